"""Downloads: they try mirrors in turn, resume after an interruption, and check the SHA-256 before a file gets its name.

pooch was tried: it neither resumes nor stops an endless answer, and follows a redirect from https to http.
"""
import contextlib
import ssl
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException

from twta import TwtaError, files
from twta.terminal import say

TIMEOUT = 30  # seconds without a byte
SLOWEST = 1000  # bytes per second, averaged over TIMEOUT; a slower download counts as stalled
WAITS = 0, 2, 8  # seconds before each round of the mirrors
CHUNK = 1 << 16  # bytes
FAILURES = (urllib.error.URLError, HTTPException, ssl.SSLError, ConnectionError, TimeoutError,
            ValueError)  # errors of the network, not of the disk; ValueError: a redirect to an invalid address
TEMPORARY = 408, 429  # HTTP statuses 4xx that are worth another try


def download(urls, path, size, sha256, otherwise):
    """Download the file with this size (bytes) and SHA-256 to `path`, from the first of the urls that has it.

    Partial downloads stay in path + '.part'; the next mirror or a later call resumes there. Other processes wait. A
    mirror is asked again after WAITS, unless it answered with another file or with 4xx (except TEMPORARY).

    Raises TwtaError if no mirror gives the file; the message ends with `otherwise`, the user's alternative.
    """
    with one_at_a_time(path.parent):
        if not path.exists():
            download_alone(urls, path, size, sha256, otherwise)


@contextlib.contextmanager
def one_at_a_time(folder):
    """Create the folder and lock it, so that two first runs do not download the same files twice."""
    folder.mkdir(parents=True, exist_ok=True)
    with files.holding(folder / '.lock', lambda: say(f'waiting for another process that fills {folder}')):
        yield


def download_alone(urls, path, size, sha256, otherwise):
    """Do the work of download() while the folder is locked."""
    part = path.with_name(path.name + '.part')
    if part.exists() and part.stat().st_size >= size and files.digest(part) != sha256:
        part.unlink()  # no mirror is to blame: its source is unknown
    failures, left = {}, list(urls)
    for wait in WAITS:
        if wait and left:
            say(f'{path.name} has not arrived; trying again in {wait} s')
            time.sleep(wait)
        for url in list(left):
            say(f'downloading {url}')
            try:
                has_all = fetch(url, part, size)
            except FAILURES as error:
                reason = str(getattr(error, 'reason', None) or error or type(error).__name__)
                failures[url] = ' '.join(reason.split())  # urllib has messages of several lines
                if 400 <= getattr(error, 'code', 0) < 500 and error.code not in TEMPORARY:
                    left.remove(url)
                continue
            found = files.digest(part)
            if found == sha256:
                files.put_in_place(part, path)
                return
            part.unlink()
            failures[url] = f'its SHA-256 is {found}, not {sha256}'
            if has_all:  # otherwise the wrong bytes may come from another mirror
                left.remove(url)
    reasons = '; '.join(f'{url}: {reason}' for url, reason in failures.items())
    raise TwtaError(f'{path.name} could not be downloaded ({reasons}); check the network, or {otherwise}')


class Redirects(urllib.request.HTTPRedirectHandler):
    """A handler that follows up to ten redirects, but never from https to http."""

    def redirect_request(self, request, file, code, message, headers, url):
        if request.type == 'https' and not url.startswith('https://'):
            raise urllib.error.URLError(f'redirected to {url}, which is not https')
        return super().redirect_request(request, file, code, message, headers, url)


def fetch(url, part, size):
    """Download the missing bytes of the file `part` up to `size`; return True if all its bytes come from this url.

    Raises one of FAILURES if the connection fails or ends early.
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
        from tqdm import tqdm  # here: a packed network on data that are there needs numpy only

        bar = tqdm(total=size, initial=have if resumed else 0, unit='B', unit_scale=True, desc=part.stem, leave=False,
                   disable=not sys.stderr.isatty())
        with bar, open(part, 'ab' if resumed else 'wb') as file:
            receive(response, file, size, bar)
    if part.stat().st_size < size:
        raise ConnectionError(f'the connection ended after {part.stat().st_size:,} of {size:,} bytes')
    return not (resumed and have)


@contextlib.contextmanager
def on_the_network():
    """Turn each OSError into one of FAILURES: "no route to host", for example, must not look like a disk error."""
    try:
        yield
    except FAILURES:
        raise
    except OSError as error:
        raise ConnectionError(error.strerror or str(error)) from None


def receive(response, file, size, bar):
    """Write a response to the file until it ends or is larger than `size`. Raises TimeoutError if it stalls."""
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
            return  # another file: its checksum will differ
        if time.monotonic() - since > TIMEOUT:
            if arrived < SLOWEST * TIMEOUT:
                raise TimeoutError(f'{arrived:,} bytes in {TIMEOUT} s')
            since, arrived = time.monotonic(), 0
