"""The variables of layers, and moving averages."""
from twta.graph.tf1 import tf

DECAY = 0.9  # of moving averages
MOMENTS = 'moments_of_batch'  # collection of a graph with each moving average and its value of the batch


def get_variable(name, shape, initializer, trainable=True, constraint=None, **arguments):
    """Return a float32 variable of the current scope; its initial value depends only on its position and the seed."""
    # TensorFlow alone would count all operations, so that float32 and bfloat16 would start with different weights
    if initializer in (tf.truncated_normal_initializer, tf.random_normal_initializer):
        arguments['seed'] = len(tf.global_variables())
    return tf.get_variable(name, shape, tf.float32, initializer(**arguments), trainable=trainable,
                           constraint=constraint)


def update_moving(moving, batch):
    """Let a moving average follow the value of each batch: for one worker in UPDATE_OPS, for several in MOMENTS."""
    tf.add_to_collection(MOMENTS, (moving, batch))
    tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, moved(moving, batch))


def moved(moving, batch):
    """Return the operation that moves a moving average towards the value of the batch."""
    return moving.assign(DECAY * moving + (1 - DECAY) * batch)
