"""The kernels of the numba engine: ternary sums as AND, XOR and population counts of bit planes.

A ternary vector is two planes of bits, non-zero and negative. 64 products and their sum are

    m = x.nonzero & w.nonzero                          products that are not 0
    n = m & (x.negative ^ w.negative)                  products that are -1
    sum = popcount(m) - 2 popcount(n)

A block is one byte of each of the next layer's planes, eight filters; or two or four bytes whose filters read two or
four groups of channels. The filters of one group fill the lanes of a vector, and a strip of up to eight positions of
the map stays in registers, so that each loaded word of weights serves the whole strip. Thresholds turn the sums of a
position into the bytes. Activations are never expanded to one byte each.

The kernels emit LLVM's generic vectors. Numba caches the compiled code beside this file or in the user's cache folder.
The kernels take addresses: twta.packed.numba_engine lays out the memory as BLOCK and COLUMNS say, and keeps it alive.
"""
from functools import partial

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from twta.packed.encoder_kernels import prepare
from twta.packed.passes import KIND, alone, named, sharing
from twta.packed.pool import compiled
from twta.packed.pooling_kernels import pool
from twta.packed.vectors import (
    INT,
    LONG,
    accumulator,
    concatenate,
    load,
    offset_address,
    population_count,
    splat,
    store_bits,
    vector,
)

LANES = 8
STRIP = 8  # positions per call; threads that share an image get whole strips
# The kernels' kinds: the number of groups of channels that a block reads, and the block's bytes
BYTES = {1: 1, 2: 2, 4: 4, 8: 1}

POOLING = 0  # the kind of a layer for pooling_kernels

# The description of a block: byte offsets of its fields
UPPER, LOWER = 0, 128  # thresholds of the filters, int64, or int32 if the block has several bytes
OUTPUTS = 256  # one int64 per byte; its offset at the first position, in an image of the output
SOURCES = 320  # one to eight int64; offsets of the groups of channels that it reads, in an image of the input
BLOCK = 384  # bytes of a description


# ----------------------------------------------------------------------------------------------------------------------
# A strip: a block at a few positions, in LLVM


def sum_ternary(builder, at, x_plane, w, words, words_at, lanes):
    """Return a block's sums, a vector of so many int64 per position and source; at[position][source] are addresses."""
    kind = vector(LONG, lanes)
    size = 8 * lanes * len(at[0])  # bytes of weights per word and plane
    counts = [[(accumulator(builder, kind), accumulator(builder, kind)) for _ in starts] for starts in at]
    with cgutils.for_range(builder, words) as loop:
        word = load(builder, builder.add(words_at, builder.shl(loop.index, LONG(3))), LONG, 8)
        for source in range(len(at[0])):
            here = builder.add(builder.add(w, builder.mul(loop.index, LONG(2 * size))), LONG(8 * lanes * source))
            w_nonzero, w_negative = (load(builder, builder.add(here, LONG(plane)), kind, 8) for plane in (0, size))
            for starts, cells in zip(at, counts, strict=True):
                address = builder.add(starts[source], word)
                nonzero, negative = (splat(builder, load(builder, builder.add(address, plane), LONG, 1), lanes)
                                     for plane in (LONG(0), x_plane))
                m = builder.and_(nonzero, w_nonzero)
                n = builder.and_(m, builder.xor(negative, w_negative))
                for cell, bits in zip(cells[source], (m, n), strict=True):
                    builder.store(builder.add(builder.load(cell), population_count(builder, bits)), cell)
    one = ir.Constant(kind, [1] * lanes)
    return [[builder.sub(builder.load(products), builder.shl(builder.load(negatives), one))
             for products, negatives in cells] for cells in counts]


def in_order_of_bytes(builder, sums):
    """Return one vector of int32, the sums of each byte's filters together, of as many vectors of sums as bytes.

    Vector g holds the filters of group g, byte by byte; each byte takes as many filters from each group.
    """
    groups = len(sums)
    sums = concatenate(builder, [builder.trunc(total, vector(INT, LANES)) for total in sums])
    order = np.arange(LANES * groups).reshape(groups, groups, -1).swapaxes(0, 1).ravel().tolist()
    undefined = ir.Constant(sums.type, ir.Undefined)
    return builder.shuffle_vector(sums, undefined, ir.Constant(vector(INT, len(order)), order))


def strip(positions, kind):
    """Return an intrinsic that computes a block at so many positions and stores its bits in the output's planes.

    Bits are non-zero if a sum >= upper or <= lower, negative if a sum <= lower. kind is that of COLUMNS.
    """
    n_bytes = BYTES[kind]

    @intrinsic
    def strip(context, x, x_plane, x_at, w, words, words_at, block, y, y_plane, y_at):
        def emit(context, builder, signature, arguments):
            x, x_plane, x_at, w, words, words_at, block, y, y_plane, y_at = arguments
            sources = builder.add(block, LONG(SOURCES))
            at = [[offset_address(builder, offset_address(builder, x, x_at, position), sources, source)
                   for source in range(kind)] for position in range(positions)]
            sums = [in_order_of_bytes(builder, parts) if n_bytes > 1 else concatenate(builder, parts)
                    for parts in sum_ternary(builder, at, x_plane, w, words, words_at, LANES * n_bytes // kind)]
            upper, lower = (load(builder, builder.add(block, LONG(where)), sums[0].type, 4) for where in (UPPER, LOWER))
            starts = [offset_address(builder, y, builder.add(block, LONG(OUTPUTS)), byte) for byte in range(n_bytes)]
            for position, total in enumerate(sums):
                negative = builder.icmp_signed('<=', total, lower)
                nonzero = builder.or_(builder.icmp_signed('>=', total, upper), negative)
                offset = load(builder, builder.add(y_at, LONG(8 * position)), LONG, 8)
                places = [builder.add(start, offset) for start in starts]
                store_bits(builder, nonzero, places)
                store_bits(builder, negative, [builder.add(place, y_plane) for place in places])
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), emit

    return strip


def block_of(wide, narrow, width, name):
    """Return a function of a name that computes a block at positions begin to end - 1.

    wide, narrow    intrinsics for strips of `width` positions and of one
    """

    def block_at(begin, end, x, x_plane, x_at, w, words, words_at, block, y, y_plane, y_at):
        whole = begin + (end - begin) // width * width
        for p in range(begin, whole, width):
            wide(x, x_plane, x_at + 8 * p, w, words, words_at, block, y, y_plane, y_at + 8 * p)
        if whole > begin and end - whole > width // 4:  # computing some positions twice takes less time
            p = end - width
            wide(x, x_plane, x_at + 8 * p, w, words, words_at, block, y, y_plane, y_at + 8 * p)
        else:
            for p in range(whole, end):
                narrow(x, x_plane, x_at + 8 * p, w, words, words_at, block, y, y_plane, y_at + 8 * p)

    return named(block_at, name)


# more positions of several groups do not fit in the registers
block_1, block_2, block_4, block_8 = (
    block_of(strip(STRIP // kind, kind), strip(1, kind), STRIP // kind, f'block_at_{kind}') for kind in BYTES)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


@njit
def run_layer(row, first, last, first_block, last_block, begin, end):
    """Compute blocks first_block to last_block - 1 of a layer, a row of the table, on images first to last - 1.

    begin, end    only positions begin to end - 1 of each image are computed
    """
    if row[KIND] == POOLING:
        pool(row, first, last, begin, end)
        return
    (kind, x, x_image, x_plane, x_at, w, w_block, words, words_at, blocks, _, y, y_image, y_plane, y_at, count,
     span, _) = row
    if begin > 0 or end < count:
        span = 1
    for b in range(first_block, last_block):
        for image in range(first, last, span):
            stop = end if span == 1 else min(span, last - image) * count
            x_here, y_here = x + image * x_image, y + image * y_image
            w_here, block = w + b * w_block, blocks + b * BLOCK
            if kind == 1:
                block_1(begin, stop, x_here, x_plane, x_at, w_here, words, words_at, block, y_here, y_plane, y_at)
            elif kind == 2:
                block_2(begin, stop, x_here, x_plane, x_at, w_here, words, words_at, block, y_here, y_plane, y_at)
            elif kind == 4:
                block_4(begin, stop, x_here, x_plane, x_at, w_here, words, words_at, block, y_here, y_plane, y_at)
            else:
                block_8(begin, stop, x_here, x_plane, x_at, w_here, words, words_at, block, y_here, y_plane, y_at)


@njit(fastmath={'reassoc'})
def dot(a, b):
    """Return the sum of products, in any order: logits of the engines differ by rounding."""
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@njit
def classify(planes, bytes_per_image, weights, affine, first, last, logits):
    """Write the logits of images first to last - 1, float32 [n, classes].

    planes     of the last layer's activations, uint8 [2, bytes]
    weights    float64 [classes, features]
    affine     float32 [2, classes]: what the sums, rounded to float32, are multiplied by, and what is added
    """
    features = np.empty(8 * bytes_per_image)
    for n in range(first, last):
        for byte in range(bytes_per_image):
            nonzero, negative = planes[0, n * bytes_per_image + byte], planes[1, n * bytes_per_image + byte]
            for bit in range(8):
                features[8 * byte + bit] = np.int64(nonzero >> bit & 1) - 2 * np.int64(negative >> bit & 1)
        for k in range(len(weights)):
            logits[n, k] = np.float32(dot(features, weights[k])) * affine[0, k] + affine[1, k]


share, run_images = sharing(run_layer, STRIP, 'planes'), alone(run_layer, classify, 'planes')


@partial(compiled, parallel=True)
def run(images, crop, largest, x, before, encoder, table, threads, chunk, planes, bytes_per_image, weights, affine,
        logits):
    """Write the logits, float32 [n, classes], of images, uint8 [n, height, width, channels].

    encoder    int64 [encoder_kernels.COLUMNS]
    table      int64 [1 + layers, COLUMNS]; its first row is not used
    threads    each of them takes at most `chunk` images through all layers, then the next ones; if there are fewer
               images than threads, the threads share each layer

    The other arguments are those of prepare and classify.
    """
    count = len(images)
    if threads == 1:  # without the cost of a parallel loop
        for first in range(0, count, chunk):
            run_images(images, first, min(count, first + chunk), crop, largest, x, before, encoder, table, planes,
                       bytes_per_image, weights, affine, logits)
    elif count < threads:
        largest = prepare(images, 0, count, crop, x, before, largest)
        counters = np.zeros((len(table), 1 + threads, 8), np.int64)
        for part in prange(threads):
            for layer in range(len(table)):
                share(table[layer], encoder, largest, count, counters, layer, part)
        classify(planes, bytes_per_image, weights, affine, 0, count, logits)
    else:
        images_per_thread = -(-count // threads)
        chunk = -(-images_per_thread // -(-images_per_thread // chunk))  # as many chunks per thread, nearly equal
        for task in prange(-(-count // chunk)):
            run_images(images, task * chunk, min(count, (task + 1) * chunk), crop, largest, x, before, encoder, table,
                       planes, bytes_per_image, weights, affine, logits)
