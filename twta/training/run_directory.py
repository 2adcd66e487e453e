"""The run directory: its lock, config.json, log.csv, curve.png and TensorBoard events.

Each file but the events is written beside its name and moved into place, so that a kill leaves the previous one whole.
"""
import contextlib
import os
import platform
import re
import time

from twta import UsageError, files, in_a_line
from twta.graph.tf1 import tf
from twta.options import is_fp, is_option_value
from twta.results import read_object, write_csv
from twta.terminal import say
from twta.training.state import FIELDS

OURS = re.compile(r'checkpoint(_best)?|(last|best)-\d+(\.\d+)?\.(index|data-\d+-of-\d+)|events\.out\.tfevents\..*'
                  r'|(config|record|result(-(best|weights|packed))?)\.json|confusion(-(best|weights|packed))?\.png'
                  r'|log\.csv|curve\.png|model\.npz|cost\.(csv|png)'
                  r'|spikes-(spatial|temporal|rest)(-best)?(-(noise|images)-.*)?')


@contextlib.contextmanager
def locked(run_dir):
    """Hold run_dir/lock for a training; raises UsageError if another process holds it."""
    def refuse():
        raise UsageError(f'--run_dir {run_dir}: another training is writing there; wait for its end, or choose another '
                         'directory') from None

    with files.holding(run_dir / 'lock', refuse):
        yield


def check_is_ours(run_dir):
    """Raise UsageError if files with the names of a run's files are in the folder, but no sign of a run."""
    found = own_files(run_dir)
    signs = [path for path in found if path.suffix == '.json' and 'script' in read_object(path)]
    lock = run_dir / 'lock'
    if found and not signs and not (lock.is_file() and not lock.stat().st_size):
        raise UsageError(f'--run_dir {run_dir}: {found[0].name} there is not of a run; choose an empty or a new folder')


def own_files(run_dir):
    """Return the files and folders in a run directory that have the name of one that a run writes."""
    return sorted(path for path in run_dir.iterdir() if OURS.fullmatch(path.name)) if run_dir.exists() else []


def move_aside(run_dir):
    """Move the files of an earlier run into run_dir/earlier-1 (or -2, ...); return that folder, or None without files.

    Only files with the names that a run writes are moved.
    """
    found = own_files(run_dir)
    if not found:
        return None
    number = 1
    while (run_dir / f'earlier-{number}').exists():
        number += 1
    earlier = run_dir / f'earlier-{number}'
    earlier.mkdir()
    for path in found:
        path.rename(earlier / path.name)
    files.sync(earlier)
    files.sync(run_dir)
    return earlier


def has_record(run_dir, state):
    """Return whether record.json is of the last epoch of the state: it may be absent, or of an earlier epoch."""
    return read_object(run_dir / 'record.json').get('epochs') == state.epoch


def has_ended(run_dir, state):
    """Return whether the last stage of the state has all its epochs and its record."""
    return state.epoch >= state.stages[-1].last_epoch and has_record(run_dir, state)


def warn_of_changes(run_dir, precision, args):
    """Print a warning per flag that differs from the last command of the run and that no checkpoint holds.

    args    the flags: deterministic, workers, batch_norm
    """
    config = read_config(run_dir)
    if config.get('precision', precision) != precision:
        say(f'WARNING: the last command trained in {str(config["precision"])[:20]!r}, this one does in {precision!r}; '
            'see --precision')
    before = config['flags'].get('deterministic', args.deterministic)
    if bool(before) != args.deterministic:
        one, other = ('with', 'without') if before else ('without', 'with')
        say(f'WARNING: the last command trained {one} --deterministic, this one does {other}')
    for name, value in ('workers', args.workers.count), ('batch_norm', args.batch_norm):
        before = config['flags'].get(name, value)
        if before != value and (name == 'workers' or None not in (before, value)):
            say(f'WARNING: the last command trained with {str(before)[:20]} {name}, this one does with {value}: its '
                'numbers differ')


def read_config(run_dir):
    """Return config.json of a run; its flags and the name of its script are empty if they are not what a run writes."""
    config = read_object(run_dir / 'config.json')
    if not isinstance(config.get('script'), str):
        config['script'] = ''
    flags = config.get('flags')
    if not isinstance(flags, dict) or not isinstance(flags.get('choices'), dict):
        config['flags'] = {}
    return config


def read_options(config):
    """Return the options of the network of a run, by name, from read_config; values that are not valid are left out.

    {} if it does not tell them. An FP script has no --quantize: what it trains is --quantize nothing.
    """
    options = {'quantize': 'nothing'} if is_fp(config['script']) else {}
    choices = config['flags'].get('choices', {})
    return options | {name: value for name, value in choices.items() if is_option_value(name, value)}


def other_dataset(config, dataset):
    """Return the data set that a run, by read_config, was trained on; None if it is `dataset`, or is not told."""
    trained_on = config['flags'].get('dataset')
    return trained_on[:40] if isinstance(trained_on, str) and trained_on != dataset else None


def write_log(path, history):
    """Write log.csv, a row per epoch. It is rewritten as a whole, so no epoch is missing or there twice."""
    write_csv(path, FIELDS, [{field: row[field] for field in FIELDS} for row in history])


def draw_curve(title, history):
    """Return a figure of loss and accuracies by epoch."""
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


class Events:
    """TensorBoard events in the run directory, a point per epoch.

    tf.summary.FileWriter writes in a thread of its own, which shows a traceback on a full disk and then ends the
    training. Here a fault ends the events: a line names it.
    """

    def __init__(self, run_dir, first_epoch):
        path = run_dir / f'events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}'
        self.writer = None
        with self.optional():
            self.writer = tf.python_io.TFRecordWriter(str(path))
        self.write(file_version='brain.Event:2')
        # TensorBoard drops what a killed run wrote beyond this epoch
        self.write(step=first_epoch, session_log=tf.SessionLog(status=tf.SessionLog.START))

    @contextlib.contextmanager
    def optional(self):
        """Do something with the writer; if that fails, say so and go on without events."""
        try:
            yield
        except (tf.errors.OpError, OSError, RuntimeError) as error:
            say(f'no TensorBoard events from here on: {in_a_line(str(error))[:200]}')
            self.writer = None

    def write(self, **fields):
        """Write a tf.Event with these fields, unless an earlier one has failed."""
        if self.writer:
            with self.optional():
                self.writer.write(tf.Event(wall_time=time.time(), **fields).SerializeToString())
                self.writer.flush()

    def add(self, row):
        values = [tf.Summary.Value(tag=field, simple_value=row[field]) for field in FIELDS[1:]
                  if row[field] is not None]
        self.write(step=row['epoch'], summary=tf.Summary(value=values))
