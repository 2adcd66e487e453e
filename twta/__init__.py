"""What the scripts of TWTA-Net share. Importing it imports neither TensorFlow nor numpy: the flags are parsed first."""
import contextlib
import errno
import os

REMEDIES = {errno.ENOSPC: 'make room on the disk', errno.EDQUOT: 'make room in the quota',
            **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), 'choose one that can be written to')}


class TwtaError(Exception):
    """Something a user can mend: the message is one line that says what, which value, what is valid and what to do."""

    exit_code = 1


class UsageError(TwtaError):
    """A flag that cannot be used as given."""

    exit_code = 2


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


def describe_fault(error):
    """An OSError in words: of which file, what, and, where it is known, what to do."""
    words = error.filename, error.strerror or str(error)
    return ': '.join(str(word) for word in words if word) + f'; {REMEDIES.get(error.errno, "")}'.removesuffix('; ')
