"""The packed engine's inner loops: ternary sums as AND, XOR and population counts of bit planes, compiled by numba.

A ternary vector is two planes of bits, non-zero and negative, so that 64 products and their sum are

    m = x.nonzero & w.nonzero                          products that count
    n = m & (x.negative ^ w.negative)                  those that are -1
    sum = popcount(m) - 2 popcount(n)

Eight filters stand in the lanes of a vector and eight positions of the map in registers: each word of weights that is
loaded meets eight positions. The thresholds turn the eight sums of a position into eight bits of the next layer's
planes, one byte each, so nothing is ever expanded. Numba emits LLVM's generic vectors; AVX-512, AVX2 or NEON code
comes out of them. The compiled code is cached beside this file or in the user's cache.

Kernels take addresses: twta.packed.numba_engine lays out the memory, as BLOCK and COLUMNS say, and keeps it alive.
"""
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8  # filters side by side, a byte of each output plane
STRIP = 8  # positions at once

BYTE, INT, LONG = (ir.IntType(bits) for bits in (8, 32, 64))
DOUBLE = ir.DoubleType()

# What is known of a block of eight filters, in bytes from its address
UPPER, LOWER = 0, 64  # thresholds, eight int64 (float32 in the encoder)
OUTPUT = 128  # int64: where in an image of the output its byte of the first position is
SOURCES = 136  # int64, one to eight: where in an image of the input its groups of channels begin
BLOCK = 256

# The columns of the table of layers, int64
COLUMNS = (
    'kind',  # how many groups of channels eight filters read, 1, 2, 4 or 8; 0: the encoder
    'x', 'x_image', 'x_plane', 'x_at',  # input: address, bytes an image, a plane; address of the positions' offsets
    'w', 'w_block',  # weights: address, bytes a block
    'words', 'words_at',  # words under the kernel; address of their offsets from a position in the input
    'blocks', 'n_blocks',  # address of what is known of each block of eight filters, and their number
    'y', 'y_image', 'y_plane', 'y_at',  # output, as the input
    'positions', 'span')  # positions of an image; images that x_at and y_at cover
N_BLOCKS = COLUMNS.index('n_blocks')


# ----------------------------------------------------------------------------------------------------------------------
# A strip: so many positions of eight filters, in LLVM


def load(builder, address, kind, alignment):
    instruction = builder.load(builder.inttoptr(address, kind.as_pointer()), typ=kind)
    instruction.align = alignment
    return instruction


def moved(builder, base, table, index):
    """base + table[index], the table of int64."""
    return builder.add(base, load(builder, builder.add(table, LONG(8 * index)), LONG, 8))


def vector(kind, lanes):
    return ir.VectorType(kind, lanes)


def everywhere(builder, scalar, lanes):
    """A vector with the scalar in every lane."""
    undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, INT(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(vector(INT, lanes), [0] * lanes))


def zeros(builder, kind):
    """A cell that LLVM keeps in a register, zero here."""
    cell = cgutils.alloca_once(builder, kind)
    builder.store(ir.Constant(kind, [0] * kind.count), cell)
    return cell


def join(builder, vectors):
    """One vector of a power of two of them."""
    while len(vectors) > 1:
        order = ir.Constant(vector(INT, 2 * vectors[0].type.count), list(range(2 * vectors[0].type.count)))
        vectors = [builder.shuffle_vector(*pair, order) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def intrinsic_function(builder, name, kind, count):
    """LLVM's function llvm.NAME of so many vectors."""
    letter = 'f' if kind.element == DOUBLE else 'i'
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * count),
                                          f'llvm.{name}.v{kind.count}{letter}64')


def sum_ternary(builder, at, x_plane, w, words, words_at):
    """Sums int64 of eight filters at positions; at[position][source] are addresses."""
    lanes = LANES // len(at[0])
    kind = vector(LONG, lanes)
    popcount = intrinsic_function(builder, 'ctpop', kind, 1)
    counts = [[(zeros(builder, kind), zeros(builder, kind)) for _ in starts] for starts in at]
    with cgutils.for_range(builder, words) as loop:
        word = load(builder, builder.add(words_at, builder.shl(loop.index, LONG(3))), LONG, 8)
        for source in range(len(at[0])):
            here = builder.add(builder.add(w, builder.shl(loop.index, LONG(7))), LONG(8 * lanes * source))
            w_nonzero, w_negative = load(builder, here, kind, 8), load(builder, builder.add(here, LONG(64)), kind, 8)
            for starts, cells in zip(at, counts, strict=True):
                address = builder.add(starts[source], word)
                nonzero, negative = (everywhere(builder, load(builder, builder.add(address, plane), LONG, 1), lanes)
                                     for plane in (LONG(0), x_plane))
                m = builder.and_(nonzero, w_nonzero)
                n = builder.and_(m, builder.xor(negative, w_negative))
                for cell, bits in zip(cells[source], (m, n), strict=True):
                    builder.store(builder.add(builder.load(cell), builder.call(popcount, [bits])), cell)
    one = ir.Constant(kind, [1] * lanes)
    return [join(builder, [builder.sub(builder.load(products), builder.shl(builder.load(negatives), one))
                           for products, negatives in cells]) for cells in counts]


def sum_real(builder, at, w, words, words_at):
    """The encoder's sums of eight filters at positions: of float64 products in float64, rounded to float32 once."""
    kind = vector(DOUBLE, LANES)
    fma = intrinsic_function(builder, 'fma', kind, 3)
    sums = [zeros(builder, kind) for _ in at]
    with cgutils.for_range(builder, words) as loop:
        weights = load(builder, builder.add(w, builder.shl(loop.index, LONG(6))), kind, 8)
        word = load(builder, builder.add(words_at, builder.shl(loop.index, LONG(3))), LONG, 8)
        for (start,), cell in zip(at, sums, strict=True):
            values = everywhere(builder, load(builder, builder.add(start, word), DOUBLE, 8), LANES)
            builder.store(builder.call(fma, [values, weights, builder.load(cell)]), cell)
    return [builder.fptrunc(builder.load(cell), vector(ir.FloatType(), LANES)) for cell in sums]


def strip(positions, kind):
    """An intrinsic: the sums at so many positions and their bits, stored in the output's planes.

    Non-zero where a sum >= upper or <= lower, negative where <= lower. kind as in COLUMNS.
    """
    @intrinsic
    def strip(context, x, x_plane, x_at, w, words, words_at, block, y, y_plane, y_at):
        def emit(context, builder, signature, arguments):
            x, x_plane, x_at, w, words, words_at, block, y, y_plane, y_at = arguments
            sources = builder.add(block, LONG(SOURCES))
            at = [[moved(builder, moved(builder, x, x_at, position), sources, source) for source in range(max(kind, 1))]
                  for position in range(positions)]
            if kind:
                sums = sum_ternary(builder, at, x_plane, w, words, words_at)
                compare = builder.icmp_signed
            else:
                sums = sum_real(builder, at, w, words, words_at)
                compare = builder.fcmp_ordered
            upper, lower = (load(builder, builder.add(block, LONG(where)), sums[0].type, 4) for where in (UPPER, LOWER))
            y = moved(builder, y, builder.add(block, LONG(OUTPUT)), 0)
            for position, total in enumerate(sums):
                negative = compare('<=', total, lower)
                nonzero = builder.or_(compare('>=', total, upper), negative)
                place = moved(builder, y, y_at, position)
                for plane, bits in ((place, nonzero), (builder.add(place, y_plane), negative)):
                    builder.store(builder.bitcast(bits, BYTE), builder.inttoptr(plane, BYTE.as_pointer()))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), emit

    return strip


def block_of(kind):
    """A function: the bits of a block of eight filters at n positions."""
    width = STRIP // max(kind, 1)  # more would not find room in the registers
    wide, narrow = strip(width, kind), strip(1, kind)

    @njit
    def block_at(n, x, x_plane, x_at, w, words, words_at, block, y, y_plane, y_at):
        whole = n // width * width
        for p in range(0, whole, width):
            wide(x, x_plane, x_at + 8 * p, w, words, words_at, block, y, y_plane, y_at + 8 * p)
        if whole and n - whole > width // 4:  # some positions twice are less work than one at a time
            p = n - width
            wide(x, x_plane, x_at + 8 * p, w, words, words_at, block, y, y_plane, y_at + 8 * p)
        else:
            for p in range(whole, n):
                narrow(x, x_plane, x_at + 8 * p, w, words, words_at, block, y, y_plane, y_at + 8 * p)

    return block_at


real_block, block_1, block_2, block_4, block_8 = (block_of(kind) for kind in (0, 1, 2, 4, 8))


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


@njit
def run_layer(row, first, last, first_block, last_block):
    """A layer, a row of the table, on the images from first to last - 1, for the blocks of filters in that range."""
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
    """Do what numpy_engine.prepare does to images uint8 [n, height, width, channels], into x float64 with its border.

    crop -1: x is prepared.
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
    """In any order: the logits of the engines differ by roundings."""
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@njit
def classify(planes, bytes_per_image, weights, first, last, sums):
    """sums[n] = activations of image n times weights float64 [classes, features]; planes uint8 [2, bytes]."""
    features = np.empty(8 * bytes_per_image)
    for n in range(first, last):
        for byte in range(bytes_per_image):
            nonzero, negative = planes[0, n * bytes_per_image + byte], planes[1, n * bytes_per_image + byte]
            for bit in range(8):
                features[8 * byte + bit] = np.int64(nonzero >> bit & 1) - 2 * np.int64(negative >> bit & 1)
        for k in range(len(weights)):
            sums[n, k] = dot(features, weights[k])


def compiled(function):
    """Compiled for several threads, and kept for the next process where there is a folder to keep it in."""
    try:
        return njit(parallel=True, cache=True)(function)
    except RuntimeError:
        return njit(parallel=True)(function)


@compiled
def run(images, crop, x, before, table, threads, chunk, planes, bytes_per_image, weights, sums):
    """From images to the classifier's sums float64 [n, classes]: prepare, the layers of the table, classify.

    table is int64 [layers, COLUMNS]. So many threads each take `chunk` images at most through all layers, and again.
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
        chunk = -(-share // -(-share // chunk))  # as many chunks for each thread, as equal as can be
        for task in prange(-(-count // chunk)):
            first, last = task * chunk, min(count, (task + 1) * chunk)
            prepare(images, first, last, crop, x, before)
            for layer in range(len(table)):
                run_layer(table[layer], first, last, 0, table[layer, N_BLOCKS])
            classify(planes, bytes_per_image, weights, first, last, sums)
