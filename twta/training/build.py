"""The graph of a network: as it is evaluated and, over the same variables, as it trains."""
from typing import NamedTuple

from twta.graph import preprocessing
from twta.graph.tf1 import tf
from twta.training import teacher
from twta.training.blocks import value_fractions


class Measures(NamedTuple):
    """Tensors of a network on a batch."""
    loss: tf.Tensor  # the cross-entropy, summed over the batch
    predicted: tf.Tensor  # classes, int32 [batch]
    step: tf.Operation | None = None  # applies Adam to the mean cross-entropy, or to what teacher.mixed_loss returns


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


def build_graph(model, image_shape, crop, seed, precision=None, augmentation='published', taught_by=None):
    """Return the Graph of a network; only with a precision it has training and value_fractions.

    model          see twta.command_line.run
    image_shape    height, width and channels of the images; crop: see twta.graph.preprocessing
    seed           of initial weights and augmentation
    precision      tf.float32 or tf.bfloat16, in which the network trains; None: it is only evaluated
    taught_by      model of the teacher, see teacher.model_of, or None
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
        training = fractions = teacher_net = None
        if precision:
            fractions = value_fractions(net)
            x = preprocessing.for_training(images, crop, seed, step, augmentation)
            with tf.variable_scope(tf.get_variable_scope(), reuse=True):
                trained = model(tf.cast(x, precision), True)
                training = measure(trained, labels)
            teacher_net = teacher.build(taught_by, tf.cast(x, precision)) if taught_by else None
            with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
                loss = training.loss / tf.cast(tf.size(labels), tf.float32)
                if taught_by:
                    loss = teacher.mixed_loss(loss, trained.outputs, teacher_net.outputs)
                training = training._replace(step=tf.train.AdamOptimizer(learning_rate).minimize(loss))
    return Graph(graph, images, labels, learning_rate, step, net, evaluation, training, fractions, teacher_net)


def measure(net, labels):
    """Return the Measures of a network against labels."""
    logits = tf.cast(net.outputs, tf.float32)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    return Measures(tf.reduce_sum(loss), tf.argmax(logits, 1, output_type=tf.int32))
