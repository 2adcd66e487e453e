"""The paired engine: the memory layout of a packed network for twta.packed.paired_kernels.

    map      images of a batch, rows of cells with the border that the reader's padding needs
    cell     the pairs of the map at one position, a code each, in the order in which the writer's blocks make them
    pair     two channels that one group of the writer makes and one group of the reader reads; an odd one is alone
    block    32 or 64 filters of one group of the writer: 16 or 32 neighbouring pairs of its map

The reader finds the pairs of a group by a list of their offsets. So it does not read pairs that only fill a block up.

Encoder and classifier are those of the numba engine; the encoder's bits become codes.
"""
import itertools
import math

import numpy as np

from twta import processor
from twta.packed import file_format, paired_kernels, passes
from twta.packed.encoder import Encoder, address, aligned, positions
from twta.packed.numba_engine import CompiledEngine, Planes, batch_of, lay_out_classifier, outputs_of, products_of
from twta.packed.paired_kernels import LANES
from twta.packed.pool import count_threads
from twta.packed.vectors import has_avx2

LARGEST_SUM = 32000  # of products; in 16 bits, thresholds beyond it are left
LARGEST_MEMORY = 1 << 29  # bytes of maps and weights
FILLED_UP = 1.8  # products computed per product of the network: up to there faster than bit planes, at 2 slower


def can_run(packed):
    """Return whether the processor has AVX2, and the paired engine can hold a network: its sums, maps and weights.

    The trained networks of pretrained/ need 5 to 50 MB.
    """
    if not has_avx2() or any(file_format.fan_in(layer.weights) > LARGEST_SUM for layer in packed.layers[1:]):
        return False
    maps = sum(batch_of(packed) * math.prod(padded) * len(order) for _, order, _, padded, *_ in maps_of(packed))
    return maps + sum(size for size, *_ in sizes_of(packed)) < LARGEST_MEMORY


def suits(packed):
    """Return whether the paired engine can run a network, and faster than the numba engine.

    It is faster unless too many of its products only fill up pairs and blocks.
    """
    sizes = list(sizes_of(packed))
    computed = sum(2 * positions * size for size, positions, _ in sizes)
    return computed < FILLED_UP * sum(products for *_, products in sizes) and can_run(packed)


def maps_of(packed):
    """Yield shape, order, rows and columns before it, padded height and width, and border of each map, as Map takes it.

    The border of the last map, which no ternary layer reads, is left out.
    """
    shapes = list(file_format.shapes(packed))
    for index, ((layer, _, _, out), (reader, *_)) in enumerate(itertools.pairwise([*shapes, (None,) * 4])):
        size = 16 * vectors_of(out[2] // layer.groups) if index else 4  # the encoder makes bytes, of eight filters
        padding = (*file_format.border(out, reader), reader.border) if reader else ((0, 0), out[:2])
        yield out, order_of(out[2], layer.groups, reader.groups if reader else 1, size), *padding


def sizes_of(packed):
    """Yield of each ternary layer the bytes of its weights, its number of positions, and that of its products."""
    for (writer, *_), (layer, shape, _, out) in itertools.pairwise(file_format.shapes(packed)):
        pairs = len(order_of(shape[2], writer.groups, layer.groups, 1))
        filters, lanes = out[2] // layer.groups, LANES * vectors_of(out[2] // layer.groups)
        yield (math.prod(layer.weights.shape[:2]) * pairs * -(-filters // lanes) * lanes, math.prod(out[:2]),
               math.prod(out) * file_format.fan_in(layer.weights))


def vectors_of(filters):
    """Return how many vectors a block has, for so many filters per group."""
    return 1 if filters <= LANES else 2


def order_of(filters, groups, readers, size):
    """Return the channels of each pair of a map, int [pairs, 2]; -1 stands for none.

    filters    channels of the map
    groups     of the writer: each makes neighbouring channels
    readers    groups of the reader: group g reads channels g, g + readers, g + 2 * readers, ...
    size       each group of the writer is filled up to a multiple of so many pairs
    """
    pairs, each = [], filters // groups
    for group in range(groups):
        channels = sorted(range(group * each, (group + 1) * each), key=lambda channel: channel % readers)
        for _, run in itertools.groupby(channels, key=lambda channel: channel % readers):
            run = list(run)
            pairs += itertools.zip_longest(run[::2], run[1::2], fillvalue=-1)
        pairs += [(-1, -1)] * (-len(pairs) % size)
    return np.array(pairs)


class Map:
    """The memory for a map's activations.

    batch     number of images
    shape     height, width, channels
    order     as order_of returns it
    before    rows and columns of padding before the map
    padded    height and width with padding
    border    activation of the cells of the padding

    Its sizes cell, row and image are in bytes.
    """

    def __init__(self, batch, shape, order, before, padded, border=0):
        self.shape, self.order, self.before, self.cell = shape, order, before, len(order)
        self.row = padded[1] * self.cell
        self.image = padded[0] * self.row
        self.data = np.full(batch * self.image, 64 * (1 + border), np.uint8)

    places = Planes.places

    def unpack(self, n):
        """Return the activations of the first n images, int8 [n, height, width, channels]."""
        (top, left), (height, width, _) = self.before, self.shape
        cells = self.data[:n * self.image].reshape(n, -1, self.row // self.cell, self.cell)
        pairs = cells[:, top:top + height, left:left + width] // 16
        values = np.empty((n, *self.shape), np.int8)
        for channels, digits in zip(self.order.T, paired_kernels.DIGITS, strict=True):
            values[..., channels[channels >= 0]] = digits[pairs[..., channels >= 0]]
        return values


class PairedEngine(CompiledEngine):
    """The engine on pairs of activations, compiled by numba; threads None: one per available core.

    Raises ValueError if it cannot compute the network.
    """

    name, kernels = 'paired', paired_kernels

    def __init__(self, packed, threads=None):
        if not can_run(packed):
            raise ValueError('the paired engine wants AVX2, sums of 16 bits, and maps and weights of at most '
                             f'{LARGEST_MEMORY >> 20} MB')
        self.packed, self.batch = packed, batch_of(packed)
        self.threads, self.cores = count_threads(threads), processor.available_cores()
        shapes, self.kept = list(file_format.shapes(packed)), []
        self.planes = [Map(self.batch, *values) for values in maps_of(packed)]
        rows = [np.zeros(len(passes.COLUMNS), np.int64), self.lay_out_encoder()]
        for (layer, *_), source, target in zip(shapes[1:], self.planes, self.planes[1:], strict=False):
            rows.append(self.lay_out(layer, source, target))
        self.table = np.array(rows, np.int64)
        self.products = products_of(packed)
        last = self.planes[-1]
        weights, affine = lay_out_classifier(packed, last.shape, last.shape[2] + 1)  # of channel -1: 0
        weights = weights.reshape(len(weights), -1, last.shape[2] + 1)[..., last.order.ravel()]
        self.classifier = np.ascontiguousarray(weights.reshape(len(weights), -1)), affine

    def lay_out_encoder(self):
        """Make the encoder, and return the row of the table that makes codes of its bits."""
        target = self.planes[0]
        self.bits = Planes(self.batch, target.shape, 1, (0, 0), target.shape[:2], 0, target.order.reshape(1, -1))
        bits, filters = self.bits, target.order.reshape(-1, 8)
        self.encoder = Encoder(self.packed, self.batch, filters, outputs_of(filters, bits),
                               (address(bits.data), bits.image, bits.plane, bits.places))
        values = {'kind': paired_kernels.CODES, 'x': address(bits.data), 'x_image': bits.image, 'x_plane': bits.plane,
                  'x_at': self.keep(bits.places(1)), 'words': bits.cell, 'n_blocks': 1, 'y': address(target.data),
                  'y_image': target.image, 'y_at': self.keep(target.places(1)),
                  'positions': math.prod(target.shape[:2]), 'span': 1, 'cost': bits.cell}
        return [values.get(column, 0) for column in passes.COLUMNS]

    def lay_out(self, layer, source, target):
        """Return a ternary layer's row of the table, by column; it reads one Map and writes another."""
        vectors = vectors_of(target.shape[2] // layer.groups)
        filters = target.order.reshape(-1, LANES * vectors)
        rows, columns = (np.arange(size)[:, np.newaxis] for size in layer.weights.shape[:2])
        pairs = np.flatnonzero(source.order[:, 0] >= 0)
        groups = source.order[pairs, 0] % layer.groups
        pairs = pairs[np.argsort(groups, kind='stable')].reshape(layer.groups, -1)  # equally many are of each group
        lists = (rows[:, np.newaxis] * source.row + columns * source.cell + pairs[:, np.newaxis, np.newaxis])
        lists = lists.reshape(layer.groups, -1).astype(np.int64)
        weights = arrange(layer, source.order[pairs], filters.reshape(layer.groups, -1, filters.shape[1]))
        of_blocks = self.keep(lists) + lists[0].nbytes * np.arange(layer.groups).repeat(len(filters) // layer.groups)
        descriptions = describe_blocks(layer, filters, of_blocks)
        span = 8 // math.gcd(8, math.prod(target.shape[:2]))
        x_at = positions(span, source.image, target.shape, layer.stride * source.row, layer.stride * source.cell)
        values = {'kind': vectors, 'x': address(source.data), 'x_image': source.image, 'x_at': self.keep(x_at),
                  'w': self.keep(weights), 'w_block': weights[0].nbytes, 'words': lists[0].size,
                  'cost': max(1, vectors * lists[0].size // paired_kernels.PACE),
                  'blocks': self.keep(descriptions), 'n_blocks': len(filters),
                  'y': address(target.data), 'y_image': target.image, 'y_at': self.keep(target.places(span)),
                  'positions': math.prod(target.shape[:2]), 'span': span}
        return [values.get(column, 0) for column in passes.COLUMNS]


def arrange(layer, pairs, filters):
    """Return the pairs of weights as indices in the table of products, uint8 [blocks, words, lanes].

    pairs      channels, int [groups, pairs, 2]
    filters    int [groups, blocks, lanes]; -1 stands for none
    """
    weights = np.pad(layer.weights, ((0, 0), (0, 0), (0, 1), (0, 1)))  # of channel or filter -1: 0
    lanes = filters.reshape(layer.groups, 1, -1)
    first, second = (weights[:, :, np.where(channels < 0, -1, channels // layer.groups)[..., np.newaxis], lanes] + 1
                     for channels in np.moveaxis(pairs, -1, 0))
    indices = np.moveaxis((first + 3 * second).astype(np.uint8), 2, 0)  # [groups, height, width, pairs, lanes]
    blocks, lanes = filters.shape[1:]
    indices = indices.reshape(layer.groups, -1, blocks, lanes).swapaxes(1, 2)
    return aligned(indices.reshape(-1, indices.shape[2], lanes))


def describe_blocks(layer, filters, lists):
    """Return the descriptions of the blocks, uint8 [blocks, paired_kernels.BLOCK].

    filters    [blocks, lanes]
    lists      addresses of the offsets of the pairs that each block reads
    """
    blocks = np.zeros((len(filters), paired_kernels.BLOCK), np.uint8)
    limits = np.iinfo(np.int16)  # a sum never comes near: the filter -1 does not fire
    for where, values, never in ((paired_kernels.UPPER, layer.upper, limits.max),
                                 (paired_kernels.LOWER, layer.lower, limits.min)):
        values = np.append(np.clip(values, limits.min, limits.max), never)[filters]
        values = values.astype(np.int16).reshape(len(filters), -1, LANES // 2, 2).swapaxes(2, 3)
        values = np.ascontiguousarray(values.reshape(len(filters), -1)).view(np.uint8)
        blocks[:, where:where + values.shape[1]] = values
    for where, values in ((paired_kernels.OUTPUT, np.arange(len(filters)) * filters.shape[1] // 2),
                          (paired_kernels.PAIRS, lists)):
        blocks[:, where:where + 8] = values.astype(np.int64)[:, np.newaxis].view(np.uint8)
    return aligned(blocks)
