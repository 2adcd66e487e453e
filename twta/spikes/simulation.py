"""Conversion to spikes: a trained network as integrate-and-fire neurons, simulated, its spikes and operations counted.

A neuron adds up the spikes that reach it, times ternary weights, into its membrane v, and fires where v reaches a
threshold: a whole number, batch normalisation folded in (twta.export.folding). It has no leak and no bias and begins
each image at 0. The first layer reads images, real-valued: it turns them into spikes. The classifier reads out
membranes.

spatial    one step. An activation of several levels is as many neurons, each with its own threshold, in one place; a
           ternary one a neuron that fires positively or negatively; the next layer adds up what fires.
temporal   store and release: one neuron for all levels. It first adds up all spikes of the window, then in each of as
           many steps as there are levels fires where v reaches the first threshold, and is reset by subtraction: v
           loses the distance to the next one. With one level both are the same.

Both fire as often as the network's activations say, so that the predictions are the network's; each run checks it, on
every image. Source: github.com/edwardzcl/Spatio_temporal_SNNs, which has the spatial conversion.

Counted are, with the images in batches of 200, a line a batch:

accuracy.txt     right predictions
spike_num.txt    spikes of all neurons, a negative one is one, the encoder's included
sop_num.txt      synaptic operations: for each spike the neurons that it reaches, in all convolutions and dense layers
                 but encoder and classifier. Borders end at the map; connections of weight 0 count (the table has the
                 number without them). The published counter, of the spatial conversion, has twice that number: it takes
                 2 for an addition.
"""
import numpy as np

from twta.packed import engines, file_format, numpy_engine

BATCH = 200  # images to a line of the .txt files
FIELDS = ('layer', 'neurons', 'spikes', 'negative', 'rate', 'operations', 'nonzero_operations')


def store_and_release(membrane, layer):
    """Spikes int8 of neurons with thresholds [levels, filters], in as many steps, one a step at most.

    After each spike the threshold is raised by what the membrane would lose: the same, without rounding.
    """
    spikes = np.zeros(membrane.shape, np.int8)
    for step, threshold in enumerate(layer.upper):
        spikes += (spikes == step) & (membrane >= threshold)
    return spikes


def deletion(noise_ratio, seed):
    """What deletes each of the encoder's spikes with that probability."""
    rng = np.random.default_rng(seed)

    def delete(spikes):
        kept = rng.binomial(np.abs(spikes), 1 - noise_ratio)
        return (np.sign(spikes) * kept).astype(np.int8)

    return delete


def fan_out(shape, layer):
    """How many neurons a spike reaches, and over how many weights that are not 0: [height, width, channels] each."""
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
    """Predicted classes of the images; of each batch the spikes of each layer and its operations; a row a layer."""
    packed = simulator.packed
    layers = packed.layers
    outputs = [out for _, _, _, out in file_format.shapes(packed)]
    reached = [fan_out(shape, layer) for shape, layer in zip(outputs, layers[1:], strict=False)]
    predicted, spikes, operations = [], [], []
    sums = np.zeros((len(layers), 4))  # spikes, negative ones, operations, those over weights that are not 0
    for start in range(0, len(images), BATCH):
        of_batch = np.zeros((len(layers), 4))
        for first in range(start, min(start + BATCH, len(images)), simulator.batch):
            part = images[first:min(first + simulator.batch, start + BATCH)]
            logits, maps = simulator.run(part)
            predicted.append(logits.argmax(1))
            for index, fired in enumerate(maps):
                number = np.abs(fired).sum(0, dtype=np.int64)
                of_batch[index] += number.sum(), np.sum(fired < 0), 0, 0
                if index + 1 < len(layers):
                    of_batch[index + 1, 2:] += (number * reached[index]).sum((1, 2, 3))
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
    """The packed engine as a simulator of one step without noise."""

    def __init__(self, packed):
        self.packed, self.engine = packed, engines.open_engine(packed)
        self.batch = min(self.engine.batch, BATCH)

    def run(self, images):
        maps = self.engine.activations(images)
        return numpy_engine.classify(maps[-1], self.packed), maps
