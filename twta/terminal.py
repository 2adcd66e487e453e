"""The user interface of every command: types of flag values, errors in one line, output above the progress bar."""
import argparse
import contextlib
import math
import os
import sys
from pathlib import Path

from twta import TwtaError, UsageError, describe_fault


def say(line):
    """Write a line to stdout, above the progress bar if there is one."""
    from tqdm import tqdm  # here: python -m twta.packed needs numpy only

    tqdm.write(line)
    sys.stdout.flush()


@contextlib.contextmanager
def errors_in_a_line(name):
    """Run a command. On an error, print one line and end the process; with --debug, let the error through."""
    os.environ['MPLBACKEND'] = 'agg'  # no command opens a window; with a notebook's value, importing Keras fails
    try:
        yield
    except (TwtaError, OSError) as error:
        if '--debug' in sys.argv:
            raise
        line = describe_fault(error) if isinstance(error, OSError) else str(error)
        print(f'{name}: error: {line}', file=sys.stderr)
        sys.exit(getattr(error, 'exit_code', TwtaError.exit_code))
    except KeyboardInterrupt:
        print(f'{name}: interrupted', file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f'{message}; see --help')


def truth(text):
    values = {'true': True, 'yes': True, '1': True, 'false': False, 'no': False, '0': False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')
    return values[text.lower()]


def path(text):
    if not text.strip():
        raise argparse.ArgumentTypeError(f'{text!r} is not a path')
    try:
        text.encode()
        Path(text).exists()
    except UnicodeEncodeError:  # from bytes that Python could not decode
        raise argparse.ArgumentTypeError(f'{text[:80]!r} is not a usable path: not UTF-8') from None
    except (OSError, ValueError) as error:  # too long, or in an unreadable folder
        reason = getattr(error, 'strerror', None) or error
        raise argparse.ArgumentTypeError(f'{text[:80]!r} is not a usable path: {reason}') from None
    return Path(text)


def real(text):
    try:
        return float(text)
    except ValueError:
        return math.nan


def positive_number(text):
    value = real(text)
    if not 1e-37 <= value <= 1e38:  # float32 holds these
        raise argparse.ArgumentTypeError(f'{text!r} is not a number above 0, from 1e-37 to 1e38')
    return value


def number(text, least, most):
    value = real(text)
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from {least} to {most}')
    return value


def natural(text, least=0, most=2 ** 31 - 1):
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from {least} to {most}')
    return int(text)


def positive_integer(text):
    return natural(text, least=1)


def input_file(text):
    file = path(text)
    if not file.exists():
        raise argparse.ArgumentTypeError(f'{text!r}: no such file')
    return file


def output_file(text):
    path = Path(text)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f'{text!r} is not a file path in an existing folder')
    return path
