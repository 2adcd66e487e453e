"""Downloads: from mirrors in turn, resumed after an interruption, verified, and in place only when whole."""
import contextlib
import hashlib
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException

from tqdm import tqdm

from twta import TwtaError, files

TIMEOUT = 30  # seconds without a byte
SLOWEST = 1000  # bytes a second, over TIMEOUT; less is taken for a stall
WAITS = 0, 2, 8  # seconds before each round of the mirrors
CHUNK = 1 << 16  # bytes
FAILURES = (urllib.error.URLError, HTTPException, ssl.SSLError, ConnectionError, TimeoutError,
            ValueError)  # of a redirect to what is no address; not those of the disk
AGAIN = 408, 429  # of 4xx, those that pass


def download(urls, path, size, sha256, otherwise):
    """Puts the file that has this size (bytes) and SHA-256 at path, from the first of the urls that gives it.

    What has arrived is kept in path + '.part', from which the next mirror, or a later call, goes on; other processes
    that want the file wait. Mirrors that answer with another file, or with 4xx (but AGAIN), are asked once, the others
    again after WAITS. Raises TwtaError where none gives the file; its message says what to do otherwise.
    """
    with one_at_a_time(path.parent):
        if not path.exists():
            download_alone(urls, path, size, sha256, otherwise)


@contextlib.contextmanager
def one_at_a_time(folder):
    """Makes the folder and holds it, once no other process does: two first runs may want the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    with files.holding(folder, lambda: print(f'waiting for another process that fills {folder}', flush=True)):
        yield


def download_alone(urls, path, size, sha256, otherwise):
    """download, where no other process does."""
    part = path.with_name(path.name + '.part')
    if part.exists() and part.stat().st_size >= size and digest(part) != sha256:
        part.unlink()  # whoever it came from
    failures, left = {}, list(urls)
    for wait in WAITS:
        if wait and left:
            print(f'{path.name} has not arrived whole; trying again in {wait} s', flush=True)
            time.sleep(wait)
        for url in list(left):
            print(f'downloading {url}', flush=True)
            try:
                has_all = fetch(url, part, size)
            except FAILURES as error:
                reason = str(getattr(error, 'reason', None) or error or type(error).__name__)
                failures[url] = ' '.join(reason.split())  # urllib has messages of several lines
                if 400 <= getattr(error, 'code', 0) < 500 and error.code not in AGAIN:
                    left.remove(url)
                continue
            found = digest(part)
            if found == sha256:
                os.replace(part, path)
                return
            part.unlink()
            failures[url] = f'its SHA-256 is {found}, not {sha256}'
            if has_all:  # otherwise the wrong bytes may be another mirror's
                left.remove(url)
    reasons = '; '.join(f'{url}: {reason}' for url, reason in failures.items())
    raise TwtaError(f'{path.name} could not be downloaded ({reasons}); check the network, or {otherwise}')


def digest(path):
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects (ten at most), but never from TLS to a connection without."""

    def redirect_request(self, request, file, code, message, headers, url):
        if request.type == 'https' and not url.startswith('https://'):
            raise urllib.error.URLError(f'redirected to {url}, which is not https')
        return super().redirect_request(request, file, code, message, headers, url)


def fetch(url, part, size):
    """Appends to the file part what it lacks of its size in bytes; raises one of FAILURES where less arrives.

    Returns whether every byte of it comes from this url.
    """
    have = part.stat().st_size if part.exists() else 0
    if have >= size:
        return False
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-', 'User-Agent': 'TWTA-Net'})
    with on_the_network():
        response = urllib.request.build_opener(Redirects).open(request, timeout=TIMEOUT)
    with response:
        resumed = response.status == 206 and response.headers.get('Content-Range', '').startswith(f'bytes {have}-')
        if response.status == 206 and not resumed:
            raise ConnectionError(f'asked for the bytes from {have} on, got {response.headers.get("Content-Range")}')
        bar = tqdm(total=size, initial=have if resumed else 0, unit='B', unit_scale=True, desc=part.stem, leave=False,
                   disable=not sys.stderr.isatty())
        with bar, open(part, 'ab' if resumed else 'wb') as file:
            receive(response, file, size, bar)
    if part.stat().st_size < size:
        raise ConnectionError(f'the connection ended after {part.stat().st_size:,} of {size:,} bytes')
    return not (resumed and have)


@contextlib.contextmanager
def on_the_network():
    """Makes every OSError one of FAILURES: no route to a host, say, is not to be taken for a fault of the disk."""
    try:
        yield
    except FAILURES:
        raise
    except OSError as error:
        raise ConnectionError(error.strerror or str(error)) from None


def receive(response, file, size, bar):
    """Writes what a response brings until it ends or the file is too large; raises TimeoutError where it stalls."""
    since, arrived = time.monotonic(), 0
    while True:
        with on_the_network():
            chunk = response.read1(CHUNK)
        if not chunk:
            return
        file.write(chunk)
        bar.update(len(chunk))
        arrived += len(chunk)
        if file.tell() > size:
            return  # not the file that was asked for; its checksum will say so
        if time.monotonic() - since > TIMEOUT:
            if arrived < SLOWEST * TIMEOUT:
                raise TimeoutError(f'{arrived:,} bytes in {TIMEOUT} s')
            since, arrived = time.monotonic(), 0
