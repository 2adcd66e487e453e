"""Checkpoints: everything that resuming needs, in one tf.train.Saver file that is complete or absent.

Beside the variables (latent weights, Adam's slots, moving moments) a checkpoint holds the State of the run as JSON.
Seed and epoch are the whole random state: the shuffle and the augmentation of each epoch are drawn from them.

Order of writing: the files of the new checkpoint; then the index `checkpoint`, which names it; then old files are
removed. Before each step, the step before is on the disk. After a kill or a power cut at any moment, the index names a
whole checkpoint.
"""
import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path

from twta import TwtaError, files
from twta.graph.tf1 import tf
from twta.terminal import say
from twta.training import bundle, run_directory
from twta.training.state import FORMAT, State, check_keys, is_natural
from twta.training.weights import check_shapes

UNREADABLE = ValueError, KeyError, TypeError, IndexError, RuntimeError, OSError, tf.errors.OpError  # by TensorFlow
INDEX = {'last': 'checkpoint', 'best': 'checkpoint_best'}  # the files that name the newest checkpoint of each kind
KEPT = {'last': 2, 'best': 1}  # number of checkpoints
SAVED = re.compile(r'(?P<name>(?P<which>last|best)-\d+(\.\d+)?)\.(index|data-\d+-of-\d+)')  # Saver's files
HALF_WRITTEN = re.compile(r'(last|best)-\d+(\.\d+)?(_temp|\..*\.tempstate\d+)'
                          rf'|\.part\.\d+\.({run_directory.OURS.pattern})')  # by Saver, and by files.replacing


class Checkpoints:
    """Writes the checkpoints of one run and keeps the last two and the best. Build it once the graph is complete."""

    def __init__(self, run_dir):
        self.run_dir = run_dir
        with tf.device('/cpu:0'):
            state = tf.get_variable('run_state', initializer=tf.constant('{}'), trainable=False)
            self.text = tf.placeholder(tf.string, [])
            self.set_state = state.assign(self.text)
        trained = [variable for variable in tf.global_variables() if variable.dtype.base_dtype.is_floating]
        self.finite = tf.reduce_all([tf.reduce_all(tf.is_finite(variable)) for variable in trained])
        self.saver = tf.train.Saver(max_to_keep=None)
        remove_leftovers(run_dir)

    def save(self, session, state, is_best):
        """Save weights and state.

        Raises FloatingPointError if a weight, a slot of Adam or a moment is not finite, and FileNotFoundError if the
        run directory has vanished.
        """
        if not self.run_dir.exists():  # Saver would make it again, without the lock
            raise FileNotFoundError(errno.ENOENT, 'the directory has vanished', str(self.run_dir))
        if not session.run(self.finite):
            raise FloatingPointError('the weights are no longer finite numbers')
        session.run(self.set_state, {self.text: json.dumps(state.to_json())})
        number = f'{state.epoch}.{state.part.steps}' if state.part else state.epoch
        for which in ('best', 'last') if is_best else ('last',):  # after a kill in between, the epoch is run again
            name = f'{which}-{number}'
            with working_in(self.run_dir):
                self.saver.save(session, f'./{name}', write_meta_graph=False, write_state=False)
            self.put_in_index(which, name)

    def put_in_index(self, which, name):
        """Name a checkpoint, whose files are written, in the index as the newest; remove those that are not kept."""
        for path in self.run_dir.glob(f'{name}.*'):
            files.sync(path)
        files.sync(self.run_dir)
        names = [Path(path).name for path in listed(self.run_dir, which)]
        names = [*(other for other in names if other != name), name][-KEPT[which]:]
        lines = [f'model_checkpoint_path: "{name}"', *(f'all_model_checkpoint_paths: "{name}"' for name in names)]
        with files.replacing(self.run_dir / INDEX[which]) as part:
            part.write_text('\n'.join(lines) + '\n')
        remove_replaced(self.run_dir)


@contextlib.contextmanager
def working_in(folder):
    """Make a folder the working directory, so that TensorFlow gets names without a folder.

    TensorFlow takes [, * and ? in the path of a checkpoint for a pattern, and would not find it, or find others.
    """
    try:
        before = os.getcwd()
    except FileNotFoundError:  # removed meanwhile; every path of a command is absolute by now
        before = folder
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def reading(path):
    """Yield TensorFlow's reader of the checkpoint `path`; raises one of UNREADABLE if it is damaged."""
    path = Path(path)
    bundle.check(Path(f'{path}.index'), Path(f'{path}.data-00000-of-00001'))
    with working_in(path.parent):
        yield tf.train.load_checkpoint(f'./{path.name}')


def listed(run_dir, which):
    """Return the paths of the checkpoints of a kind, 'last' or 'best', oldest first.

    The index file lists them. If the index is lost or damaged, or names a checkpoint that is not there, the checkpoints
    found in the folder are added.
    """
    try:
        index = (run_dir / INDEX[which]).read_text()
        names = re.findall(rf'^all_model_checkpoint_paths: "({which}-\d+(?:\.\d+)?)"$', index, re.MULTILINE)
    except (OSError, ValueError):
        names = []
    if not (names and is_there(run_dir / names[-1])):
        there = [path.stem for path in run_dir.glob(f'{which}-*.index') if SAVED.fullmatch(path.name)]
        names = sorted({*names, *there}, key=lambda name: [int(part) for part in name.partition('-')[2].split('.')])
    return [str(run_dir / name) for name in names]


def is_there(path):
    return Path(f'{path}.index').exists()


def remove_leftovers(run_dir):
    """Remove checkpoints that the index no longer lists, and what kills have left of other files.

    For the start of a training: later, an evaluation beside it may be writing such files.
    """
    remove_replaced(run_dir)
    for path in run_dir.iterdir():
        if HALF_WRITTEN.fullmatch(path.name):
            remove(path)


def remove_replaced(run_dir):
    """Remove checkpoints that the index no longer lists."""
    names = {which: [Path(path).name for path in listed(run_dir, which)] for which in INDEX}
    for path in run_dir.iterdir():
        saved = SAVED.fullmatch(path.name)
        if saved and names[saved['which']] and saved['name'] not in names[saved['which']]:
            remove(path)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def find(run_dir, which):
    """Return the path of the newest intact checkpoint of a kind, 'last' or 'best'.

    Every byte is read: TensorFlow keeps a checksum of each tensor and of the index. Raises TwtaError if there is none.
    """
    paths = listed(run_dir, which)
    otherwise = ('leave out --checkpoint best' if which == 'best' else
                 'train again with --resume False --mode training')
    if (run_dir / 'model.npz').exists():
        otherwise += f', or try --weights {run_dir / "model.npz"}'
    if not paths:
        raise TwtaError(f'{run_dir / INDEX[which]} names no checkpoint, and none is there; {otherwise}')
    for path in reversed(paths):
        try:
            with reading(path) as reader:
                for name in reader.get_variable_to_shape_map():
                    reader.get_tensor(name)
            if path != paths[-1]:
                say(f'{path}: whole, and used in its place')
            return path
        except FileNotFoundError:
            say(f'{path}: damaged (a file of it is absent)')
        except UNREADABLE as error:
            say(f'{path}: damaged ({first_line(error)})')
    raise TwtaError(f'{paths[-1]}: damaged, and no older checkpoint is whole; {otherwise}')


def first_line(error):
    return str(error).partition('\n')[0] or type(error).__name__


def read_state(path, script, dataset):
    """Return the State in a checkpoint.

    Raises TwtaError if it is of another script, data set or version, or if it cannot be read.
    """
    try:
        with reading(path) as reader:
            text = reader.get_tensor('run_state')
    except UNREADABLE as error:
        raise TwtaError(f'{path}: not a checkpoint of these scripts ({first_line(error)})') from None
    return parse_state(path, text, script, dataset)


def parse_state(path, text, script, dataset):
    """Return the State in a JSON text; path names the checkpoint in errors, which are those of read_state."""
    try:
        entry = json.loads(text)
        check_keys('its state', entry, {'format': is_natural, 'script': str, 'dataset': str})
        if entry['format'] != FORMAT:
            age, remedy = ('a newer', 'update them') if entry['format'] > FORMAT else ('an older', 'train again')
            raise TwtaError(f'{path}: written by {age} version of these scripts (format {entry["format"]}, this one '
                            f'reads {FORMAT}); {remedy}')
        found = entry['script'], entry['dataset']
        if found != (script, dataset):
            raise TwtaError(f'{path}: a checkpoint of {found[0]} on {found[1]}, not of {script} on {dataset}; choose '
                            'another --run_dir')
        return State.from_json(entry)
    except UNREADABLE as error:
        raise TwtaError(f'{path}: not a checkpoint of these scripts ({first_line(error)})') from None


def restore(session, path, net, variables):
    """Set the variables from a checkpoint; raises TwtaError if the network in it is another one than net."""
    names = {variable.op.name for variable in net.all_params}
    with reading(path) as reader, session.graph.as_default():
        shapes = reader.get_variable_to_shape_map()
        check_shapes(path, net, {f'{name}:0': shape for name, shape in shapes.items() if name in names})
        tf.train.Saver(variables).restore(session, f'./{Path(path).name}')
