"""The runs of a sweep: the product of the values of all flags, each run with its name, directory and command."""
import hashlib
import itertools
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from twta import UsageError, command_line, files
from twta.options import SHORT
from twta.results import read_object
from twta.scripts import load_network
from twta.terminal import check_folder

OWN = {'--run_dir': 'each run has its own, in --sweep_dir', '--resume': 'each run has --resume auto',
       '--mode': 'a sweep trains', **dict.fromkeys(('--workers', '--task', '--batch_norm', '--patience'),
                                                   'each run trains alone')}  # flags that the sweep decides on
SINGLE = '--data_dir', '--gpu', '--verbose'  # they change no result: one value, and not in the name
MOST_RUNS = 1000
LONGEST_NAME = 150  # file systems take 255 bytes


class Run(NamedTuple):
    """A training of the sweep."""
    name: str  # script and flags
    label: str  # the flags in which it differs from other runs of the sweep
    run_dir: Path
    command: list
    values: dict  # {flag without --: value} of the flags that are given, but for SINGLE
    epochs: int


def make_runs(script, words, sweep_dir):
    """Return the sweep's folder, its runs in the order of the values, and the flags with several values.

    The same flags twice are one run.

    words        the flags of the script; each may have several values
    sweep_dir    None: runs/sweep-SCRIPT beside README.md

    Raises UsageError if the script has no network, or if its own parser refuses a combination.
    """
    script = Path(script).resolve()
    if not script.is_file() or script.suffix != '.py':
        raise UsageError(f'{script}: {"not a Python file" if script.exists() else "no such file"}; name a script of '
                         'MNIST/ or CIFAR10/ first, then its flags')
    module = load_network(script)
    flags = group(words)
    count = math.prod(map(len, flags.values()))
    if count > MOST_RUNS:
        raise UsageError(f'{count:,} combinations of values: a sweep has {MOST_RUNS:,} at most; make several')
    sweep_dir = (sweep_dir or script.parent.parent / 'runs' / f'sweep-{script.stem}').resolve()
    check_folder(f'--sweep_dir {sweep_dir}', sweep_dir)
    runs = [make_run(script, module, dict(zip(flags, values, strict=True)), sweep_dir)
            for values in itertools.product(*flags.values())]
    runs = list({run.name: run for run in runs}.values())
    swept = [flag for flag in runs[0].values if len({str(run.values[flag]) for run in runs}) > 1]
    runs = [run._replace(label=' '.join(f'{flag} {run.values[flag]}' for flag in swept) or run.name) for run in runs]
    return sweep_dir, runs, swept


def group(words):
    """Return {flag: [values]} of a command line; a flag without a value has None as its only one."""
    found = {}
    for word in words:
        if word.startswith('--'):
            flag, equals, value = word.partition('=')
            values = found.setdefault(flag, [])
            if equals:
                values.append(value)
        else:
            values.append(word)
    for flag, values in found.items():
        if flag == '--':
            raise UsageError('-- is no flag; leave it out')
        if flag in OWN:
            raise UsageError(f'{flag}: {OWN[flag]}; leave it out')
        if flag in SINGLE and len(values) > 1:
            raise UsageError(f'{flag} {" ".join(values)}: it changes no result and has one value in a sweep')
    return {flag: values or [None] for flag, values in found.items()}


def make_run(script, module, given, sweep_dir):
    """Return the run of one value per flag; 1e-3 and 0.001 are the same."""
    words = [flag if value is None else f'{flag}={value}' for flag, value in given.items()]
    args, _ = command_line.parse_script(script, module, [*words, '--run_dir', str(sweep_dir), '--resume', 'auto'])
    parsed = {flag: {**vars(args), **args.options}[flag[2:]] for flag in given}
    parsed = {flag: files.in_real_folder(value) if isinstance(value, Path) else value for flag, value in parsed.items()}
    values = {flag[2:]: value for flag, value in parsed.items() if flag not in SINGLE}
    run_dir = sweep_dir / name_run(script.stem, values)
    flags = [flag if value is True else f'{flag}={value}' for flag, value in parsed.items()]
    command = [sys.executable, str(script), *flags, '--run_dir', str(run_dir), '--resume', 'auto']
    usual = SHORT[args.dataset]['epochs'] if args.protocol == 'short' else module.EPOCHS
    return Run(run_dir.name, '', run_dir, command, values, args.epochs or usual)


def name_run(script, values):
    """Return script and flags as a file name, e.g. TWTA_4_4_MNIST-learning_rate_0.001-seed_0, for any order of flags.

    A name that would be too long, or has characters that are not safe in a file name, ends in 8 digits of its SHA-256.
    """
    words = [flag if value is True else f'{flag}_{value}' for flag, value in sorted(values.items())]
    whole = '-'.join([script, *words])
    name = re.sub(r'[^A-Za-z0-9_.+-]', '_', whole)[:LONGEST_NAME]
    return name if name == whole else f'{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}'


# ----------------------------------------------------------------------------------------------------------------------
# What is there of a run


def find_record(run):
    """Return record.json of a run that has finished with these very flags, else None."""
    record = read_object(run.run_dir / 'record.json')
    try:
        stage = record['stages'][-1]
        known = {**record['flags'], **record['choices'], **stage, 'seed': record['seed'],
                 'validation': record['data']['validation_images']}
        has_flags = all(known[flag] == (files.digest(value) if flag == 'teacher' else value)
                        for flag, value in run.values.items() if flag != 'weights')
        is_whole = record['epochs'] == stage['first_epoch'] + stage['epochs'] - 1
        return record if has_flags and is_whole and stage['epochs'] == run.epochs else None
    except (KeyError, IndexError, TypeError, OSError):  # absent, or not what a training writes, or without its teacher
        return None


def is_locked(run_dir):
    """Return whether a training holds the run directory."""
    class Taken(Exception):
        pass

    def refuse():
        raise Taken

    if not (run_dir / 'lock').exists():
        return False
    try:
        with files.holding(run_dir / 'lock', refuse):
            return False
    except Taken:
        return True
