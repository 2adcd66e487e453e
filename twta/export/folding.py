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
from twta.graph.blocks import read_blocks
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
    *blocks, classifier = read_blocks(net)
    has_stem = len(blocks) > 1 and not blocks[0].levels
    if not all(block.levels for block in blocks[has_stem:]):
        raise TwtaError(f'{script} {NOTHING_TO_PACK}')
    check_finite(net, session)
    stem = fold_stem(session, blocks.pop(0)) if has_stem else None
    layers, input_probe = [], None  # input_probe: of the layer that the block reads
    for block in blocks:
        probe = ActivationProbe.of(block, session)
        layers.append(fold_maximum(block.layer, probe, input_probe) if block.pooling == 'max' else
                      fold_layer(session, block, probe, input_probe))
        input_probe = probe
    weights = session.run(classifier.layer.quantized) / np.float32(input_probe.unit)
    scale, shift = np.ones(weights.shape[1], np.float32), np.zeros(weights.shape[1], np.float32)
    if classifier.batch_norm:
        beta, gamma, mean, variance = read_parameters(session, classifier.batch_norm)
        scale = gamma / np.sqrt(variance + np.float64(ternary_layers.EPSILON))
        shift = (beta - mean * scale).astype(np.float32)
        scale = scale.astype(np.float32)
    return stem, layers, weights, scale, shift


def check_finite(net, session):
    for variable, value in zip(net.all_params, session.run(net.all_params), strict=True):
        if not is_sound(variable.name, value):
            raise TwtaError(f'{variable.name} holds NaN, infinity or a negative variance: the training has failed; '
                            'export another checkpoint')


def read_parameters(session, batch_norm):
    """Return beta, gamma, mean and variance of a batch normalisation, float32 [channels] each."""
    return session.run([batch_norm.beta, batch_norm.gamma, batch_norm.moving_mean, batch_norm.moving_variance])


def fold_stem(session, block):
    beta, gamma, mean, variance = (values.astype(np.float64) for values in read_parameters(session, block.batch_norm))
    scale = gamma * (1 / np.sqrt(variance + ternary_layers.EPSILON))
    return Stem(session.run(block.layer.quantized), scale, beta - mean * scale)


class ActivationProbe(NamedTuple):
    """Runs batch normalisation and activation of a layer, in the graph, on any sums."""
    session: object
    sums: object  # the tensor [batch, ..., filters] that batch normalisation reads
    activations: object  # the tensor that the activation gives
    sign: np.ndarray  # int8 [filters], of gamma: sums are taken times it, so that activations rise with them
    steps: int  # thresholds of the activation above 0
    unit: int  # thresholds that an activation of 1.0 has reached

    @classmethod
    def of(cls, block, session):
        """Return the probe of a block."""
        steps = sum(level > 0 for level in block.levels)
        sign = np.where(session.run(block.batch_norm.gamma) < 0, -1, 1).astype(np.int8)
        return cls(session, block.batch_norm.inputs, block.activation.outputs, sign, steps,
                   round(steps / block.levels[-1]))

    def __call__(self, values):
        """Activations as whole numbers [count, filters] of values float32 [count, filters], a column a filter."""
        shape = self.sums.shape[1:].as_list()
        per_image = int(np.prod(shape[:-1]))
        padded = np.pad(values, ((0, -len(values) % per_image), (0, 0)))
        found = self.session.run(self.activations, {self.sums: padded.reshape(-1, *shape)}).reshape(-1, shape[-1])
        return np.rint(found[:len(values)] * self.unit).astype(np.int32)


def fold_layer(session, block, probe, input_probe):
    """Return a convolution, dense layer or average-pooling as a Layer.

    input_probe    the probe of the layer that it reads; None: the layer is the encoder
    """
    layer, groups = block.layer, block.groups
    if block.pooling:  # an average: each channel is a group of its own
        channels = int(layer.inputs.shape[-1])
        area = layer.filter_size ** 2
        weights, groups = np.ones((layer.filter_size, layer.filter_size, 1, channels), np.int8), channels
    else:
        weights, area = session.run(layer.quantized), 1
    if weights.ndim == 2:  # dense on a flattened map: a kernel as large as the map
        flat = getattr(layer.prev_layer, 'inputs', layer.inputs).shape[1:]  # FlattenLayer's, before it is flat
        shape = flat.as_list() if len(flat) == 3 else [1, 1, weights.shape[0]]
        weights = weights.reshape(*shape, -1)
    if input_probe is None:
        upper, lower = real_thresholds(probe)
    else:
        weights = weights.astype(np.int8)
        upper, lower = integer_thresholds(probe, input_probe.steps * fan_in(weights), input_probe.unit * area)
    return Layer(layer.name, weights * probe.sign, upper, lower, getattr(layer, 'stride', 1),
                 getattr(layer, 'padding', 'VALID'), groups)


def integer_thresholds(probe, most, divisor):
    """For sums times sign from -most to most: the least that reaches each step, the greatest that gives -1.

    In the graph they are divided by the divisor. Returns upper [steps, filters], most + 1 where none does, and lower
    [filters], -most - 1 where none does.
    """
    values = np.arange(-most, most + 1)[:, np.newaxis]
    response = probe((values * probe.sign / divisor).astype(np.float32))
    reached = [response > step for step in range(probe.steps)]
    upper = np.stack([np.where(any_of.any(0), any_of.argmax(0) - most, most + 1) for any_of in reached])
    lower = np.where((response < 0).any(0), most - (response < 0)[::-1].argmax(0), -most - 1)
    if not np.array_equal(response, sum((values >= step).astype(int) for step in upper) - (values <= lower)):
        raise TwtaError(f'{probe.sums.name}: the activation does not rise with the sum; this is a fault of the scripts')
    return upper.astype(np.int32), lower.astype(np.int32)


def real_thresholds(probe):
    """For float32 sums times sign: the least that reaches each step (infinity: none), the greatest that gives -1."""
    n_filters = len(probe.sign)
    upper = [bisect(lambda values, step=step: probe(values * probe.sign) > step, n_filters)
             for step in range(probe.steps)]
    return np.stack(upper), -bisect(lambda values: probe(-values * probe.sign) < 0, n_filters)


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


def fold_maximum(layer, probe, input_probe):
    if input_probe.unit != 1 or probe.steps != 1:
        raise TwtaError(f'{layer.name}: max-pooling is exported of ternary and of binary activations only; train with '
                        '--pooling conv or average')
    values = np.repeat(np.float32([[-1], [0], [1]]), len(probe.sign), axis=1)
    return Maximum(layer.name, layer.filter_size, layer.stride, layer.padding, probe(values).astype(np.int8))
