"""The graph of a network: as it is evaluated and, over the same variables, as it trains."""
from types import SimpleNamespace

from twta.graph import preprocessing
from twta.graph.blocks import value_fractions
from twta.graph.tf1 import tf


def build_graph(model, image_shape, crop, seed, precision=None, augmentation='published'):
    """Return the graph: placeholders, the network for evaluation and, if a precision is given, the one for training.

    images         uint8 [batch, *image_shape]: height, width, channels; crop: the side that the network sees, or 0
    labels         int32 [batch]
    step           of the run: with the seed, it decides on the augmentation of training images
    evaluation     .loss the summed cross-entropy over the batch and .predicted, the classes [batch]
    training       the same, as it trains; .step applies Adam with learning_rate to the mean cross-entropy
    shares         of negative and positive values, see value_fractions, where a precision is given
    net            the network as a TensorLayer layer
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
        training = shares = None
        if precision:
            shares = value_fractions(net)
            x = preprocessing.for_training(images, crop, seed, step, augmentation)
            with tf.variable_scope(tf.get_variable_scope(), reuse=True):
                training = measure(model(tf.cast(x, precision), True), labels)
            with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
                mean_loss = training.loss / tf.cast(tf.size(labels), tf.float32)
                training.step = tf.train.AdamOptimizer(learning_rate).minimize(mean_loss)
    return SimpleNamespace(graph=graph, images=images, labels=labels, learning_rate=learning_rate, step=step, net=net,
                           evaluation=evaluation, training=training, shares=shares)


def measure(net, labels):
    logits = tf.cast(net.outputs, tf.float32)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    return SimpleNamespace(loss=tf.reduce_sum(loss), predicted=tf.argmax(logits, 1, output_type=tf.int32))
