"""The command line that every script has. It answers --help and a bad flag before TensorFlow is imported."""
import argparse
import os
import shlex
import sys
from functools import partial
from pathlib import Path

from twta import UsageError, workers
from twta.options import NOTHING_TO_PACK, OPTIONS, SHORT, SUFFIXES, WAYS, has_meaning, is_fp, with_defaults
from twta.terminal import (
    Parser,
    check_folder,
    errors_in_a_line,
    natural,
    nearest,
    path,
    positive_integer,
    positive_number,
    truth_or_auto,
)

OF_TRAINING = 'epochs', 'learning_rate', 'schedule', 'augmentation', 'protocol', 'batch_size', 'seed', 'validation', \
    'teacher', 'workers', 'task', 'batch_norm', 'patience'
PATIENCE = 300  # seconds


def run(script, description, model, datasets, learning_rate, epochs, batch_size, options=()):
    """Parse the flags and do what --mode says; a script ends in this call.

    script         the script's __file__; its name names the architecture, its folder's parent is the root
    description    the script's docstring, for --help
    model          function of (x, is_train, **options) that returns the network as a TensorLayer layer, whose outputs
                   are the logits
    datasets       names in twta.data.datasets.DATASETS, the default first
    learning_rate, epochs, batch_size    the script's own protocol: the defaults of the flags
    options        names in options.OPTIONS: each becomes a flag, and its value an argument of model
    """
    script = Path(script).resolve()
    defaults = protocol(learning_rate, epochs, batch_size)
    with errors_in_a_line(script.name):
        args = parse(script, description, datasets, defaults, options)
        if args.engine == 'packed':
            from twta.packed import inference  # here: --help needs no numpy

            inference.infer(script.stem, args)
            return
        if args.verbose:
            os.environ['TF_CPP_MIN_LOG_LEVEL'] = '0'
        execute(script.stem, model, args, defaults)


def execute(script, model, args, defaults):
    """Train, infer or export the network of the script of that name."""
    from twta.export.pack import export  # here, and below: they import TensorFlow
    from twta.training import experiment
    from twta.training.evaluation import infer

    act = partial(export, file=args.file, form=args.format) if args.mode == 'export' else infer
    experiment.run(script, model, args, defaults, act)


def protocol(learning_rate, epochs, batch_size):
    """Return how a script trains if no flag says otherwise."""
    return {'learning_rate': learning_rate, 'epochs': epochs, 'batch_size': batch_size, 'schedule': 'constant',
            'augmentation': 'published', 'protocol': 'published'}


def parse_script(script, module, argv):
    """Return the flags of a script that is loaded as a module, as parse() does, and its own protocol."""
    defaults = protocol(module.LEARNING_RATE, module.EPOCHS, module.BATCH_SIZE)
    return parse(script, '', module.DATASETS, defaults, getattr(module, 'OPTIONS', ()), argv), defaults


def parse(script, description, datasets, defaults, options=(), argv=None):
    """Return the flags, resolved: paths are absolute, --resume and --file have their values.

    `options` of the result holds the options of the network by name, None for those that are not given.
    Raises UsageError if a flag is not valid, and SystemExit after --help.
    """
    args = make_parser(script, description, datasets, defaults, options).parse_args(argv)
    args.options = {name: vars(args).pop(name) for name in options}
    check_network(args, script)
    check_meaning(args)
    args = resolve(args, script, datasets[0])
    check_files(args, script)
    return args


# ----------------------------------------------------------------------------------------------------------------------
# The flags


def make_parser(script, description, datasets, defaults, options):
    parser = Parser(prog=script.name, description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--mode', choices=('training', 'inference', 'export'), default='training',
        help='train; evaluate on the test images; or write the trained network as integers (default: training)')
    add('--resume', type=truth_or_auto, metavar='{True,False,auto}',
        help='True: continue from the last checkpoint in --run_dir. False: start with new weights and move an earlier '
             'run aside. auto, for schedulers: the same command starts the training, continues it, and does nothing '
             'once its --epochs are done. (default: True for inference and export of a checkpoint, else False)')
    add('--gpu', type=natural, default=0, metavar='INDEX', help='index of the GPU; without any GPU the CPU is used '
                                                                '(default: 0)')
    add('--verbose', action='store_true', help="print TensorLayer's layers and parameters and TensorFlow's messages")
    add('--debug', action='store_true', help='print the traceback of an error')
    add_training(parser.add_argument_group('training').add_argument, datasets, defaults)
    add_workers(parser.add_argument_group('several workers: docs/scale.md').add_argument)
    add_network(parser.add_argument_group('network').add_argument, options)
    add_files(parser.add_argument_group('data and files').add_argument, datasets)
    add_export(parser.add_argument_group('export and --engine packed').add_argument)
    return parser


def add_training(add, datasets, defaults):
    """Add the flags of training; most are None if they are not given: a resumed run then has its own values."""
    short = SHORT[datasets[0]]
    add('--learning_rate', type=positive_number, metavar='RATE',
        help=f'learning rate of Adam (default: {defaults["learning_rate"]:g})')
    add('--epochs', type=positive_integer, metavar='N',
        help=f'epochs to train in this command (default: {defaults["epochs"]}). --resume True finishes an interrupted '
             'training if you repeat its flags or omit them. If you change a flag, or the training had finished, it '
             "trains --epochs more; omitted flags then take the script's defaults")
    add('--schedule', choices=WAYS['schedule'],
        help='learning rate over --epochs. cosine: up from 0 in the first epoch, or the first quarter if that is '
             f'shorter, then down to 0 along half a cosine (default: {defaults["schedule"]})')
    add('--augmentation', choices=WAYS['augmentation'],
        help='changes of the training images. published: none for MNIST; crop, flip, brightness and contrast for '
             'CIFAR-10. geometric: a random affine map for MNIST; crop and flip for CIFAR-10. cutout: geometric, and a '
             'square of 8*8 pixels is erased (default: published)')
    add('--protocol', choices=WAYS['protocol'],
        help='short sets the defaults of the four flags before this one to '
             f'{short["learning_rate"]:g}, {short["epochs"]}, {short["schedule"]} and {short["augmentation"]} '
             '(default: published)')
    add('--batch_size', type=positive_integer, metavar='N',
        help=f'images per training step (default: {defaults["batch_size"]})')
    add('--seed', type=natural, metavar='N',
        help='random seed for weights, shuffling and augmentation (default: 0); a resumed run keeps its seed')
    add('--validation', type=natural, metavar='N',
        help='training images to hold out for validation, from the end (default: 10000 for MNIST, none for CIFAR-10, '
             'as published; digits 297, shapes 500); a resumed run keeps its number')
    add('--precision', choices=('auto', 'float32', 'bfloat16'), default='auto',
        help='number type for training. auto: bfloat16 if the hardware multiplies it, else float32, since '
             'emulated bfloat16 is slower. Evaluation is always float32 (default: auto)')
    add('--deterministic', action='store_true',
        help='train in one thread with deterministic kernels: the same weights, bit for bit, on any number of cores; '
             'slower')


def add_workers(add):
    add('--workers', type=workers.addresses, metavar='HOST:PORT,...',
        help='addresses of the processes that train together, the same on each; the first one, worker 0, writes the '
             'run directory. Who reaches such a port can run code there: on Linux the addresses of the workers, '
             'elsewhere everyone; use a network that you trust (default: those in TF_CONFIG, else this process '
             'trains alone)')
    add('--task', type=natural, metavar='I', help='index of this process in --workers (default: that in TF_CONFIG)')
    add('--batch_norm', choices=('shard', 'global'),
        help='moments that batch normalisation trains with. shard: of the images of each worker; global: of the whole '
             'batch, as one process would (default: shard)')
    add('--patience', type=positive_integer, metavar='SECONDS',
        help=f'longest wait for another worker: then a worker ends with exit code 75 (default: {PATIENCE})')


def add_network(add, options):
    for name in options:
        add(f'--{name}', **OPTIONS[name][1])
    add('--weights', type=path, metavar='NPZ',
        help='a model.npz to start from, to evaluate or to export, in place of a checkpoint; repeat the flags of the '
             'network that it was trained with. A training may also start from the same network in full precision')
    add('--teacher', type=path, metavar='NPZ',
        help='model.npz of the same network trained with --quantize nothing: training then follows its probabilities '
             'and the sums in its layers too, image by image (distillation); a resumed run keeps its teacher. FP '
             'scripts have none')
    add('--checkpoint', choices=('last', 'best'), default='last',
        help='which checkpoint inference and export read: the last, or the best on the validation images; without '
             'validation images best is the last (default: last)')


def add_files(add, datasets):
    sample = f'; {datasets[1]} is a small sample that needs no internet connection' if len(datasets) > 1 else ''
    add('--dataset', choices=datasets, default=datasets[0],
        help=f'data set{sample} (default: {datasets[0]})')
    add('--data_dir', type=path, metavar='DIR',
        help='folder of the data sets, downloaded if they are absent (default: data/ beside README.md)')
    add('--run_dir', type=path, metavar='DIR',
        help='folder for checkpoints, log.csv, model.npz, ... (default: runs/SCRIPT-DATASET beside README.md)')


def add_export(add):
    add('--engine', choices=('tensorflow', 'packed'), default='tensorflow',
        help='engine for inference; packed reads --file and needs no TensorFlow (default: tensorflow)')
    add('--file', type=path, metavar='FILE',
        help='file that export writes and --engine packed reads (default: SCRIPT.twta, .npz, .h, .onnx, ... in the '
             'current folder; if it is absent, packed reads the file in pretrained/, for the default data set only)')
    add('--format', choices=tuple(SUFFIXES), default='twta',
        help='format for export: the packed file, plain arrays, a C header, ONNX, QONNX (FINN, qonnx), or NIR '
             '(spiking networks); html, a page that runs it (default: twta)')
    add('--threads', type=positive_integer, metavar='N',
        help='threads for --engine packed (default: one per core that the process may use)')
    add('--report', action='store_true',
        help='with --engine packed: bits, sparsity, additions and estimated energy per layer, as a table, cost.csv '
             'and cost.png')


def resolve(args, script, usual_dataset):
    """Return the flags with absolute paths and, if a file is used, a path for --file.

    --resume becomes a truth value; --resume auto also sets is_auto. workers becomes Workers.
    """
    root, is_packed = script.parent.parent, args.engine == 'packed'
    file = args.file
    if is_packed or args.mode == 'export':
        exported = Path(script.stem + SUFFIXES[args.format])
        pretrained = root / 'pretrained' / exported
        if is_packed and not exported.exists() and args.dataset == usual_dataset and pretrained.is_file():
            exported = pretrained
        file = (file or exported).resolve()
    run_dir = (args.run_dir or root / 'runs' / f'{script.stem}-{args.dataset}').resolve()
    resume = args.resume
    if resume is None:
        resume = args.mode != 'training' and not args.weights and not is_packed
    elif resume == 'auto':
        resume = has_checkpoint(run_dir)
    found = workers.choose(args.workers, args.task) if args.mode == 'training' else workers.Workers()
    for flag in 'batch_norm', 'patience':
        if found.count == 1 and getattr(args, flag) is not None:
            raise UsageError(f'--{flag} {getattr(args, flag)} has no meaning without several --workers; leave it out')
    resolved = {**vars(args), 'file': file, 'resume': resume, 'is_auto': args.resume == 'auto', 'run_dir': run_dir,
                'data_dir': (args.data_dir or root / 'data').resolve(), 'workers': found,
                'patience': args.patience or PATIENCE,
                'batch_norm': (args.batch_norm or 'shard') if found.count > 1 else None}
    del resolved['task']  # it is in workers
    return argparse.Namespace(**resolved)


def has_checkpoint(run_dir):
    return (run_dir / 'checkpoint').is_file() or any(run_dir.glob('last-*.index'))


# ----------------------------------------------------------------------------------------------------------------------
# Checks; each raises UsageError


def check_network(args, script):
    """Check the options of the network against each other."""
    chosen = with_defaults(args.options)
    for flag, value in args.options.items():
        if value not in (None, OPTIONS[flag][0]) and not has_meaning(flag, chosen):
            raise UsageError(f'--{flag} {value} has no meaning with --quantize {chosen["quantize"]}: its activations '
                             'are ReLU; leave one out')
    if chosen.get('levels') == 3 and chosen.get('pooling') == 'max':
        raise UsageError('--levels 3 with --pooling max: such a network cannot be exported; use --pooling average or '
                         'conv')
    if chosen.get('rest') and chosen.get('pooling') == 'max':
        raise UsageError('--rest -1 with --pooling max: such a network cannot be exported; use --pooling conv or '
                         'average')
    if chosen.get('quantize', 'both') != 'both' and (args.engine == 'packed' or args.mode == 'export'):
        raise UsageError(f'--quantize {chosen["quantize"]}: such a network cannot be packed; leave it out')
    if is_fp(script.stem) and (args.engine == 'packed' or args.mode == 'export'):
        raise UsageError(f'{script.stem} {NOTHING_TO_PACK}')
    is_of_run = args.resume is True or (args.mode != 'training' and not args.weights)
    # what is not given is the run's or, without a run, the default
    k, largest = ((args.options if is_of_run else chosen).get(name) for name in 'kB')
    if None not in (k, largest) and largest * 2 ** k > 8:
        raise UsageError(f'--k {k} --B {largest}: {largest * 2 ** k} steps, valid are up to 8; make one smaller')


def check_meaning(args):
    """Check that each flag that is given has a meaning beside the others."""
    is_packed, is_export, is_training = args.engine == 'packed', args.mode == 'export', args.mode == 'training'
    for flag, training in (('weights', 'a training'), ('teacher', 'a training with --quantize nothing')):
        file = getattr(args, flag)
        if file and not file.is_file():
            reason = 'not a file' if file.exists() else 'no such file'
            raise UsageError(f'--{flag} {file}: {reason}; {training} writes model.npz into its --run_dir')
    if args.resume == 'auto' and not is_training:
        raise UsageError(f'--resume auto is for --mode training; leave it out with --mode {args.mode}')
    if args.teacher and 'quantize' not in args.options:
        raise UsageError('--teacher is for scripts that have --quantize, which trains the teacher; leave it out')
    if args.weights and args.resume is True:
        raise UsageError('--weights and --resume True: weights come from a file or from a checkpoint; leave one out')
    if not is_training and args.resume is False and not args.weights and not is_packed:
        raise UsageError(f'--resume False with --mode {args.mode}: there is nothing but random weights; use --resume '
                         'True, or --weights model.npz')
    for flag in OF_TRAINING:
        value = getattr(args, flag)
        if not is_training and value is not None:
            value = ','.join(value) if flag == 'workers' else value
            raise UsageError(f'--{flag} {value} has no meaning with --mode {args.mode}; leave it out')
    if not is_training and args.precision != 'auto':
        raise UsageError(f'--precision {args.precision} has no meaning with --mode {args.mode}, which computes in '
                         'float32; leave it out')
    if not is_training and args.deterministic:
        raise UsageError(f'--deterministic has no meaning with --mode {args.mode}; leave it out')
    if args.checkpoint == 'best' and (is_training or args.weights):
        raise UsageError('--checkpoint best is for --mode inference or export without --weights; training resumes from '
                         'the last')
    if is_packed:
        check_packed(args)
    elif args.threads is not None or args.report:
        flag = 'report' if args.threads is None else 'threads'
        raise UsageError(f'--{flag} is for --mode inference --engine packed; leave it out')
    if args.format != 'twta' and not is_export:
        raise UsageError(f'--format {args.format} is for --mode export; leave it out')
    if args.file and not is_packed and not is_export:
        raise UsageError('--file is for --mode export and --engine packed; leave it out')


def check_packed(args):
    """Check that no flag contradicts --engine packed."""
    if args.mode != 'inference':
        raise UsageError(f'--engine packed is for --mode inference, not for --mode {args.mode}; leave it out')
    for flag, value in (('resume', args.resume), ('weights', args.weights), *args.options.items()):
        if value is not None:
            raise UsageError(f'--{flag} has no meaning with --engine packed, which reads --file; leave it out')
    if args.checkpoint != 'last':
        raise UsageError('--checkpoint best has no meaning with --engine packed; export with it')
    if args.gpu:
        raise UsageError(f'--gpu {args.gpu} has no meaning with --engine packed, which uses the CPU; leave it out')
    if args.verbose:
        raise UsageError('--verbose has no meaning with --engine packed, which needs no TensorFlow; leave it out')


def check_files(args, script):
    """Check that files are there to be read, and folders to be written to."""
    is_packed, is_export = args.engine == 'packed', args.mode == 'export'
    if is_export and not args.file.name.endswith(SUFFIXES[args.format]):
        raise UsageError(f'--file {args.file}: with --format {args.format} its name ends in {SUFFIXES[args.format]}')
    if is_export and not args.file.parent.is_dir():
        raise UsageError(f'--file {args.file}: no such folder; make it first, or choose another file')
    if args.file and args.file.exists() and not args.file.is_file():
        raise UsageError(f'--file {args.file}: not a file')
    if is_export and args.file.name == 'model.npz':
        raise UsageError(f'--file {args.file}: runs keep their weights in files of that name; choose another')
    if is_export and args.weights and args.weights.resolve() == args.file:
        raise UsageError(f'--file {args.file}: is what --weights reads; choose another')
    if is_packed and not args.file.is_file():
        file = ['file'] if args.file.name.endswith(SUFFIXES['twta']) else []
        make = command(script, '--mode export', 'dataset', 'data_dir', 'run_dir', *file, args=args)
        raise UsageError(f'--file {args.file}: no such file; make it with: {make}')
    for flag, folder in (('run_dir', args.run_dir), ('data_dir', args.data_dir)):
        if not nearest(folder).is_dir():
            raise UsageError(f'--{flag} {folder}: {nearest(folder)} is not a directory; choose another')
    written, folder = ('file', args.file.parent) if is_export else ('run_dir', args.run_dir)
    if args.workers.task:
        return  # only worker 0 reads and writes the run directory
    if args.mode != 'inference':  # which prints the accuracy in any case
        check_folder(f'--{written} {getattr(args, written)}', folder)
    if args.teacher and args.teacher.resolve().parent == args.run_dir:
        raise UsageError(f'--teacher {args.teacher}: this training writes its own model.npz there; choose another '
                         '--run_dir')
    if args.is_auto and not args.resume and args.weights and args.weights.resolve().parent == args.run_dir:
        raise UsageError(f'--weights {args.weights}: --resume auto would look for it there again, and this training '
                         'moves it; choose another --run_dir')
    if args.resume and not has_checkpoint(args.run_dir):
        make = command(script, '--resume False --mode training', 'dataset', 'data_dir', 'run_dir', args=args)
        raise UsageError(f'no checkpoint in {args.run_dir}; make one with: {make}')


def command(script, mode, *flags, args):
    """Return a command of the script in that mode, with those of the flags that are given in this one."""
    given = [flag for flag in flags if any(word.split('=')[0] == f'--{flag}' for word in sys.argv)]
    values = (f' --{flag} {shlex.quote(str(getattr(args, flag)))}' for flag in given)
    return f'python {shlex.quote(os.path.relpath(script))} {mode}' + ''.join(values)
