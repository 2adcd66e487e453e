"""The command line that every script has. It answers --help and a bad flag before TensorFlow is imported."""
import argparse
import os
import shlex
import sys
from pathlib import Path

from twta import UsageError
from twta.options import NOTHING_TO_PACK, OPTIONS, SHORT, SUFFIXES, WAYS, with_defaults
from twta.terminal import Parser, errors_in_a_line, natural, path, positive_integer, positive_number, truth


def run(script, description, model, datasets, learning_rate, epochs, batch_size, choices=()):
    """Parses the flags and trains or evaluates the network; a script ends in this call.

    script         the script's __file__; its name names the architecture, its folder's parent is the root
    description    the script's docstring, for --help
    model          function of (x, is_train, **choices) that returns the network as a TensorLayer layer, its outputs
                   the logits
    datasets       names in twta.data.datasets.DATASETS, the default first
    learning_rate, epochs, batch_size    the script's own protocol, the defaults of the flags
    choices        names in OPTIONS: each is a flag, and what it says an argument of model
    """
    script = Path(script).resolve()
    defaults = protocol(learning_rate, epochs, batch_size)
    with errors_in_a_line(script.name):
        args = parse(script, description, datasets, defaults, choices)
        if args.engine == 'packed':
            from twta.packed import inference  # here: --help needs no numpy

            inference.infer(script.stem, args)
            return
        if args.verbose:
            os.environ['TF_CPP_MIN_LOG_LEVEL'] = '0'
        execute(script.stem, model, args, defaults)


def execute(script, model, args, defaults):
    """Do what --mode says."""
    from twta.training import experiment  # here, and below: they import TensorFlow

    if args.mode == 'export':
        from twta.export.pack import export

        experiment.run(script, model, args, defaults, export)
    else:
        experiment.run(script, model, args, defaults)


def protocol(learning_rate, epochs, batch_size):
    """How a script trains where its flags do not say otherwise."""
    return {'learning_rate': learning_rate, 'epochs': epochs, 'batch_size': batch_size, 'schedule': 'constant',
            'augmentation': 'published', 'protocol': 'published'}


def parse(script, description, datasets, defaults, choices=(), argv=None):
    """The flags as a namespace, with the paths made absolute; raises UsageError, or SystemExit after --help.

    Of its `choices` each is None where the command line does not say.
    """
    parser = Parser(prog=script.name, description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--mode', choices=('training', 'inference', 'export'), default='training',
        help='default: training. export: writes the trained network as integers, for --engine packed or, with '
             '--format, for other programs')
    add('--resume', type=truth, metavar='{True,False}',
        help='True: go on from the last checkpoint in --run_dir; False: start with new weights, an earlier run is '
             'moved aside. Default: False in training; inference and export read a checkpoint, or --weights')
    add('--learning_rate', type=positive_number, metavar='RATE',
        help=f'of Adam, default: {defaults["learning_rate"]:g}')
    add('--epochs', type=positive_integer, metavar='N',
        help=f'to train in this command, default: {defaults["epochs"]}. With --resume True, the same flags finish an '
             'interrupted training, and flags left out are those that it had; with other flags, or after a finished '
             'training, N more epochs begin, and flags left out are the defaults')
    add('--schedule', choices=WAYS['schedule'],
        help='of the learning rate over --epochs; cosine: up from 0 in the first epoch (in the first quarter of less '
             f'than 4), then half a cosine down to 0. Default: {defaults["schedule"]}')
    short = SHORT[datasets[0]]
    add('--augmentation', choices=WAYS['augmentation'],
        help='of training images; published: none of MNIST; crop, flip, brightness and contrast of CIFAR-10. '
             'geometric: a random affine map of MNIST; crop and flip of CIFAR-10. Default: published')
    add('--protocol', choices=WAYS['protocol'],
        help='the defaults of the four flags before; published, the default: as above. short: --learning_rate '
             f'{short["learning_rate"]:g} --epochs {short["epochs"]} --schedule {short["schedule"]} --augmentation '
             f'{short["augmentation"]}')
    for name in choices:
        add(f'--{name}', **OPTIONS[name][1])
    add('--batch_size', type=positive_integer, metavar='N', help=f'default: {defaults["batch_size"]}')
    add('--seed', type=natural, metavar='N',
        help='of weights, shuffling and augmentation, default: 0; a resumed run keeps its own')
    add('--gpu', type=natural, default=0, metavar='INDEX', help='which GPU, default: 0; without any, the CPU is used')
    add('--dataset', choices=datasets, default=datasets[0],
        help=f'default: {datasets[0]}; {datasets[1]} is a small sample that needs no network')
    add('--validation', type=natural, metavar='N',
        help='training images, from the end, to hold out for validation; default: as published (10000 of MNIST, '
             'none of CIFAR-10), or as the sample has it; a resumed run keeps its own')
    add('--data_dir', type=path, metavar='DIR',
        help='where data sets are, or are downloaded to; default: data/ beside README.md')
    add('--run_dir', type=path, metavar='DIR',
        help='checkpoints, log.csv, model.npz, ...; default: runs/SCRIPT-DATASET beside README.md')
    add('--precision', choices=('auto', 'float32', 'bfloat16'), default='auto',
        help='of training; auto, the default: bfloat16 if the hardware multiplies it, else float32. On other '
             'hardware bfloat16 is emulated, slower than float32. Evaluation is always float32, its first layer summed '
             'in float64')
    add('--deterministic', action='store_true',
        help='train in one thread with deterministic kernels: the same weights, bit for bit, whatever the number of '
             'cores; slower')
    add('--checkpoint', choices=('last', 'best'), default='last',
        help='which one inference or export reads: the last (default), after the last epoch or where the training was '
             'stopped, or the best on validation; without validation images that is the last')
    add('--weights', type=path, metavar='NPZ',
        help='a model.npz to start from, to evaluate or to export, instead of a checkpoint; with the same '
             'flags of the network as it was trained with')
    add('--engine', choices=('tensorflow', 'packed'), default='tensorflow',
        help='of inference; packed: reads --file and needs no TensorFlow. Default: tensorflow')
    add('--file', type=path, metavar='FILE',
        help='the packed network that export writes and --engine packed reads; default: SCRIPT.twta (.npz, .h, .onnx) '
             'in the current folder; where it is not there, packed reads the one in pretrained/')
    add('--format', choices=tuple(SUFFIXES), default='twta',
        help='of export: twta, the packed file (default); npz, plain arrays; c, a header; onnx')
    add('--threads', type=positive_integer, metavar='N',
        help='of --engine packed; default: one per core that the process may use')
    add('--report', action='store_true',
        help='with --engine packed: bits, sparsity, additions and estimated energy of each layer, as a table, '
             'cost.csv and cost.png')
    add('--verbose', action='store_true',
        help="print TensorLayer's layers and parameters, and TensorFlow's own messages")
    add('--debug', action='store_true', help='show the traceback of an error')
    args = parser.parse_args(argv)
    args.choices = {name: vars(args).pop(name) for name in choices}

    root = script.parent.parent
    args.data_dir = (args.data_dir or root / 'data').resolve()
    args.run_dir = (args.run_dir or root / 'runs' / f'{script.stem}-{args.dataset}').resolve()
    check(args, script, datasets[0])
    return args


def check(args, script, trained_on):
    """Raises UsageError where the flags contradict each other or ask for a file that is not there."""
    chosen = with_defaults(args.choices)
    if chosen.get('levels') == 3 and chosen.get('pooling') == 'max':
        raise UsageError('--levels 3 with --pooling max: such a network cannot be exported; use --pooling average or '
                         'conv')
    if script.stem.startswith('FP_') and (args.engine == 'packed' or args.mode == 'export'):
        raise UsageError(f'{script.stem} {NOTHING_TO_PACK}')
    if 'k' in chosen and chosen['B'] * 2 ** chosen['k'] > 8:
        raise UsageError(f'--k {chosen["k"]} --B {chosen["B"]}: {chosen["B"] * 2 ** chosen["k"]} steps, valid are up '
                         'to 8; make one smaller')
    evaluation = args.mode != 'training'
    packed = args.engine == 'packed'
    if args.weights and not args.weights.is_file():
        reason = 'not a file' if args.weights.exists() else 'no such file'
        raise UsageError(f'--weights {args.weights}: {reason}; a training writes model.npz into its --run_dir')
    if args.weights and args.resume:
        raise UsageError('--weights and --resume True: weights come from a file or from a checkpoint; leave one out')
    if evaluation and args.resume is False and not args.weights and not packed:
        raise UsageError(f'--resume False with --mode {args.mode}: there is nothing but random weights; use --resume '
                         'True, or --weights model.npz')
    for flag in ('epochs', 'learning_rate', 'schedule', 'augmentation', 'protocol', 'batch_size', 'seed', 'validation'):
        if evaluation and getattr(args, flag) is not None:
            raise UsageError(f'--{flag} {getattr(args, flag)} has no meaning with --mode {args.mode}; leave it out')
    if evaluation and args.deterministic:
        raise UsageError(f'--deterministic has no meaning with --mode {args.mode}; leave it out')
    if args.checkpoint == 'best' and (not evaluation or args.weights):
        raise UsageError('--checkpoint best is for --mode inference or export without --weights; training resumes from '
                         'the last')
    if packed and args.mode != 'inference':
        raise UsageError(f'--engine packed is for --mode inference, not for --mode {args.mode}; leave it out')
    for flag, value in (('resume', args.resume), ('weights', args.weights), *args.choices.items()):
        if packed and value is not None:
            raise UsageError(f'--{flag} has no meaning with --engine packed, which reads --file; leave it out')
    if packed and args.checkpoint != 'last':
        raise UsageError('--checkpoint best has no meaning with --engine packed; export with it')
    for flag, given in (('threads', args.threads is not None), ('report', args.report)):
        if given and not packed:
            raise UsageError(f'--{flag} is for --mode inference --engine packed; leave it out')
    if args.format != 'twta' and args.mode != 'export':
        raise UsageError(f'--format {args.format} is for --mode export; leave it out')
    if args.file and not packed and args.mode != 'export':
        raise UsageError('--file is for --mode export and --engine packed; leave it out')
    if packed or args.mode == 'export':
        exported = Path(script.stem + SUFFIXES[args.format])
        trained = script.parent.parent / 'pretrained' / exported
        if packed and not exported.exists() and args.dataset == trained_on and trained.is_file():
            exported = trained
        args.file = (args.file or exported).resolve()
    if args.mode == 'export' and args.file.suffix != SUFFIXES[args.format]:
        raise UsageError(f'--file {args.file}: with --format {args.format} its name ends in {SUFFIXES[args.format]}')
    if args.mode == 'export' and not args.file.parent.is_dir():
        raise UsageError(f'--file {args.file}: no such folder; make it first, or choose another file')
    if args.file and args.file.exists() and not args.file.is_file():
        raise UsageError(f'--file {args.file}: not a file')
    if packed and not args.file.is_file():
        make = command(script, '--mode export', 'dataset', 'data_dir', 'run_dir', 'file', args=args)
        raise UsageError(f'--file {args.file}: no such file; make it with: {make}')
    for flag, folder in (('run_dir', args.run_dir), ('data_dir', args.data_dir)):
        if folder.exists() and not folder.is_dir():
            raise UsageError(f'--{flag} {folder}: not a directory')
    written, folder = ('file', args.file.parent) if args.mode == 'export' else ('run_dir', args.run_dir)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UsageError(f'--{written} {getattr(args, written)}: nothing can be written to {there}; choose another')
    args.resume = bool(evaluation and not args.weights and not packed if args.resume is None else args.resume)
    if args.resume and not ((args.run_dir / 'checkpoint').is_file() or list(args.run_dir.glob('last-*.index'))):
        make = command(script, '--resume False --mode training', 'dataset', 'data_dir', 'run_dir', args=args)
        raise UsageError(f'no checkpoint in {args.run_dir}; make one with: {make}')


def command(script, mode, *flags, args):
    """A command of the script in that mode, with those of the flags that this one was given."""
    given = [flag for flag in flags if any(word.split('=')[0] == f'--{flag}' for word in sys.argv)]
    values = (f' --{flag} {shlex.quote(str(getattr(args, flag)))}' for flag in given)
    return f'python {shlex.quote(os.path.relpath(script))} {mode}' + ''.join(values)
