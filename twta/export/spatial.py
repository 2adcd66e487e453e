"""Spatial conversion: each folded neuron becomes as many as it has thresholds, with the same weights.

The next layer adds them up (github.com/edwardzcl/Spatio_temporal_SNNs). What is left is a network of convolutions and
of neurons that fire once at most, positively or negatively.
"""
import numpy as np

from twta import TwtaError
from twta.export.folding import Maximum
from twta.graph.blocks import read_blocks
from twta.packed.file_format import Layer, fan_in


def spatial(layers, weights):
    """Folded layers and the classifier's weights as Layers of neurons that have one threshold or, ternary, two.

    The neurons that stand for one are `lanes`: filters stand by group, within a group by lane. Of each lane `worth`
    tells what a spike counts in the next layer, +1 or -1.
    """
    physical, groups, worth = [], 1, np.ones(1, np.int8)  # of the map before: groups of its writer, its lanes
    for index, layer in enumerate(layers):
        if isinstance(layer, Maximum):  # built with the layer before it
            if isinstance(layers[index - 1], Maximum):
                raise TwtaError(f'{layer.name}: a maximum of maxima is not exported')
            continue
        layer = layer._replace(weights=gather(layer.weights, layer.groups, groups, worth) if index else layer.weights)
        groups, maximum = layer.groups, layers[index + 1] if index + 1 < len(layers) else None
        if not isinstance(maximum, Maximum):
            worth = np.ones(len(layer.upper), np.int8)
            physical.append(split(layer, layer.upper) if len(worth) > 1 else layer._replace(upper=layer.upper[0]))
        else:
            upper, signs, worth = any_or_none(layer, maximum)
            physical.append(split(layer, upper))
            signs = by_lane(signs, groups)
            size, channels = maximum.filter_size, len(signs)
            weights_of_maximum = np.broadcast_to(signs, (size, size, 1, channels)).astype(np.int8)
            physical.append(Layer(maximum.name, weights_of_maximum, (signs > 0).astype(np.int32),
                                  np.full(channels, -size * size - 1, np.int32), maximum.stride, maximum.padding,
                                  channels))
    if len(worth) > 1:
        channels = physical[-1].weights.shape[3] // len(worth)
        maps = weights.reshape(-1, 1, channels, weights.shape[1])
        weights = gather(maps, 1, groups, worth).reshape(-1, weights.shape[1])
    return physical, weights


def gather(weights, groups, writer_groups, worth):
    """Weights [height, width, channels / groups, filters] for a map of lanes that was written in writer_groups."""
    if len(worth) == 1:
        return weights * worth
    height, width, channels, filters = weights.shape
    if channels % writer_groups:
        raise TwtaError(f'{len(worth)} neurons for one and {writer_groups} groups that {groups} groups read: the '
                        'channels do not divide; this network cannot be exported')
    by_group = weights.reshape(height, width, writer_groups, 1, -1, filters)
    return (by_group * worth[:, np.newaxis, np.newaxis]).reshape(height, width, -1, filters)


def by_lane(values, groups):
    """Values [lanes, filters] in the order of the lanes' filters: by group, within a group by lane."""
    return values.reshape(len(values), groups, -1).swapaxes(0, 1).ravel()


def split(layer, upper):
    """A layer with a filter for each threshold in upper [lanes, filters]."""
    lanes, filters = upper.shape
    order = by_lane(np.broadcast_to(np.arange(filters), (lanes, filters)), layer.groups)
    never = -np.inf if upper.dtype == np.float32 else -fan_in(layer.weights) - 1
    return layer._replace(weights=layer.weights[..., order], upper=by_lane(upper, layer.groups),
                          lower=np.full(lanes * filters, never, upper.dtype))


def any_or_none(layer, maximum):
    """Thresholds [lanes, filters] of a layer, and signs [lanes, filters], from which a maximum's activations come.

    It is +1 where any neuron of the first lane fires, or where none does (sign -1); and -1, likewise, by the second
    lane, which binary activations need not. So it takes no more than neurons that count spikes. worth: of the lanes.
    """
    is_real = layer.upper.dtype == np.float32
    never, always = (np.inf, -np.inf) if is_real else (fan_in(layer.weights) + 1, -fan_in(layer.weights))
    above = np.nextafter(layer.lower, np.float32(np.inf)) if is_real else layer.lower + 1
    at_least = np.stack([np.full_like(above, always), above, layer.upper[0], np.full_like(above, never)])  # -1, 0, 1, 2
    upper, signs, worth = [], [], []
    for value in (1, -1) if (maximum.response < 0).any() else (1,):
        gives = maximum.response == value  # [3, filters], monotonous: from some place on, or up to it
        rises = gives[2] & ~gives[0] | gives.all(0) | ~gives.any(0)
        place = np.where(rises, (~gives).sum(0), gives.sum(0))
        upper.append(np.take_along_axis(at_least, place[np.newaxis], 0)[0])
        signs.append(np.where(rises, 1, -1))
        worth.append(value)
    return np.stack(upper), np.stack(signs), np.array(worth, np.int8)


def read_out(net):
    """Of each layer of the spatial network, the activations in the graph, and groups and worth of the lanes that they
    are the sum of; None where the lanes feed a maximum."""
    blocks = [block for block in read_blocks(net)[:-1] if block.levels]
    for index, block in enumerate(blocks):
        positive = [level for level in block.levels if level > 0]
        worth, groups = np.full(len(positive), positive[0]), block.groups
        if block.pooling == 'average':
            groups = int(block.layer.inputs.shape[-1])
        elif block.pooling == 'max':
            groups = blocks[index - 1].groups
            worth = np.array([1, -1] if block.levels[0] < 0 else [1])
        feeds_maximum = index + 1 < len(blocks) and blocks[index + 1].pooling == 'max'
        yield None if feeds_maximum else (block.activation.outputs, groups, worth)


def add_lanes(spikes, groups, worth):
    """Activations [n, height, width, channels] of the spikes [n, height, width, lanes * channels] of a layer."""
    lanes = spikes.reshape(*spikes.shape[:3], groups, len(worth), -1)
    return np.tensordot(lanes, worth, (4, 0)).reshape(*spikes.shape[:3], -1)
