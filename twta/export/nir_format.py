"""Export of a packed network in the Neuromorphic Intermediate Representation (NIR, doi 10.1038/s41467-024-52259-9).

The graph is one chain: input, then per layer a Conv2d and an IF, then the classifier as a Conv2d, output. It is for one
image and one time step. docs/exchange.md tells what reads the files.

A negative spike is a spike of another neuron: a layer with negative activations has two halves of channels, [positive,
negative], with weights [W, -W]; the next layer reads them with [W, -W]. Networks of --rest -1 count from the state of
rest instead (rewrite.count_from_rest), so that nothing is negative and the border is 0.

thresholds    weights -1, 0, +1; each neuron has its threshold, half a step from the whole sums
biases        every threshold is 1; weights are scaled by 2 ** -k, biases hold the thresholds. For readers that allow
              one threshold per layer, or several spikes per step: a membrane stays within (0, 2)

The file is HDF5 without v_reset, which older versions of the package nir refuse.
"""
import io
import itertools
import math

import numpy as np

from twta.export.rewrite import borders, count_from_rest, fires_negatively, is_from_rest, without_groups
from twta.packed.file_format import after, shapes
from twta.packed.numpy_engine import NumpyEngine, prepare

VERSION = '1.0.8'  # of nir


def neurons(packed):
    """Return the network whose spikes are written, without groups; for --rest -1 its form that counts from rest."""
    packed = packed._replace(layers=tuple(map(without_groups, packed.layers)))
    return count_from_rest(packed) if is_from_rest(packed) else packed


def build_nodes(packed, core, dialect):
    """Return the nodes by name, in the order of the chain: dictionaries of arrays, `type` among them.

    packed    see neurons
    core      begin with the encoder's spikes
    """
    rows = list(shapes(packed))
    nodes, halves = {'input': None}, 1  # halves: of the channels that a layer reads
    for index, (layer, shape, before, out) in enumerate(rows):
        signed = fires_negatively(layer)
        if index or not core:
            kernel = read_halves(layer.weights.astype(np.float32), halves)
            least = [half_below(layer.upper)] + ([half_below(-layer.lower)] if signed else [])
            kernel = np.concatenate([kernel, -kernel], axis=3) if signed else kernel
            # a standardised image of n values has none above the square root of n
            reach = 1 if index or not packed.crop else math.prod(shape) ** 0.5
            kernel, bias, threshold = encode(kernel, np.concatenate(least), dialect, reach)
            kernel, padding = pad_evenly(kernel, before, after(shape, layer))
            nodes[f'{layer.name}_sums'] = convolution(kernel, bias, shape[:2], layer.stride, padding)
            nodes[layer.name] = {'type': 'IF', **spread(threshold, out[:2])}
        halves = 1 + signed
        if not index:
            first = (shape[2], *shape[:2]) if not core else (halves * out[2], *out[:2])
            nodes['input'] = {'type': 'Input', 'shape': np.array(first)}
    nodes['classifier'] = classifier(packed, halves, rows[-1][3])
    nodes['output'] = {'type': 'Output', 'shape': np.array([len(packed.classes), 1, 1])}
    return nodes


def read_halves(kernel, halves):
    """Return weights that read the positive half of the channels, and minus themselves that read the negative one."""
    return np.concatenate([kernel, -kernel], axis=2) if halves == 2 else kernel


def half_below(upper):
    """Return thresholds that a sum exceeds if it is `upper` or more."""
    if upper.dtype == np.float32:
        return np.nextafter(upper, np.float32(-np.inf))
    return (upper - 0.5).astype(np.float32)


def encode(kernel, threshold, dialect, reach=1):
    """Return kernel, bias and thresholds, [filters] each, in a dialect.

    reach    the largest value that the layer reads; sums and thresholds are within what follows from it

    Thresholds of the encoder may be infinite: the neuron fires never, or always (after nextafter the lowest float).
    """
    if dialect == 'thresholds':
        return kernel, np.zeros_like(threshold), threshold.clip(-1e30, 1e30)
    is_constant = np.abs(threshold) > 1e30
    known = np.where(is_constant, 0, threshold)
    largest = np.maximum(reach * np.abs(kernel).sum((0, 1, 2)), np.abs(known))
    scale = (2.0 ** -np.ceil(np.log2(2 * largest + 2))).astype(np.float32)
    bias = np.where(is_constant, np.where(threshold > 0, 0, 1.5), 1 - known * scale)
    return kernel * np.where(is_constant, 0, scale), bias, np.ones_like(threshold)


def pad_evenly(kernel, before, behind):
    """Return a kernel with the same sums under the same padding on both sides, and that padding (rows, columns).

    TensorFlow pads an even kernel more behind than before; a row of zeros at the kernel's beginning makes up for it.
    """
    more = [max(0, last - first) for first, last in zip(before, behind, strict=True)]
    kernel = np.pad(kernel, ((more[0], 0), (more[1], 0), (0, 0), (0, 0)))
    return kernel, [max(first, last) for first, last in zip(before, behind, strict=True)]


def convolution(kernel, bias, shape, stride, padding):
    """Return a Conv2d node of a kernel [rows, columns, channels, filters] on maps of a shape (rows, columns)."""
    return {'type': 'Conv2d', 'weight': kernel.transpose(3, 2, 0, 1).astype(np.float32),
            'bias': bias.astype(np.float32), 'input_shape': np.array(shape), 'stride': np.array([stride, stride]),
            'padding': np.array(padding), 'dilation': np.array([1, 1]), 'groups': np.array(1)}


def spread(threshold, shape):
    """Return the arrays of an IF node: one value per neuron, [channels, rows, columns]."""
    v_threshold = np.broadcast_to(threshold[:, np.newaxis, np.newaxis], (len(threshold), *shape)).astype(np.float32)
    return {'r': np.ones_like(v_threshold), 'v_threshold': v_threshold}


def classifier(packed, halves, shape):
    """Return the Conv2d over the whole last map, [rows, columns, channels], whose sums are the logits."""
    kernel = packed.weights.reshape(*shape, -1) * packed.scale
    return convolution(read_halves(kernel, halves), packed.shift, shape[:2], 1, [0, 0])


def build_file(packed, core, dialect):
    """Return the bytes of the file; packed: see neurons."""
    import h5py  # here: TensorFlow brings it, twta.packed does without

    content = io.BytesIO()  # on a full disk, HDF5 itself would end in a segmentation fault
    with h5py.File(content, 'w') as file:
        file.create_dataset('version', data=VERSION)
        group = file.create_group('node')
        group.create_dataset('type', data='NIRGraph')
        nodes = build_nodes(packed, core, dialect)
        group.create_dataset('edges', data=np.array(list(itertools.pairwise(nodes)), dtype=h5py.string_dtype()))
        for name, node in nodes.items():
            for key, value in node.items():
                packing = {'compression': 'gzip'} if getattr(value, 'size', 1) > 100 else {}
                group.create_dataset(f'nodes/{name}/{key}', data=value, **packing)
    return content.getvalue()


def make_vectors(packed, core, images):
    """Return input, spikes by layer, and logits of images, as the graph has them: halves of channels, NCHW.

    images    uint8 [n, height, width, channels]
    """
    logits, maps = NumpyEngine(packed).run(images)
    spikes = {layer.name: halve(fired, layer) for layer, fired in zip(packed.layers, maps, strict=True)}
    first = spikes[packed.layers[0].name] if core else prepare(images, packed.crop).transpose(0, 3, 1, 2)
    return {'images': images, 'input': first, **spikes, 'logits': logits}


def halve(fired, layer):
    """Return spikes, int8 NCHW with halves of channels, of activations NHWC."""
    parts = [fired > 0, fired < 0] if fires_negatively(layer) else [fired > 0]
    return np.concatenate(parts, axis=3).transpose(0, 3, 1, 2).astype(np.int8)


def check(packed, core):
    """Return why the network cannot be written, or None."""
    if packed.stem and not core:
        return (f'{packed.network} has a ReLU before the encoder, which NIR has not; export a .twta file, then use '
                'python -m twta.export FILE.twta --format nir --core')
    values = borders(packed)
    if values not in ({0}, {-1}, set()):
        return f'{packed.network} pads with {sorted(values)}, but NIR pads with 0; use qonnx or onnx'
    return None
