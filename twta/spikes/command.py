"""The command line of the Spiking scripts."""
import argparse
from functools import partial
from pathlib import Path

from twta import TwtaError, UsageError, command_line
from twta.packed import file_format
from twta.scripts import load_network
from twta.spikes.conversion import FILES, convert, convert_file
from twta.terminal import Parser, check_folder, errors_in_a_line, natural, number, path, positive_integer


def run(script, description, datasets, default):
    """Parse the flags, convert a network and simulate it; a Spiking script ends in this call.

    script         the script's __file__; its folder's parent is the root
    description    the script's docstring, for --help
    datasets       names in twta.data.datasets.DATASETS, the default first
    default        default of --network
    """
    script = Path(script).resolve()
    with errors_in_a_line(script.name):
        start(script, description, datasets, default)


def start(script, description, datasets, default, argv=None):
    """Do what run does. Raises UsageError if a flag is not valid, TwtaError if the conversion is not exact."""
    flags = make_parser(script, description, datasets, default).parse_args(argv)
    check_flags(flags)
    packed = file_format.read(flags.file) if flags.file else None
    if packed:
        check_dataset(packed, flags, datasets)
    network = packed.network if packed else flags.network or default
    flags = resolve(flags, script.parent.parent, network)
    check_folder(f'--output {flags.output}', flags.output)
    for name in FILES:
        if (flags.output / name).is_dir():
            raise UsageError(f'--output {flags.output}: {name} in it is a folder; choose another')
    if packed:
        convert_file(flags, packed)
    else:
        convert_network(script.parent / f'{network}.py', flags)


def make_parser(script, description, datasets, default):
    """Return the parser of a Spiking script, which finds its networks in its own folder."""
    networks = sorted(path.stem for path in script.parent.glob('*.py') if not path.stem.startswith(('FP', 'Spiking')))
    parser = Parser(prog=script.name, description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--network', choices=networks, metavar='NAME',
        help=f'trained network to convert: {", ".join(networks)} (default: {default})')
    add('--conversion', choices=('spatial', 'temporal', 'rest'), default='spatial',
        help='spatial: one neuron per level, one step; temporal: one step per level, store and release; rest: for '
             'networks of --rest -1: each activation a has one neuron, which fires a + 1 times in two steps, never '
             'negatively (default: spatial)')
    add('--noise_ratio', type=partial(number, least=0, most=0.99), metavar='P', default=0.0,
        help='probability that a spike of the encoder is deleted (default: 0)')
    add('--seed', type=natural, metavar='N', help='random seed for the noise (default: 0)')
    add('--images', type=positive_integer, metavar='N', help='number of test images (default: all)')
    add('--dataset', choices=datasets, default=datasets[0], help=f'data set (default: {datasets[0]})')
    add('--data_dir', type=path, metavar='DIR', help='folder of the data sets (default: data/ beside README.md)')
    add('--run_dir', type=path, metavar='DIR',
        help='folder with the checkpoints of --network (default: runs/NETWORK-DATASET beside README.md)')
    add('--checkpoint', choices=('last', 'best'), help='checkpoint of --network (default: last)')
    add('--file', type=path, metavar='FILE',
        help='packed network, from --mode export, in place of --network; for --conversion spatial or '
             'rest; needs no TensorFlow')
    add('--output', type=path, metavar='DIR',
        help='folder for the results (default: spikes-CONVERSION in the run directory, with -best, -noise-P, -images-N '
             'and, with noise, -seed-N if you give these; with --file, FILE-spikes-... in the current folder)')
    add('--debug', action='store_true', help='print the traceback of an error')
    return parser


def check_flags(flags):
    """Raise UsageError if a flag contradicts another, or if there is no such --file."""
    for flag in ('network', 'run_dir', 'checkpoint'):
        if flags.file and getattr(flags, flag) is not None:
            raise UsageError(f'--{flag} has no meaning with --file, which has its network; leave one out')
    if flags.file and flags.conversion == 'temporal':
        raise UsageError('--conversion temporal with --file, whose network is converted spatially; use --network')
    if flags.seed is not None and not flags.noise_ratio:
        raise UsageError(f'--seed {flags.seed} has no meaning without --noise_ratio; leave it out')
    if flags.file and not flags.file.is_file():
        raise UsageError(f'--file {flags.file}: no such file; --mode export writes such files, pretrained/ has some')


def check_dataset(packed, flags, datasets):
    """Raise TwtaError if a packed network is for another data set than --dataset."""
    if packed.dataset not in datasets:
        raise TwtaError(f'{flags.file}: a network for {packed.dataset}, not for {" or ".join(datasets)}; use the '
                        'Spiking script of its data set')
    if packed.dataset != flags.dataset:
        raise TwtaError(f'{flags.file}: a network for {packed.dataset}, not {flags.dataset}; give --dataset '
                        f'{packed.dataset}')


def resolve(flags, root, network):
    """Return the flags with absolute paths, their defaults filled in; network is the name of its script."""
    run_dir = (flags.run_dir or root / 'runs' / f'{network}-{flags.dataset}').resolve()
    noise = f'-noise-{flags.noise_ratio:g}' + (f'-seed-{flags.seed}' if flags.seed else '') if flags.noise_ratio else ''
    best = '-best' if flags.checkpoint == 'best' else ''
    folder = f'spikes-{flags.conversion}{best}{noise}' + (f'-images-{flags.images}' if flags.images else '')
    usual = Path(f'{flags.file.stem}-{folder}') if flags.file else run_dir / folder
    return argparse.Namespace(**{
        **vars(flags), 'run_dir': run_dir, 'data_dir': (flags.data_dir or root / 'data').resolve(),
        'output': (flags.output or usual).resolve(), 'seed': flags.seed or 0, 'checkpoint': flags.checkpoint or 'last'})


def convert_network(script, flags):
    """Convert the trained network of a script and simulate it."""
    module = load_network(script)
    args, defaults = command_line.parse_script(script, module, [
        '--mode', 'inference', '--dataset', flags.dataset, '--data_dir', str(flags.data_dir), '--run_dir',
        str(flags.run_dir), '--checkpoint', flags.checkpoint])
    from twta.training import experiment  # here: it imports TensorFlow

    experiment.run(script.stem, module.model, args, defaults, partial(convert, flags=flags))
