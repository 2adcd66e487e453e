"""Folding: batch normalisation and activation of a trained graph become integer thresholds.

Thresholds are not derived by formula. The graph's own float32 batch normalisation and quantiser run on every integer
sum that a filter can produce, so that thresholds and graph agree on each sum, ties and rounding included. The encoder's
sums are real; its thresholds come from bisection over float32. Equations and edge cases: docs/deployment.md.

An activation becomes a whole number: how many thresholds its sum reaches. Activations of several levels have several
thresholds; max-pooling has a table. twta.export.spatial then makes neurons with one threshold per sign.
"""
from typing import NamedTuple

import numpy as np

from twta import TwtaError, ternary_layers
from twta.export.spatial import Maximum
from twta.options import NOTHING_TO_PACK
from twta.packed.file_format import Layer, Stem, fan_in
from twta.training.blocks import read_blocks
from twta.training.weights import is_sound

LARGEST_FLOAT = 2.0 ** 64  # the encoder's sums stay below it


def fold(net, session, script):
    """Return stem (or None), layers, and the classifier's weights, scale and shift, of the network in the session.

    net       its last TensorLayer layer
    script    name for messages

    Layers are of two kinds: Maximum, and Layer with upper [levels, filters] instead of [filters]. An activation is the
    number of upper thresholds that its sum reaches, or -1 if the sum is <= lower. The results are the fields `stem`,
    `layers`, `weights`, `scale` and `shift` of PackedNetwork, before twta.export.spatial.

    Raises TwtaError if an activation is not quantised, a parameter is not finite or a variance is negative.
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
    """Raise TwtaError if a parameter is not finite or a variance is negative."""
    for variable, value in zip(net.all_params, session.run(net.all_params), strict=True):
        if not is_sound(variable.name, value):
            raise TwtaError(f'{variable.name} holds NaN, infinity or a negative variance: the training has failed; '
                            'export another checkpoint')


def read_parameters(session, batch_norm):
    """Return beta, gamma, mean and variance of a batch normalisation, float32 [channels] each."""
    return session.run([batch_norm.beta, batch_norm.gamma, batch_norm.moving_mean, batch_norm.moving_variance])


def fold_stem(session, block):
    """Return the Stem of a block: batch normalisation as scale and shift, float64."""
    beta, gamma, mean, variance = (values.astype(np.float64) for values in read_parameters(session, block.batch_norm))
    scale = gamma * (1 / np.sqrt(variance + ternary_layers.EPSILON))
    return Stem(session.run(block.layer.quantized), scale, beta - mean * scale)


class ActivationProbe(NamedTuple):
    """A layer's batch normalisation and activation, to be run in the graph on given sums."""
    session: object
    sums: object  # tensor [batch, ..., filters] that batch normalisation reads
    activations: object  # tensor of the same shape
    sign: np.ndarray  # int8 [filters], of gamma; activations rise with sums * sign
    steps: int  # number of positive levels, each with its threshold
    unit: int  # number of thresholds that an activation of 1.0 reaches

    @classmethod
    def of(cls, block, session):
        """Return the probe of a block."""
        steps = sum(level > 0 for level in block.levels)
        sign = np.where(session.run(block.batch_norm.gamma) < 0, -1, 1).astype(np.int8)
        return cls(session, block.batch_norm.inputs, block.activation.outputs, sign, steps,
                   round(steps / block.levels[-1]))

    def __call__(self, values):
        """Return the activations, int32 [count, filters], of sums float32 [count, filters], one column per filter."""
        shape = self.sums.shape[1:].as_list()
        per_image = int(np.prod(shape[:-1]))
        padded = np.pad(values, ((0, -len(values) % per_image), (0, 0)))
        found = self.session.run(self.activations, {self.sums: padded.reshape(-1, *shape)}).reshape(-1, shape[-1])
        return np.rint(found[:len(values)] * self.unit).astype(np.int32)


def fold_layer(session, block, probe, input_probe):
    """Return a convolution, dense layer or average-pooling as a Layer, its upper [levels, filters].

    input_probe    the probe of the layer that it reads; None: the layer is the encoder
    """
    layer, groups = block.layer, block.groups
    if block.pooling:  # an average; each channel is a group of its own
        channels = int(layer.inputs.shape[-1])
        area = layer.filter_size ** 2
        weights, groups = np.ones((layer.filter_size, layer.filter_size, 1, channels), np.int8), channels
    else:
        weights, area = session.run(layer.quantized), 1
    if weights.ndim == 2:  # dense on a flattened map: a kernel as large as the map
        flat = getattr(layer.prev_layer, 'inputs', layer.inputs).shape[1:]  # input of the FlattenLayer
        shape = flat.as_list() if len(flat) == 3 else [1, 1, weights.shape[0]]
        weights = weights.reshape(*shape, -1)
    if input_probe is None:
        upper, lower = real_thresholds(probe)
    else:
        if not np.isin(weights, (-1, 0, 1)).all():
            raise TwtaError(f'{layer.name} has full-precision weights: there is nothing to pack or to convert; train '
                            'with --quantize both')
        weights = weights.astype(np.int8)
        upper, lower = integer_thresholds(probe, input_probe.steps * fan_in(weights), input_probe.unit * area)
    return Layer(layer.name, weights * probe.sign, upper, lower, getattr(layer, 'stride', 1),
                 getattr(layer, 'padding', 'VALID'), groups, getattr(layer, 'border', 0))


def integer_thresholds(probe, most, divisor):
    """Return the thresholds of integer sums from -most to most: upper int32 [steps, filters], lower int32 [filters].

    upper is the least sum that reaches a step (most + 1: none does), lower the greatest sum whose activation is -1
    (-most - 1: none is). Both are for sums * probe.sign. The graph's sums are the integer sums / divisor.

    Raises TwtaError if the activation does not rise with the sum.
    """
    values = np.arange(-most, most + 1)[:, np.newaxis]
    response = probe((values * probe.sign / divisor).astype(np.float32))
    steps = [response > step for step in range(probe.steps)]
    upper = np.stack([np.where(reached.any(0), reached.argmax(0) - most, most + 1) for reached in steps])
    lower = np.where((response < 0).any(0), most - (response < 0)[::-1].argmax(0), -most - 1)
    if not np.array_equal(response, sum((values >= step).astype(int) for step in upper) - (values <= lower)):
        raise TwtaError(f'{probe.sums.name}: the activation does not rise with the sum; this is a fault of the scripts')
    return upper.astype(np.int32), lower.astype(np.int32)


def real_thresholds(probe):
    """Return the thresholds of real sums: upper float32 [steps, filters], lower float32 [filters].

    They are as in integer_thresholds; infinity in upper and -infinity in lower mean that no sum reaches them.
    """
    n_filters = len(probe.sign)
    upper = [bisect(lambda values, step=step: probe(values * probe.sign) > step, n_filters)
             for step in range(probe.steps)]
    return np.stack(upper), -bisect(lambda values: probe(-values * probe.sign) < 0, n_filters)


def bisect(is_reached, n_filters):
    """Return the least float32 per filter for which is_reached; infinity if there is none, -infinity if all are.

    is_reached    function of float32 [1, filters] that returns bool [1, filters] and rises with its argument
    """
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
    """Return the float32 of each place in the order of all float32 numbers; 0.0 is at 0."""
    return np.copysign(np.abs(order).astype(np.int32).view(np.float32), order).astype(np.float32)


def fold_maximum(layer, probe, input_probe):
    """Return the Maximum of a max-pooling layer. Raises TwtaError if it reads or gives several levels."""
    if input_probe.unit != 1 or probe.steps != 1:
        raise TwtaError(f'{layer.name}: max-pooling can be exported for ternary and binary activations only; train '
                        'with --pooling conv or average')
    values = np.repeat(np.float32([[-1], [0], [1]]), len(probe.sign), axis=1)
    return Maximum(layer.name, layer.filter_size, layer.stride, layer.padding, probe(values).astype(np.int8))
