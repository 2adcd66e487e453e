#!/usr/bin/env python3
"""Train one network under several thresholds, poolings and protocols, and compare the results.

    python benchmarks/choices.py                    # all studies, two and a half hours on 2 cores
    python benchmarks/choices.py --study MNIST --epochs 1 --seeds 0 --json trial.json

A study trains one network for equal epochs in several variants, one command of a script after the other. Data sets that
are not in --data_dir are downloaded. On CIFAR-10 the last 5,000 training images are held out to choose on. A run that
--runs already holds is not repeated, so the same command goes on with an interrupted study. After each study its rows
replace the old ones in --json; at the end the table is printed. With other --epochs or --seeds a study is a trial: give
it a --json of its own.
"""
import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from twta.files import replacing
from twta.report.tables import ablations as table
from twta.terminal import output_file, path, positive_integer

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    'published': (),
    'threshold trainable': ('--threshold', 'trainable'),
    'threshold runtime': ('--threshold', 'runtime'),
    'pooling max': ('--pooling', 'max'),
    'pooling average': ('--pooling', 'average'),
}
MNIST_PROTOCOLS = {
    'short': (),
    'without augmentation': ('--augmentation', 'published'),
    '--learning_rate 0.005': ('--learning_rate', '0.005'),
    '--batch_size 100': ('--batch_size', '100'),
}
CIFAR10_PROTOCOLS = {flags: flags.split() for flags in (
    '--learning_rate 0.001',
    '--learning_rate 0.005',
    '--learning_rate 0.02',
    '--learning_rate 0.06',
    '--learning_rate 0.005 --batch_size 50',
    '--learning_rate 0.02 --batch_size 50')}
COSINE = '--schedule', 'cosine', '--learning_rate'
SHORT = '--protocol', 'short'
HELD_OUT = '--validation', '5000'
GROUP_V2 = 'CIFAR10/TWTA_3_3_CIFAR10_Group_V2.py'


class Study(NamedTuple):
    script: str
    flags: tuple
    epochs: int
    seeds: tuple
    variants: dict  # flags by name


STUDIES = {
    'MNIST': Study('MNIST/TWTA_4_4_MNIST.py', (*COSINE, '0.002'), 6, (0, 1, 2), VARIANTS),
    'CIFAR10': Study(GROUP_V2, (*COSINE, '0.005', *HELD_OUT), 3, (0,), VARIANTS),
    'short-MNIST': Study('MNIST/TWTA_5_5_MNIST.py', SHORT, 30, (0,), MNIST_PROTOCOLS),
    'short-CIFAR10': Study(GROUP_V2, (*SHORT, *HELD_OUT), 6, (0,), CIFAR10_PROTOCOLS),
}


def run(name, study, variant, seed, epochs, args):
    """Return the row of a variant; train it first, unless its run is finished in --runs."""
    script = Path(study.script).stem
    run_dir = args.runs / f'{script}-{variant.replace(" ", "-")}-{epochs}-{seed}'
    if not (run_dir / 'result.json').is_file():
        begun = (run_dir / 'checkpoint').is_file()
        command = [sys.executable, str(ROOT / study.script), '--mode', 'training', '--resume', str(begun), *study.flags,
                   '--epochs', str(epochs), '--seed', str(seed), '--run_dir', str(run_dir), *study.variants[variant],
                   *(('--data_dir', str(args.data_dir)) if args.data_dir else ())]
        subprocess.run(command, check=True, stdout=sys.stderr)
    result = json.loads((run_dir / 'result.json').read_text())
    if result['epoch'] != epochs:  # a run of another study, or of older code
        sys.exit(f'choices.py: error: the run in {run_dir} has {result["epoch"]} epochs, not {epochs}; remove it')
    with open(run_dir / 'log.csv', newline='') as file:
        *_, last = csv.DictReader(file)
    return {'study': name, 'script': script, 'variant': variant, 'seed': seed, 'epochs': epochs,
            'validation_accuracy': float(last['validation_accuracy']), 'test_accuracy': result['test_accuracy'],
            'images_per_second': float(last['images_per_second']), 'data': result['data'], 'code': result['code'],
            'versions': result['versions'], 'machine': result['machine']}


def main(argv=None, studies=STUDIES):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    epochs = ', '.join(f'{name} {study.epochs}' for name, study in studies.items())
    seeds = ', '.join(f'{name} {" ".join(map(str, study.seeds))}' for name, study in studies.items())
    parser.add_argument('--study', choices=studies, help='the study to run (default: all)')
    parser.add_argument('--epochs', type=positive_integer, metavar='N',
                        help=f'epochs per run (default: {epochs})')
    parser.add_argument('--seeds', type=int, nargs='+', metavar='N',
                        help=f'random seeds, one run each (default: {seeds})')
    parser.add_argument('--runs', type=path, default=ROOT / 'runs' / 'choices', metavar='DIR',
                        help='folder for the run directories (default: runs/choices)')
    parser.add_argument('--data_dir', type=path, metavar='DIR', help='folder of the data sets (default: data)')
    parser.add_argument('--json', type=output_file, default=ROOT / 'benchmarks' / 'choices.json', metavar='FILE',
                        help='file of the rows (default: benchmarks/choices.json)')
    args = parser.parse_args(argv)
    if (args.epochs or args.seeds) and args.json.resolve() == parser.get_default('json'):
        parser.error(f'--json {args.json}: the rows of a trial with --epochs or --seeds would replace those of the '
                     'study; give another file')
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    for name in [args.study] if args.study else studies:
        study = studies[name]
        rows = [row for row in rows if row['study'] != name]
        for seed in args.seeds or study.seeds:
            for variant in study.variants:
                try:
                    rows.append(run(name, study, variant, seed, args.epochs or study.epochs, args))
                except subprocess.CalledProcessError as error:
                    sys.exit(f'choices.py: error: {name}, {variant}, seed {seed}: the script ended with exit code '
                             f'{error.returncode}')
        with replacing(args.json) as part:
            part.write_text(json.dumps(rows, indent=1) + '\n')
    print('\n'.join(table(rows)))


if __name__ == '__main__':
    main()
