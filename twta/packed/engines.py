"""The engines that run a packed network.

Two engines have the same activations, and the same logits but for roundings. `numba`: bit planes, compiled
(twta.packed.numba_engine). `numpy`: the same integers as arrays, slower: the fall-back, and the plain statement of what
a packed network computes (twta.packed.numpy_engine).
"""
import sys
import time

import numpy as np

from twta import TwtaError, UsageError
from twta.packed.numpy_engine import NumpyEngine


def open_engine(packed, engine='auto', threads=None):
    """The engine of that name for a packed network; 'auto' is numba where it is installed, else numpy.

    It has name, batch (the most images that logits and activations take at once), logits(images) and
    activations(images). UsageError where numba is asked for and cannot be had.
    """
    if engine != 'numpy':
        try:
            from twta.packed.numba_engine import NumbaEngine  # here: it compiles

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


def warm_engine(packed, engine, threads):
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
