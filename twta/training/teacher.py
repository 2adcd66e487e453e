"""The teacher of --teacher: the same network in full precision, whose values a network learns to give.

It learns the teacher's probabilities ("Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2) and,
layer by layer, its hints: the sums that the teacher's activations get ("FitNets", arXiv:1412.6550, section 2.2; both
networks have the same layers, so no regressor stands between them). Teacher and student see the same augmented images.
docs/experiments.md has what each gains.
"""
import functools
from pathlib import Path

from twta import UsageError
from twta.files import digest, in_real_folder
from twta.graph.fast import compiled
from twta.graph.tf1 import tf
from twta.options import is_full_precision, with_defaults
from twta.training import run_directory
from twta.training.blocks import read_blocks

SHARE = 0.7  # of the teacher in the loss; the labels have the rest
TEMPERATURE = 2.0  # of both probabilities
TINY = 1e-12  # least squared length of a map; below, it has no direction
SCOPE = 'teacher'  # of its variables


def describe(path):
    """Return what a run's state keeps of a teacher: file and SHA-256; None without one."""
    return {'file': str(in_real_folder(path)), 'sha256': digest(path)} if path else None


def find(state, flag):
    """Return the path of the teacher of a run; None without one, or if the run has no epochs left to learn from it.

    flag    path of --teacher, or None; it is checked in any case

    Raises UsageError if the run has another teacher, if its file is gone or has changed, or if it was trained on
    another data set.
    """
    if not state.teacher:
        if flag:
            raise UsageError(f'--teacher {flag}: the run was started without a teacher; start a new one')
        return None
    if not flag and state.epoch >= state.stages[-1].last_epoch:
        return None
    path = Path(flag or state.teacher['file'])
    if not path.is_file() or digest(path) != state.teacher['sha256']:
        reason = 'no such file' if not path.is_file() else 'is another file' if flag else 'is another file now'
        raise UsageError(f'--teacher {path}: {reason}, but the run learns from one with the SHA-256 '
                         f'{state.teacher["sha256"]}; give its path')
    other = run_directory.other_dataset(run_directory.read_config(path.parent), state.dataset)
    if other:
        raise UsageError(f'--teacher {path}: trained on --dataset {other}; give one that was trained on '
                         f'{state.dataset}')
    return path


def model_of(path, model):
    """Return the model of a teacher, a function of x and is_train.

    path     of its model.npz
    model    of the student, functools.partial of the script's model with its options

    Raises UsageError if config.json beside the file does not tell that it was trained with --quantize nothing.
    """
    trained_with = run_directory.read_options(run_directory.read_config(path.parent))
    if not is_full_precision(trained_with):
        reason = (f'trained with --quantize {trained_with["quantize"]}' if 'quantize' in trained_with else
                  'config.json beside it does not tell that it was trained with --quantize nothing')
        raise UsageError(f'--teacher {path}: {reason}; give the model.npz in the run directory of such a training')
    options = with_defaults({name: trained_with.get(name) for name in model.keywords})
    return functools.partial(model.func, **options, exact=False)


def build(model, x):
    """Return the teacher on images x as a TensorLayer layer. No checkpoint holds its variables, and none is trained."""
    def frozen(getter, *arguments, **named):
        return getter(*arguments, **{**named, 'trainable': False, 'collections': [tf.GraphKeys.LOCAL_VARIABLES]})

    with tf.variable_scope(SCOPE, custom_getter=frozen):
        return model(x, False)


def mixed_loss(labels_loss, student, teacher):
    """Return the loss of a batch: labels_loss and the teacher's probabilities, weighted by SHARE, and the hints.

    labels_loss         mean cross-entropy with the labels
    student, teacher    last layers of the networks
    """
    pairs = zip(read_blocks(student)[1:-1], read_blocks(teacher)[1:-1], strict=True)
    hints = [unlikeness(learner.batch_norm.outputs, model.batch_norm.outputs) for learner, model in pairs]
    return tf.add_n([distilled(labels_loss, student.outputs, teacher.outputs), *hints])


def distilled(labels_loss, student, teacher):
    """Return the mean cross-entropy with the labels and with the teacher, from the logits [batch, classes] of both."""
    target = tf.stop_gradient(tf.nn.softmax(tf.cast(teacher, tf.float32) / TEMPERATURE))
    found = tf.nn.softmax_cross_entropy_with_logits(labels=target, logits=tf.cast(student, tf.float32) / TEMPERATURE)
    return (1 - SHARE) * labels_loss + SHARE * TEMPERATURE ** 2 * tf.reduce_mean(found)


def unlikeness(x, target):
    """Return 1 - the cosine between the maps of an image in student and teacher, mean over the batch.

    x, target    sums after batch normalisation, [batch, ...]; of each, the mean of all values is subtracted first
    """
    @tf.custom_gradient
    def of(x, target):
        (a, mean), (b, mean_of_target) = centred(x), centred(target)
        product, size, size_of_target = (tf.reduce_sum(pair, 1) for pair in (a * b, a * a, b * b))
        size, size_of_target = tf.maximum(size, TINY), tf.maximum(size_of_target, TINY)
        length = tf.sqrt(size) * tf.sqrt(size_of_target)
        cosine = product / length

        def backward(gradient):
            scale = gradient / tf.cast(tf.size(cosine), tf.float32)
            by_map, by_target = scale * cosine / size, -scale / length
            through_mean = by_map * tf.reduce_sum(a, 1) + by_target * tf.reduce_sum(b, 1)
            through_mean = tf.reduce_sum(through_mean) / tf.cast(tf.size(a), tf.float32)
            offset = -by_map * mean - by_target * mean_of_target - through_mean
            shape = [-1] + [1] * (x.shape.rank - 1)
            return combined(x, target, *(tf.reshape(factor, shape) for factor in (by_map, by_target, offset))), None

        return tf.reduce_mean(1 - cosine), backward

    return of(x, target)


def centred(x):
    """Return the maps as rows minus the mean of all values, float32 [batch, values], and this mean."""
    x = tf.reshape(tf.cast(x, tf.float32), [tf.shape(x)[0], -1])
    mean = tf.reduce_mean(x)
    return x - mean, mean


@compiled
def combined(x, target, by_x, by_target, offset):
    return tf.cast(by_x * tf.cast(x, tf.float32) + by_target * tf.cast(target, tf.float32) + offset, x.dtype)
