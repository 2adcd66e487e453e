"""Folding: batch normalisation and activation of a trained graph become integer thresholds.

The thresholds are not computed from gamma, beta and the moments: they are read off the graph. Its own float32 batch
normalisation and quantiser are run on every sum that a filter can reach, so that they agree with it on each, ties and
rounding included. Equations and edge cases: docs/deployment.md.

Each activation becomes a whole number, how many thresholds the sum reaches; multi-level ones have several, and a
maximum has a table. twta.export.spatial makes neurons of that.
"""
from typing import NamedTuple

import numpy as np

from twta import TwtaError, ternary_layers
from twta.graph.blocks import pooling, read_blocks
from twta.options import NOTHING_TO_PACK
from twta.packed.file_format import Layer, Stem, fan_in
from twta.training.weights import is_sound

LARGEST_FLOAT = 2.0 ** 64  # beyond any real sum of the encoder


class Maximum(NamedTuple):
    """Max-pooling with the batch normalisation and the ternary or binary activation after it."""
    name: str
    filter_size: int
    stride: int
    padding: str
    response: np.ndarray  # int8 [3, channels]: the activation where the maximum is -1, 0, +1


def fold(net, session, script):
    """Stem or None, layers, and the classifier's weights, scale and shift, of the network in the session.

    The layers are Layers whose `upper` is [levels, filters], the sum that is needed for each, or Maximums. Activations
    are whole numbers: how many of the thresholds are reached, -1 where the sum is <= lower.
    """
    *blocks, (classifier, classifier_bn, _) = read_blocks(net)
    has_stem = len(blocks) > 1 and not hasattr(blocks[0][2].activation, 'levels')
    if any(not hasattr(activation.activation, 'levels') for _, _, activation in blocks[has_stem:]):
        raise TwtaError(f'{script} {NOTHING_TO_PACK}')
    check_finite(net, session)
    stem = fold_stem(session, *blocks.pop(0)[:2]) if has_stem else None
    layers, before = [], None  # before: the Reader of the layer before
    for layer, batch_norm, activation in blocks:
        levels = np.array(activation.activation.levels)
        steps = np.count_nonzero(levels > 0)
        read = Reader(session, batch_norm.inputs, activation.outputs, sign_of_gamma(session, batch_norm), steps,
                      round(steps / levels[-1]))
        layers.append(fold_maximum(layer, read, before) if pooling(layer) == 'max' else
                      fold_layer(session, layer, read, before))
        before = read
    weights = session.run(classifier.quantized) / np.float32(before.unit)
    scale, shift = np.ones(weights.shape[1], np.float32), np.zeros(weights.shape[1], np.float32)
    if classifier_bn:
        beta, gamma, mean, variance = session.run(classifier_bn.all_params[-4:])
        scale = gamma / np.sqrt(variance + np.float64(ternary_layers.EPSILON))
        shift = (beta - mean * scale).astype(np.float32)
        scale = scale.astype(np.float32)
    return stem, layers, weights, scale, shift


def check_finite(net, session):
    for variable, value in zip(net.all_params, session.run(net.all_params), strict=True):
        if not is_sound(variable.name, value):
            raise TwtaError(f'{variable.name} holds NaN, infinity or a negative variance: the training has failed; '
                            'export another checkpoint')


def fold_stem(session, layer, batch_norm):
    beta, gamma, mean, variance = (values.astype(np.float64) for values in session.run(batch_norm.all_params[-4:]))
    scale = gamma * (1 / np.sqrt(variance + ternary_layers.EPSILON))
    return Stem(session.run(layer.quantized), scale, beta - mean * scale)


def sign_of_gamma(session, batch_norm):
    return np.where(session.run(batch_norm.all_params[-3]) < 0, -1, 1).astype(np.int8)


class Reader(NamedTuple):
    """Reads off the graph what batch normalisation and activation of a layer do to its sums."""
    session: object
    sums: object  # the tensor [batch, ..., filters] that batch normalisation reads
    activations: object  # the tensor that the activation gives
    sign: np.ndarray  # int8 [filters], of gamma: sums are taken times it, so that activations rise with them
    steps: int  # thresholds of the activation above 0
    unit: int  # thresholds that an activation of 1.0 has reached

    def __call__(self, values):
        """Activations as whole numbers [count, filters] of values float32 [count, filters], a column a filter."""
        shape = self.sums.shape[1:].as_list()
        per_image = int(np.prod(shape[:-1]))
        padded = np.pad(values, ((0, -len(values) % per_image), (0, 0)))
        found = self.session.run(self.activations, {self.sums: padded.reshape(-1, *shape)}).reshape(-1, shape[-1])
        return np.rint(found[:len(values)] * self.unit).astype(np.int32)


def fold_layer(session, layer, read, before):
    """A convolution, dense layer or average-pooling as a Layer; before: the Reader of its inputs, None: the encoder."""
    if pooling(layer):  # an average: each channel is a group of its own
        channels = int(layer.inputs.shape[-1])
        area = layer.filter_size ** 2
        weights, groups = np.ones((layer.filter_size, layer.filter_size, 1, channels), np.int8), channels
    else:
        weights, groups, area = session.run(layer.quantized), getattr(layer, 'groups', 1), 1
    if weights.ndim == 2:  # dense on a flattened map: a kernel as large as the map
        flat = layer.prev_layer.inputs.shape[1:] if hasattr(layer.prev_layer, 'inputs') else ()
        shape = flat.as_list() if len(flat) == 3 else [1, 1, weights.shape[0]]
        weights = weights.reshape(*shape, -1)
    if before is None:
        upper, lower = real_thresholds(read)
    else:
        weights = weights.astype(np.int8)
        upper, lower = integer_thresholds(read, before.steps * fan_in(weights), before.unit * area)
    return Layer(layer.name, weights * read.sign, upper, lower, getattr(layer, 'stride', 1),
                 getattr(layer, 'padding', 'VALID'), groups)


def integer_thresholds(read, most, divisor):
    """For sums times sign from -most to most: the least that reaches each step, the greatest that gives -1.

    In the graph they are divided by the divisor. Returns upper [steps, filters], most + 1 where none does, and lower
    [filters], -most - 1 where none does.
    """
    values = np.arange(-most, most + 1)[:, np.newaxis]
    response = read((values * read.sign / divisor).astype(np.float32))
    reached = [response > step for step in range(read.steps)]
    upper = np.stack([np.where(any_of.any(0), any_of.argmax(0) - most, most + 1) for any_of in reached])
    lower = np.where((response < 0).any(0), most - (response < 0)[::-1].argmax(0), -most - 1)
    if not np.array_equal(response, sum((values >= step).astype(int) for step in upper) - (values <= lower)):
        raise TwtaError(f'{read.sums.name}: the activation does not rise with the sum; this is a fault of the scripts')
    return upper.astype(np.int32), lower.astype(np.int32)


def real_thresholds(read):
    """For float32 sums times sign: the least that reaches each step (infinity: none), the greatest that gives -1."""
    n_filters = len(read.sign)
    upper = [bisect(lambda values, step=step: read(values * read.sign) > step, n_filters)
             for step in range(read.steps)]
    return np.stack(upper), -bisect(lambda values: read(-values * read.sign) < 0, n_filters)


def bisect(is_reached, n_filters):
    """The least float32 of each filter that reaches; infinity where none does, -infinity where all do."""
    largest = int(np.float32(LARGEST_FLOAT).view(np.int32))
    below, above = np.full(n_filters, -largest), np.full(n_filters, largest)
    never = ~is_reached(to_float(above)[np.newaxis])[0]
    always = is_reached(to_float(below)[np.newaxis])[0]
    while (above - below > 1).any():
        middle = (below + above) // 2
        reached = is_reached(to_float(middle)[np.newaxis])[0]
        below, above = np.where(reached, below, middle), np.where(reached, middle, above)
    return np.where(never, np.inf, np.where(always, -np.inf, to_float(above))).astype(np.float32)


def to_float(order):
    """The float32 that comes at that place, counted from 0.0 = 0."""
    return np.copysign(np.abs(order).astype(np.int32).view(np.float32), order).astype(np.float32)


def fold_maximum(layer, read, before):
    if before.unit != 1 or read.steps != 1:
        raise TwtaError(f'{layer.name}: max-pooling is exported of ternary and of binary activations only; train with '
                        '--pooling conv or average')
    values = np.repeat(np.float32([[-1], [0], [1]]), len(read.sign), axis=1)
    return Maximum(layer.name, layer.filter_size, layer.stride, layer.padding, read(values).astype(np.int8))
