"""Files: written whole or not at all, .npy and .npz read even from strangers, locks between processes."""
import contextlib
import math
import os
import struct
import tokenize
import zipfile
import zlib

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: without locks
    fcntl = None

UNREADABLE = (OSError, ValueError, TypeError, AttributeError, EOFError, LookupError, ArithmeticError, RuntimeError,
              SyntaxError, MemoryError, zlib.error, zipfile.BadZipFile, struct.error,
              tokenize.TokenError)  # what zipfile and numpy raise on damaged files
PACKINGS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED  # numpy's; zipfile unpacks the others without a bound


@contextlib.contextmanager
def replacing(path):
    """A path to write to: it takes the place of `path` where the block ends well, and is removed where it does not."""
    part = path.with_name(f'.part.{path.name}')
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # a full disk names none
        raise
    finally:
        part.unlink(missing_ok=True)


def read_npy(path):
    """The array that numpy.save wrote; raises one of UNREADABLE where the file is another, or has another length."""
    with open(path, 'rb') as file:
        shape, kind = read_header(file)
        if file.tell() + math.prod(shape) * kind.itemsize != os.fstat(file.fileno()).st_size:
            raise ValueError('not as long as its header says')
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def read_npz(path, check):
    """The arrays by name that numpy.savez wrote; raises one of UNREADABLE where the file is another, or damaged.

    check    is called with (shape, dtype) by name, and may raise, before an array is read
    """
    with zipfile.ZipFile(path) as archive:
        headers = {}
        for entry in archive.infolist():
            if entry.compress_type not in PACKINGS:
                raise ValueError(f'packed by method {entry.compress_type}')
            with archive.open(entry) as member:
                headers[entry.filename.removesuffix('.npy')] = read_header(member)
        check(headers)
        arrays = {}
        for name in headers:
            with archive.open(f'{name}.npy') as member:
                arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
                if member.read(1):
                    raise ValueError('longer than its header says')
        return arrays


def read_header(file):
    """Shape and dtype of an npy file."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # the others are for headers of more than 64 kB and names that are not ASCII
        raise ValueError(f'npy version {version}')
    shape, _, kind = np.lib.format.read_array_header_1_0(file)
    return shape, kind


@contextlib.contextmanager
def holding(path, taken):
    """Holds a file or folder; where another process does, calls `taken`, which raises, or else waits."""
    if not fcntl:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
