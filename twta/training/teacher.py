"""The teacher of --teacher: a full-precision network of the same script, whose probabilities a network learns to give.

Source: "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), section 2. Teacher and student see the same
augmented images. docs/experiments.md has what it gains.
"""
import functools
from pathlib import Path

from twta import UsageError
from twta.data.download import digest
from twta.graph.tf1 import tf
from twta.options import with_defaults
from twta.training import run_directory

SHARE = 0.7  # of the teacher in the loss; the labels have the rest
TEMPERATURE = 2.0  # of both probabilities
SCOPE = 'teacher'  # of its variables


def describe(path):
    """Return what a run's state keeps of a teacher: file and SHA-256; None without one."""
    return {'file': str(path.resolve()), 'sha256': digest(path)} if path else None


def find(state, flag):
    """Return the path of the teacher of a run, or None.

    flag    path of --teacher, or None

    Raises UsageError if the run has another teacher, or if its file is gone or has changed.
    """
    if not state.teacher:
        if flag:
            raise UsageError(f'--teacher {flag}: the run was started without a teacher; start a new one')
        return None
    path = Path(flag or state.teacher['file'])
    if not path.is_file() or digest(path) != state.teacher['sha256']:
        reason = 'is another file now' if path.is_file() else 'no such file'
        raise UsageError(f'--teacher {path}: {reason}, but the run learns from one with the SHA-256 '
                         f'{state.teacher["sha256"]}; give its path')
    return path


def model_of(path, model):
    """Return the model of a teacher, a function of x and is_train.

    path     of its model.npz
    model    of the student, functools.partial of the script's model with its options

    Raises UsageError if config.json beside the file does not tell that it was trained with --quantize nothing.
    """
    trained_with = run_directory.read_config(path.parent)['flags'].get('choices', {})
    if trained_with.get('quantize') != 'nothing':
        reason = (f'trained with --quantize {trained_with["quantize"]}' if 'quantize' in trained_with else
                  'config.json beside it does not tell that it was trained with --quantize nothing')
        raise UsageError(f'--teacher {path}: {reason}; give the model.npz in the run directory of such a training')
    options = with_defaults(dict.fromkeys(model.keywords))
    pooling = trained_with.get('pooling', model.keywords['pooling'])
    return functools.partial(model.func, **{**options, 'pooling': pooling, 'quantize': 'nothing', 'exact': False})


def build(model, x):
    """Return the teacher on images x as a TensorLayer layer. No checkpoint holds its variables, and none is trained."""
    def frozen(getter, *arguments, **named):
        return getter(*arguments, **{**named, 'trainable': False, 'collections': [tf.GraphKeys.LOCAL_VARIABLES]})

    with tf.variable_scope(SCOPE, custom_getter=frozen):
        return model(x, False)


def mixed_loss(labels_loss, student, teacher):
    """Return the loss of a batch: the mean cross-entropy with the labels and with the teacher, weighted by SHARE.

    labels_loss         mean cross-entropy with the labels
    student, teacher    logits [batch, classes]
    """
    target = tf.stop_gradient(tf.nn.softmax(tf.cast(teacher, tf.float32) / TEMPERATURE))
    found = tf.nn.softmax_cross_entropy_with_logits(labels=target, logits=tf.cast(student, tf.float32) / TEMPERATURE)
    return (1 - SHARE) * labels_loss + SHARE * TEMPERATURE ** 2 * tf.reduce_mean(found)
