#!/usr/bin/env python3
"""Time how the cost per image of packed inference grows with width, depth, batch and threads.

    python benchmarks/growth.py --json benchmarks/growth.json      # two minutes

The networks have random ternary weights: an encoder and `depth` convolutions of 3 * 3, all of `width` filters, on maps
of 24 * 24. One of the three numbers changes at a time; the others are 64 filters, 4 layers, 200 images.
"""
import argparse
import statistics
import time

import numpy as np
from speed import random_images, write_rows

from twta import processor
from twta.packed import engines
from twta.packed.file_format import Layer, PackedNetwork
from twta.terminal import output_file, positive_integer

WIDTH, DEPTH, BATCH = 64, 4, 200
WIDTHS, DEPTHS, BATCHES = (16, 32, 64, 128, 256, 512), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32, 64, 128, 256, 1000)
IMAGE, CROP = (32, 32, 3), 24
SECONDS = 0.05  # least duration of a timing


def network(width, depth):
    """Return a packed network with random weights; about a third of its activations is 0."""
    rng, layers = np.random.default_rng(0), []
    for index in range(depth + 1):
        channels = width if index else IMAGE[2]
        weights = rng.integers(-1, 2, (3, 3, channels, width))
        limit = np.full(width, 0.35 * weights[..., 0].size ** 0.5)
        kind, limits = (np.int8, np.int32) if index else (np.float32, np.float32)
        layers.append(Layer(f'conv{index}', weights.astype(kind), limit.astype(limits), -limit.astype(limits), 1,
                            'SAME', 1))
    classes = tuple('0123456789')
    return PackedNetwork('growth', 'benchmark', IMAGE, CROP, classes, tuple(layers),
                         rng.standard_normal((CROP * CROP * width, 10)).astype(np.float32), np.ones(10, np.float32),
                         np.zeros(10, np.float32), {})


def measure(what, width, depth, batch, threads, repetitions):
    """Return and print a row: the median seconds per image."""
    packed = network(width, depth)
    engine, images = engines.open_engine(packed, 'numba', threads), random_images(IMAGE, batch)

    def run(times):
        start = time.perf_counter()
        for _ in range(times):
            engines.logits(engine, images)
        return (time.perf_counter() - start) / times

    run(1)  # it may compile
    times = 1 + int(SECONDS / run(1))
    seconds = statistics.median(run(times) for _ in range(repetitions)) / batch
    row = {'grows': what, 'width': width, 'depth': depth, 'batch': batch, 'threads': threads, 'seconds': seconds,
           'products': CROP * CROP * 9 * width * (IMAGE[2] + depth * width), 'processor': processor.kind()}
    print(f'{what:6} {width:6} {depth:6} {batch:6} {threads:8} {1e6 * seconds:13,.1f}', flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repetitions', type=positive_integer, default=5, metavar='N',
                        help='timings per figure; the median is reported (default: %(default)s)')
    parser.add_argument('--most', type=positive_integer, default=1000, metavar='N',
                        help='leave out widths, depths and batches above this (default: %(default)s)')
    parser.add_argument('--json', type=output_file, metavar='FILE',
                        help='also write the rows to this file (default: only print them)')
    args = parser.parse_args()
    print('grows   width  depth  batch  threads  us per image')
    rows = []
    for threads in sorted({1, processor.available_cores()}):
        points = [('width', width, DEPTH, BATCH) for width in WIDTHS]
        points += [('depth', WIDTH, depth, BATCH) for depth in DEPTHS]
        points += [('batch', WIDTH, DEPTH, batch) for batch in BATCHES]
        rows += [measure(*point, threads, args.repetitions) for point in points
                 if dict(zip(('width', 'depth', 'batch'), point[1:], strict=True))[point[0]] <= args.most]
    if args.json:
        write_rows(args.json, (), args.repetitions, rows)


if __name__ == '__main__':
    main()
