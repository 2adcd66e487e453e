"""The kernels of the numba engine: ternary sums as AND, XOR and population counts of bit planes.

A ternary vector is two planes of bits, non-zero and negative. 64 products and their sum are

    m = x.nonzero & w.nonzero                          products that are not 0
    n = m & (x.negative ^ w.negative)                  products that are -1
    sum = popcount(m) - 2 popcount(n)

A block of eight filters fills the lanes of a vector, and a strip of up to eight positions of the map stays in
registers, so that each loaded word of weights serves the whole strip. Thresholds turn the eight sums of a position
into one byte of each of the next layer's planes. Activations are never expanded to one byte each.

The kernels emit LLVM's generic vectors, which LLVM compiles to AVX-512, AVX2 or NEON. Numba caches the compiled code
beside this file or in the user's cache folder. The kernels take addresses: twta.packed.numba_engine lays out the
memory as BLOCK and COLUMNS say, and keeps it alive.
"""
from functools import partial

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from twta.packed.pool import compiled

LANES = 8  # filters of a block: one byte of each output plane
STRIP = 8  # positions per call

BYTE, INT, LONG = (ir.IntType(bits) for bits in (8, 32, 64))
DOUBLE = ir.DoubleType()

# The description of a block of eight filters: byte offsets of its fields
UPPER, LOWER = 0, 64  # thresholds, eight int64; in the encoder eight float32
OUTPUT = 128  # int64; offset of the block's byte at the first position, in an image of the output
SOURCES = 136  # one to eight int64; offsets of the groups of channels that it reads, in an image of the input
BLOCK = 256  # bytes of a description

# The columns of the table of layers, int64; one row per layer
COLUMNS = (
    'kind',  # groups of channels that a block reads: 1, 2, 4 or 8; 0: the encoder
    'x', 'x_image', 'x_plane', 'x_at',  # input: address, bytes per image and per plane, address of positions' offsets
    'w', 'w_block',  # weights: address, bytes per block
    'words', 'words_at',  # words under the kernel: number, address of their offsets from a position of the input
    'blocks', 'n_blocks',  # descriptions of the blocks: address, number
    'y', 'y_image', 'y_plane', 'y_at',  # output: as for the input
    'positions', 'span')  # positions per image; number of images that x_at and y_at cover
N_BLOCKS, OUTPUT_MAP = COLUMNS.index('n_blocks'), COLUMNS.index('y')


# ----------------------------------------------------------------------------------------------------------------------
# A strip: eight filters at a few positions, in LLVM


def load(builder, address, kind, alignment):
    instruction = builder.load(builder.inttoptr(address, kind.as_pointer()), typ=kind)
    instruction.align = alignment
    return instruction


def offset_address(builder, base, table, index):
    """Return base + table[index]; table is the address of int64 numbers."""
    return builder.add(base, load(builder, builder.add(table, LONG(8 * index)), LONG, 8))


def vector(kind, lanes):
    return ir.VectorType(kind, lanes)


def splat(builder, scalar, lanes):
    """Return a vector with the scalar in every lane."""
    undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, INT(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(vector(INT, lanes), [0] * lanes))


def accumulator(builder, kind):
    """Return a stack slot that holds 0; LLVM keeps it in a register."""
    cell = cgutils.alloca_once(builder, kind)
    builder.store(ir.Constant(kind, [0] * kind.count), cell)
    return cell


def concatenate(builder, vectors):
    """Return one vector of the lanes of several vectors; their number is a power of two."""
    while len(vectors) > 1:
        order = ir.Constant(vector(INT, 2 * vectors[0].type.count), list(range(2 * vectors[0].type.count)))
        vectors = [builder.shuffle_vector(*pair, order) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def intrinsic_function(builder, name, kind, count):
    """Return LLVM's intrinsic llvm.NAME with so many vectors as arguments."""
    letter = 'f' if kind.element == DOUBLE else 'i'
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * count),
                                          f'llvm.{name}.v{kind.count}{letter}64')


def sum_ternary(builder, at, x_plane, w, words, words_at):
    """Return a block's sums, a vector of eight int64 per position; at[position][source] are addresses."""
    lanes = LANES // len(at[0])
    kind = vector(LONG, lanes)
    popcount = intrinsic_function(builder, 'ctpop', kind, 1)
    counts = [[(accumulator(builder, kind), accumulator(builder, kind)) for _ in starts] for starts in at]
    with cgutils.for_range(builder, words) as loop:
        word = load(builder, builder.add(words_at, builder.shl(loop.index, LONG(3))), LONG, 8)
        for source in range(len(at[0])):
            here = builder.add(builder.add(w, builder.shl(loop.index, LONG(7))), LONG(8 * lanes * source))
            w_nonzero, w_negative = load(builder, here, kind, 8), load(builder, builder.add(here, LONG(64)), kind, 8)
            for starts, cells in zip(at, counts, strict=True):
                address = builder.add(starts[source], word)
                nonzero, negative = (splat(builder, load(builder, builder.add(address, plane), LONG, 1), lanes)
                                     for plane in (LONG(0), x_plane))
                m = builder.and_(nonzero, w_nonzero)
                n = builder.and_(m, builder.xor(negative, w_negative))
                for cell, bits in zip(cells[source], (m, n), strict=True):
                    builder.store(builder.add(builder.load(cell), builder.call(popcount, [bits])), cell)
    one = ir.Constant(kind, [1] * lanes)
    return [concatenate(builder, [builder.sub(builder.load(products), builder.shl(builder.load(negatives), one))
                           for products, negatives in cells]) for cells in counts]


def sum_real(builder, at, w, words, words_at):
    """Return a block's sums in the encoder, a vector of eight float32 per position.

    Products and sums are in float64; the sum is rounded once, to float32.
    """
    kind = vector(DOUBLE, LANES)
    fma = intrinsic_function(builder, 'fma', kind, 3)
    sums = [accumulator(builder, kind) for _ in at]
    with cgutils.for_range(builder, words) as loop:
        weights = load(builder, builder.add(w, builder.shl(loop.index, LONG(6))), kind, 8)
        word = load(builder, builder.add(words_at, builder.shl(loop.index, LONG(3))), LONG, 8)
        for (start,), cell in zip(at, sums, strict=True):
            values = splat(builder, load(builder, builder.add(start, word), DOUBLE, 8), LANES)
            builder.store(builder.call(fma, [values, weights, builder.load(cell)]), cell)
    return [builder.fptrunc(builder.load(cell), vector(ir.FloatType(), LANES)) for cell in sums]


def strip(positions, kind):
    """Return an intrinsic that computes a block at so many positions and stores its bits in the output's planes.

    Bits are non-zero if a sum >= upper or <= lower, negative if a sum <= lower. kind is that of COLUMNS.
    """
    @intrinsic
    def strip(context, x, x_plane, x_at, w, words, words_at, block, y, y_plane, y_at):
        def emit(context, builder, signature, arguments):
            x, x_plane, x_at, w, words, words_at, block, y, y_plane, y_at = arguments
            sources = builder.add(block, LONG(SOURCES))
            at = [[offset_address(builder, offset_address(builder, x, x_at, position), sources, source)
                   for source in range(max(kind, 1))] for position in range(positions)]
            if kind:
                sums = sum_ternary(builder, at, x_plane, w, words, words_at)
                compare = builder.icmp_signed
            else:
                sums = sum_real(builder, at, w, words, words_at)
                compare = builder.fcmp_ordered
            upper, lower = (load(builder, builder.add(block, LONG(where)), sums[0].type, 4) for where in (UPPER, LOWER))
            y = offset_address(builder, y, builder.add(block, LONG(OUTPUT)), 0)
            for position, total in enumerate(sums):
                negative = compare('<=', total, lower)
                nonzero = builder.or_(compare('>=', total, upper), negative)
                place = offset_address(builder, y, y_at, position)
                for plane, bits in ((place, nonzero), (builder.add(place, y_plane), negative)):
                    builder.store(builder.bitcast(bits, BYTE), builder.inttoptr(plane, BYTE.as_pointer()))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), emit

    return strip


def block_of(kind):
    """Return a function that computes a block at n positions."""
    width = STRIP // max(kind, 1)  # more positions do not fit in the registers
    wide, narrow = strip(width, kind), strip(1, kind)

    def block_at(n, x, x_plane, x_at, w, words, words_at, block, y, y_plane, y_at):
        whole = n // width * width
        for p in range(0, whole, width):
            wide(x, x_plane, x_at + 8 * p, w, words, words_at, block, y, y_plane, y_at + 8 * p)
        if whole and n - whole > width // 4:  # computing some positions twice takes less time
            p = n - width
            wide(x, x_plane, x_at + 8 * p, w, words, words_at, block, y, y_plane, y_at + 8 * p)
        else:
            for p in range(whole, n):
                narrow(x, x_plane, x_at + 8 * p, w, words, words_at, block, y, y_plane, y_at + 8 * p)

    # two cached functions may bring each its own code under one name, and the first is taken for both: so no two kinds
    # have one name
    block_at.__qualname__ = f'block_at_{kind}'
    return njit(block_at)


real_block, block_1, block_2, block_4, block_8 = (block_of(kind) for kind in (0, 1, 2, 4, 8))


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


@njit
def run_layer(row, first, last, first_block, last_block):
    """Compute blocks first_block to last_block - 1 of a layer, a row of the table, on images first to last - 1."""
    (kind, x, x_image, x_plane, x_at, w, w_block, words, words_at, blocks, _, y, y_image, y_plane, y_at, positions,
     span) = row
    for b in range(first_block, last_block):
        for image in range(first, last, span):
            n = min(span, last - image) * positions
            x_here, y_here = x + image * x_image, y + image * y_image
            w_here, block = w + b * w_block, blocks + b * BLOCK
            if kind == 0:
                real_block(n, x_here, x_plane, x_at, w_here, words, words_at, block, y_here, y_plane, y_at)
            elif kind == 1:
                block_1(n, x_here, x_plane, x_at, w_here, words, words_at, block, y_here, y_plane, y_at)
            elif kind == 2:
                block_2(n, x_here, x_plane, x_at, w_here, words, words_at, block, y_here, y_plane, y_at)
            elif kind == 4:
                block_4(n, x_here, x_plane, x_at, w_here, words, words_at, block, y_here, y_plane, y_at)
            else:
                block_8(n, x_here, x_plane, x_at, w_here, words, words_at, block, y_here, y_plane, y_at)


@njit
def prepare(images, first, last, crop, x, before):
    """Write what numpy_engine.prepare returns of images first to last - 1 into x.

    images    uint8 [n, height, width, channels]
    crop      as for numpy_engine.prepare; -1: x is prepared already
    x         float64 [n, padded height, padded width, channels]
    before    rows and columns of padding before the map
    """
    if crop < 0:
        return
    height, width, channels = images.shape[1:]
    rows, columns = (crop, crop) if crop else (height, width)
    top, left = (height - rows) // 2, (width - columns) // 2
    values = rows * columns * channels
    for n in range(first, last):
        mean, deviation = 0.0, 256.0
        if crop:
            total, squares = 0, 0
            for i in range(rows):
                for j in range(columns):
                    for k in range(channels):
                        value = np.int64(images[n, top + i, left + j, k])
                        total += value
                        squares += value * value
            mean = total / values
            deviation = max(np.sqrt(squares / values - mean * mean), 1 / np.sqrt(values))
        for i in range(rows):
            for j in range(columns):
                for k in range(channels):
                    value = (np.float64(images[n, top + i, left + j, k]) - mean) / deviation
                    x[n, before[0] + i, before[1] + j, k] = np.float32(value)


@njit(fastmath={'reassoc'})
def dot(a, b):
    """Return the sum of products, in any order: logits of the engines differ by rounding."""
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@njit
def classify(planes, bytes_per_image, weights, first, last, sums):
    """Write the classifier's sums of images first to last - 1 into sums, float64 [n, classes].

    planes     of the last layer's activations, uint8 [2, bytes]
    weights    float64 [classes, features]
    """
    features = np.empty(8 * bytes_per_image)
    for n in range(first, last):
        for byte in range(bytes_per_image):
            nonzero, negative = planes[0, n * bytes_per_image + byte], planes[1, n * bytes_per_image + byte]
            for bit in range(8):
                features[8 * byte + bit] = np.int64(nonzero >> bit & 1) - 2 * np.int64(negative >> bit & 1)
        for k in range(len(weights)):
            sums[n, k] = dot(features, weights[k])


@partial(compiled, parallel=True)
def run(images, crop, x, before, table, threads, chunk, planes, bytes_per_image, weights, sums):
    """Write the classifier's sums of images, uint8 [n, height, width, channels], into sums, float64 [n, classes].

    table      int64 [layers, COLUMNS]
    threads    each of them takes at most `chunk` images through all layers, then the next ones; if there are fewer
               images than threads, the threads share the blocks of each layer

    The other arguments are those of prepare and classify.
    """
    count = len(images)
    if count < threads:  # the threads share the filters of each layer
        prepare(images, 0, count, crop, x, before)
        for layer in range(len(table)):
            blocks = table[layer, N_BLOCKS]
            for part in prange(threads):
                run_layer(table[layer], 0, count, part * blocks // threads, (part + 1) * blocks // threads)
        classify(planes, bytes_per_image, weights, 0, count, sums)
    else:
        share = -(-count // threads)
        chunk = -(-share // -(-share // chunk))  # the same number of chunks per thread, of nearly equal sizes
        for task in prange(-(-count // chunk)):
            first, last = task * chunk, min(count, (task + 1) * chunk)
            prepare(images, first, last, crop, x, before)
            for layer in range(len(table)):
                run_layer(table[layer], first, last, 0, table[layer, N_BLOCKS])
            classify(planes, bytes_per_image, weights, first, last, sums)
