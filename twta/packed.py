"""Packed networks: python -m twta.packed FILE.twta IMAGES.npy prints a class an image. No TensorFlow.

Two engines have the same activations, and the same logits but for roundings. `numba`: bit planes, compiled
(twta.bitplanes). `numpy`: the same integers as arrays, slower: the fall-back, and the plain statement of what a packed
network computes (twta.numpy_engine).
"""
import os
import sys
import time

import numpy as np

from twta import TwtaError, UsageError, arrays, packed_file
from twta.numpy_engine import NumpyEngine
from twta.terminal import Parser, errors_in_a_line, input_file, positive_integer


def open_engine(packed, engine='auto', threads=None):
    """The engine of that name for a packed network; 'auto' is numba where it is installed, else numpy.

    It has name, batch (the most images that logits and activations take at once), logits(images) and
    activations(images). UsageError where numba is asked for and cannot be had.
    """
    if engine != 'numpy':
        try:
            from twta.bitplanes import NumbaEngine  # here: it compiles

            return NumbaEngine(packed, threads)
        except ImportError as error:
            if engine == 'numba':
                raise UsageError(f'--engine numba: {error}; use --engine numpy') from None
            print(f'without numba, which is much faster: {error}', file=sys.stderr)
    return NumpyEngine(packed)


def logits(engine, images):
    """Logits float32 [n, classes] of any number of images, uint8 [n, height, width, channels]."""
    parts = [engine.logits(images[start:start + engine.batch]) for start in range(0, len(images), engine.batch)]
    return np.concatenate(parts)


# ----------------------------------------------------------------------------------------------------------------------
# From the shell


def started(packed, engine, threads):
    """open_engine's, warmed up; a line tells how long that took."""
    start = time.perf_counter()
    try:
        engine = open_engine(packed, engine, threads)
        engine.logits(np.zeros((1, *packed.image), np.uint8))
    except MemoryError:
        raise TwtaError(f'{packed.network}: too little memory for its maps') from None
    threads = f', {engine.threads} thread{"s" if engine.threads > 1 else ""}' if engine.name == 'numba' else ''
    taken = time.perf_counter() - start
    print(f'engine: {engine.name}{threads}, ready after {taken:.1f} s', file=sys.stderr, flush=True)
    return engine


def main(argv=None):
    parser = Parser(prog='python -m twta.packed', description=__doc__.partition('\n')[0], allow_abbrev=False)
    parser.add_argument('file', type=input_file, help='a packed network, from --mode export')
    parser.add_argument('images', type=input_file, help='uint8 [n, height, width, channels] as numpy.save writes '
                        'them; of images with one channel, [n, height, width] does as well')
    parser.add_argument('--engine', choices=('auto', 'numba', 'numpy'), default='auto',
                        help='auto, the default: numba where it is installed, else numpy, slower; the same classes')
    parser.add_argument('--threads', type=positive_integer, metavar='N',
                        help='default: one per core that the process may use')
    parser.add_argument('--names', action='store_true', help="print the classes' names, not their numbers")
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error, not only its line')
    with errors_in_a_line('twta.packed'):
        args = parser.parse_args(argv)
        packed = packed_file.read(args.file)
        images = read_images(args.images, packed.image)
        predicted = logits(started(packed, args.engine, args.threads), images).argmax(1)
        try:
            print('\n'.join(packed.classes[k] if args.names else str(k) for k in predicted), flush=True)
        except BrokenPipeError:  # a reader such as head has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_images(path, shape):
    try:
        images = arrays.read_npy(path)
    except arrays.UNREADABLE as error:
        reason = getattr(error, 'strerror', None) or 'not numbers that numpy.save wrote, or damaged'
        raise TwtaError(f'{path}: {reason}; give images as numpy.save writes them') from None
    wanted = f'uint8 [n, {", ".join(map(str, shape))}]'
    if images.dtype != np.uint8:
        raise TwtaError(f'{path}: {images.dtype}, but the network takes {wanted}')
    if images.ndim == 3 and shape[2] == 1:
        images = images[..., np.newaxis]
    if not len(images):
        raise TwtaError(f'{path}: {list(images.shape)} has no images in it; the network takes {wanted}')
    if images.shape[1:] != tuple(shape):
        raise TwtaError(f'{path}: {list(images.shape)}, but the network takes {wanted}')
    return images


if __name__ == '__main__':
    main()
