"""What the scripts of TWTA-Net share. Importing it imports neither TensorFlow nor numpy: the flags are parsed first."""


class TwtaError(Exception):
    """Something a user can mend: the message is one line that says what, which value, what is valid and what to do."""

    exit_code = 1


class UsageError(TwtaError):
    """A flag that cannot be used as given."""

    exit_code = 2
