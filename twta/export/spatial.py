"""Spatial conversion: a neuron with several thresholds becomes several neurons with the same weights.

The next layer adds them up. The result is a network of convolutions whose neurons fire at most once, positively or
negatively. Source: github.com/edwardzcl/Spatio_temporal_SNNs.

The neurons that stand for one activation are its lanes. A layer's filters are ordered by group, and in a group by lane.
The worth of a lane is what its spike counts in the next layer.
"""
from typing import NamedTuple

import numpy as np

from twta import TwtaError
from twta.packed.file_format import Layer, fan_in


class Maximum(NamedTuple):
    """Max-pooling, with the batch normalisation and the ternary or binary activation after it."""
    name: str
    filter_size: int
    stride: int
    padding: str
    response: np.ndarray  # int8 [3, channels]: the activation for a maximum of -1, 0, +1


def spatial(layers, weights):
    """Return folded layers and the classifier's weights as Layers with upper [filters], and weights to match.

    layers, weights    as fold returns them; each Maximum becomes a Layer of neurons that count spikes

    Raises TwtaError if a maximum reads a maximum, or groups cannot be divided among lanes.
    """
    physical, groups, worth = [], 1, np.ones(1, np.int8)  # groups, worth: of the layer before
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
    """Return weights [height, width, channels / groups * lanes, filters] that read all lanes of each channel.

    writer_groups, worth    groups of the layer that writes the map, and worth of its lanes
    """
    if len(worth) == 1:
        return weights * worth
    height, width, channels, filters = weights.shape
    if channels % writer_groups:
        raise TwtaError(f'{groups} groups read {writer_groups} groups of {len(worth)} neurons per activation: the '
                        'channels do not divide; this network cannot be exported')
    by_group = weights.reshape(height, width, writer_groups, 1, -1, filters)
    return (by_group * worth[:, np.newaxis, np.newaxis]).reshape(height, width, -1, filters)


def by_lane(values, groups):
    """Return values [lanes, filters] in the order of the converted filters: by group, and in a group by lane."""
    return values.reshape(len(values), groups, -1).swapaxes(0, 1).ravel()


def split(layer, upper):
    """Return a layer with one filter per threshold in upper [lanes, filters]."""
    lanes, filters = upper.shape
    order = by_lane(np.broadcast_to(np.arange(filters), (lanes, filters)), layer.groups)
    never = -np.inf if upper.dtype == np.float32 else -fan_in(layer.weights) - 1
    return layer._replace(weights=layer.weights[..., order], upper=by_lane(upper, layer.groups),
                          lower=np.full(lanes * filters, never, upper.dtype))


def above_lower(layer):
    """Return the least sums that are above `lower`, [filters]: their activation is 0 or +1."""
    is_real = layer.lower.dtype == np.float32
    return np.nextafter(layer.lower, np.float32(np.inf)) if is_real else layer.lower + 1


def any_or_none(layer, maximum):
    """Return what makes a maximum from neurons that count spikes: thresholds and signs [lanes, filters], and worth.

    The thresholds are those of the layer before the maximum. The first lane says if the activation is +1: it is if any
    neuron of the window fires (sign +1), or if none does (sign -1). The second lane says the same of -1; binary
    activations do without it.
    """
    is_real = layer.upper.dtype == np.float32
    never, always = (np.inf, -np.inf) if is_real else (fan_in(layer.weights) + 1, -fan_in(layer.weights))
    above = above_lower(layer)
    # at_least[k]: the least sum whose activation is k - 1 or more
    at_least = np.stack([np.full_like(above, always), above, layer.upper[0], np.full_like(above, never)])
    upper, signs, worth = [], [], []
    for value in (1, -1) if (maximum.response < 0).any() else (1,):
        gives = maximum.response == value  # [3, filters], true from some place on, or up to it
        rises = gives[2] & ~gives[0] | gives.all(0) | ~gives.any(0)
        place = np.where(rises, (~gives).sum(0), gives.sum(0))
        upper.append(np.take_along_axis(at_least, place[np.newaxis], 0)[0])
        signs.append(np.where(rises, 1, -1))
        worth.append(value)
    return np.stack(upper), np.stack(signs), np.array(worth, np.int8)


def add_lanes(spikes, groups, worth):
    """Return activations [n, height, width, channels] of a layer's spikes [n, height, width, lanes * channels]."""
    lanes = spikes.reshape(*spikes.shape[:3], groups, len(worth), -1)
    return np.tensordot(lanes, worth, (4, 0)).reshape(*spikes.shape[:3], -1)
