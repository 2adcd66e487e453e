"""A lock between processes: the system lets go of it when its process ends, in whatever way it does."""
import contextlib
import os

try:
    import fcntl
except ImportError:  # Windows: without locks
    fcntl = None


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
