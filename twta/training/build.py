"""The graph of a network: as it is evaluated and, over the same variables, as it trains."""
from typing import NamedTuple

from twta.graph import collectives, preprocessing
from twta.graph.tf1 import tf
from twta.graph.variables import MOMENTS, moved
from twta.training import teacher
from twta.training.blocks import value_fractions
from twta.workers import ALONE


class Measures(NamedTuple):
    """Tensors of a network on a batch."""
    loss: tf.Tensor  # the cross-entropy, summed over the batch
    predicted: tf.Tensor  # classes, int32 [batch]
    step: tf.Operation | None = None  # applies Adam to the mean cross-entropy, or to what teacher.mixed_loss returns


class Reduced(NamedTuple):
    """Sums of a training step over all workers, float32, and the step that is made of them."""
    stop: tf.Tensor  # placeholder: above 0 if this worker is to stop
    loss: tf.Tensor  # the cross-entropy, summed over the global batch
    correct: tf.Tensor  # number of predictions
    stopping: tf.Tensor  # above 0 if a worker is to stop
    step: tf.Operation  # applies Adam to the mean gradients and moves the moving averages: the same bits on each worker


class Graph(NamedTuple):
    """A built network."""
    graph: tf.Graph
    images: tf.Tensor  # placeholder, uint8 [batch, height, width, channels]
    labels: tf.Tensor  # placeholder, int32 [batch]
    learning_rate: tf.Tensor  # placeholder
    step: tf.Tensor  # placeholder, the number of the step in the run; with the seed, it decides on the augmentation
    net: object  # the last TensorLayer layer
    evaluation: Measures
    training: Measures | None
    value_fractions: dict | None  # see blocks.value_fractions
    teacher: object  # its last TensorLayer layer, or None
    reduced: Reduced | None  # if there are several workers


def build_graph(model, image_shape, crop, seed, precision=None, augmentation='published', taught_by=None,
                workers=ALONE, patience=0, batch_norm='shard'):
    """Return the Graph of a network; only with a precision it has training and value_fractions.

    model          see twta.command_line.run
    image_shape    height, width and channels of the images; crop: see twta.graph.preprocessing
    seed           of initial weights and augmentation
    precision      tf.float32 or tf.bfloat16, in which the network trains; None: it is only evaluated
    taught_by      model of the teacher, see teacher.model_of, or None
    workers        Workers; patience: seconds until a collective gives up
    batch_norm     moments that batch normalisation trains with: 'shard', of this worker's images, or 'global'
    """
    graph = tf.Graph()
    with graph.as_default():
        tf.set_random_seed(seed)
        images = tf.placeholder(tf.uint8, [None, *image_shape], 'images')
        labels = tf.placeholder(tf.int32, [None], 'labels')
        learning_rate = tf.placeholder(tf.float32, [], 'learning_rate')
        step = tf.placeholder(tf.int32, [], 'step')
        net = model(preprocessing.for_evaluation(images, crop), False)
        evaluation = measure(net, labels)
        training = fractions = teacher_net = reduced = None
        if precision:
            fractions = value_fractions(net)
            x = preprocessing.for_training(images, crop, seed, step, augmentation, workers)
            group = collectives.Group(workers.count, patience)
            if workers.count > 1 and batch_norm == 'global':
                tf.add_to_collection(collectives.OF_BATCH_NORM, group)
            with tf.variable_scope(tf.get_variable_scope(), reuse=True):
                trained = model(tf.cast(x, precision), True)
                training = measure(trained, labels)
            teacher_net = teacher.build(taught_by, tf.cast(x, precision)) if taught_by else None
            with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS) if workers.count == 1 else []):
                loss = training.loss / tf.cast(tf.size(labels), tf.float32)
                if taught_by:
                    loss = teacher.mixed_loss(loss, trained, teacher_net)
                optimizer = tf.train.AdamOptimizer(learning_rate)
                if workers.count == 1:
                    training = training._replace(step=optimizer.minimize(loss))
                else:
                    reduced = reduce(training, labels, optimizer, loss, group)
    return Graph(graph, images, labels, learning_rate, step, net, evaluation, training, fractions, teacher_net, reduced)


def reduce(training, labels, optimizer, loss, group):
    """Return Reduced: one vector with gradients, batch moments, loss and count is summed over the workers."""
    stop = tf.placeholder(tf.float32, [], 'stop')
    correct = tf.reduce_sum(tf.cast(tf.equal(training.predicted, labels), tf.float32))
    gradients, variables = zip(*optimizer.compute_gradients(loss), strict=True)
    moving, batch = zip(*tf.get_collection(MOMENTS), strict=True)
    *sums, total, right, stopping = collectives.add_up_all([*gradients, *batch, training.loss, correct, stop], group)
    means = [value / group.size for value in sums]
    update = optimizer.apply_gradients(zip(means, variables, strict=False))
    moves = [moved(*pair) for pair in zip(moving, means[len(variables):], strict=True)]
    return Reduced(stop, total, right, stopping, tf.group(update, *moves))


def measure(net, labels):
    """Return the Measures of a network against labels."""
    logits = tf.cast(net.outputs, tf.float32)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    return Measures(tf.reduce_sum(loss), tf.argmax(logits, 1, output_type=tf.int32))
