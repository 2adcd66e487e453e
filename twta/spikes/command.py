"""The command line of the Spiking scripts."""
import argparse
import os
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from twta import TwtaError, UsageError, command_line
from twta.packed import file_format
from twta.spikes.conversion import convert, convert_file
from twta.terminal import Parser, errors_in_a_line, natural, number, path, positive_integer


def run(script, description, datasets, default):
    """Parses the flags, converts and simulates; the Spiking scripts end in this call. default: of --network."""
    script = Path(script).resolve()
    with errors_in_a_line(script.name):
        start(script, description, datasets, default)


def start(script, description, datasets, default, argv=None):
    """What run does; raises TwtaError."""
    networks = sorted(path.stem for path in script.parent.glob('*.py') if not path.stem.startswith(('FP', 'Spiking')))
    parser = Parser(prog=script.name, description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--network', choices=networks,
        help=f'which trained network, of {", ".join(networks)}; default: {default}')
    add('--conversion', choices=('spatial', 'temporal'), default='spatial',
        help='spatial: a neuron a level, one step; temporal: a step a level, store and release. Default: spatial')
    add('--noise_ratio', type=partial(number, least=0, most=0.99), metavar='P', default=0.0,
        help='delete each spike of the encoder with this probability; default: 0')
    add('--seed', type=natural, default=0, metavar='N', help='of the noise, default: 0')
    add('--images', type=positive_integer, metavar='N', help='of the test images; default: all')
    add('--dataset', choices=datasets, default=datasets[0], help=f'default: {datasets[0]}')
    add('--data_dir', type=path, metavar='DIR', help='default: data/ beside README.md')
    add('--run_dir', type=path, metavar='DIR',
        help="the network's; default: runs/NETWORK-DATASET beside README.md")
    add('--checkpoint', choices=('last', 'best'), help='of the network, default: last')
    add('--file', type=path, metavar='FILE',
        help='a packed network, from --mode export, in place of --network; without TensorFlow, spatial only')
    add('--output', type=path, metavar='DIR',
        help='default: spikes-CONVERSION (with noise, spikes-CONVERSION-noise-P) in the run directory; of a --file, '
             'FILE-spikes-... in the current folder')
    add('--debug', action='store_true', help='show the traceback of an error')
    flags = parser.parse_args(argv)
    for flag in ('network', 'run_dir', 'checkpoint'):
        if flags.file and getattr(flags, flag) is not None:
            raise UsageError(f'--{flag} has no meaning with --file, which has its network; leave one out')
    if flags.file and flags.conversion == 'temporal':
        raise UsageError('--conversion temporal with --file, whose network has been converted spatially; use --network')
    packed = file_format.read(flags.file) if flags.file else None
    if packed and packed.dataset not in datasets:
        raise TwtaError(f'{flags.file}: a network for {packed.dataset}, not for {" or ".join(datasets)}; use the '
                        'Spiking script of its data set')
    if packed and packed.dataset != flags.dataset:
        raise TwtaError(f'{flags.file}: a network for {packed.dataset}, not {flags.dataset}; give --dataset '
                        f'{packed.dataset}')
    root, name = script.parent.parent, packed.network if packed else flags.network or default
    flags.data_dir = (flags.data_dir or root / 'data').resolve()
    flags.run_dir = (flags.run_dir or root / 'runs' / f'{name}-{flags.dataset}').resolve()
    folder = f'spikes-{flags.conversion}' + (f'-noise-{flags.noise_ratio:g}' if flags.noise_ratio else '')
    usual = Path(f'{flags.file.stem}-{folder}') if packed else flags.run_dir / folder
    flags.output = (flags.output or usual).resolve()
    there = next(path for path in (flags.output, *flags.output.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f'--output {flags.output}: {there} is not a directory that can be written to; choose another')
    if packed:
        convert_file(flags, packed)
        return
    network = script.parent / f'{name}.py'
    module = SimpleNamespace(**runpy.run_path(str(network)))
    if not hasattr(module, 'model'):
        raise UsageError(f'--network {name}: {network} has no model(x, is_train); choose another')
    defaults = command_line.protocol(module.LEARNING_RATE, module.EPOCHS, module.BATCH_SIZE)
    args = command_line.parse(network, '', module.DATASETS, defaults, getattr(module, 'CHOICES', ()), [
        '--mode', 'inference', '--dataset', flags.dataset, '--data_dir', str(flags.data_dir), '--run_dir',
        str(flags.run_dir), '--checkpoint', flags.checkpoint or 'last'])
    from twta.training import experiment  # imports TensorFlow

    experiment.run(name, module.model, args, defaults, partial(convert, flags=flags))
