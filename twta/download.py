"""Downloads: from mirrors in turn, resumed after an interruption, verified, and in place only when whole."""
import hashlib
import os
import sys
import urllib.error
import urllib.request
from http.client import HTTPException

from tqdm import tqdm

from twta import TwtaError

TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 16  # bytes


def download(urls, path, size, sha256, otherwise):
    """Puts the file that has this size (bytes) and SHA-256 at path, from the first of the urls that gives it.

    What has arrived is kept in path + '.part', from which a later call goes on. Raises TwtaError where no mirror
    gives the file; its message says what to do otherwise.
    """
    part = path.with_name(path.name + '.part')
    failures = []
    for url in urls:
        print(f'downloading {url}', flush=True)
        try:
            fetch(url, part, size)
        except (OSError, HTTPException) as error:  # urllib's errors are OSErrors
            failures.append(f'{url}: {getattr(error, "reason", None) or error or type(error).__name__}')
            continue
        found = hashlib.sha256(part.read_bytes()).hexdigest()
        if found == sha256:
            os.replace(part, path)
            return
        part.unlink()
        failures.append(f'{url}: its SHA-256 is {found}, not {sha256}')
    raise TwtaError(f'{path.name} could not be downloaded ({"; ".join(failures)}); '
                    f'check the network, or {otherwise}')


def fetch(url, part, size):
    """Appends to the file part what it lacks of its size in bytes; raises OSError where the connection ends early."""
    have = part.stat().st_size if part.exists() else 0
    if have >= size:
        return
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-', 'User-Agent': 'TWTA-Net'})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.status == 206 and response.headers.get('Content-Range', '').startswith(f'bytes {have}-')
        if response.status == 206 and not resumed:
            raise OSError(f'asked for the bytes from {have} on, got {response.headers.get("Content-Range")}')
        part.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=size, initial=have if resumed else 0, unit='B', unit_scale=True, desc=part.stem, leave=False,
                   disable=not sys.stderr.isatty())
        with bar, open(part, 'ab' if resumed else 'wb') as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > size:
                    break  # not the file that was asked for; its checksum will say so
    if part.stat().st_size < size:
        raise OSError(f'the connection ended after {part.stat().st_size:,} of {size:,} bytes')
