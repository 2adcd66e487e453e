"""What the scripts of TWTA-Net share. Importing it imports neither TensorFlow nor numpy: the flags are parsed first."""
import contextlib
import os


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
    finally:
        part.unlink(missing_ok=True)
