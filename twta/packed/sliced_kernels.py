"""The kernels of the sliced engine: ternary sums of many images at once, in AND, OR and XOR alone.

A lane is an image: bit i of a vector of 256 bits belongs to image i. An activation of all images is two such
vectors, positive and negative. A filter's sum is the number of its products that are +1 less the number that are -1:

    plus     positive where the weight is +1, negative where it is -1
    minus    the other vector of the same channel

Carry-save adders count sixteen vectors at a time, in bit-sliced numbers: vector k of a number holds bit k of each
image's number (Harley-Seal; Mula, Kurz and Lemire, "Faster population counts using AVX2 instructions", 2018). Weights
that are 0 cost nothing. Thresholds are subtractions of bit-sliced numbers, whose sign is the next layer's bit.

The kernels emit LLVM's generic vectors, which LLVM compiles to AVX2, or two halves for SSE2 or NEON. They take
addresses: twta.packed.sliced_engine lays out the memory as the columns below say, and keeps it alive.
"""
from functools import partial

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from twta.packed import encoder_kernels
from twta.packed.encoder_kernels import encode, prepare
from twta.packed.kernels import classify
from twta.packed.pool import compiled
from twta.packed.vectors import INT, LONG, load, peek, splat, vector

SIZE = 32  # bytes of a vector
IMAGES = 8 * SIZE
PART = 32  # images that pass through the encoder together
UNIT = 16  # entries of a list that are counted together
BITS = 8, 11, 15  # of numbers: the kernels' variants

# The columns of the table of layers, int64; one row per layer
COLUMNS = (
    'x', 'x_at',  # address of the map that it reads; address of the positions' offsets in it
    'y', 'y_at',  # the same of the map that it writes
    'filters', 'n_filters', 'positions',  # address of the descriptions of filters, their number, positions
    'bits')  # width of the layer's largest number
Y, Y_AT, N_FILTERS, POSITIONS = (COLUMNS.index(name) for name in ('y', 'y_at', 'n_filters', 'positions'))
# The description of a filter, int64
FILTER = (
    'entries',  # address of its entries, int32: offsets of `plus` vectors from a position
    'units',  # number of entries / UNIT
    'odd', 'has_odd',  # one more entry, and -1 if there is one, else 0
    'upper', 'lower')  # added to the sum: +1 if sum - upper >= 0; -1 unless sum - lower - 1 >= 0


class Lanes:
    """Emits code on vectors."""

    def __init__(self, builder):
        self.builder, self.kind = builder, vector(LONG, SIZE // 8)
        self.zero, self.ones = (ir.Constant(self.kind, [value] * (SIZE // 8)) for value in (0, -1))

    def load(self, address):
        return load(self.builder, address, self.kind, SIZE)

    def store(self, value, address):
        instruction = self.builder.store(value, self.builder.inttoptr(address, self.kind.as_pointer()))
        instruction.align = SIZE

    def splat(self, bit):
        """Return a vector of ones if bit, an int64, is -1; of zeros if it is 0."""
        return splat(self.builder, bit, SIZE // 8)

    def majority(self, a, b, c):
        either = self.builder.xor(a, b)
        return self.builder.xor(a, self.builder.and_(either, self.builder.xor(a, c)))

    def add(self, a, b, c):
        """Return carry and sum of three bits."""
        either = self.builder.xor(a, b)
        return (self.builder.or_(self.builder.and_(a, b), self.builder.and_(either, c)),
                self.builder.xor(either, c))


def count(lanes, base, entries, units, flip, first, bits):
    """Return the number of vectors at base + (entry ^ flip), as vectors of its bits.

    first    a vector that is counted, too
    """
    builder = lanes.builder
    cells = [cgutils.alloca_once(builder, lanes.kind) for _ in range(bits)]
    for k, cell in enumerate(cells):
        builder.store(lanes.zero if k else first, cell)
    with cgutils.for_range(builder, units) as loop:
        at = builder.add(entries, builder.mul(loop.index, LONG(4 * UNIT)))
        carries = []
        for k in range(UNIT):
            entry = builder.sext(load(builder, builder.add(at, LONG(4 * k)), INT, 4), LONG)
            carries.append(lanes.load(builder.add(base, builder.xor(entry, flip))))
        for cell in cells:  # ones, twos, fours, eights; then one carry goes through the others
            below = builder.load(cell)
            if len(carries) == 1:
                builder.store(builder.xor(below, carries[0]), cell)
                carries = [builder.and_(below, carries[0])]
                continue
            carried = []
            for a, b in zip(carries[::2], carries[1::2], strict=True):
                carry, below = lanes.add(a, b, below)
                carried.append(carry)
            builder.store(below, cell)
            carries = carried
    return [builder.load(cell) for cell in cells]


def fire(lanes, plus, minus, thresholds):
    """Return vectors that say whether plus - minus + threshold >= 0, one per threshold.

    plus, minus    numbers of equally many bits
    thresholds     int64, from -2**bits to 2**bits - 1
    """
    builder = lanes.builder
    borrow, carries = lanes.zero, [lanes.zero for _ in thresholds]

    def bit_of(threshold, bit):
        return lanes.splat(builder.sub(LONG(0), builder.and_(builder.ashr(threshold, LONG(bit)), LONG(1))))

    for bit, (a, b) in enumerate(zip(plus, minus, strict=True)):
        difference = builder.xor(builder.xor(a, b), borrow)
        borrow = lanes.majority(builder.xor(a, lanes.ones), b, borrow)
        carries = [lanes.majority(difference, bit_of(threshold, bit), carry)
                   for threshold, carry in zip(thresholds, carries, strict=True)]
    found = []
    for threshold, carry in zip(thresholds, carries, strict=True):  # two more bits, both those of the signs
        high = bit_of(threshold, 63)
        carry = lanes.majority(borrow, high, carry)
        found.append(builder.xor(builder.xor(builder.xor(borrow, high), carry), lanes.ones))
    return found


def filter_at(bits):
    """Return an intrinsic that computes a filter at a position, with numbers of so many bits."""
    @intrinsic
    def filter_at(context, x, description, y):
        def emit(context, builder, signature, arguments):
            x, description, y = arguments
            lanes = Lanes(builder)
            entries, units, odd, has_odd, upper, lower = (
                load(builder, builder.add(description, LONG(8 * k)), LONG, 8) for k in range(len(FILTER)))
            numbers = []
            for flip in (0, SIZE):
                start = builder.and_(lanes.load(builder.add(x, builder.xor(odd, LONG(flip)))), lanes.splat(has_odd))
                numbers.append(count(lanes, x, entries, units, LONG(flip), start, bits))
            positive, above = fire(lanes, *numbers, (upper, lower))
            lanes.store(positive, y)
            lanes.store(builder.xor(above, lanes.ones), builder.add(y, LONG(SIZE)))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), emit

    return filter_at


@intrinsic
def slice_32(context, nonzero, negative, y, step):
    """Store eight filters of 32 images, a byte per image and plane, as 32 bits per filter and plane.

    nonzero, negative    addresses of 32 bytes
    y                    address of the bits of the first filter's positive vector
    step                 bytes from one vector to the next
    """
    def emit(context, builder, signature, arguments):
        nonzero, negative, y, step = arguments
        kind = vector(ir.IntType(8), 32)
        nonzero, negative = (load(builder, address, kind, 1) for address in (nonzero, negative))
        positive = builder.and_(nonzero, builder.not_(negative))
        for k in range(8):
            for values in (positive, negative):
                bits = builder.and_(values, ir.Constant(kind, [1 << k] * 32))
                bits = builder.icmp_unsigned('!=', bits, ir.Constant(kind, [0] * 32))
                instruction = builder.store(builder.bitcast(bits, INT), builder.inttoptr(y, INT.as_pointer()))
                instruction.align = 4
                y = builder.add(y, step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), emit


small_filter, middle_filter, large_filter = map(filter_at, BITS)


@njit
def run_filters(row, begin, end):
    """Compute the results begin to end - 1 of a layer, a row of the table: positions, and in a position filters."""
    x, x_at, y, y_at, filters, n_filters, _, bits = row
    for item in range(begin, end):
        position, k = item // n_filters, item % n_filters
        here, there = x + peek(x_at + 8 * position), y + peek(y_at + 8 * position) + 2 * SIZE * k
        description = filters + 8 * len(FILTER) * k
        if bits <= BITS[0]:
            small_filter(here, description, there)
        elif bits <= BITS[1]:
            middle_filter(here, description, there)
        else:
            large_filter(here, description, there)


@njit
def run_encoder(row, largest, images, planes, y, y_at, task):
    """Compute the encoder for the task-th 32 of so many images, and store its activations as vectors.

    row       of encoder_kernels.COLUMNS, for the first task's planes
    largest   as prepare returns it
    planes    uint8 [tasks, 2, positions, blocks, 32]: non-zero, negative; a block is eight filters
    y, y_at   of the map, as in COLUMNS
    """
    first = PART * task
    row = row.copy()
    row[encoder_kernels.OUTPUT_MAP] += task * planes[0].size - first  # encode adds an image's number
    encode(row, largest, first, min(images, first + PART), 0, row[encoder_kernels.N_GROUPS], 0,
           row[encoder_kernels.POSITIONS])
    for position in range(planes.shape[2]):
        for block in range(planes.shape[3]):
            nonzero, negative = planes[task, 0, position, block], planes[task, 1, position, block]
            slice_32(nonzero.ctypes.data, negative.ctypes.data,
                     y + peek(y_at + 8 * position) + 16 * SIZE * block + PART // 8 * task, SIZE)


@njit
def unslice(vectors, planes, bytes_per_image, begin, end):
    """Write the activations at positions begin to end - 1 of a map as planes of kernels.classify.

    vectors    uint8 [positions, channels, 2, SIZE], channels a multiple of eight
    planes     uint8 [2, bytes]: non-zero, negative
    """
    blocks = vectors.shape[1] // 8
    for position in range(begin, end):
        for block in range(blocks):
            at = position * blocks + block
            for byte in range(SIZE):
                positive, negative = np.uint64(0), np.uint64(0)
                for k in range(8):
                    positive |= np.uint64(vectors[position, 8 * block + k, 0, byte]) << np.uint64(8 * k)
                    negative |= np.uint64(vectors[position, 8 * block + k, 1, byte]) << np.uint64(8 * k)
                nonzero, negative = transpose(positive | negative), transpose(negative)
                for k in range(8):
                    image = (8 * byte + k) * bytes_per_image + at
                    planes[0, image] = np.uint8(nonzero >> np.uint64(8 * k) & np.uint64(255))
                    planes[1, image] = np.uint8(negative >> np.uint64(8 * k) & np.uint64(255))


@njit
def transpose(bits):
    """Return 8 x 8 bits, a row per byte, with rows and columns exchanged (Warren, Hacker's Delight, 7-3)."""
    for step, mask in ((7, 0x00aa00aa00aa00aa), (14, 0x0000cccc0000cccc), (28, 0x00000000f0f0f0f0)):
        swap = (bits ^ bits >> np.uint64(step)) & np.uint64(mask)
        bits ^= swap ^ swap << np.uint64(step)
    return bits


@partial(compiled, parallel=True)
def run(images, crop, largest, x, before, encoder, encoded, table, threads, last, planes, bytes_per_image,
        weights, affine, logits):
    """Write the logits, float32 [n, classes], of images, uint8 [n, height, width, channels].

    n is at most IMAGES.

    encoder    the encoder's row of encoder_kernels.COLUMNS; it writes `encoded`, the planes of run_encoder
    table      int64 [1 + layers, COLUMNS]; its first row has y and y_at of the encoder's map
    last       vectors of the last map, as for unslice, which writes planes

    The other arguments are those of encoder_kernels.prepare and kernels.classify. The threads share the images in the
    encoder and in the classifier, and the results of each layer between them.
    """
    count = len(images)
    for part in prange(threads):
        for task in range(part, -(-count // PART), threads):
            most = prepare(images, PART * task, min(count, PART * task + PART), crop, x, before, largest)
            run_encoder(encoder, most, count, encoded, table[0, Y], table[0, Y_AT], task)
    for layer in range(1, len(table)):
        results = table[layer, POSITIONS] * table[layer, N_FILTERS]
        for part in prange(threads):
            run_filters(table[layer], part * results // threads, (part + 1) * results // threads)
    positions = len(last)
    for part in prange(threads):
        unslice(last, planes, bytes_per_image, part * positions // threads, (part + 1) * positions // threads)
    for part in prange(threads):
        classify(planes, bytes_per_image, weights, affine, part * count // threads, (part + 1) * count // threads,
                 logits)
