"""The engines that run a packed network.

numba    bit planes and compiled kernels (twta.packed.numba_engine)
paired   pairs of products from tables (twta.packed.paired_engine)
sliced   vectors with a bit per image (twta.packed.sliced_engine)
numpy    plain arrays, slower; the reference for what a packed network computes (twta.packed.numpy_engine)

Two replace the numba engine on x86 processors that have no population count of vectors. The paired engine does so for
any number of images, if the processor has AVX2 and the layers fill its vectors (paired_engine.suits). Else the sliced
engine does so in batches of 144 and more. (In batches of 256 the sliced engine may be 10 % faster than the paired one.
But it wants the caches for itself, compiles for some seconds more, and gains nothing with binary weights.)

Their activations are the same; their logits differ by rounding.
"""
import threading
import time

import numpy as np

from twta import TwtaError, UsageError, in_a_line
from twta.packed.numpy_engine import NumpyEngine, check_images
from twta.terminal import complain

MANY = 144  # images from which on the sliced engine is faster than the numba engine: it computes 256 in any case
NUMBA_FAULTS = ImportError, ValueError, RuntimeError  # not installed, too old, a variable NUMBA_... that it refuses
SLOW = 2  # seconds; if an engine takes longer to begin, the user is told why


def open_engine(packed, engine='auto', threads=None):
    """Return an engine for a packed network: 'numba', 'numpy', or 'auto', which is numba if it is installed.

    threads    of the numba engine, at least 1; None: one per core

    An engine has name, batch (the largest number of images per call), logits(images) and activations(images).
    Raises UsageError if engine is 'numba' and numba cannot be used, or if an argument is none of these.
    """
    if engine not in ('auto', 'numba', 'numpy'):
        raise UsageError(f"engine {engine!r}: no such engine, valid are 'auto', 'numba' and 'numpy'")
    if threads is not None and threads < 1:
        raise UsageError(f'threads {threads}: valid are 1 and more')
    if engine != 'numpy':
        try:
            from twta.packed.numba_engine import NumbaEngine  # here: numba is optional, and its import compiles

            return NumbaEngine(packed, threads)
        except NUMBA_FAULTS as error:
            return without_numba(packed, engine, error)
    return NumpyEngine(packed)


def without_numba(packed, engine, error):
    """Return the numpy engine after a line that tells why it is not numba; raise UsageError if that was asked for."""
    if engine == 'numba':
        raise UsageError(f'--engine numba: {error}; use --engine numpy') from None
    complain(f'numba, which is much faster, cannot be used: {in_a_line(str(error))}')
    return NumpyEngine(packed)


def logits(engine, images):
    """Return logits, float32 [n, classes], of any number of images, uint8 [n, height, width, channels].

    Raises ValueError if images have another type or shape.
    """
    if 0 < len(images) <= engine.batch:
        return engine_for(engine, len(images)).logits(images)
    if not len(images):
        check_images(images, engine.packed, 0)
        return np.zeros((0, len(engine.packed.classes)), np.float32)
    batches = [images[start:start + engine.batch] for start in range(0, len(images), engine.batch)]
    return np.concatenate([engine_for(engine, len(batch)).logits(batch) for batch in batches])


def engine_for(engine, count):
    """Return the engine for so many images: `engine`, or in place of a numba engine the sliced or the paired one.

    The other two are for x86 processors that have no population count of vectors.
    """
    if engine.name != 'numba':
        return engine
    from twta.packed import numba_engine  # here: numba is optional
    from twta.packed.pool import POOL

    if numba_engine.counts_in_vectors():
        return engine
    for name in ('paired', 'sliced') if count >= MANY else ('paired',):
        with POOL['opening']:  # one is enough for all threads
            if name not in engine.others:
                engine.others[name] = open_other(name, engine)
        if engine.others[name]:
            return engine.others[name]
    return engine


def open_other(name, engine):
    """Return the sliced or the paired engine in place of a numba engine; None if it is too large now, or slower."""
    from twta.packed import paired_engine, sliced_engine

    module, kind = ((sliced_engine, sliced_engine.SlicedEngine) if name == 'sliced' else
                    (paired_engine, paired_engine.PairedEngine))
    try:
        return kind(engine.packed, engine.threads) if module.suits(engine.packed) else None
    except MemoryError:
        return None


def warm_engine(packed, engine, threads, count=1):
    """Return open_engine's engine after first images have compiled it; print to stderr which computes, and its wait.

    count    number of images to come

    Raises UsageError as open_engine does, and TwtaError if there is too little memory.
    """
    start = time.perf_counter()
    first = np.zeros((1, *packed.image), np.uint8)
    compiling = threading.Timer(SLOW, complain, ['engine: the first use compiles it, for some seconds'])
    try:
        if engine != 'numpy':
            compiling.start()
        try:
            found = open_engine(packed, engine, threads)
            for number in sorted({1, min(count, found.batch)}):
                used = engine_for(found, number)
                used.logits(first)
        except NUMBA_FAULTS as error:
            used = found = without_numba(packed, engine, error)
            found.logits(first)
    except MemoryError:
        raise TwtaError(f'{packed.network}: too little memory for its maps') from None
    finally:
        compiling.cancel()
    threads = f', {found.threads} thread{"s" if found.threads > 1 else ""}' if found.name == 'numba' else ''
    taken = time.perf_counter() - start
    kernels = f', {used.name} kernels' if used is not found else ''
    complain(f'engine: {found.name}{kernels}{threads}, ready after {taken:.1f} s')
    return found
