"""Simulation of a network as integrate-and-fire neurons; spikes and synaptic operations are counted.

A neuron adds the spikes that reach it, times ternary weights, to its membrane v. It fires if v reaches its threshold, a
whole number with batch normalisation folded in (twta.export.folding). It has no leak and no bias, and v is 0 at the
start of each image. The encoder turns real-valued images into spikes. The classifier reads membranes, not spikes.

spatial     One step. Each level of an activation is one neuron with its own threshold. A ternary activation is one
            neuron that fires positively or negatively. The next layer adds up the spikes.
temporal    Store and release: one neuron for all levels. It adds up all spikes of its window first. Then there is one
            step per level: the neuron fires if v reaches the first threshold, and each spike subtracts the distance to
            the next threshold from v. With one level, this is the spatial conversion.

rest        For networks of --rest -1: activations a in {-1, 0, +1} are counted from the state of rest, as a + 1 spikes,
            none of them negative. Store and release in two steps; most neurons fire in neither.

A neuron fires as often as the network's activation says, so the predictions are the network's. Every run checks this on
every image. Source: github.com/edwardzcl/Spatio_temporal_SNNs, which has the spatial conversion.

Three files have one line per batch of 200 images:

accuracy.txt     right predictions
spike_num.txt    spikes of all neurons, encoder included; a negative spike counts as one
sop_num.txt      synaptic operations: for each spike, the neurons that it reaches, in all layers but encoder and
                 classifier. Connections end at the map's border. Connections with weight 0 count; the table has the
                 number without them too. The published counter takes 2 operations per addition, so its number for the
                 spatial conversion is twice this one.
"""
import numpy as np

from twta.packed import engines, file_format, numpy_engine

BATCH = 200  # images per line of the .txt files
FIELDS = ('layer', 'neurons', 'spikes', 'negative', 'rate', 'operations', 'nonzero_operations')


def store_and_release(membrane, layer):
    """Return how often neurons with thresholds layer.upper [levels, filters] fire, int8: at most once per step.

    membrane    sums [n, height, width, filters]; there is one step per level

    Each spike raises the threshold instead of lowering the membrane: the same result, without rounding.
    """
    spikes = np.zeros(membrane.shape, np.int8)
    for step, threshold in enumerate(layer.upper):
        spikes += (spikes == step) & (membrane >= threshold)
    return spikes


def deletion(noise_ratio, seed):
    """Return a function that deletes each spike of an int8 array with probability noise_ratio."""
    rng = np.random.default_rng(seed)

    def delete(spikes):
        kept = rng.binomial(np.abs(spikes), 1 - noise_ratio)
        return (np.sign(spikes) * kept).astype(np.int8)

    return delete


def fan_out(shape, layer):
    """Return how many neurons of a layer a spike reaches, and how many of them by a weight that is not 0.

    shape    height, width, channels of the map that the layer reads; the result is int64 [2, *shape]
    """
    (top, left), (rows, columns, filters) = file_format.geometry(shape, layer)
    height, width = layer.weights.shape[:2]
    by_group = layer.weights.reshape(height, width, shape[2] // layer.groups, layer.groups, -1)
    nonzero = np.count_nonzero(by_group, axis=4).reshape(height, width, shape[2])
    counts = np.zeros((2, *shape), np.int64)
    for i in range(height):
        for j in range(width):
            y, x = (np.arange(size) * layer.stride + shift for size, shift in ((rows, i - top), (columns, j - left)))
            at = np.ix_(y[(y >= 0) & (y < shape[0])], x[(x >= 0) & (x < shape[1])])
            counts[0][at] += filters // layer.groups
            counts[1][at] += nonzero[i, j]
    return counts


def simulate(simulator, images, steps):
    """Return predicted classes [n], spikes and synaptic operations per batch (two lists), and rows of the table.

    simulator    an object with packed, batch (the largest number of images per call) and run(images)
    images       uint8 [n, height, width, channels]
    steps        time steps per image, for the rate

    There is one row per layer and one in all, each a dictionary of FIELDS: means per image.
    """
    packed = simulator.packed
    layers = packed.layers
    outputs = [out for _, _, _, out in file_format.shapes(packed)]
    fans = [fan_out(shape, layer) for shape, layer in zip(outputs, layers[1:], strict=False)]
    predicted, spikes, operations = [], [], []
    sums = np.zeros((len(layers), 4))  # spikes, negative ones, operations, those over weights that are not 0
    for start in range(0, len(images), BATCH):
        of_batch = np.zeros((len(layers), 4))
        for first in range(start, min(start + BATCH, len(images)), simulator.batch):
            logits, maps = simulator.run(images[first:min(first + simulator.batch, start + BATCH)])
            predicted.append(logits.argmax(1))
            for index, fired in enumerate(maps):
                number = np.abs(fired).sum(0, dtype=np.int64)
                of_batch[index] += number.sum(), np.sum(fired < 0), 0, 0
                if index + 1 < len(layers):
                    of_batch[index + 1, 2:] += (number * fans[index]).sum((1, 2, 3))
        sums += of_batch
        spikes.append(int(of_batch[:, 0].sum()))
        operations.append(int(of_batch[:, 2].sum()))
    rows = [dict(zip(FIELDS, (layer.name, int(np.prod(out)), *(sums[index, :2] / len(images)),
                              sums[index, 0] / len(images) / np.prod(out) / steps, *(sums[index, 2:] / len(images))),
                     strict=True)) for index, (layer, out) in enumerate(zip(layers, outputs, strict=True))]
    total = {field: sum(row[field] for row in rows) for field in FIELDS[1:]}
    total['rate'] = total['spikes'] / total['neurons'] / steps
    return np.concatenate(predicted), spikes, operations, [*rows, {'layer': 'in all', **total}]


class PackedSimulator:
    """A packed engine as a simulator of one step without noise."""

    def __init__(self, packed):
        self.packed, self.engine = packed, engines.open_engine(packed)
        self.batch = min(self.engine.batch, BATCH)

    def run(self, images):
        """Return logits, float32 [n, classes], and the spikes of each layer, int8 NHWC."""
        maps = self.engine.activations(images)
        return numpy_engine.classify(maps[-1], self.packed), maps
