"""A packed network rewritten for other programs: without groups, or as unsigned spikes from the state of rest."""
import numpy as np

from twta import TwtaError
from twta.export.spatial import above_lower, spatial
from twta.packed.file_format import border, fan_in, shapes


def without_groups(layer):
    """Return a layer of one group that computes the same; its weights between groups are 0."""
    height, width, channels, filters = layer.weights.shape
    weights = np.zeros((height, width, channels * layer.groups, filters), layer.weights.dtype)
    share = filters // layer.groups
    for group in range(layer.groups):
        own = slice(group * share, (group + 1) * share)
        weights[:, :, group::layer.groups, own] = layer.weights[..., own]
    return layer._replace(weights=weights, groups=1)


def fires_negatively(layer):
    """Return whether any sum makes a filter of the layer -1."""
    least = -np.inf if layer.lower.dtype == np.float32 else -fan_in(layer.weights) - 1
    return bool((layer.lower > least).any())


def is_from_rest(packed):
    """Return whether the network was trained with --rest -1: its convolutions have -1 as border, padding or not."""
    return any(layer.border == -1 for layer in packed.layers)


def borders(packed):
    """Return the set of activations in the cells that the ternary layers pad with; it is empty if none pads."""
    return {layer.border for layer, shape, _, _ in list(shapes(packed))[1:] if border(shape, layer)[1] != shape[:2]}


def count_from_rest(packed, temporal=False):
    """Return a network of --rest -1 as unsigned spikes: neurons count events a + 1 in {0, 1, 2} instead of a.

    Each activation becomes two neurons with the same weights w: one fires if a >= 0, the other if a = 1. A sum over w
    (a + 1) is larger by the sum of w, so each threshold is, too. Padding with -1 becomes padding with 0. All
    activations are the same, exactly; logits differ by rounding.

    temporal    keep one neuron per activation, which fires up to twice: its layer has upper [2, filters], for
                twta.spikes

    Raises TwtaError if the network was not trained with --rest -1, or if groups cannot be divided among neurons: see
    without_groups.
    """
    if not is_from_rest(packed) or borders(packed) - {-1}:
        raise TwtaError(f'{packed.network} was not trained with --rest -1: its spikes cannot be counted from rest; use '
                        '--conversion spatial')
    layers = []
    for index, layer in enumerate(packed.layers):
        upper = np.stack([above_lower(layer), layer.upper])
        if index:  # the encoder reads the image, which is not counted from rest
            upper += layer.weights.sum((0, 1, 2), dtype=np.int32)
        layers.append(layer._replace(upper=upper, border=0))
    weights = packed.weights
    if not temporal:
        layers, weights = spatial(layers, weights)
    shift = packed.shift - packed.scale * packed.weights.astype(np.float64).sum(0).astype(np.float32)
    return packed._replace(layers=tuple(layers), weights=weights, shift=shift)
