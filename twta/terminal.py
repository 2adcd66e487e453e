"""The user interface of every command: types of flag values, errors in one line, output, the signals that stop it."""
import argparse
import contextlib
import math
import os
import signal
import sys
from pathlib import Path

from twta import TwtaError, UsageError, describe_fault

# Ctrl-C, a request to end, a closed terminal, a warning before preemption (Slurm's --signal=USR1); Windows has two
STOPS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name)]


def say(line):
    """Write a line to stdout, above the progress bar if there is one.

    If nobody reads stdout any more (`| head`, a closed terminal) or its disk is full, the line is lost and the command
    goes on: a training is worth more than its messages.
    """
    try:
        from tqdm import tqdm  # here: python -m twta.packed needs numpy only
    except ImportError:
        tqdm = None
    try:
        tqdm.write(line) if tqdm else print(line)
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)


def complain(line):
    """Write a line to stderr, if it can be written to."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def silence(stream):
    """Send what a stream still holds, and all that follows, to /dev/null."""
    try:
        stream.fileno()
    except OSError:  # not a file, but a StringIO, say
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def errors_in_a_line(name):
    """Run a command. On an error, print one line and end the process; with --debug, let the error through."""
    os.environ['MPLBACKEND'] = 'agg'  # no command opens a window; with a notebook's value, importing Keras fails
    prepare_streams()
    try:
        yield
    except (TwtaError, OSError, ModuleNotFoundError) as error:
        is_ours = isinstance(error, ModuleNotFoundError) and (error.name or 'twta').split('.')[0] == 'twta'
        if is_ours or '--debug' in sys.argv:  # a module of this package that is absent is a fault of the code
            raise
        line = describe_fault(error)
        if isinstance(error, FileNotFoundError) and not error.filename and not has_working_folder():
            line = 'the working folder has been removed; change to another one'
        complain(f'{name}: error: {line}')
        sys.exit(getattr(error, 'exit_code', TwtaError.exit_code))
    except KeyboardInterrupt:
        complain(f'{name}: interrupted')
        sys.exit(130)  # 128 + SIGINT


def has_working_folder():
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def prepare_streams():
    """Make sure that messages can always be written, and reach no other file.

    A closed stream (`>&-`) is opened on /dev/null: otherwise the next file to be opened would take its number, and
    TensorFlow's messages would go into that file. Characters that the encoding of a stream lacks become escapes.
    """
    for number, (name, mode) in enumerate((('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w'))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, it stays open
        if mode == 'w' and hasattr(getattr(sys, name), 'reconfigure'):
            getattr(sys, name).reconfigure(errors='backslashreplace')


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f'{message}; see --help')


def truth_or_auto(text):
    values = {'true': True, 'yes': True, '1': True, 'false': False, 'no': False, '0': False, 'auto': 'auto'}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f'{text!r} is none of True, False and auto')
    return values[text.lower()]


def path(text):
    """Return a path; a leading ~ is the home folder, also where no shell has replaced it (--run_dir=~/runs)."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f'{text!r} is not a path')
    try:
        text.encode()
        found = Path(os.path.expanduser(text))
        if text.startswith('~') and str(found).startswith('~'):
            raise ValueError('no such user; ./~ is a folder of that name')
        found.resolve()
        found.exists()
    except UnicodeEncodeError:  # from bytes that Python could not decode
        raise argparse.ArgumentTypeError(f'{text[:80]!r} is not a usable path: not UTF-8') from None
    except (OSError, ValueError, RuntimeError) as error:  # too long, unreadable, links in a circle
        reason = getattr(error, 'strerror', None) or error
        raise argparse.ArgumentTypeError(f'{text[:80]!r} is not a usable path: {reason}') from None
    return found


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
    is_whole = text.isascii() and text.isdigit() and len(text) <= 99  # int() refuses thousands of digits
    if not (is_whole and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f'{text[:99]!r} is not a whole number from {least} to {most}')
    return int(text)


def positive_integer(text):
    return natural(text, least=1)


def input_file(text):
    file = path(text)
    if not file.exists():
        raise argparse.ArgumentTypeError(f'{text!r}: no such file')
    if file.is_dir():
        raise argparse.ArgumentTypeError(f'{text!r} is a folder, not a file')
    return file


def output_file(text):
    file = path(text)
    if not file.resolve().parent.is_dir() or (file.exists() and not file.is_file()):  # no folder, no device
        raise argparse.ArgumentTypeError(f'{text!r} is not a file path in an existing folder')
    return file.resolve()


def nearest(folder):
    """Return the folder or, if it is absent, the nearest one above it that is there; it may be a file."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def check_folder(given, folder):
    """Raise UsageError if the folder can neither be written to nor be made; `given` is the flag with its value."""
    there = nearest(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f'{given}: {there} is not a directory that can be written to; choose another')


@contextlib.contextmanager
def stop_signals(is_each_caught=False):
    """Yield a list that collects the signals STOPS, except those that are ignored.

    is_each_caught    whether it collects each signal; else a second one of a kind has its usual effect
    """
    caught = []
    usual = {number: signal.getsignal(number) for number in STOPS}

    def catch(number, frame):
        caught.append(number)
        if not is_each_caught:
            signal.signal(number, usual[number])

    for number, handler in usual.items():
        if handler is not signal.SIG_IGN:  # a shell starts background jobs with SIGINT ignored, nohup with SIGHUP
            signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
