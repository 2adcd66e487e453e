"""The numba engine's kernel for layers in which each filter reads a channel of its own, as in pooling without weights.

64 filters are computed at once, a bit of a word each. Their channels lie in the same order in the input. Each cell
under the kernel adds to a counter, whose bits are words too,

    1 if the product is +1, and 1 if it is not -1            together: product + 1

so the counter ends at sum + cells. It is compared with thresholds, whose bits are words as well.
"""
import numpy as np
from numba import carray, njit

from twta.packed.vectors import peek, pointer, poke


@njit
def bits_of(cells):
    """Return the number of bits for a counter of up to 2 * cells, and for a threshold one above."""
    bits = 1
    while 2 * cells + 1 >> bits:
        bits += 1
    return bits


@njit
def count(counter, ones):
    """Add a bit to each of the counters, uint64 [bits, words]; ones, uint64 [words], is spent."""
    for bit in range(len(counter)):
        for word in range(len(ones)):
            carry = counter[bit, word] & ones[word]
            counter[bit, word] ^= ones[word]
            ones[word] = carry


@njit
def reach(counter, thresholds, reached):
    """Set the bits of `reached`, uint64 [words], of the counters that are at least their thresholds."""
    reached[:] = ~np.uint64(0)
    for bit in range(len(counter)):
        for word in range(len(reached)):
            c, t = counter[bit, word], thresholds[bit, word]
            reached[word] = (c & ~t) | (~(c ^ t) & reached[word])


@njit
def pool(row, first, last, begin, end):
    """Compute positions begin to end - 1 of a layer, a row of passes.COLUMNS, on images first to last - 1.

    These columns have other meanings here:

    w         masks of the weights, uint64 [cells, 2, words]: not zero, negative
    w_block   words
    words     cells under the kernel; words_at: address of their offsets from a position of the input
    blocks    address of the thresholds, uint64 [2, bits, words]: a filter fires if its counter is at least the first,
              or less than the second; then of an int64 per byte of the words: its offset in an image of the output,
              -1 if it has none
    """
    _, x, x_image, x_plane, x_at, w, words, cells, cells_at, constants, _, y, y_image, y_plane, y_at, _, _, _ = row
    bits = bits_of(cells)
    masks = carray(pointer(w), (cells, 2, words))
    thresholds = carray(pointer(constants), (2, bits, words))
    outputs = carray(pointer(constants + 16 * bits * words), 8 * words)
    counter, ones = np.empty((bits, words), np.uint64), np.empty(words, np.uint64)
    found = np.empty((2, words), np.uint64)
    for image in range(first, last):
        for position in range(begin, end):
            counter[:] = 0
            for cell in range(cells):
                here = x + image * x_image + peek(x_at + 8 * position) + peek(cells_at + 8 * cell)
                nonzero, negative = carray(pointer(here), words), carray(pointer(here + x_plane), words)
                for word in range(words):
                    ones[word] = nonzero[word] & masks[cell, 0, word] & ~(negative[word] ^ masks[cell, 1, word])
                count(counter, ones)
                for word in range(words):
                    ones[word] = ~(nonzero[word] & masks[cell, 0, word] & (negative[word] ^ masks[cell, 1, word]))
                count(counter, ones)
            reach(counter, thresholds[0], found[0])
            reach(counter, thresholds[1], found[1])
            there = y + image * y_image + peek(y_at + 8 * position)
            for word in range(words):
                found[1, word] = ~found[1, word]
                found[0, word] |= found[1, word]
            store(found, outputs, there, y_plane)


@njit
def store(found, outputs, there, y_plane):
    """Store the bytes of words [2, words], non-zero and negative, each at its offset in the planes of the output."""
    for word in range(found.shape[1]):
        for byte in range(8):
            offset = np.int64(outputs[8 * word + byte])
            if offset >= 0:
                poke(there + offset, found[0, word] >> np.uint64(8 * byte))
                poke(there + offset + y_plane, found[1, word] >> np.uint64(8 * byte))
