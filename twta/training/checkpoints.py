"""Checkpoints: everything that resuming needs, in one tf.train.Saver file that is complete or absent.

Beside the variables (latent weights, Adam's slots, moving moments) a checkpoint holds the State of the run as JSON.
Seed and epoch are the whole random state: the shuffle and the augmentation of each epoch are drawn from them. Saver
first writes a new file, then its name into the index `checkpoint`, and then removes an old file. A kill at any moment
therefore leaves the previous checkpoint usable.
"""
import errno
import json
import math
import re
import shutil
from pathlib import Path

from twta import TwtaError
from twta.graph.tf1 import tf
from twta.training.state import FORMAT, State, check_keys, is_natural
from twta.training.weights import check_shapes

UNREADABLE = ValueError, KeyError, TypeError, IndexError, RuntimeError, OSError, tf.errors.OpError  # by TensorFlow
INDEX = {'last': 'checkpoint', 'best': 'checkpoint_best'}  # the files that name the newest checkpoint of each kind
SAVED = re.compile(r'(?P<name>(?P<which>last|best)-\d+(\.\d+)?)\.(index|data-\d+-of-\d+)')  # Saver's files
HALF_WRITTEN = re.compile(r'(last|best)-\d+(\.\d+)?(_temp|\..*\.tempstate\d+)|checkpoint(_best)?\.tmp\w+|\.part\..*')


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
        self.savers = {which: tf.train.Saver(max_to_keep=keep, save_relative_paths=True)
                       for which, keep in (('last', 2), ('best', 1))}
        remove_leftovers(run_dir)
        for which, saver in self.savers.items():
            saver.recover_last_checkpoints(listed(run_dir, which))

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
        name = f'{state.epoch}.{state.part.steps}' if state.part else state.epoch
        for which in ('best', 'last') if is_best else ('last',):  # after a kill in between, the epoch is run again
            self.savers[which].save(session, str(self.run_dir / f'{which}-{name}'), latest_filename=INDEX[which],
                                    write_meta_graph=False)


def listed(run_dir, which):
    """Return the paths of the checkpoints of a kind, 'last' or 'best', oldest first.

    The index file lists them; paths outside of the run directory are left out. If the index is lost or damaged, or
    names a checkpoint that is not there, the checkpoints found in the folder are added.
    """
    try:
        index = tf.train.get_checkpoint_state(str(run_dir), INDEX[which])
        paths = [path for path in index.all_model_checkpoint_paths if Path(path).parent == run_dir]
    except (ValueError, AttributeError, tf.errors.OpError):  # the index is empty, no list, absent, or no file
        paths = []
    if paths and Path(f'{paths[-1]}.index').exists():
        return paths
    there = [str(path.with_suffix('')) for path in run_dir.glob(f'{which}-*.index')]
    names = {Path(path).name for path in (*paths, *there) if SAVED.fullmatch(f'{Path(path).name}.index')}
    return [str(run_dir / name) for name in
            sorted(names, key=lambda name: [int(number) for number in name.partition('-')[2].split('.')])]


def remove_leftovers(run_dir):
    """Remove what kills have left: half-written files, and checkpoints that the index no longer lists."""
    names = {which: [Path(path).name for path in listed(run_dir, which)] for which in INDEX}
    for path in run_dir.iterdir():
        saved = SAVED.fullmatch(path.name)
        is_replaced = saved and names[saved['which']] and saved['name'] not in names[saved['which']]
        if is_replaced or HALF_WRITTEN.fullmatch(path.name):
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
            reader = tf.train.load_checkpoint(path)
            shapes, kinds = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
            declared = sum(math.prod(shape) * kinds[name].size for name, shape in shapes.items())
            if declared > Path(f'{path}.data-00000-of-00001').stat().st_size:  # before so much memory is taken
                raise ValueError(f'it declares {declared:,} bytes, more than there are')
            for name in shapes:
                reader.get_tensor(name)
            if path != paths[-1]:
                print(f'{path}: whole, and used in its place', flush=True)
            return path
        except UNREADABLE as error:
            print(f'{path}: damaged ({first_line(error)})', flush=True)
    raise TwtaError(f'{paths[-1]}: damaged, and no older checkpoint is whole; {otherwise}')


def first_line(error):
    return str(error).partition('\n')[0] or type(error).__name__


def read_state(path, script, dataset):
    """Return the State in a checkpoint.

    Raises TwtaError if it is of another script, data set or version, or if it cannot be read.
    """
    try:
        text = tf.train.load_checkpoint(path).get_tensor('run_state')
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
    shapes = tf.train.load_checkpoint(path).get_variable_to_shape_map()
    check_shapes(path, net, {f'{name}:0': shape for name, shape in shapes.items() if name in names})
    with session.graph.as_default():
        tf.train.Saver(variables).restore(session, path)
