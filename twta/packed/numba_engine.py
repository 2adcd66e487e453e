"""The numba engine: the memory layout of a packed network as bit planes, for twta.packed.kernels.

A map of ternary activations is two planes of bits: non-zero and negative. Its layout serves the layer that reads it,
here called the reader; the layer that writes it is the writer.

    plane    the images of a batch, one after the other
    image    the reader's groups of channels, one after the other
    group    rows of cells, with the border that the reader's padding needs
    cell     the group's channels at one position, one bit each, in whole bytes

One row of the reader's weights thus meets a run of neighbouring bits, read as 64-bit words. If a word reads beyond the
run, its weights there are zero. The compiled code computes one byte of a cell in each plane at once, eight filters, or
several bytes. So the writer takes its filters in the order of the reader's bytes. Eight filters in that order read one,
two, four or eight groups of the writer's own input. Two bytes that read the same two groups, and four that read the
same four, are computed together.

If each filter of a layer reads a channel of its own, as in pooling without weights, its input has one group, whose
channels lie in the order of its filters: see twta.packed.pooling_kernels.
"""
import functools
import itertools
import math

import numba
import numpy as np

from twta import processor
from twta.packed import file_format, kernels, passes
from twta.packed.encoder import Encoder, Memory, address, aligned, positions
from twta.packed.numpy_engine import check_images
from twta.packed.pool import POOL, call, count_threads
from twta.packed.pooling_kernels import bits_of
from twta.packed.vectors import processor_of_code

if numba.config.DISABLE_JIT:
    raise ImportError('NUMBA_DISABLE_JIT is set')
if numba.version_info[:2] < (0, 61):  # its LLVM is older than the one for which vectors.py is written
    raise ImportError(f'numba {numba.__version__} is too old, 0.61 is needed')
MEMORY = 1 << 28  # bytes; limit of a batch of prepared images
SHARED = 1 << 25  # products; a call with fewer gains nothing from threads and runs in one
CHUNK = 16  # images that pass through all layers together: activations stay in the cache, weights are reused


@functools.cache
def counts_in_vectors():
    """Return whether the bit planes' kernels are at their best here, or nothing else has been measured.

    On x86 they want AVX-512's population counts of vectors (VPOPCNTDQ).
    """
    architecture, features = processor_of_code()
    return architecture != 'x86_64' or '+avx512vpopcntdq' in features


class Planes:
    """The memory for a map's activations, laid out for its reader.

    batch     number of images
    shape     height, width, channels of the map
    groups    of the reader
    before    rows and columns of padding before the map
    padded    height and width with padding
    border    activation of the cells of the padding
    order     channel of each bit of the cells, int [groups, bits]; -1 stands for none. By default group g of G has the
              channels g, g + G, g + 2G, ...

    Its sizes cell, row, group, image and plane are in bytes.
    """

    def __init__(self, batch, shape, groups, before, padded, border=0, order=None):
        if order is None:
            lane = np.arange(-(-shape[2] // groups // 8) * 8)
            order = np.where(lane < shape[2] // groups, lane * groups + np.arange(groups)[:, np.newaxis], -1)
        self.shape, self.before, self.order = shape, before, order
        groups, bits = order.shape
        self.cell = bits // 8
        self.row = padded[1] * self.cell
        self.group = padded[0] * self.row
        self.image = groups * self.group
        self.plane = batch * self.image + 64  # a word may read beyond the last row
        self.data = np.empty((2, self.plane), np.uint8)  # non-zero, negative
        self.data[:] = [[255 * (border != 0)], [255 * (border < 0)]]  # only cells of the map are written to again

    def places(self, span):
        """Return the byte offsets of the positions of `span` images in a plane, int64, image by image, row by row."""
        before = self.before[0] * self.row + self.before[1] * self.cell
        return before + positions(span, self.image, self.shape, self.row, self.cell)

    def unpack(self, n):
        """Return the activations of the first n images, int8 [n, height, width, channels]."""
        height, width, _ = self.shape
        cells = self.data[:, :n * self.image].reshape(2, n, len(self.order), -1, self.row // self.cell, self.cell)
        top, left = self.before
        bits = np.unpackbits(cells[:, :, :, top:top + height, left:left + width], axis=-1, bitorder='little')
        bits = np.moveaxis(bits.astype(np.int8), 2, -2).reshape(2, n, height, width, -1)
        channel, values = self.order.ravel(), np.empty((n, *self.shape), np.int8)
        values[..., channel[channel >= 0]] = (bits[0] - 2 * bits[1])[..., channel >= 0]
        return values


class CompiledEngine(Memory):
    """What engines share that numba compiles: the results, and copies.

    packed, threads, batch    network, number of threads, most images
    encoder                   Encoder
    planes                    of each layer's activations; they have unpack(n)
    kernels                   module whose function `run` computes them, except in the sliced engine
    """

    def __reduce__(self):
        """Copy and pickle the network alone: the memory is known to the kernels by its addresses."""
        return type(self), (self.packed, self.threads)

    def take(self, images):
        """Return images as the kernels take them, and crop and largest for encoder_kernels.prepare.

        Raises ValueError if images have another type or shape: the kernels would write outside their memory.
        """
        check_images(images, self.packed, self.batch)
        if not (images.flags.c_contiguous and images.flags.writeable):
            images = images.copy()  # numba would compile anew for memory that is read only
        return images, *self.encoder.take(images)

    def logits(self, images):
        """Return logits, float32 [n, classes], of at most `batch` images, uint8 [n, height, width, channels]."""
        with POOL['lock']:
            return self.run(images)

    def activations(self, images):
        """Return each layer's activations, int8 [n, height, width, channels], of at most `batch` images."""
        with POOL['lock']:
            self.run(images)
            return [planes.unpack(len(images)) for planes in self.planes]

    def run(self, images):
        """Return logits, float32 [n, classes], and leave the activations in self.planes."""
        images, crop, largest = self.take(images)
        threads = self.threads if len(images) * self.products >= SHARED else 1
        if len(images) < threads:
            threads = min(threads, self.cores)  # threads that share an image wait for each other
        encoder, last = self.encoder, self.planes[-1]
        logits = np.empty((len(images), len(self.packed.classes)), np.float32)
        call(self.kernels, threads, images, crop, largest, encoder.x, encoder.before, encoder.row, self.table, threads,
             CHUNK, last.data, last.image, *self.classifier, logits)
        return logits


class NumbaEngine(CompiledEngine):
    """The engine on bit planes, compiled by numba; threads None: one per available core."""

    name, kernels = 'numba', kernels

    def __init__(self, packed, threads=None):
        self.packed = packed
        self.threads, self.cores = count_threads(threads), processor.available_cores()
        self.others = {}  # twta.packed.engines puts the engines there that replace this one
        shapes = list(file_format.shapes(packed))
        self.batch = batch_of(packed)
        out = shapes[-1][3]
        self.planes = [Planes(self.batch, out, 1, (0, 0), out[:2])]
        for (_, _, _, out), (reader, *_) in reversed(list(itertools.pairwise(shapes))):
            order = words_of(self.planes[0].order) if has_a_channel_each(reader) else None
            self.planes.insert(0, Planes(self.batch, out, reader.groups, *file_format.border(out, reader),
                                         reader.border, order))
        first, self.kept = self.planes[0], []
        filters = first.order.reshape(-1, 8)
        self.encoder = Encoder(packed, self.batch, filters, outputs_of(filters, first),
                               (address(first.data), first.image, first.plane, first.places))
        rows = [np.zeros(len(passes.COLUMNS), np.int64)]
        for (layer, _, _, out), source, target in zip(shapes[1:], self.planes, self.planes[1:], strict=False):
            lay_out = self.lay_out_pooling if has_a_channel_each(layer) else self.lay_out
            rows.append(lay_out(layer, source, out, target))
        self.table = np.array(rows, np.int64)
        self.products = products_of(packed)
        self.classifier = lay_out_classifier(packed, out, 8 * self.planes[-1].cell)

    def lay_out(self, layer, source, out, target):
        """Return a ternary layer's row of the table, by column.

        source    Planes that the layer reads
        out       shape of its output
        target    Planes that the layer writes
        """
        filters = target.order.reshape(-1, 8)
        height, width = layer.weights.shape[:2]
        blocks, groups = blocks_of(groups_read(filters, out[2] // layer.groups))
        offsets = np.arange(height)[:, np.newaxis] * source.row + 8 * np.arange(-(-width * source.cell // 8))
        lanes = order_of_lanes(filters[blocks], groups.shape[1])
        weights = ternary_words(layer, lanes, source.cell, offsets.shape[1])
        offsets = offsets.ravel().astype(np.int64)
        outputs = outputs_of(filters, target)[blocks]
        descriptions = describe_blocks(layer, filters[blocks], groups * source.group, outputs)
        return self.row(layer, source, out, target, span=8 // math.gcd(8, math.prod(out[:2])), kind=groups.shape[1],
                        w=self.keep(weights), w_block=weights[0].nbytes, words=len(offsets),
                        words_at=self.keep(offsets), blocks=self.keep(descriptions), n_blocks=len(blocks),
                        cost=groups.shape[1] * len(offsets))

    def lay_out_pooling(self, layer, source, out, target):
        """Return a row of the table as lay_out does, for pooling_kernels."""
        height, width, *_ = layer.weights.shape
        cells, (filters,) = height * width, source.order
        offsets = (np.arange(height)[:, np.newaxis] * source.row + np.arange(width) * source.cell).ravel()
        weights = np.append(layer.weights.reshape(cells, -1), np.zeros((cells, 1), np.int8), axis=1)[:, filters]
        masks = np.packbits(np.stack([weights != 0, weights < 0], axis=1), axis=-1, bitorder='little').view(np.uint64)
        # the sum + cells is at least the first one, or less than the second one
        limits = cells + np.stack([np.append(layer.upper, cells + 1), np.append(layer.lower, -cells - 1) + 1])
        limits = limits[:, np.newaxis, filters]
        bits = limits >> np.arange(bits_of(cells))[:, np.newaxis] & 1
        thresholds = np.packbits(bits, axis=-1, bitorder='little').view(np.int64)
        outputs = np.full(8 * thresholds.shape[-1], -1)
        outputs[:target.order.size // 8] = outputs_of(target.order.reshape(-1, 8), target)
        return self.row(layer, source, out, target, span=1, kind=kernels.POOLING, w=self.keep(masks),
                        w_block=masks.shape[-1], words=cells, words_at=self.keep(offsets.astype(np.int64)),
                        blocks=self.keep(np.append(thresholds, outputs)), n_blocks=1, cost=0)

    def row(self, layer, source, out, target, span, **values):
        """Return a row of the table, by column: `values`, and what both kinds of layers have in common; see lay_out.

        span    number of images that the positions' offsets cover
        """
        x_at = positions(span, source.image, out, layer.stride * source.row, layer.stride * source.cell)
        values |= {'x': address(source.data), 'x_image': source.image, 'x_plane': source.plane,
                   'x_at': self.keep(x_at), 'y': address(target.data), 'y_image': target.image,
                   'y_plane': target.plane, 'y_at': self.keep(target.places(span)),
                   'positions': math.prod(out[:2]), 'span': span}
        return [values[column] for column in passes.COLUMNS]


def batch_of(packed):
    """Return the largest number of images per call."""
    layer, shape, *_ = next(file_format.shapes(packed))
    padded = file_format.border(shape, layer)[1]
    return max(1, min(256, MEMORY // ((12 if packed.stem else 4) * math.prod(padded) * shape[2])))


def products_of(packed):
    """Return the number of products per image, the encoder's included."""
    return sum(math.prod(out) * file_format.fan_in(layer.weights) for layer, _, _, out in file_format.shapes(packed))


def has_a_channel_each(layer):
    """Return whether each filter of a ternary layer reads one channel, and no other filter does."""
    return 1 < layer.groups == layer.weights.shape[3] and layer.weights.shape[2] == 1


def words_of(order):
    """Return the order of Planes as that of one group, filled up to words of 64 bits."""
    return np.append(order.ravel(), np.full(-order.size % 64, -1)).reshape(1, -1)


def outputs_of(filters, target):
    """Return the byte offset in an image of the target of each row of filters, its order byte by byte, int64."""
    index = np.arange(len(filters))
    return index // target.cell * target.group + index % target.cell


def groups_read(filters, per_group):
    """Return the groups of channels that each block of eight filters reads, [blocks, 1, 2, 4 or 8].

    Each group serves the same number of neighbouring filters. per_group is the number of filters in a group.
    """
    of_block = filters.max(1, keepdims=True).clip(0)  # for the filters -1, which have no weights
    groups = np.where(filters < 0, of_block, filters) // per_group
    for count in (1, 2, 4):
        runs = groups.reshape(len(groups), count, -1)
        if (runs == runs[:, :, :1]).all():
            return runs[:, :, 0]
    return groups


def blocks_of(groups):
    """Return the bytes that are computed together, [blocks, bytes], and the groups that they read, [blocks, groups].

    groups    as groups_read returns them

    Several bytes read the same groups; if one is missing, another is computed twice.
    """
    n_bytes = kernels.BYTES[groups.shape[1]]
    found, readers = np.unique(groups, axis=0, return_inverse=True)
    blocks, read = [], []
    for index, group in enumerate(found):
        members = np.flatnonzero(readers.ravel() == index)
        members = np.append(members, members[-1:].repeat(-len(members) % n_bytes)).reshape(-1, n_bytes)
        blocks += members.tolist()
        read += [group] * len(members)
    return np.array(blocks), np.array(read)


def order_of_lanes(filters, groups):
    """Return filters [blocks, bytes, 8] in the order of the weights' lanes, [blocks, bytes * 8].

    That is group by group, and byte by byte within a group. In a byte, filters are group by group already.
    """
    blocks, n_bytes, _ = filters.shape
    return filters.reshape(blocks, n_bytes, groups, -1).swapaxes(1, 2).reshape(blocks, -1)


def ternary_words(layer, filters, cell, words):
    """Return a ternary layer's weights as planes, uint64 [blocks, height, words, 2, lanes]: non-zero, negative; lanes.

    filters    as order_of_lanes returns them
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


def lay_out_classifier(packed, shape, channels):
    """Return weights and affine for kernels.classify, for maps of a shape with so many channels."""
    weights = np.zeros((math.prod(shape[:2]), channels, len(packed.classes)))
    weights[:, :shape[2]] = packed.weights.reshape(-1, shape[2], len(packed.classes))
    affine = np.empty((2, len(packed.classes)), np.float32)
    affine[:] = packed.scale, packed.shift
    return np.ascontiguousarray(weights.reshape(-1, len(packed.classes)).T), affine


def describe_blocks(layer, filters, sources, outputs):
    """Return the descriptions of the blocks, uint8 [blocks, kernels.BLOCK], as UPPER to SOURCES in kernels say.

    filters    [blocks, bytes, 8]
    sources    byte offsets of the groups in the input, [blocks, 1, 2, 4 or 8]
    outputs    byte offsets in a plane of the output, [blocks, bytes]
    """
    blocks = np.zeros((len(filters), kernels.BLOCK), np.uint8)
    kind = np.int64 if filters.shape[1] == 1 else np.int32
    limits = np.iinfo(np.int32)  # a sum never comes near: the filter -1 does not fire
    for where, values in (
            (kernels.UPPER, np.append(layer.upper, limits.max)[filters].astype(kind)),
            (kernels.LOWER, np.append(layer.lower, limits.min)[filters].astype(kind)),
            (kernels.OUTPUTS, outputs.astype(np.int64)), (kernels.SOURCES, sources.astype(np.int64))):
        values = np.ascontiguousarray(values.reshape(len(blocks), -1)).view(np.uint8)
        blocks[:, where:where + values.shape[1]] = values
    return blocks
