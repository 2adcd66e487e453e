"""The encoder of the compiled engines: its memory, as twta.packed.encoder_kernels wants it."""
import math

import numpy as np

from twta.packed import file_format
from twta.packed.encoder_kernels import COLUMNS, FILTERS
from twta.packed.numpy_engine import encoder_input

ROUNDING = 1.05 * 2.0 ** -24  # unit roundoff of float32, and room for the bound itself, which float32 computes
OVERFLOW = 1e30  # sum of |weights|; from there on float32 decides nothing


class Memory:
    """What gives addresses of arrays to kernels, and keeps the arrays as long as itself in the list `kept`."""

    def keep(self, array):
        """Keep an array; return its address."""
        self.kept.append(array)
        return address(array)


class Encoder(Memory):
    """The prepared images of a network and its encoder.

    x          prepared images, float32 [batch, padded height, padded width, channels]
    wide       a stem's maps in float64, as x; None without a stem
    before     rows and columns of padding before the map
    row        int64 [COLUMNS]
    """

    def __init__(self, packed, batch, filters, outputs, target):
        """Lay out the memory.

        filters    of each byte of the output, int [bytes, 8]; -1 stands for no filter
        outputs    byte offset of each of these in an image of the output
        target     address, bytes per image and per plane, and a function of `span` that returns the positions' offsets
        """
        layer, shape, self.before, out = next(file_format.shapes(packed))
        padded = file_format.border(shape, layer)[1]
        self.packed, self.kept = packed, []
        self.x = aligned(np.zeros((batch, *padded, shape[2]), np.float32))
        self.wide = np.zeros(self.x.shape) if packed.stem else None
        bytes_per_group = FILTERS // 8
        fill = -len(filters) % bytes_per_group  # the last byte is computed once more
        order = np.concatenate([filters, filters[-1:].repeat(fill, 0)]).reshape(-1, FILTERS)
        outputs = np.append(outputs, outputs[-1:].repeat(fill)).astype(np.int64)
        height, width = layer.weights.shape[:2]
        image, row, cell = (part.nbytes for part in (self.x[0], self.x[0, 0], self.x[0, 0, 0]))
        words = (np.arange(height)[:, np.newaxis] * row + 4 * np.arange(width * shape[2])).ravel().astype(np.int64)
        y, y_image, y_plane, y_at = target
        span = 8 // math.gcd(8, math.prod(out[:2]))
        weights = arrange(layer.weights.reshape(-1, out[2]), order)
        values = {
            'x': address(self.x), 'wide': address(self.wide) if packed.stem else 0, 'x_image': image,
            'x_at': self.keep(positions(span, image, out, layer.stride * row, layer.stride * cell)),
            'w': self.keep(weights), 'w_group': weights[0].nbytes, 'words': len(words), 'words_at': self.keep(words),
            'thresholds': self.keep(describe_thresholds(layer, order)), 'outputs': self.keep(outputs),
            'is_run': (np.diff(outputs.reshape(-1, bytes_per_group)) == 1).all(),
            'n_groups': len(order), 'y': y, 'y_image': y_image, 'y_plane': y_plane, 'y_at': self.keep(y_at(span)),
            'positions': math.prod(out[:2]), 'span': span}
        self.row = np.array([values[column] for column in COLUMNS], np.int64)

    def take(self, images):
        """Return crop and largest of these images for encoder_kernels.prepare; put a stem's maps into the memory."""
        if not self.packed.stem:
            return self.packed.crop, np.float32(0)
        maps = encoder_input(images, self.packed)
        (top, left), (height, width) = self.before, maps.shape[1:3]
        inner = np.s_[:len(images), top:top + height, left:left + width]
        with np.errstate(over='ignore'):  # the encoder then sums in float64
            self.x[inner], self.wide[inner] = maps, maps
        return -1, np.abs(self.x[inner]).max()


def describe_thresholds(layer, order):
    """Return the thresholds as encoder_kernels.COLUMNS say, float32 [groups, 4, FILTERS]."""
    upper, lower = layer.upper.astype(np.float64), layer.lower.astype(np.float64)
    magnitudes = np.maximum(np.abs(upper), np.abs(lower))
    magnitudes = np.where(magnitudes < OVERFLOW, magnitudes, 0)
    weights = np.abs(layer.weights.astype(np.float64)).reshape(-1, layer.weights.shape[3])
    sums = weights.sum(0)
    # two more roundings: of a stem's maps to float32, and of the exact sum
    scale = np.where(sums < OVERFLOW, (len(weights) + 3) * ROUNDING * sums + 1e-30, np.inf)
    least = 4 * ROUNDING * magnitudes + 1e-30
    values = np.array([upper, lower, scale, least]).astype(np.float32)
    values = np.append(values, np.float32([[np.inf], [-np.inf], [0], [0]]), axis=1)  # filter -1: never fires
    return aligned(np.moveaxis(values[:, order], 0, 1))


def arrange(weights, order):
    """Return weights [products, filters] as float32 [groups, products, FILTERS]; filter -1 has none."""
    weights = np.append(weights, np.zeros((len(weights), 1), weights.dtype), axis=1).astype(np.float32)
    return aligned(np.moveaxis(weights[:, order], 0, 1))


def address(array):
    return array.ctypes.data


def positions(span, image, out, row, column):
    """Return the byte offsets of all positions of `span` images, int64, image by image and row by row.

    image, row, column    bytes from one image, row, column of the output to the next, in the memory addressed
    out                   shape of the output
    """
    at = np.arange(span)[:, np.newaxis, np.newaxis] * image + np.arange(out[0])[:, np.newaxis] * row
    return (at + np.arange(out[1]) * column).ravel().astype(np.int64)


def aligned(array):
    """Return a copy that starts on a cache line of 64 bytes."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -address(memory) % 64
    copy = memory[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
