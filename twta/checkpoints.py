"""Checkpoints: everything that resuming needs, in one tf.train.Saver file that is complete or absent.

Beside the variables (latent weights, Adam slots, moving moments) a checkpoint holds the run's state as JSON text: its
script and its choices, data set and validation split, seed, epoch, what a part of the next one has come to, stages
(learning rates and schedules in order), history and best validation accuracy. The random state needs no more than seed
and epoch, from which each epoch's shuffle and augmentation are drawn. Saver writes a new file, then the name of it into
`checkpoint`, then removes an old one: a kill at any moment leaves the previous checkpoint usable.
"""
import json
import shutil
from pathlib import Path

from twta import TwtaError
from twta.records import check_shapes
from twta.tf1 import tf

FORMAT = 4  # 1 knew no --validation, no --schedule and no part of an epoch, 2 no choices, 3 no --augmentation
KEYS = {'format', 'script', 'dataset', 'data_sha256', 'seed', 'validation', 'epoch', 'part', 'stages', 'history',
        'best_validation_accuracy', 'choices'}
UNREADABLE = ValueError, KeyError, TypeError, IndexError, RuntimeError, OSError, tf.errors.OpError  # by TensorFlow
INDEX = {'last': 'checkpoint', 'best': 'checkpoint_best'}  # the files that name the newest checkpoint of each kind


class Checkpoints:
    """Writes the checkpoints of one run, keeping the last two and the best; to be built when the graph is complete."""

    def __init__(self, run_dir):
        self.run_dir = run_dir
        with tf.device('/cpu:0'):
            state = tf.get_variable('run_state', initializer=tf.constant('{}'), trainable=False)
            self.text = tf.placeholder(tf.string, [])
            self.set_state = state.assign(self.text)
        self.savers = {which: tf.train.Saver(max_to_keep=keep, save_relative_paths=True)
                       for which, keep in (('last', 2), ('best', 1))}
        for leftover in run_dir.glob('*_temp'):  # of a save that was killed
            shutil.rmtree(leftover)
        for which, saver in self.savers.items():
            saver.recover_last_checkpoints(listed(run_dir, which))

    def save(self, session, state, is_best):
        session.run(self.set_state, {self.text: json.dumps(state)})
        name = f'{state["epoch"]}.{state["part"]["steps"]}' if state['part'] else state['epoch']
        for which in ('best', 'last') if is_best else ('last',):  # after a kill in between, the epoch is run again
            self.savers[which].save(session, str(self.run_dir / f'{which}-{name}'), latest_filename=INDEX[which],
                                    write_meta_graph=False)


def listed(run_dir, which):
    """The checkpoints of a kind, 'last' or 'best', oldest first; only those of the run directory itself."""
    try:
        index = tf.train.get_checkpoint_state(str(run_dir), INDEX[which])
    except ValueError:  # the file is empty
        return []
    paths = index.all_model_checkpoint_paths if index else []
    return [path for path in paths if Path(path).parent == run_dir]


def find(run_dir, which):
    """The path of the newest intact checkpoint of a kind, 'last' or 'best'; TwtaError where there is none.

    Every byte is read: TensorFlow keeps a checksum of each tensor and of the index.
    """
    paths = listed(run_dir, which)
    if not paths:
        raise TwtaError(f'{run_dir / INDEX[which]} names no checkpoint; start again with --resume False')
    for path in reversed(paths):
        try:
            reader = tf.train.load_checkpoint(path)
            for name in reader.get_variable_to_shape_map():
                reader.get_tensor(name)
            return path
        except UNREADABLE as error:
            print(f'{path}: damaged ({first_line(error)})', flush=True)
    raise TwtaError(f'{paths[-1]}: damaged, and no older checkpoint is whole; start again with --resume False')


def first_line(error):
    return str(error).partition('\n')[0] or type(error).__name__


def read_state(path, script, dataset):
    """The run's state in a checkpoint; TwtaError where it is of another script or data set, or cannot be read."""
    try:
        state = json.loads(tf.train.load_checkpoint(path).get_tensor('run_state'))
        found = state['script'], state['dataset']
        is_newer = state['format'] > FORMAT
        if state['format'] == 1:
            state.update(format=2, part=None, validation={'mnist': 10000, 'digits': 297}[state['dataset']])
            for stage in state['stages']:
                stage['schedule'] = 'constant'
        if state['format'] == 2:
            state.update(format=3, choices={})
        if state['format'] == 3:
            state['format'] = FORMAT
            for stage in state['stages']:
                stage.update(augmentation='published', protocol='published')
        absent = KEYS - state.keys()
        if absent and not is_newer:
            raise KeyError(f'its state lacks {min(absent)}')
    except UNREADABLE as error:
        raise TwtaError(f'{path}: not a checkpoint of these scripts ({first_line(error)})') from None
    if is_newer:
        raise TwtaError(f'{path}: written by a newer version of these scripts (format {state["format"]}, this one '
                        f'reads up to {FORMAT}); update them')
    if found != (script, dataset):
        raise TwtaError(f'{path}: a checkpoint of {found[0]} on {found[1]}, not of {script} on {dataset}; choose '
                        'another --run_dir')
    return state


def restore(session, path, net, variables):
    """Sets the variables from a checkpoint; TwtaError where the network in it is not this one."""
    names = {variable.op.name for variable in net.all_params}
    shapes = tf.train.load_checkpoint(path).get_variable_to_shape_map()
    check_shapes(path, net, {f'{name}:0': shape for name, shape in shapes.items() if name in names})
    with session.graph.as_default():
        tf.train.Saver(variables).restore(session, path)
