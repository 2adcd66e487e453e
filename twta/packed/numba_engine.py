"""The numba engine: the memory layout of a packed network as bit planes, for twta.packed.kernels.

A map of ternary activations is two planes of bits: non-zero and negative. Its layout serves the layer that reads it,
here called the reader; the layer that writes it is the writer.

    plane    the images of a batch, one after the other
    image    the reader's groups of channels, one after the other
    group    rows of cells, with the border that the reader's padding needs
    cell     the group's channels at one position, one bit each, in whole bytes

One row of the reader's weights thus meets a run of neighbouring bits, read as 64-bit words. If a word reads beyond the
run, its weights there are zero. The compiled code computes a block of eight filters at once: one byte of a cell in each
plane. So the writer takes its filters in the order of the reader's bytes. Eight filters in that order read one, two,
four or eight groups of the writer's own input.
"""
import functools
import math

import numba
import numpy as np
from numba.core.registry import cpu_target

from twta.packed import file_format, kernels
from twta.packed.numpy_engine import check_images, encoder_input, scale_logits
from twta.packed.pool import call, count_threads, held

if numba.config.DISABLE_JIT:
    raise ImportError('NUMBA_DISABLE_JIT is set')
if numba.version_info[:2] < (0, 61):  # kernels.popcount is for newer versions of LLVM
    raise ImportError(f'numba {numba.__version__} is too old, 0.61 is needed')
MEMORY = 1 << 28  # bytes; limit of a batch of prepared images in float64
SHARED = 1 << 25  # products; a call with fewer gains nothing from threads and runs in one
CHUNK = 32  # images that pass through all layers together: activations stay in the cache, weights are reused


@functools.cache
def counts_in_vectors():
    """Return whether the bit planes' kernels are at their best here, or nothing else has been measured.

    On x86 they want AVX-512's population counts of vectors (VPOPCNTDQ).
    """
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return not triple.startswith('x86_64') or '+avx512vpopcntdq' in features


class Planes:
    """The memory for a map's activations, laid out for its reader.

    batch     number of images
    shape     height, width, channels of the map
    groups    of the reader
    before    rows and columns of padding before the map
    padded    height and width with padding
    border    activation of the cells of the padding

    Its sizes cell, row, group, image and plane are in bytes.
    """

    def __init__(self, batch, shape, groups, before, padded, border=0):
        self.shape, self.groups, self.before = shape, groups, before
        self.channels = shape[2] // groups  # per cell
        self.cell = -(-self.channels // 8)
        self.row = padded[1] * self.cell
        self.group = padded[0] * self.row
        self.image = groups * self.group
        self.plane = batch * self.image + 64  # a word may read beyond the last row
        self.data = np.empty((2, self.plane), np.uint8)  # non-zero, negative
        self.data[:] = [[255 * (border != 0)], [255 * (border < 0)]]  # only cells of the map are written to again

    def unpack(self, n):
        """Return the activations of the first n images, int8 [n, height, width, channels]."""
        height, width, _ = self.shape
        cells = self.data[:, :n * self.image].reshape(2, n, self.groups, -1, self.row // self.cell, self.cell)
        top, left = self.before
        bits = np.unpackbits(cells[:, :, :, top:top + height, left:left + width], axis=-1, count=self.channels,
                             bitorder='little').astype(np.int8)
        values = bits[0] - 2 * bits[1]  # [n, groups, height, width, channels of a group]
        return np.moveaxis(values, 1, -1).reshape(n, *self.shape)


class CompiledEngine:
    """What engines share that numba compiles: the input, the results, and copies.

    packed, threads, batch, x, before    network, number of threads, most images, prepared images, padding before these
    planes                               of each layer's activations; they have unpack(n)
    """

    def __reduce__(self):
        """Copy and pickle the network alone: the memory is known to the kernels by its addresses."""
        return type(self), (self.packed, self.threads)

    def take(self, images):
        """Return images as the kernels take them, and crop for kernels.prepare; the stem's maps are put into self.x.

        Raises ValueError if images have another type or shape: the kernels would write outside their memory.
        """
        check_images(images, self.packed, self.batch)
        crop = self.packed.crop
        if self.packed.stem:
            crop, (top, left), (height, width, _) = -1, self.before, file_format.input_shape(self.packed)
            self.x[:len(images), top:top + height, left:left + width] = encoder_input(images, self.packed)
        return np.require(images, requirements='CW'), crop  # numba would compile anew for memory that is read only

    def logits(self, images):
        """Return logits, float32 [n, classes], of at most `batch` images, uint8 [n, height, width, channels]."""
        with held():
            return scale_logits(self.run(images), self.packed)

    def activations(self, images):
        """Return each layer's activations, int8 [n, height, width, channels], of at most `batch` images."""
        with held():
            self.run(images)
            return [planes.unpack(len(images)) for planes in self.planes]


class NumbaEngine(CompiledEngine):
    """The engine on bit planes, compiled by numba; threads None: one per available core."""

    name = 'numba'

    def __init__(self, packed, threads=None):
        self.packed = packed
        self.threads = count_threads(threads)
        self.sliced = None  # twta.packed.engines puts the sliced engine there
        shape = file_format.input_shape(packed)
        encoder = packed.layers[0]
        self.before, padded = file_format.border(shape, encoder)
        self.batch = max(1, min(256, MEMORY // (8 * math.prod(padded) * shape[2])))
        self.x = np.zeros((self.batch, *padded, shape[2]))
        self.products = 0
        self.kept, self.planes, rows = [], [], []  # kept: the arrays whose addresses are in the table
        for index, (layer, _, _, out) in enumerate(file_format.shapes(packed)):
            if index + 1 < len(packed.layers):
                reader = packed.layers[index + 1]
                planes = Planes(self.batch, out, reader.groups, *file_format.border(out, reader), reader.border)
            else:
                planes = Planes(self.batch, out, 1, (0, 0), out[:2])
            rows.append(self.lay_out(layer, self.planes[-1] if index else None, out, planes))
            self.planes.append(planes)
            self.products += math.prod(out) * file_format.fan_in(layer.weights)
        self.table = np.array(rows, np.int64)
        self.weights = classifier_weights(packed, out, 8 * planes.cell)

    def lay_out(self, layer, source, out, target):
        """Return a layer's row of the table, int64 [COLUMNS].

        source    Planes that the layer reads; None: the layer is the encoder, which reads self.x
        out       shape of its output
        target    Planes that the layer writes
        """
        filters = readers_order(out[2], target)
        height, width = layer.weights.shape[:2]
        if source is None:
            kind, sources = 0, np.zeros((len(filters), 1), np.int64)
            x, image, plane, row, cell = self.x, self.x[0].nbytes, 0, self.x[0, 0].nbytes, self.x[0, 0, 0].nbytes
            offsets = np.arange(height)[:, np.newaxis] * row + 8 * np.arange(width * self.x.shape[3])
            weights = real_weights(layer, filters)
        else:
            sources = groups_read(filters, out[2] // layer.groups)
            kind = sources.shape[1]
            sources = sources * source.group
            x, image, plane, row, cell = source.data, source.image, source.plane, source.row, source.cell
            offsets = np.arange(height)[:, np.newaxis] * row + 8 * np.arange(-(-width * cell // 8))
            weights = ternary_words(layer, filters, cell, offsets.shape[1])
        span = 8 // math.gcd(8, math.prod(out[:2]))
        x_at = positions(span, image, out, layer.stride * row, layer.stride * cell)
        y_at = positions(span, target.image, out, target.row, target.cell)
        y_at += target.before[0] * target.row + target.before[1] * target.cell
        index = np.arange(len(filters))
        blocks = describe_blocks(layer, filters, sources,
                                 index // target.cell * target.group + index % target.cell)
        offsets = offsets.ravel().astype(np.int64)
        self.kept += [weights, offsets, x_at, y_at, blocks]
        values = {'kind': kind, 'x': address(x), 'x_image': image, 'x_plane': plane, 'x_at': address(x_at),
                  'w': address(weights), 'w_block': weights[0].nbytes, 'words': len(offsets),
                  'words_at': address(offsets), 'blocks': address(blocks), 'n_blocks': len(filters),
                  'y': address(target.data), 'y_image': target.image, 'y_plane': target.plane, 'y_at': address(y_at),
                  'positions': math.prod(out[:2]), 'span': span}
        return [values[column] for column in kernels.COLUMNS]

    def run(self, images):
        """Return the classifier's sums, float64 [n, classes], and leave the activations in self.planes."""
        images, crop = self.take(images)
        sums = np.empty((len(images), len(self.packed.classes)))
        threads = self.threads if len(images) * self.products >= SHARED else 1
        last = self.planes[-1]
        call(kernels, threads, images, crop, self.x, self.before, self.table, threads, CHUNK, last.data, last.image,
             self.weights, sums)
        return sums


def address(array):
    return array.ctypes.data


def positions(span, image, out, row, column):
    """Return the byte offsets of all positions of `span` images, int64, image by image and row by row.

    image, row, column    bytes from one image, row, column of the output to the next, in the memory addressed
    out                   shape of the output
    """
    at = np.arange(span)[:, np.newaxis, np.newaxis] * image + np.arange(out[0])[:, np.newaxis] * row
    return (at + np.arange(out[1]) * column).ravel().astype(np.int64)


def readers_order(filters, target):
    """Return the filters of each byte of the target's cells, int [blocks, 8]; -1 stands for no filter."""
    lane = np.arange(8 * target.cell)
    order = np.where(lane < target.channels, lane * target.groups + np.arange(target.groups)[:, np.newaxis], -1)
    return order.reshape(-1, 8)


def groups_read(filters, per_group):
    """Return the groups of channels that each block of eight filters reads, [blocks, 1, 2, 4 or 8].

    Each group serves the same number of neighbouring filters. per_group is the number of filters in a group.
    """
    groups = np.where(filters < 0, filters.max(1, keepdims=True), filters) // per_group
    for count in (1, 2, 4):
        runs = groups.reshape(len(groups), count, -1)
        if (runs == runs[:, :, :1]).all():
            return runs[:, :, 0]
    return groups


def ternary_words(layer, filters, cell, words):
    """Return a ternary layer's weights as planes, uint64 [blocks, height, words, 2, 8]: non-zero, negative; filters.

    filters    as readers_order returns them
    cell       bytes of a cell of the input
    words      64-bit words per row of the kernel
    """
    height, width, channels, n_filters = layer.weights.shape
    bits = np.zeros((2, n_filters + 1, height, width, 8 * cell), np.uint8)  # the last one, index -1, has no weights
    weights = file_format.filter_major(layer.weights)
    bits[:, :-1, :, :, :channels] = weights != 0, weights < 0
    run = np.zeros((2, n_filters + 1, height, 64 * words), np.uint8)
    run[..., :width * 8 * cell] = bits.reshape(2, n_filters + 1, height, -1)
    planes = np.packbits(run, axis=-1, bitorder='little').view(np.uint64)
    return aligned(planes[:, filters].transpose(1, 3, 4, 0, 2))


def real_weights(layer, filters):
    """Return the encoder's weights, float64 [blocks, height, width * channels, 8]."""
    height, _, _, n_filters = layer.weights.shape
    weights = np.zeros((height, math.prod(layer.weights.shape[1:3]), n_filters + 1))
    weights[..., :-1] = layer.weights.reshape(height, -1, n_filters)
    return aligned(np.moveaxis(weights[..., filters], 2, 0))


def classifier_weights(packed, shape, channels):
    """Return the classifier's weights, float64 [classes, features], for maps of a shape with so many channels."""
    weights = np.zeros((math.prod(shape[:2]), channels, len(packed.classes)))
    weights[:, :shape[2]] = packed.weights.reshape(-1, shape[2], len(packed.classes))
    return np.ascontiguousarray(weights.reshape(-1, len(packed.classes)).T)


def describe_blocks(layer, filters, sources, output):
    """Return the descriptions of the blocks, uint8 [blocks, kernels.BLOCK], as UPPER to SOURCES in kernels say.

    sources    byte offsets of the groups in the input, [blocks, 1, 2, 4 or 8]
    output     byte offset of each block in a plane of the output
    """
    blocks = np.zeros((len(filters), kernels.BLOCK), np.uint8)
    kind = np.float32 if layer.upper.dtype == np.float32 else np.int64
    limits = np.finfo(np.float32) if kind is np.float32 else np.iinfo(np.int64)
    for where, thresholds, never in ((kernels.UPPER, layer.upper, limits.max),  # never: the filter -1 does not fire
                                     (kernels.LOWER, layer.lower, limits.min)):
        values = np.append(thresholds.astype(kind), kind(never))[filters]
        blocks[:, where:where + values[0].nbytes] = values.view(np.uint8)
    blocks[:, kernels.OUTPUT:kernels.OUTPUT + 8] = output.astype(np.int64)[:, np.newaxis].view(np.uint8)
    starts = np.ascontiguousarray(sources, np.int64)
    blocks[:, kernels.SOURCES:kernels.SOURCES + starts[0].nbytes] = starts.view(np.uint8)
    return blocks


def aligned(array):
    """Return a copy that starts on a cache line of 64 bytes."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -address(memory) % 64
    copy = memory[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
