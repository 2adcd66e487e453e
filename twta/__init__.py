"""The package behind the scripts. Importing it loads neither TensorFlow nor numpy, so that flags are parsed first."""
import errno

REMEDIES = {errno.ENOSPC: 'make room on the disk', errno.EDQUOT: 'make room in the quota',
            errno.EROFS: 'choose a path that can be written to',
            **dict.fromkeys((errno.EACCES, errno.EPERM), 'change its permissions, or choose another path')}


class TwtaError(Exception):
    """An error that the user can fix. Its message is one line: what, which value, what is valid, what to do."""

    exit_code = 1

    def __init__(self, message):
        super().__init__(in_a_line(message))


class UsageError(TwtaError):
    """A flag or value that cannot be used as given."""

    exit_code = 2


def in_a_line(text):
    """Return the text with spaces for unprintable characters: names and values may come from untrusted files."""
    return ''.join(c if c.isprintable() else ' ' for c in text)


def describe_fault(error):
    """Return an error in words, one line; of an OSError the file, the fault and, if known, what to do."""
    if isinstance(error, ModuleNotFoundError):
        return in_a_line(f'the package {error.name} is not installed: pip install -r requirements.txt')
    if not isinstance(error, OSError):
        return in_a_line(str(error) or type(error).__name__)
    words = error.filename, error.strerror or str(error)
    text = ': '.join(str(word) for word in words if word) + f'; {REMEDIES.get(error.errno, "")}'.removesuffix('; ')
    return in_a_line(text)
