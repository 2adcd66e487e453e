"""Files: writes that survive kills and power cuts, safe reading of untrusted .npy and .npz files, locks."""
import contextlib
import errno
import hashlib
import math
import os
import struct
import tokenize
import zipfile
import zlib

import numpy as np

from twta.terminal import say

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

UNREADABLE = (OSError, ValueError, TypeError, AttributeError, EOFError, LookupError, ArithmeticError, RuntimeError,
              SyntaxError, MemoryError, zlib.error, zipfile.BadZipFile, struct.error,
              tokenize.TokenError)  # what zipfile and numpy raise on damaged files
WITHOUT_LOCKS = errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF  # from flock on some networks
PACKINGS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED  # numpy writes these; zipfile reads others without a size limit


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path. If the block succeeds, its file replaces `path`; otherwise it is removed."""
    part = path.with_name(f'.part.{os.getpid()}.{path.name}')
    try:
        yield part
        put_in_place(part, path)
    except OSError as error:
        if error.filename in (None, part, str(part)):  # the error of a full disk names no file
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def put_in_place(part, path):
    """Rename the file `part` to `path`, so that after a power cut `path` is the old file or the new one, whole."""
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def make_folder(path):
    """Create a folder and those above it, unless they are there; after a power cut it is still there."""
    absent = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in absent:
        sync(folder.parent)


def sync(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    is_folder = path.is_dir()
    if not fcntl or (is_folder and not os.access(path, os.R_OK)):
        return  # Windows cannot sync what is open for reading; an unreadable folder cannot be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)


def read_npy(path):
    """Return the array of a .npy file. Raises one of UNREADABLE if the file is damaged or has a wrong length."""
    with open(path, 'rb') as file:
        shape, kind = read_header(file)
        if file.tell() + math.prod(shape) * kind.itemsize != os.fstat(file.fileno()).st_size:
            raise ValueError('its length differs from its header')
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def read_npz(path, check):
    """Return the arrays of a .npz file, by name. Raises one of UNREADABLE if the file is damaged.

    check    called before any array is read, with a dict of name: (shape, dtype); may raise
    """
    with zipfile.ZipFile(path) as archive:
        headers = {}
        for entry in archive.infolist():
            if entry.compress_type not in PACKINGS:
                raise ValueError(f'compressed by method {entry.compress_type}')
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
    """Return shape and dtype of an open .npy file."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # the others are for headers over 64 kB and non-ASCII names
        raise ValueError(f'npy version {version}')
    shape, _, kind = np.lib.format.read_array_header_1_0(file)
    return shape, kind


def in_real_folder(path):
    """Return the absolute path of a file without links among its folders; a link to the file itself stays.

    So config.json is found beside it where the user sees it.
    """
    return path.parent.resolve() / path.name


def digest(path):
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def holding(path, taken):
    """Hold a lock on a file, which is created if absent. If another process holds it, call `taken`, then wait.

    taken    a function without arguments, which may raise

    On a file system without locks, a line says so and the block runs without one. The package filelock was tried: it
    removes the file, which another process may have locked by then, and twta.packed, which needs numpy only, would
    need it.
    """
    if not fcntl:
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only files that are open for writing
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            say(f'WARNING: {path.parent}: its file system has no locks ({error.strerror}); let no other command write '
                'there meanwhile')
        yield
    finally:
        os.close(descriptor)
