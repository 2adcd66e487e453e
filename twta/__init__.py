"""What the scripts of TWTA-Net share. Importing it imports neither TensorFlow nor numpy: the flags are parsed first."""
import errno

REMEDIES = {errno.ENOSPC: 'make room on the disk', errno.EDQUOT: 'make room in the quota',
            errno.EROFS: 'choose one that can be written to',
            **dict.fromkeys((errno.EACCES, errno.EPERM), 'change its permissions, or choose another')}


class TwtaError(Exception):
    """Something a user can mend: the message is one line that says what, which value, what is valid and what to do."""

    exit_code = 1

    def __init__(self, message):
        super().__init__(in_a_line(message))


class UsageError(TwtaError):
    """A flag that cannot be used as given."""

    exit_code = 2


def in_a_line(text):
    """The text with a space for each character that cannot be printed: names and values may come from a stranger."""
    return ''.join(c if c.isprintable() else ' ' for c in text)


def describe_fault(error):
    """An OSError in words: of which file, what, and, where it is known, what to do."""
    words = error.filename, error.strerror or str(error)
    text = ': '.join(str(word) for word in words if word) + f'; {REMEDIES.get(error.errno, "")}'.removesuffix('; ')
    return in_a_line(text)
