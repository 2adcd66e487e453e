"""Sums over the workers of a training, in the graph: TensorFlow's collectives, as a ring over gRPC on the CPU.

Every worker gets the same bits: each part of the vector is summed once along the ring, then handed on. Each collective
of a graph has its own key, by which the workers know which sums belong together.
"""
from typing import NamedTuple

from twta.graph.tf1 import tf

OF_BATCH_NORM = 'workers_of_batch_norm'  # collection of a graph with the Group that batch normalisation reduces over
KEYS = 'keys_of_collectives'  # collection of a graph with the keys that are taken


class Group(NamedTuple):
    """Those who reduce together."""
    size: int  # number of workers
    patience: float  # seconds until a collective gives up


def add_up(x, group, key=None):
    """Return a tensor summed over the workers, elementwise; it raises DeadlineExceededError if a worker is too late.

    key    of the collective; by default the next one of the graph. Sessions of one server need different keys for
           different shapes
    """
    if key is None:
        key = 1 + len(tf.get_collection(KEYS))
        tf.add_to_collection(KEYS, key)
    with tf.device('/cpu:0'):
        return tf.raw_ops.CollectiveReduce(
            input=x, group_size=group.size, group_key=1, instance_key=key, merge_op='Add', final_op='Id',
            subdiv_offsets=[0], wait_for=[], communication_hint='ring', timeout_seconds=group.patience)


def add_up_all(tensors, group):
    """Return float32 tensors of fixed shapes, each summed over the workers; all travel in one vector."""
    sizes = [tensor.shape.num_elements() for tensor in tensors]
    vector = add_up(tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0), group)
    return [tf.reshape(part, tensor.shape) for part, tensor in zip(tf.split(vector, sizes), tensors, strict=True)]


def means(tensors):
    """Return tensors of a batch as means over the workers, if the graph has OF_BATCH_NORM; else as they are."""
    group = next(iter(tf.get_collection(OF_BATCH_NORM)), None)
    return [total / group.size for total in add_up_all(tensors, group)] if group else tensors


def normalize(x, gamma, beta, pivot, epsilon):
    """Return x normalised by the moments of the whole batch, scaled and shifted; and the moments, biased.

    x              [rows of this worker, ..., channels]
    gamma, beta    variables [channels]
    pivot          variable [channels], a value near the mean: sums about it cost the variance no digits
    """
    axes = list(range(x.shape.rank - 1))

    def of_batch(*values):
        return means([tf.ensure_shape(tf.reduce_mean(value, axes), gamma.shape) for value in values])

    @tf.custom_gradient
    def normal_form(x, gamma, beta, pivot):
        shifted = tf.cast(x, tf.float32) - pivot
        first, second = of_batch(shifted, shifted * shifted)
        variance = second - first * first
        scale = tf.rsqrt(variance + epsilon)
        normal = (shifted - first) * scale

        def gradient(upstream, *of_moments):
            upstream = tf.cast(upstream, tf.float32)
            by_beta, by_gamma = of_batch(upstream, upstream * normal)
            by_x = gamma * scale * (upstream - by_beta - normal * by_gamma)
            of_worker = [tf.reduce_sum(value, axes) for value in (upstream * normal, upstream)]
            return tf.cast(by_x, x.dtype), *of_worker, None

        return (tf.cast(gamma * normal + beta, x.dtype), pivot + first, variance), gradient

    return normal_form(x, gamma.value(), beta.value(), pivot.value())


def run_options():
    """Return the options with which a session runs collectives: the workers' graphs are parts of one."""
    options = tf.RunOptions()
    options.experimental.collective_graph_key = 1
    return options
