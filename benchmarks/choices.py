#!/usr/bin/env python3
"""Which threshold, which pooling? The same training with each choice, on MNIST and CIFAR-10.

Every run is a command of a script, with equal epochs and, on MNIST, three seeds; they go one after the other, about an
hour in all on 2 cores. A run that is finished in --runs is not repeated, so an interrupted study goes on. Prints the
table and writes choices.json. CIFAR-10 holds out 5,000 images: what is chosen here is chosen on validation.

    python benchmarks/choices.py                    # needs the data sets under data/, or downloads them
    python benchmarks/choices.py --family MNIST --epochs 1 --seeds 0 --data_dir ../data
"""
import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    'published': (),
    'threshold trainable': ('--threshold', 'trainable'),
    'threshold runtime': ('--threshold', 'runtime'),
    'pooling max': ('--pooling', 'max'),
    'pooling average': ('--pooling', 'average'),
}
STUDIES = {  # script, flags, epochs, seeds
    'MNIST': ('TWTA_4_4_MNIST', ('--learning_rate', '0.002'), 6, (0, 1, 2)),
    'CIFAR10': ('TWTA_3_3_CIFAR10_Group_V2', ('--learning_rate', '0.005', '--validation', '5000'), 3, (0,)),
}


def run(family, variant, seed, epochs, args):
    """Trains, or finds trained, a network; returns its row."""
    script, flags, _, _ = STUDIES[family]
    run_dir = args.runs / f'{script}-{variant.replace(" ", "-")}-{epochs}-{seed}'
    if not (run_dir / 'result.json').is_file():
        begun = (run_dir / 'checkpoint').is_file()
        command = [sys.executable, str(ROOT / family / f'{script}.py'), '--mode', 'training', '--resume', str(begun),
                   '--schedule', 'cosine', '--epochs', str(epochs), '--seed', str(seed), '--run_dir', str(run_dir),
                   *flags, *VARIANTS[variant], *(('--data_dir', str(args.data_dir)) if args.data_dir else ())]
        subprocess.run(command, check=True, stdout=sys.stderr)
    result = json.loads((run_dir / 'result.json').read_text())
    if result['epoch'] != epochs:  # killed between the last checkpoint and the result, it has begun another training
        sys.exit(f'choices.py: error: {run_dir} has {result["epoch"]} epochs, not {epochs}; remove it')
    with open(run_dir / 'log.csv', newline='') as file:
        *_, last = csv.DictReader(file)
    return {'script': script, 'variant': variant, 'seed': seed, 'epochs': epochs,
            'validation_accuracy': float(last['validation_accuracy']), 'test_accuracy': result['test_accuracy'],
            'images_per_second': float(last['images_per_second']), 'data': result['data'], 'code': result['code'],
            'versions': result['versions'], 'machine': result['machine']}


def spread(values):
    """Mean, and standard deviation where there are several, in per cent."""
    mean = f'{100 * statistics.mean(values):.2f}'
    return mean if len(values) == 1 else f'{mean} ± {100 * statistics.stdev(values):.2f}'


def table(rows):
    yield '| network | choice | epochs | seeds | validation accuracy, % | test accuracy, % |'
    yield '|---|---|---|---|---|---|'
    for key in dict.fromkeys((row['script'], row['variant'], row['epochs']) for row in rows):
        same = [row for row in rows if (row['script'], row['variant'], row['epochs']) == key]
        yield (f'| {key[0]} | {key[1]} | {key[2]} | {len(same)} | '
               f'{spread([row["validation_accuracy"] for row in same])} | '
               f'{spread([row["test_accuracy"] for row in same])} |')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--family', choices=STUDIES, help='default: both')
    parser.add_argument('--epochs', type=int, metavar='N', help='default: 6 on MNIST, 3 on CIFAR-10')
    parser.add_argument('--seeds', type=int, nargs='+', metavar='N', help='default: 0 1 2 on MNIST, 0 on CIFAR-10')
    parser.add_argument('--runs', type=Path, default=ROOT / 'runs' / 'choices', metavar='DIR',
                        help='default: runs/choices')
    parser.add_argument('--data_dir', type=Path, metavar='DIR', help='default: data')
    parser.add_argument('--json', type=Path, default=Path(__file__).with_suffix('.json'), metavar='FILE',
                        help='default: benchmarks/choices.json')
    args = parser.parse_args()
    scripts = [STUDIES[family][0] for family in STUDIES if args.family in (None, family)]
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    rows = [row for row in rows if row['script'] not in scripts]
    for family, (_, _, epochs, seeds) in STUDIES.items():
        if args.family not in (None, family):
            continue
        for seed in args.seeds or seeds:
            for variant in VARIANTS:
                try:
                    rows.append(run(family, variant, seed, args.epochs or epochs, args))
                except subprocess.CalledProcessError as error:
                    sys.exit(f'choices.py: error: {family}, {variant}, seed {seed}: the script has ended with '
                             f'{error.returncode}')
                args.json.write_text(json.dumps(rows, indent=1) + '\n')
    print('\n'.join(table(rows)))


if __name__ == '__main__':
    main()
