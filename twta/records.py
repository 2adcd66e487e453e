"""What a run leaves for its reader: config.json, log.csv, curve.png, events, result.json, ... in its directory.

Each is written beside its name and moved into place, so that a kill leaves the previous one whole.
"""
import contextlib
import csv
import json
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from twta import TwtaError, UsageError, arrays, describe_fault, in_a_line, locks, processor, replacing
from twta.options import WAYS, complete, is_choice
from twta.terminal import say

FIELDS = ('epoch', 'learning_rate', 'loss', 'training_accuracy', 'validation_accuracy', 'images_per_second', 'seconds')
SIGNS = 'negative', 'positive'
PACKAGES = 'tensorflow', 'tensorflow-cpu', 'tensorlayer', 'numpy', 'numba'
OURS = ('checkpoint*', 'last-*', 'best-*', 'events.out.tfevents*', 'config.json', 'log.csv', 'curve.png',
        'result*.json', 'record.json', 'confusion*.png', 'cost.csv', 'cost.png', 'model.npz', 'spikes-*')


@contextlib.contextmanager
def locked(run_dir):
    """Holds run_dir/lock for a training; UsageError where another process does."""
    def refuse():
        raise UsageError(f'--run_dir {run_dir}: another training is writing there; wait for its end, or choose another '
                         'directory') from None

    (run_dir / 'lock').touch()
    with locks.holding(run_dir / 'lock', refuse):
        yield


def move_aside(run_dir):
    """Moves an earlier run's files into run_dir/earlier-1 (or -2, ...); returns that folder, None where none was there.

    Only files of the kinds that a run writes are moved.
    """
    files = [path for pattern in OURS for path in run_dir.glob(pattern)]
    if not files:
        return None
    number = 1
    while (run_dir / f'earlier-{number}').exists():
        number += 1
    earlier = run_dir / f'earlier-{number}'
    earlier.mkdir()
    for path in files:
        path.rename(earlier / path.name)
    return earlier


def report(script, args, choices, dataset, kind, weights, epoch, loss, confusion):
    """Prints loss and accuracy on the test images; writes result.json and confusion.png.

    choices   what the network was built with
    kind      which network: 'last', 'best', 'weights' or 'packed'; the files are result-best.json, ... but for the last
    weights   the same in words, a path where it is a file; epoch: after which, or None
    """
    share = accuracy(confusion)
    say(f'test loss: {loss:.4f}')
    say(f'test acc: {share:.4f}')
    args.run_dir.mkdir(parents=True, exist_ok=True)
    suffix = '' if kind == 'last' else f'-{kind}'
    write_json(args.run_dir / f'result{suffix}.json', {
        'script': script, 'choices': choices, 'weights': str(weights), 'epoch': epoch, 'test_loss': loss,
        'test_accuracy': share, 'test_images': len(dataset.test.labels), 'confusion': confusion.tolist(),
        'data': describe_data(dataset), **environment()})
    picture = args.run_dir / f'confusion{suffix}.png'
    title = (f'{script} on {dataset.title}\n{share:.2%} of {len(dataset.test.labels):,} test images, '
             + (Path(weights).name if epoch is None else f'after epoch {epoch}'))
    if save_picture(picture, draw_confusion, title, dataset.classes, confusion):
        say(f'confusion matrix: {picture}')


def write_record(run_dir, config, state, parameters, loss, confusion, best):
    """record.json: all that a finished run is judged by, in one file; twta.report reads it.

    config, state    the run's config.json and checkpointed state
    loss, confusion  on the test images after the last epoch
    best             of the epoch that is best on validation: see experiment.test_best
    """
    history = state['history']
    columns = {field: [row[field] for row in history] for field in FIELDS}
    shares = [row['shares'] for row in history if 'shares' in row]  # absent from epochs of older versions
    shares = {kind: {layer: {sign: [row[kind][layer][i] for row in shares] for i, sign in enumerate(SIGNS)}
                     for layer in layers} for kind, layers in (shares[0] if shares else {}).items()}
    write_json(run_dir / 'record.json', {
        'name': name_run(state), 'dataset': state['dataset'], 'choices': state['choices'],
        'parameters': parameters, 'epochs': state['epoch'], 'wall_seconds': sum(columns['seconds']),
        'last': {'epoch': state['epoch'], 'validation_accuracy': columns['validation_accuracy'][-1],
                 'test_accuracy': accuracy(confusion), 'test_loss': loss},
        'best_validation': best, 'confusion': confusion.tolist(), **config,
        'precision': ' and '.join(state['precision']) or config['precision'],
        'curve': columns, 'shares': shares})


def is_judged(run_dir, state):
    """Whether record.json is of the run as it stands, and not of an earlier epoch of it, or absent."""
    return read_object(run_dir / 'record.json').get('epochs') == state['epoch']


def name_run(state):
    """SCRIPT-DATASET-SEED-PROTOCOL, e.g. TWTA_4_4_MNIST-mnist-0-constant150, and the choices that are not default."""
    stages = '+'.join(f'{name_stage(stage)}{stage["epochs"]}' for stage in state['stages'])
    choices = ''.join(f'-{choice.replace(" ", "_")}' for choice in list_choices(state['choices']))
    return f'{state["script"]}-{state["dataset"]}-{state["seed"]}-{stages}{choices}'


def name_stage(stage):
    """constant, cosine, short for cosine with geometric augmentation, or constant-geometric."""
    if stage['augmentation'] == 'published':
        return stage['schedule']
    return 'short' if stage['schedule'] == 'cosine' else f'{stage["schedule"]}-{stage["augmentation"]}'


def list_choices(choices):
    """Those that are not the default, as words."""
    usual = complete(dict.fromkeys(choices))
    return [f'{name} {value}' for name, value in choices.items() if value != usual[name]]


def describe_data(dataset):
    return {'name': dataset.name, 'origin': dataset.origin, 'folder': dataset.folder, 'published': dataset.published,
            'sha256': dataset.sha256, 'training_images': len(dataset.train.labels),
            'validation_images': len(dataset.validation.labels)}


def confuse(labels, predicted, n_classes):
    """The confusion matrix [true class, predicted class]."""
    pairs = labels.astype(np.int64) * n_classes + predicted
    return np.bincount(pairs, minlength=n_classes ** 2).reshape(n_classes, n_classes)


def accuracy(confusion):
    return float(np.trace(confusion) / np.sum(confusion))


def write_json(path, record):
    text = json.dumps(record, indent=2, default=str)
    text = re.sub(r'\[[^][{}"]+\]', lambda numbers: ' '.join(numbers[0].split()), text)  # a row a line
    with replacing(path) as part:
        part.write_text(text + '\n')


def environment():
    """Versions, code and machine, for config.json and result.json."""
    root = Path(__file__).resolve().parent.parent
    try:
        code = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=root, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        code = 'unknown'
    return {
        'versions': {'python': platform.python_version(), **dict(installed(PACKAGES))},
        'code': code,
        'machine': {'processor': processor.name(), 'kind': processor.kind(), 'cores': processor.available_cores(),
                    'system': platform.platform()},
        'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
    }


def installed(packages):
    """Those of the packages that are there, each with its version; importing none."""
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            yield package, version(package)


def warn_of_changes(run_dir, precision, deterministic):
    """A line where a run that is continued was trained otherwise, by the flags that no checkpoint holds."""
    config = read_config(run_dir)
    if config.get('precision', precision) != precision:
        say(f'WARNING: the last command trained in {str(config["precision"])[:20]!r}, this one does in {precision!r}; '
            'see --precision')
    if config['flags'].get('deterministic') and not deterministic:
        say('WARNING: the last command trained with --deterministic, this one does without')


def read_object(path):
    """A JSON file as a dictionary, empty where it is no object, or absent: what a run can do without."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_config(run_dir):
    """config.json of a run, without what is not as a run writes it."""
    config = read_object(run_dir / 'config.json')
    flags = config.get('flags')
    if not isinstance(flags, dict) or not isinstance(flags.get('choices'), dict):
        config['flags'] = {}
    return config


def write_log(path, history):
    """log.csv, a row an epoch, from the state's history: rewritten whole, no epoch is missing or there twice."""
    write_csv(path, FIELDS, [{field: row[field] for field in FIELDS} for row in history])


def write_csv(path, fields, rows):
    with replacing(path) as part, open(part, 'w', newline='') as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def draw_curve(title, history):
    """Loss and accuracies by epoch."""
    from matplotlib.figure import Figure  # here: only some commands draw
    from matplotlib.ticker import MaxNLocator

    epochs = [row['epoch'] for row in history]
    figure = Figure(figsize=(10, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    marker = '.' if len(epochs) < 40 else None
    losses = [row['loss'] for row in history]
    left.plot(epochs, losses, marker=marker)
    left.set(xlabel='epoch', ylabel='training loss (cross-entropy)',
             yscale='log' if max(losses) > 10 * min(losses) else 'linear')
    for key, label in (('training_accuracy', 'training'), ('validation_accuracy', 'validation')):
        points = [(row['epoch'], 100 * row[key]) for row in history if row[key] is not None]
        if points:
            right.plot(*zip(*points, strict=True), marker=marker, label=label)
    right.set(xlabel='epoch', ylabel='accuracy (%)')
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.suptitle(title)
    return figure


def draw_confusion(title, classes, confusion):
    """The confusion matrix [true class, predicted class], with the accuracy of each class."""
    from matplotlib.figure import Figure

    shares = confusion / confusion.sum(axis=1, keepdims=True).clip(1)
    figure = Figure(figsize=(8, 7), layout='constrained')
    axes = figure.subplots()
    axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    for (true, predicted), share in np.ndenumerate(shares):
        axes.text(predicted, true, confusion[true, predicted], ha='center', va='center', fontsize=9,
                  color='white' if share > 0.5 else 'black')
    axes.set(xlabel='predicted class', ylabel='true class, and the accuracy on it')
    figure.suptitle(title)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha='right')
    axes.set_yticks(range(len(classes)), [f'{name}  {share:.1%}' for name, share in
                                          zip(classes, shares.diagonal(), strict=True)])
    return figure


def save_picture(path, draw, *arguments):
    """Write the figure that draw(*arguments) returns, and return whether it could be made.

    A picture is no result: if matplotlib is absent, broken or set up so that it fails, a line names the cause and the
    command goes on. Texts are drawn as they are: names hold characters that LaTeX and mathtext would read.
    """
    try:
        import matplotlib  # here: only some commands draw

        with matplotlib.rc_context({'text.usetex': False, 'text.parse_math': False}), replacing(path) as part:
            draw(*arguments).savefig(part, format='png', dpi=120)
        return True
    except Exception as error:  # of any kind: matplotlib's settings run code of others
        cause = describe_fault(error) if isinstance(error, OSError) else str(error) or type(error).__name__
        say(f'no picture {path}: {in_a_line(cause)[:200]}')
        return False


class Events:
    """TensorBoard events in the run directory, a point an epoch."""

    def __init__(self, run_dir, first_epoch):
        from twta.tf1 import tf  # here: packed inference records its result without TensorFlow

        self.tf = tf
        self.writer = tf.summary.FileWriter(str(run_dir))
        start = tf.SessionLog(status=tf.SessionLog.START)  # TensorBoard drops what a killed run wrote beyond
        self.writer.add_session_log(start, first_epoch)

    def add(self, row):
        values = [self.tf.Summary.Value(tag=field, simple_value=row[field]) for field in FIELDS[1:]
                  if row[field] is not None]
        self.writer.add_summary(self.tf.Summary(value=values), row['epoch'])
        self.writer.flush()


def save_weights(path, net, session):
    """model.npz: every parameter of the network by variable name, in TensorLayer's own form."""
    from twta.tf1 import tl

    with replacing(path) as part:
        tl.files.save_npz_dict(net.all_params, str(part), session)


def read_weights(path, net):
    """A model.npz as arrays by variable name; TwtaError where they are not finite float32 of the network's shapes."""
    def check(headers):
        check_shapes(f'--weights {path}', net, {name: list(shape) for name, (shape, _) in headers.items()})
        for name, (_, kind) in headers.items():
            if kind != np.float32:
                raise TwtaError(f'--weights {path}: {name} is {kind}, weights are float32')

    try:
        weights = arrays.read_npz(path, check)
    except PermissionError:
        raise
    except arrays.UNREADABLE:
        raise TwtaError(f'--weights {path}: not an npz file of weights, or damaged; a training writes model.npz into '
                        'its --run_dir') from None
    wrong = [name for name, value in weights.items() if not is_sound(name, value)]
    if wrong:
        raise TwtaError(f'--weights {path}: {wrong[0]} holds NaN, infinity or a negative variance')
    return weights


def is_sound(name, value):
    """Whether a parameter can be that of a training: finite, and a variance not negative."""
    return np.isfinite(value).all() and not ('moving_variance' in name and (value < 0).any())


def check_keys(what, entry, keys):
    """Raises ValueError where a JSON object lacks one of the keys, or has no value of its kind there.

    keys: by name, a type, or a tuple of types, or a function that says whether a value will do.
    """
    if not isinstance(entry, dict):
        raise ValueError(f'{what} is no JSON object')
    for key, kind in keys.items():
        value = entry.get(key)
        if key not in entry or not (isinstance(value, kind) if isinstance(kind, type | tuple) else kind(value)):
            raise ValueError(f'{key} of {what} is {"absent" if key not in entry else repr(value)[:50]}')


def check_choices(choices):
    """Raises ValueError where one is not a value of a flag that chooses between networks."""
    for name, value in choices.items():
        if not is_choice(name, value):
            raise ValueError(f'--{name} {value}'[:80])


def are_objects(value):
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def are_shares(value):
    """Whether it is what experiment.measure_shares returns: two numbers by kind and layer."""
    return isinstance(value, dict) and all(
        isinstance(layers, dict) and all(isinstance(pair, list) and len(pair) == 2 and all(map(is_finite, pair))
                                         for pair in layers.values()) for layers in value.values())


def is_natural(value):
    return type(value) is int and 0 <= value < 2 ** 31


def is_finite(value):
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


STAGE_KEYS = {'first_epoch': is_natural, 'epochs': is_natural, 'learning_rate': is_finite,
              'batch_size': lambda value: is_natural(value) and value > 0,
              **{name: values.__contains__ for name, values in WAYS.items()}}


def check_shapes(source, net, found):
    """Raises TwtaError where the shapes that a source has, by variable name, are not those of the network."""
    shapes = {variable.name: variable.shape.as_list() for variable in net.all_params}
    for name in sorted(shapes.keys() | found.keys()):
        if found.get(name) != shapes.get(name):
            raise TwtaError(f'{source} is of another network: {name} is {found.get(name, "absent")} there and '
                            f'{shapes.get(name, "absent")} here')
