#!/usr/bin/env python3
"""Which threshold, which pooling, which protocol? The same training with each choice, on MNIST and CIFAR-10.

Every run is a command of a script, within a study with equal epochs; they go one after the other, two and a half hours
in all on 2 cores. A run that is finished in --runs is not repeated, so an interrupted study goes on. Prints the table
and, as each study ends, puts its rows in choices.json in place of the old ones. Other epochs or seeds than a study's
are a trial, which needs a --json of its own. On CIFAR-10 5,000 images are held out to choose on.

    python benchmarks/choices.py                    # needs the data sets under data/, or downloads them
    python benchmarks/choices.py --study MNIST --epochs 1 --seeds 0 --json trial.json
"""
import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

from twta.files import replacing
from twta.report.tables import choices as table
from twta.terminal import output_file, path, positive_integer

ROOT = Path(__file__).resolve().parent.parent
CHOICES = {
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
STUDIES = {  # script, flags, epochs, seeds, variants with their flags
    'MNIST': ('MNIST/TWTA_4_4_MNIST.py', (*COSINE, '0.002'), 6, (0, 1, 2), CHOICES),
    'CIFAR10': (GROUP_V2, (*COSINE, '0.005', *HELD_OUT), 3, (0,), CHOICES),
    'short-MNIST': ('MNIST/TWTA_5_5_MNIST.py', SHORT, 30, (0,), MNIST_PROTOCOLS),
    'short-CIFAR10': (GROUP_V2, (*SHORT, *HELD_OUT), 6, (0,), CIFAR10_PROTOCOLS),
}


def run(study, variant, seed, epochs, args):
    """Trains, or finds trained, a network; returns its row."""
    file, flags, _, _, variants = STUDIES[study]
    script = Path(file).stem
    run_dir = args.runs / f'{script}-{variant.replace(" ", "-")}-{epochs}-{seed}'
    if not (run_dir / 'result.json').is_file():
        begun = (run_dir / 'checkpoint').is_file()
        command = [sys.executable, str(ROOT / file), '--mode', 'training', '--resume', str(begun), *flags, '--epochs',
                   str(epochs), '--seed', str(seed), '--run_dir', str(run_dir), *variants[variant],
                   *(('--data_dir', str(args.data_dir)) if args.data_dir else ())]
        subprocess.run(command, check=True, stdout=sys.stderr)
    result = json.loads((run_dir / 'result.json').read_text())
    if result['epoch'] != epochs:  # what lies there is of another study, or of older code
        sys.exit(f'choices.py: error: {run_dir} has {result["epoch"]} epochs, not {epochs}; remove it')
    with open(run_dir / 'log.csv', newline='') as file:
        *_, last = csv.DictReader(file)
    return {'study': study, 'script': script, 'variant': variant, 'seed': seed, 'epochs': epochs,
            'validation_accuracy': float(last['validation_accuracy']), 'test_accuracy': result['test_accuracy'],
            'images_per_second': float(last['images_per_second']), 'data': result['data'], 'code': result['code'],
            'versions': result['versions'], 'machine': result['machine']}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--study', choices=STUDIES, help='default: all')
    parser.add_argument('--epochs', type=positive_integer, metavar='N',
                        help='default: 6 on MNIST, 3 on CIFAR-10, 30 and 6 of short')
    parser.add_argument('--seeds', type=int, nargs='+', metavar='N', help='default: 0 1 2 on MNIST, else 0')
    parser.add_argument('--runs', type=path, default=ROOT / 'runs' / 'choices', metavar='DIR',
                        help='default: runs/choices')
    parser.add_argument('--data_dir', type=path, metavar='DIR', help='default: data')
    parser.add_argument('--json', type=output_file, default=ROOT / 'benchmarks' / 'choices.json', metavar='FILE',
                        help='default: benchmarks/choices.json')
    args = parser.parse_args()
    if (args.epochs or args.seeds) and args.json.resolve() == parser.get_default('json'):
        parser.error(f'--epochs and --seeds make a trial, whose rows would replace those of the study in {args.json}; '
                     'give it another --json')
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    for study in [study for study in STUDIES if args.study in (None, study)]:
        _, _, epochs, seeds, variants = STUDIES[study]
        rows = [row for row in rows if row['study'] != study]
        for seed in args.seeds or seeds:
            for variant in variants:
                try:
                    rows.append(run(study, variant, seed, args.epochs or epochs, args))
                except subprocess.CalledProcessError as error:
                    sys.exit(f'choices.py: error: {study}, {variant}, seed {seed}: the script has ended with '
                             f'{error.returncode}')
        with replacing(args.json) as part:
            part.write_text(json.dumps(rows, indent=1) + '\n')
    print('\n'.join(table(rows)))


if __name__ == '__main__':
    main()
