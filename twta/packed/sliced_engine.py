"""The sliced engine: the memory layout of a packed network for twta.packed.sliced_kernels.

    map         positions, with the border that the reader's padding needs; at each its channels, filled up to eights
    channel     two vectors, positive and negative, with a bit per image
    filter      the channels under its kernel whose weights are not 0, as offsets of the vectors that count as plus;
                the other vector of a channel, SIZE away, counts as minus

Encoder and classifier are those of the numba engine.
"""
import itertools
import math

import numpy as np

from twta.packed import file_format, sliced_kernels
from twta.packed.encoder import Encoder, address, positions
from twta.packed.numba_engine import CompiledEngine, Planes, lay_out_classifier
from twta.packed.pool import call, count_threads
from twta.packed.sliced_kernels import IMAGES, PART, SIZE, UNIT

LARGEST_MEMORY = 1 << 29  # bytes of maps and entries; entries are int32 offsets in a map
MOST_FILTERS = 1 << 16  # a second to lay out


def suits(packed):
    """Return whether the sliced engine can hold a network: its sums, and the memory and time that it takes.

    The trained networks of pretrained/ need 1 to 20 MB.
    """
    memory, n_filters = 0, 0
    for layer, shape, *_ in list(file_format.shapes(packed))[1:]:
        memory += math.prod(file_format.border(shape, layer)[1]) * (shape[2] + 7) * 2 * SIZE + 4 * layer.weights.size
        n_filters += layer.weights.shape[3]
    widest = max((file_format.fan_in(layer.weights) for layer in packed.layers[1:]), default=0)
    return memory < LARGEST_MEMORY and n_filters < MOST_FILTERS and widest + UNIT < 1 << sliced_kernels.BITS[-1]


class Map:
    """The memory for a map's activations of IMAGES images.

    shape     height, width, channels
    before    rows and columns of padding before the map
    padded    height and width with padding
    border    activation of the cells of the padding
    """

    def __init__(self, shape, before, padded, border):
        self.shape, self.before = shape, before
        self.channels = -(-shape[2] // 8) * 8
        self.cell = 2 * SIZE * self.channels
        self.row = self.cell * padded[1]
        memory = np.zeros(padded[0] * self.row + SIZE, np.uint8)
        start = -address(memory) % SIZE
        self.data = memory[start:start + padded[0] * self.row].reshape(*padded, self.channels, 2, SIZE)
        if border:
            self.data[..., 0, :], self.data[..., 1, :] = 255 * (border > 0), 255 * (border < 0)

    def places(self, shape, stride, before):
        """Return the byte offsets of so many rows and columns of positions, int64, row by row."""
        return before[0] * self.row + before[1] * self.cell + positions(1, 0, shape, stride * self.row,
                                                                        stride * self.cell)

    def unpack(self, n):
        """Return the activations of the first n images, int8 [n, height, width, channels]."""
        (top, left), (height, width, channels) = self.before, self.shape
        inner = self.data[top:top + height, left:left + width, :channels]
        bits = np.unpackbits(inner, axis=-1, bitorder='little')[..., :n].astype(np.int8)
        return np.moveaxis(bits[..., 0, :] - bits[..., 1, :], -1, 0)


class SlicedEngine(CompiledEngine):
    """The engine on vectors of images, compiled by numba; threads None: one per available core.

    Its memory: 64 bytes per activation, 4 per weight that is not 0, 1 KB per value of the encoder's input (3 KB with a
    stem).

    Raises ValueError if it does not suit the network.
    """

    name, batch = 'sliced', IMAGES

    def __init__(self, packed, threads=None):
        if not suits(packed):
            raise ValueError('the network is too large for the sliced engine')
        self.packed, self.threads = packed, count_threads(threads)
        shapes = list(file_format.shapes(packed))
        self.planes = []
        for (_, _, _, out), (reader, *_) in itertools.pairwise(shapes):
            self.planes.append(Map(out, *file_format.border(out, reader), reader.border))
        out = shapes[-1][3]
        self.planes.append(Map(out, (0, 0), out[:2], 0))
        self.kept = []
        first, last = self.planes[0], self.planes[-1]
        rows = [{'y': address(first.data), 'y_at': self.keep(first.places(first.shape[:2], 1, first.before))}]
        for (layer, *_), source, target in zip(shapes[1:], self.planes, self.planes[1:], strict=False):
            rows.append(self.lay_out(layer, source, target))
        self.table = np.array([[row.get(column, 0) for column in sliced_kernels.COLUMNS] for row in rows], np.int64)
        out = shapes[0][3]
        count, blocks = math.prod(out[:2]), first.channels // 8
        self.encoded = np.zeros((IMAGES // PART, 2, count, blocks, PART), np.uint8)
        order = np.arange(8 * blocks)
        self.encoder = Encoder(
            packed, IMAGES, np.where(order < out[2], order, -1).reshape(-1, 8), PART * np.arange(blocks),
            (address(self.encoded), 1, self.encoded[0, 0].nbytes,
             lambda span: positions(span, 1, out, out[1] * blocks * PART, blocks * PART)))
        self.last = last.data.reshape(-1, last.channels, 2, SIZE)
        self.features = Planes(IMAGES, last.shape, 1, (0, 0), last.shape[:2])
        self.classifier = lay_out_classifier(packed, last.shape, last.channels)

    def lay_out(self, layer, source, target):
        """Return a ternary layer's row of the table, by column; it reads one Map and writes another."""
        height, width, _, n_filters = layer.weights.shape
        cells = np.arange(height)[:, np.newaxis] * source.row + np.arange(width) * source.cell
        rows, longest = [], 0
        for k in range(n_filters):
            weights, group = layer.weights[..., k], k // (n_filters // layer.groups)
            channels = 2 * SIZE * np.arange(group, source.shape[2], layer.groups)
            entries = (cells[..., np.newaxis] + channels + SIZE * (weights < 0))[weights != 0]
            count = len(entries)
            odd, entries = (entries[0], entries[1:]) if count % 2 else (0, entries)
            # filled up with pairs that add as much to plus as to minus
            entries = np.append(entries, [0, SIZE] * (-len(entries) % UNIT // 2)).astype(np.int32)
            rows.append((self.keep(entries), len(entries) // UNIT, odd, -(count % 2),
                         -np.clip(layer.upper[k], -count, count + 1), -np.clip(layer.lower[k], -count - 1, count) - 1))
            longest = max(longest, len(entries) + 1)
        return {'x': address(source.data), 'x_at': self.keep(source.places(target.shape[:2], layer.stride, (0, 0))),
                'y': address(target.data), 'y_at': self.keep(target.places(target.shape[:2], 1, target.before)),
                'filters': self.keep(np.array(rows, np.int64)), 'n_filters': n_filters,
                'positions': math.prod(target.shape[:2]), 'bits': longest.bit_length()}

    def run(self, images):
        """Return logits, float32 [n, classes], and leave the activations in self.planes."""
        images, crop, largest = self.take(images)
        encoder, logits = self.encoder, np.empty((len(images), len(self.packed.classes)), np.float32)
        call(sliced_kernels, self.threads, images, crop, largest, encoder.x, encoder.before, encoder.row, self.encoded,
             self.table, self.threads, self.last, self.features.data, self.features.image, *self.classifier, logits)
        return logits
