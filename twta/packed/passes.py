"""How images pass through all layers of an engine with a table of layers: in one thread, or shared by several.

Each engine has layers, and a classifier, of its own: twta.packed.kernels, twta.packed.paired_kernels.
"""
from numba import njit

from twta.packed import encoder_kernels
from twta.packed.encoder_kernels import encode, prepare
from twta.packed.vectors import fetch_add, read

SHARE = 1 << 11  # the least work for a thread that shares an image, in words over all blocks and positions
WORDS_OF_BLOCKS = 18  # the least words of a block for sharing blocks: each thread then reads what the others wrote

# The columns of the table of layers, int64; one row per layer
COLUMNS = (
    'kind',  # which kernel computes the layer
    'x', 'x_image', 'x_plane', 'x_at',  # input: address, bytes per image and per plane, address of positions' offsets
    'w', 'w_block',  # weights: address, bytes per block
    'words', 'words_at',  # words under the kernel: number, address of their offsets from a position of the input
    'blocks', 'n_blocks',  # descriptions of the blocks: address, number
    'y', 'y_image', 'y_plane', 'y_at',  # output: as for the input
    'positions', 'span',  # positions per image; number of images that x_at and y_at cover
    'cost')  # of a block at a position: words of bit planes that take as long; 0: one thread computes the layer
KIND, N_BLOCKS, POSITIONS, COST = (COLUMNS.index(name) for name in ('kind', 'n_blocks', 'positions', 'cost'))


def named(function, name):
    """Return a function compiled under a name that no other one has.

    Two cached functions may bring each its own code under one name, and the first is taken for both.
    """
    function.__qualname__ = name
    return njit(function)


def sharing(run_layer, strip, name):
    """Return a function, named after `name`, that computes a thread's share of a layer.

    run_layer    function as that of kernels
    strip        positions; threads get whole strips
    """
    def share(row, encoder, largest, count, counters, layer, part):
        """Compute the part-th share of a layer, on so many images, and all that nobody has begun; wait for the others.

        So nobody waits for a thread that does not run. A thread mostly has the same positions in all layers: what it
        wrote is in its own cache. Layer 0 is the encoder.

        counters    int64 [layers, 1 + threads, 8], zeros: the shares that are done, and whether each was begun
        """
        threads = counters.shape[1] - 1
        if layer:
            blocks, positions, words = row[N_BLOCKS], row[POSITIONS], row[COST]
        else:
            blocks, positions, words = (encoder[encoder_kernels.N_GROUPS], encoder[encoder_kernels.POSITIONS],
                                        encoder[encoder_kernels.WORDS])
        strips = -(-positions // strip)
        by_strips = strips >= 4 * threads
        cuts = strips if by_strips else blocks
        shares = max(1, min(threads, cuts, blocks * positions * words // SHARE))
        if not by_strips and words < WORDS_OF_BLOCKS:
            shares = 1
        done = counters[layer].ctypes.data
        for k in range(part, part + shares):
            k %= shares
            if fetch_add(done + 64 * (1 + k), 1) > 0:
                continue
            begin, end = k * cuts // shares, (k + 1) * cuts // shares
            if by_strips:
                first_block, last_block, begin, end = 0, blocks, strip * begin, min(strip * end, positions)
            else:
                first_block, last_block, begin, end = begin, end, 0, positions
            if layer:
                run_layer(row, 0, count, first_block, last_block, begin, end)
            else:
                encode(encoder, largest, 0, count, first_block, last_block, begin, end)
            fetch_add(done, 1)
        while read(done) < shares:
            pass

    return named(share, f'share_{name}')


def alone(run_layer, classify, name):
    """Return a function, named after `name`, that takes images through all layers.

    run_layer, classify    functions as those of kernels
    """
    def run_images(images, first, last, crop, largest, x, before, encoder, table, planes, bytes_per_image, weights,
                   affine, logits):
        """Write the logits of images first to last - 1; the arguments are those of run."""
        largest = prepare(images, first, last, crop, x, before, largest)
        encode(encoder, largest, first, last, 0, encoder[encoder_kernels.N_GROUPS], 0,
               encoder[encoder_kernels.POSITIONS])
        for layer in range(1, len(table)):
            run_layer(table[layer], first, last, 0, table[layer, N_BLOCKS], 0, table[layer, POSITIONS])
        classify(planes, bytes_per_image, weights, affine, first, last, logits)

    return named(run_images, f'run_images_{name}')
