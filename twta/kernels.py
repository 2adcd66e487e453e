"""The packed engine's inner loops: ternary sums as AND, XOR and population counts of bit planes, compiled by numba.

A ternary vector is two planes of bits, non-zero and negative, so that 64 products and their sum are

    m = x.nonzero & w.nonzero                          products that count
    n = m & (x.negative ^ w.negative)                  those that are -1
    sum = popcount(m) - 2 popcount(n)

Eight filters stand in the lanes of a vector and eight positions of the map in registers: each word of weights that is
loaded meets eight positions. The thresholds turn the eight sums of a position into eight bits of the next layer's
planes, one byte each, so nothing is ever expanded. Numba emits LLVM's generic vectors; AVX-512, AVX2 or NEON code
comes out of them. The compiled code is cached beside this file or in the user's cache.

Kernels take addresses: twta.bitplanes lays out the memory, as its Table says, and keeps it alive.
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
LONGS, DOUBLES = ir.VectorType(LONG, LANES), ir.VectorType(DOUBLE, LANES)
FLOATS = ir.VectorType(ir.FloatType(), LANES)

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
    'rows', 'row_bytes', 'words',  # the kernel's rows, bytes from one to the next in the input, words to read in each
    'blocks', 'n_blocks',  # address of what is known of each block of eight filters, and their number
    'y', 'y_image', 'y_plane', 'y_at',  # output, as the input
    'positions', 'span',  # positions of an image; images that x_at and y_at cover
    'chunk')  # images at a time, so that they stay in the cache


# ----------------------------------------------------------------------------------------------------------------------
# A strip: so many positions of eight filters, in LLVM


def load(builder, address, kind, alignment):
    instruction = builder.load(builder.inttoptr(address, kind.as_pointer()), typ=kind)
    instruction.align = alignment
    return instruction


def moved(builder, base, table, index):
    """base + table[index], the table of int64."""
    return builder.add(base, load(builder, builder.add(table, LONG(8 * index)), LONG, 8))


def spread(builder, scalars, kind):
    """A vector of LANES values with the scalars in its lanes, LANES / len(scalars) lanes each."""
    vector = ir.Constant(ir.VectorType(kind, LANES), ir.Undefined)
    filled = vector
    for index, scalar in enumerate(scalars):
        filled = builder.insert_element(filled, scalar, INT(index))
    lanes = [lane * len(scalars) // LANES for lane in range(LANES)]
    return builder.shuffle_vector(filled, vector, ir.Constant(ir.VectorType(INT, LANES), lanes))


def variable(builder, initial):
    """A cell that LLVM keeps in a register, set to the initial value here."""
    cell = cgutils.alloca_once(builder, initial.type)
    builder.store(initial, cell)
    return cell


def add_to(builder, cell, value):
    builder.store(builder.add(builder.load(cell), value), cell)


def sum_ternary(builder, at, x_plane, w, rows, row_bytes, words):
    """Sums int64 at positions; at[position][source] are addresses."""
    popcount = cgutils.get_or_insert_function(builder.module, ir.FunctionType(LONGS, [LONGS]), 'llvm.ctpop.v8i64')
    zero, one = (ir.Constant(LONGS, [value] * LANES) for value in (0, 1))
    counts = [(variable(builder, zero), variable(builder, zero)) for _ in at]
    weights, row = variable(builder, w), variable(builder, LONG(0))
    with cgutils.for_range(builder, rows):
        with cgutils.for_range(builder, words) as loop:
            here = builder.load(weights)
            w_nonzero, w_negative = load(builder, here, LONGS, 8), load(builder, builder.add(here, LONG(64)), LONGS, 8)
            word = builder.add(builder.load(row), builder.shl(loop.index, LONG(3)))
            for starts, (products, negatives) in zip(at, counts, strict=True):
                words_at = [builder.add(start, word) for start in starts]
                nonzero, negative = (
                    spread(builder, [load(builder, builder.add(address, plane), LONG, 1) for address in words_at], LONG)
                    for plane in (LONG(0), x_plane))
                m = builder.and_(nonzero, w_nonzero)
                add_to(builder, products, builder.call(popcount, [m]))
                n = builder.and_(m, builder.xor(negative, w_negative))
                add_to(builder, negatives, builder.call(popcount, [n]))
            add_to(builder, weights, LONG(128))
        add_to(builder, row, row_bytes)
    return [builder.sub(builder.load(products), builder.shl(builder.load(negatives), one))
            for products, negatives in counts]


def sum_real(builder, at, w, rows, row_bytes, columns):
    """The encoder's sums at positions: of float64 products in float64, rounded to float32 once."""
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(DOUBLES, [DOUBLES] * 3), 'llvm.fma.v8f64')
    sums = [variable(builder, ir.Constant(DOUBLES, [0.0] * LANES)) for _ in at]
    weights, row = variable(builder, w), variable(builder, LONG(0))
    with cgutils.for_range(builder, rows):
        with cgutils.for_range(builder, columns) as loop:
            here = builder.load(weights)
            w_values = load(builder, here, DOUBLES, 8)
            column = builder.add(builder.load(row), builder.shl(loop.index, LONG(3)))
            for (start,), cell in zip(at, sums, strict=True):
                value = load(builder, builder.add(start, column), DOUBLE, 8)
                values = spread(builder, [value], DOUBLE)
                builder.store(builder.call(fma, [values, w_values, builder.load(cell)]), cell)
            add_to(builder, weights, LONG(64))
        add_to(builder, row, row_bytes)
    return [builder.fptrunc(builder.load(cell), FLOATS) for cell in sums]


def strip(positions, kind):
    """An intrinsic: the sums at so many positions and their bits, stored in the output's planes.

    Non-zero where a sum >= upper or <= lower, negative where <= lower. kind as in COLUMNS.
    """

    @intrinsic
    def strip(context, x, x_plane, x_at, w, rows, row_bytes, words, block, y, y_plane, y_at):
        def emit(context, builder, signature, arguments):
            x, x_plane, x_at, w, rows, row_bytes, words, block, y, y_plane, y_at = arguments
            sources = builder.add(block, LONG(SOURCES))
            at = [[moved(builder, moved(builder, x, x_at, position), sources, source) for source in range(max(kind, 1))]
                  for position in range(positions)]
            if kind:
                sums = sum_ternary(builder, at, x_plane, w, rows, row_bytes, words)
                compare = builder.icmp_signed
            else:
                sums = sum_real(builder, at, w, rows, row_bytes, words)
                compare = builder.fcmp_ordered
            upper, lower = (load(builder, builder.add(block, LONG(where)), sums[0].type, 4) for where in (UPPER, LOWER))
            y = moved(builder, y, builder.add(block, LONG(OUTPUT)), 0)
            for position, total in enumerate(sums):
                positive, negative = compare('>=', total, upper), compare('<=', total, lower)
                byte = moved(builder, y, y_at, position)
                for plane, bits in ((byte, builder.or_(positive, negative)), (builder.add(byte, y_plane), negative)):
                    builder.store(builder.bitcast(bits, BYTE), builder.inttoptr(plane, BYTE.as_pointer()))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 11), emit

    return strip


def block_of(kind):
    """A function: the bits of a block of eight filters at n positions."""
    wide, narrow = strip(STRIP, kind), strip(1, kind)

    @njit
    def block_at(n, x, x_plane, x_at, w, rows, row_bytes, words, block, y, y_plane, y_at):
        whole = n // STRIP * STRIP
        for p in range(0, whole, STRIP):
            wide(x, x_plane, x_at + 8 * p, w, rows, row_bytes, words, block, y, y_plane, y_at + 8 * p)
        if whole and n - whole > 2:  # some positions twice are less work than one at a time
            p = n - STRIP
            wide(x, x_plane, x_at + 8 * p, w, rows, row_bytes, words, block, y, y_plane, y_at + 8 * p)
        else:
            for p in range(whole, n):
                narrow(x, x_plane, x_at + 8 * p, w, rows, row_bytes, words, block, y, y_plane, y_at + 8 * p)

    return block_at


real_block, block_1, block_2, block_4, block_8 = (block_of(kind) for kind in (0, 1, 2, 4, 8))


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


@njit(parallel=True, cache=True)
def run_layers(table, images, threads):
    """The layers, one after the other, on so many images; table int64 [layers, COLUMNS]."""
    for layer in range(table.shape[0]):
        (kind, x, x_image, x_plane, x_at, w, w_block, rows, row_bytes, words, blocks, n_blocks, y, y_image, y_plane, y_at,
         positions, span, chunk) = table[layer]
        share = -(-images // threads)
        chunk = -(-share // -(-share // chunk))  # as many chunks for each thread, as equal as can be
        chunks = -(-images // chunk)
        parts = min(n_blocks, -(-threads // chunks))  # of the filters, where there are fewer images than threads
        for task in prange(chunks * parts):
            first, part = task // parts * chunk, task % parts
            last = min(images, first + chunk)
            for b in range(part * n_blocks // parts, (part + 1) * n_blocks // parts):
                for image in range(first, last, span):
                    n = min(span, last - image) * positions
                    x_here, w_here, block = x + image * x_image, w + b * w_block, blocks + b * BLOCK
                    y_here = y + image * y_image
                    if kind == 0:
                        real_block(n, x_here, x_plane, x_at, w_here, rows, row_bytes, words, block, y_here, y_plane, y_at)
                    elif kind == 1:
                        block_1(n, x_here, x_plane, x_at, w_here, rows, row_bytes, words, block, y_here, y_plane, y_at)
                    elif kind == 2:
                        block_2(n, x_here, x_plane, x_at, w_here, rows, row_bytes, words, block, y_here, y_plane, y_at)
                    elif kind == 4:
                        block_4(n, x_here, x_plane, x_at, w_here, rows, row_bytes, words, block, y_here, y_plane, y_at)
                    else:
                        block_8(n, x_here, x_plane, x_at, w_here, rows, row_bytes, words, block, y_here, y_plane, y_at)


@njit(parallel=True, cache=True)
def prepare(images, crop, x, before):
    """What twta.packed.prepare does, for images uint8 [n, height, width, channels], into x float64, which has a border."""
    height, width, channels = images.shape[1:]
    rows, columns = (crop, crop) if crop else (height, width)
    top, left = (height - rows) // 2, (width - columns) // 2
    values = rows * columns * channels
    for n in prange(len(images)):
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


@njit(parallel=True, cache=True)
def classify(planes, bytes_per_image, weights, sums):
    """sums[n] += activations of image n @ weights; planes uint8 [2, at least n * bytes_per_image], weights float64."""
    for n in prange(len(sums)):
        for byte in range(bytes_per_image):
            nonzero, negative = planes[0, n * bytes_per_image + byte], planes[1, n * bytes_per_image + byte]
            for bit in range(8):
                if nonzero >> bit & 1:
                    row = weights[8 * byte + bit]
                    if negative >> bit & 1:
                        for k in range(len(row)):
                            sums[n, k] -= row[k]
                    else:
                        for k in range(len(row)):
                            sums[n, k] += row[k]
