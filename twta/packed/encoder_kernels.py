"""The encoder's kernels, which both compiled engines share: preparation of images, real-valued sums, thresholds.

The encoder's sums are defined in float64, rounded once, to float32. Here float32 alone decides nearly always: a sum of
k products is within k 2^-24 sum |w| |x| of the exact one, in any order (Jeannerod and Rump, "Improved error bounds for
inner products in floating-point arithmetic", 2013), and a threshold is seldom as near as that. If one is, the strip is
computed again in float64.

Filters come in groups of FILTERS, the lanes of PARTS vectors. A strip of STRIP positions of the map stays in registers.
twta.packed.encoder lays out the memory as COLUMNS say.
"""
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from twta.packed.vectors import (
    DOUBLE,
    FLOAT,
    LONG,
    accumulator,
    concatenate,
    distance,
    load,
    minimum,
    multiply_add,
    offset_address,
    peek,
    processor_of_code,
    splat,
    store_bits,
    vector,
)

LANES = 16
PARTS, STRIP = (2, 8) if '+avx512f' in processor_of_code()[1] else (1, 4)  # more would not fit in the registers
FILTERS = PARTS * LANES

# The columns of the encoder's description, int64
COLUMNS = (
    'x', 'wide',  # addresses of the prepared images in float32, and of a stem's maps in float64, laid out alike, or 0
    'x_image', 'x_at',  # bytes per image and address of positions' offsets, both in float32
    'w', 'w_group',  # weights, float32 [groups, words, FILTERS]: address, bytes per group
    'words', 'words_at',  # products per sum: number, address of their values' offsets from a position
    'thresholds',  # address of float32 [groups, 4, FILTERS]: upper, lower; then what a sum may be wrong by is
                   # the third times the largest |x|, plus the fourth
    'outputs',  # address of int64 [groups, FILTERS / 8]: where in an image of the output eight filters have their byte
    'is_run',  # whether the bytes of each group are side by side
    'n_groups',
    'y', 'y_image', 'y_plane', 'y_at',  # output: address, bytes per image and per plane, address of positions' offsets
    'positions', 'span')  # positions per image; number of images that x_at and y_at cover
WORDS, OUTPUT_MAP, POSITIONS, N_GROUPS = (COLUMNS.index(name) for name in ('words', 'y', 'positions', 'n_groups'))


def strip(positions):
    """Return an intrinsic that computes a group of filters at so many positions and stores its bits.

    The intrinsic returns 0 if all bits are certain.
    """
    @intrinsic
    def strip(context, x, x_at, w, words, words_at, thresholds, outputs, is_run, largest, y, y_plane, y_at):
        def emit(context, builder, signature, arguments):
            x, x_at, w, words, words_at, thresholds, outputs, is_run, largest, y, y_plane, y_at = arguments
            kind = vector(FLOAT, LANES)
            at = [offset_address(builder, x, x_at, position) for position in range(positions)]
            cells = [[accumulator(builder, kind) for _ in range(PARTS)] for _ in at]
            with cgutils.for_range(builder, words) as loop:
                word = load(builder, builder.add(words_at, builder.shl(loop.index, LONG(3))), LONG, 8)
                here = builder.add(w, builder.mul(loop.index, LONG(4 * FILTERS)))
                weights = [load(builder, builder.add(here, LONG(64 * part)), kind, 64) for part in range(PARTS)]
                for start, row in zip(at, cells, strict=True):
                    value = splat(builder, load(builder, builder.add(start, word), FLOAT, 4), LANES)
                    for weight, cell in zip(weights, row, strict=True):
                        builder.store(multiply_add(builder, value, weight, builder.load(cell)), cell)
            certain = ir.Constant(vector(ir.IntType(1), LANES), [1] * LANES)
            places = [offset_address(builder, y, outputs, byte) for byte in range(FILTERS // 8)]
            bits = [[None] * positions, [None] * positions]  # non-zero, negative
            for part in range(PARTS):
                upper, lower, scale, least = (
                    load(builder, builder.add(thresholds, LONG(64 * (PARTS * field + part))), kind, 64)
                    for field in range(4))
                error = multiply_add(builder, scale, splat(builder, largest, LANES), least)
                for position, row in enumerate(cells):
                    total = builder.load(row[part])
                    below = builder.fcmp_ordered('<=', total, lower)
                    above = builder.fcmp_ordered('>=', total, upper)
                    for found, plane in zip(bits, (builder.or_(above, below), below), strict=True):
                        found[position] = concatenate(builder, [found[position], plane]) if part else plane
                    near = minimum(builder, distance(builder, total, upper), distance(builder, total, lower))
                    certain = builder.and_(certain, builder.fcmp_ordered('>', near, error))
            with builder.if_else(builder.icmp_signed('!=', is_run, LONG(0))) as (together, apart):
                for branch, starts in (together, places[:1]), (apart, places):
                    with branch:
                        for position, planes in enumerate(zip(*bits, strict=True)):
                            offset = load(builder, builder.add(y_at, LONG(8 * position)), LONG, 8)
                            for plane, found in zip((LONG(0), y_plane), planes, strict=True):
                                offset = builder.add(offset, plane)
                                store_bits(builder, found, [builder.add(start, offset) for start in starts])
            return builder.zext(builder.not_(builder.bitcast(certain, ir.IntType(LANES))), LONG)

        return types.int64(*[types.int64] * 8, types.float32, *[types.int64] * 3), emit

    return strip


wide_strip, narrow_strip = strip(STRIP), strip(1)


def exact_byte(kind):
    """Return an intrinsic that computes eight filters at one position in float64, rounded to float32.

    kind    FLOAT or DOUBLE: the type of the images at x, the address of the position in them
    """
    size = 4 if kind is FLOAT else 8

    @intrinsic
    def exact_byte(context, x, w, words, words_at, thresholds, y, y_plane):
        def emit(context, builder, signature, arguments):
            x, w, words, words_at, thresholds, y, y_plane = arguments
            wide, single = vector(DOUBLE, 8), vector(FLOAT, 8)
            cell = accumulator(builder, wide)
            with cgutils.for_range(builder, words) as loop:
                word = load(builder, builder.add(words_at, builder.shl(loop.index, LONG(3))), LONG, 8)  # of float32
                value = load(builder, builder.add(x, builder.mul(word, LONG(size // 4))), kind, size)
                value = value if kind is DOUBLE else builder.fpext(value, DOUBLE)
                weights = load(builder, builder.add(w, builder.mul(loop.index, LONG(4 * FILTERS))), single, 32)
                builder.store(multiply_add(builder, splat(builder, value, 8), builder.fpext(weights, wide),
                                           builder.load(cell)), cell)
            total = builder.fptrunc(builder.load(cell), single)
            upper, lower = (load(builder, builder.add(thresholds, LONG(4 * FILTERS * field)), single, 32)
                            for field in range(2))
            below = builder.fcmp_ordered('<=', total, lower)
            store_bits(builder, builder.or_(builder.fcmp_ordered('>=', total, upper), below), [y])
            store_bits(builder, below, [builder.add(y, y_plane)])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), emit

    return exact_byte


exact_byte_of_float, exact_byte_of_double = exact_byte(FLOAT), exact_byte(DOUBLE)


@njit
def encode(row, largest, first, last, first_group, last_group, begin, end):
    """Compute groups first_group to last_group - 1 of the encoder on images first to last - 1.

    row           int64 [COLUMNS]
    largest       as prepare returns it
    begin, end    only positions begin to end - 1 of each image are computed
    """
    (x, wide, x_image, x_at, w, w_group, words, words_at, thresholds, outputs, is_run, _, y, y_image, y_plane, y_at,
     count, span) = row
    if begin > 0 or end < count:
        span = 1
    for group in range(first_group, last_group):
        weights, limits, places = w + group * w_group, thresholds + group * 16 * FILTERS, outputs + group * FILTERS
        for image in range(first, last, span):
            x_here, y_here = x + image * x_image, y + image * y_image
            n = end - begin if span == 1 else min(span, last - image) * count
            size = STRIP if n >= STRIP else 1
            for start in range(begin, begin + n, size):
                p = min(start, begin + n - size)  # the last strip computes some positions again
                if size == 1:
                    doubt = narrow_strip(x_here, x_at + 8 * p, weights, words, words_at, limits, places, is_run,
                                         largest, y_here, y_plane, y_at + 8 * p)
                else:
                    doubt = wide_strip(x_here, x_at + 8 * p, weights, words, words_at, limits, places, is_run,
                                       largest, y_here, y_plane, y_at + 8 * p)
                if doubt:
                    for position in range(p, p + size):
                        at, y_position = peek(x_at + 8 * position), y_here + peek(y_at + 8 * position)
                        for byte in range(FILTERS // 8):
                            w_byte, limits_byte = weights + 32 * byte, limits + 32 * byte
                            there = y_position + peek(places + 8 * byte)
                            if wide:
                                exact_byte_of_double(wide + 2 * (image * x_image + at), w_byte, words, words_at,
                                                     limits_byte, there, y_plane)
                            else:
                                exact_byte_of_float(x_here + at, w_byte, words, words_at, limits_byte,
                                                    there, y_plane)


@njit
def prepare(images, first, last, crop, x, before, largest):
    """Write what numpy_engine.prepare returns of images first to last - 1 into x; return the largest |x|.

    images     uint8 [n, height, width, channels]
    crop       as for numpy_engine.prepare; -1: x has a stem's maps already
    x          float32 [n, padded height, padded width, channels]
    before     rows and columns of padding before the map
    largest    |x| of a stem's maps

    It returns infinity if |x| may be so large that a sum overflows, and a number greater than 0.
    """
    height, width, channels = images.shape[1:]
    rows, columns = (crop, crop) if crop > 0 else (height, width)
    top, left, line = (height - rows) // 2, (width - columns) // 2 * channels, columns * channels
    at = before[1] * channels
    if crop == 0:
        largest = np.float32(1)
    for n in range(first, last if crop >= 0 else first):
        pixels, values = images[n].reshape(height, -1), x[n].reshape(x.shape[1], -1)
        if crop == 0:
            for i in range(rows):
                for j in range(line):
                    values[before[0] + i, at + j] = np.float32(pixels[i, j]) * np.float32(1 / 256)
        else:
            total, squares, least, most = np.int64(0), np.int64(0), np.int64(255), np.int64(0)
            for i in range(rows):
                for j in range(line):
                    value = np.int64(pixels[top + i, left + j])
                    total += value
                    squares += value * value
                    least, most = min(least, value), max(most, value)
            mean = total / (rows * line)
            deviation = max(np.sqrt(squares / (rows * line) - mean * mean), 1 / np.sqrt(rows * line))
            largest = max(largest, np.float32(max(mean - least, most - mean) / deviation))
            for i in range(rows):
                for j in range(line):
                    value = (np.float64(pixels[top + i, left + j]) - mean) / deviation
                    values[before[0] + i, at + j] = np.float32(value)
    return max(largest, np.float32(1e-30)) if largest < 1e6 else np.float32(np.inf)
