"""The kernels of the paired engine: two ternary products at once, by looking up their sum in a table.

An activation is a digit, 0, 1 or 2 for -1, 0 and +1. Two of them, a pair, make a byte, the pair's code:

    16 * (digit of the first + 3 * digit of the second)

It is the offset of a row of 16 bytes in a table of nine rows. At index w of the row for a pair of activations is the
sum of its products with the pair w of weights. So one shuffle of bytes looks up the sums of 32 filters (AVX2's pshufb).

A block is 32 or 64 filters. A strip of positions of the map stays in registers. The sums are bytes for MOST pairs, and
are then added to sums of 16 bits. Two neighbouring lanes make a pair of the output. So the halves of each 16 bits are
the first and the second filters of 16 pairs, and their digits make the code without any change of lanes.

The kernels want AVX2. twta.packed.paired_engine lays out the memory as passes.COLUMNS say. Some mean something else:

    kind        vectors of a block, 1 or 2; or CODES, for the row that makes codes of the encoder's bits
    words       pairs under the kernel, whose offsets each block has an address of, see PAIRS; of CODES: bytes of a cell
    x_plane     of CODES alone; y_plane and words_at are not used
"""
from functools import partial
from itertools import chain

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from twta.packed.encoder_kernels import prepare
from twta.packed.kernels import block_of, dot
from twta.packed.passes import KIND, alone, sharing
from twta.packed.pool import compiled
from twta.packed.vectors import (
    BYTE,
    INT,
    LONG,
    accumulator,
    load,
    offset_address,
    peek,
    peek_byte,
    poke_four,
    vector,
)

LANES = 32  # filters of a vector
MOST = 63  # pairs whose sums, from -2 to 2, a byte holds
STRIPS = {1: 6, 2: 4}  # positions per call, by kind: more do not fit in the registers
SHARED_STRIP = 12  # positions; threads that share an image get whole strips of either kind
PACE = 8  # pairs of a vector take as long as a word of bit planes
CODES = 0  # a kind
ZEROS = 0x40404040  # four codes of (0, 0)

# The description of a block: byte offsets of its fields
UPPER, LOWER = 0, 128  # thresholds, int16 [vectors, 2, 16]: of the first and of the second filters of pairs
OUTPUT = 256  # int64; the offset of its codes at the first position
PAIRS = 264  # int64; address of the offsets of the pairs that it reads, from a position of the input, int64
BLOCK = 320  # bytes of a description

HALF = ir.IntType(16)
DIGITS = np.arange(9) % 3 - 1, np.arange(9) // 3 - 1  # of pairs
PRODUCTS = sum(np.outer(digits, digits) for digits in DIGITS)
# what eight filters that are not zero add to ZEROS; if they are negative, they take away twice as much
STEPS = (np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1, bitorder='little')
         .reshape(256, 4, 2) @ np.array([16, 48], np.uint8)).astype(np.uint8).view('<u4').ravel()


# ----------------------------------------------------------------------------------------------------------------------
# A strip: a block at a few positions, in LLVM


def table_of_products(builder):
    """Return the address of the table, a constant of the code."""
    rows = np.zeros((9, 16), int)
    rows[:, :9] = PRODUCTS
    values = ir.Constant(ir.ArrayType(BYTE, rows.size), rows.ravel().tolist())
    table = cgutils.global_constant(builder, 'products', values)
    table.align = 64
    return builder.ptrtoint(table, LONG)


def look_up(builder, rows, indices):
    """Return the bytes of 32 lanes: of 16 bytes `rows`, those at the indices."""
    kind = vector(BYTE, LANES)
    both = ir.Constant(vector(INT, LANES), [*range(LANES // 2)] * 2)
    rows = builder.shuffle_vector(rows, ir.Constant(rows.type, ir.Undefined), both)
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind, kind]),
                                              'llvm.x86.avx2.pshuf.b')
    return builder.call(function, [rows, indices])


def sum_pairs(builder, at, w, words, pairs, vectors):
    """Return the sums of a block at each address of `at`: per vector those of the first and of the second filters."""
    kind, wide = vector(BYTE, LANES), vector(HALF, LANES // 2)
    sums = [[[accumulator(builder, wide) for _ in range(2)] for _ in range(vectors)] for _ in at]
    table, eight = table_of_products(builder), ir.Constant(wide, [8] * wide.count)
    left = cgutils.alloca_once_value(builder, words)
    chunks = builder.udiv(builder.add(words, LONG(MOST - 1)), LONG(MOST))
    with cgutils.for_range(builder, chunks) as chunk:
        rest = builder.load(left)
        count = builder.select(builder.icmp_signed('<', rest, LONG(MOST)), rest, LONG(MOST))
        builder.store(builder.sub(rest, count), left)
        first = builder.mul(chunk.index, LONG(MOST))
        cells = [[cgutils.alloca_once(builder, kind) for _ in range(vectors)] for _ in at]
        for cell in chain(*cells):
            builder.store(ir.Constant(kind, [0] * LANES), cell)
        with cgutils.for_range(builder, count) as loop:
            pair = builder.add(first, loop.index)
            offset = load(builder, builder.add(pairs, builder.shl(pair, LONG(3))), LONG, 8)
            here = builder.add(w, builder.mul(pair, LONG(LANES * vectors)))
            weights = [load(builder, builder.add(here, LONG(LANES * k)), kind, LANES) for k in range(vectors)]
            for start, row in zip(at, cells, strict=True):
                code = builder.zext(load(builder, builder.add(start, offset), BYTE, 1), LONG)
                products = load(builder, builder.add(table, code), vector(BYTE, 16), 16)
                for indices, cell in zip(weights, row, strict=True):
                    builder.store(builder.add(builder.load(cell), look_up(builder, products, indices)), cell)
        for cell, (low, high) in zip(chain(*cells), chain(*sums), strict=True):
            both = builder.bitcast(builder.load(cell), wide)
            for total, part in ((low, builder.ashr(builder.shl(both, eight), eight)),
                                (high, builder.ashr(both, eight))):
                builder.store(builder.add(builder.load(total), part), total)
    return [[[builder.load(total) for total in pair] for pair in row] for row in sums]


def strip(positions, vectors):
    """Return an intrinsic that computes a block at so many positions and stores its codes.

    A digit is 2 if a sum >= upper, 0 if a sum <= lower.
    """
    @intrinsic
    def strip(context, x, x_plane, x_at, w, words, pairs, block, y, y_plane, y_at):
        def emit(context, builder, signature, arguments):
            x, _, x_at, w, words, pairs, block, y, _, y_at = arguments
            at = [offset_address(builder, x, x_at, position) for position in range(positions)]
            sums = sum_pairs(builder, at, w, words, pairs, vectors)
            start = offset_address(builder, y, builder.add(block, LONG(OUTPUT)), 0)
            for k in range(vectors):
                limits = [[load(builder, builder.add(block, LONG(where + LANES * (2 * k + half))), vector(HALF, 16), 32)
                           for half in range(2)] for where in (UPPER, LOWER)]
                for position, row in enumerate(sums):
                    code = ir.Constant(vector(HALF, 16), [ZEROS & 255] * 16)
                    for total, upper, lower, step in zip(row[k], *limits, (16, 48), strict=True):
                        steps, zero = (ir.Constant(code.type, [value] * 16) for value in (step, 0))
                        above = builder.icmp_signed('>=', total, upper)
                        below = builder.icmp_signed('<=', total, lower)
                        code = builder.add(code, builder.select(above, steps, zero))
                        code = builder.sub(code, builder.select(below, steps, zero))
                    place = builder.add(offset_address(builder, start, y_at, position), LONG(16 * k))
                    code = builder.trunc(code, vector(BYTE, 16))
                    builder.store(code, builder.inttoptr(place, code.type.as_pointer())).align = 1
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), emit

    return strip


block_1, block_2 = (block_of(strip(width, kind), strip(1, kind), width, f'paired_block_at_{kind}')
                    for kind, width in STRIPS.items())


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


@njit
def make_codes(row, first, last, begin, end):
    """Write the codes of positions begin to end - 1 of images first to last - 1 of the encoder's output.

    Of passes.COLUMNS, x, x_image, x_plane and x_at are those of its planes; words is the number of bytes at a position.
    """
    _, x, x_image, x_plane, x_at, _, _, count, _, _, _, y, y_image, _, y_at, _, _, _ = row
    for image in range(first, last):
        for position in range(begin, end):
            here = x + image * x_image + peek(x_at + 8 * position)
            there = y + image * y_image + peek(y_at + 8 * position)
            for byte in range(count):
                nonzero, negative = peek_byte(here + byte), peek_byte(here + byte + x_plane)
                poke_four(there + 4 * byte, np.uint32(ZEROS + STEPS[nonzero] - 2 * np.int64(STEPS[negative])))


@njit
def run_layer(row, first, last, first_block, last_block, begin, end):
    """Compute blocks first_block to last_block - 1 of a layer, a row of the table, on images first to last - 1.

    begin, end    only positions begin to end - 1 of each image are computed
    """
    if row[KIND] == CODES:
        make_codes(row, first, last, begin, end)
        return
    kind, x, x_image, _, x_at, w, w_block, words, _, blocks, _, y, y_image, _, y_at, count, span, _ = row
    if begin > 0 or end < count:
        span = 1
    for b in range(first_block, last_block):
        w_here, block = w + b * w_block, blocks + b * BLOCK
        pairs = peek(block + PAIRS)
        for image in range(first, last, span):
            stop = end if span == 1 else min(span, last - image) * count
            x_here, y_here = x + image * x_image, y + image * y_image
            if kind == 1:
                block_1(begin, stop, x_here, 0, x_at, w_here, words, pairs, block, y_here, 0, y_at)
            else:
                block_2(begin, stop, x_here, 0, x_at, w_here, words, pairs, block, y_here, 0, y_at)


@njit
def classify(codes, bytes_per_image, weights, affine, first, last, logits):
    """Write the logits of images first to last - 1, float32 [n, classes].

    codes    of the last layer's activations, uint8; the other arguments are those of kernels.classify
    """
    features = np.empty(2 * bytes_per_image)
    for n in range(first, last):
        for byte in range(bytes_per_image):
            code = np.int64(codes[n * bytes_per_image + byte]) // 16
            features[2 * byte], features[2 * byte + 1] = code % 3 - 1, code // 3 - 1
        for k in range(len(weights)):
            logits[n, k] = np.float32(dot(features, weights[k])) * affine[0, k] + affine[1, k]


share, run_images = sharing(run_layer, SHARED_STRIP, 'pairs'), alone(run_layer, classify, 'pairs')


@partial(compiled, parallel=True)  # not made by a function for both engines: numba would not find it in its cache
def run(images, crop, largest, x, before, encoder, table, threads, chunk, codes, bytes_per_image, weights, affine,
        logits):
    """Write the logits, as kernels.run does; codes are as for classify."""
    count = len(images)
    if threads == 1:  # without the cost of a parallel loop
        for first in range(0, count, chunk):
            run_images(images, first, min(count, first + chunk), crop, largest, x, before, encoder, table, codes,
                       bytes_per_image, weights, affine, logits)
    elif count < threads:
        largest = prepare(images, 0, count, crop, x, before, largest)
        counters = np.zeros((len(table), 1 + threads, 8), np.int64)
        for part in prange(threads):
            for layer in range(len(table)):
                share(table[layer], encoder, largest, count, counters, layer, part)
        classify(codes, bytes_per_image, weights, affine, 0, count, logits)
    else:
        images_per_thread = -(-count // threads)
        chunk = -(-images_per_thread // -(-images_per_thread // chunk))  # as many chunks per thread, nearly equal
        for task in prange(-(-count // chunk)):
            run_images(images, task * chunk, min(count, (task + 1) * chunk), crop, largest, x, before, encoder, table,
                       codes, bytes_per_image, weights, affine, logits)
