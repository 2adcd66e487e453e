"""The engines that run a packed network.

numba    bit planes and compiled kernels (twta.packed.numba_engine)
sliced   vectors with a bit per image (twta.packed.sliced_engine): replaces the numba engine in batches of 144 and more,
         on x86 processors that have no population count of vectors
numpy    plain arrays, slower; the reference for what a packed network computes (twta.packed.numpy_engine)

Their activations are the same; their logits differ by rounding.
"""
import time

import numpy as np

from twta import TwtaError, UsageError, in_a_line
from twta.packed.numpy_engine import NumpyEngine, check_images
from twta.terminal import complain

MANY = 144  # images from which on the sliced engine is the faster one: it computes 256 in any case


def open_engine(packed, engine='auto', threads=None):
    """Return an engine for a packed network: 'numba', 'numpy', or 'auto', which is numba if it is installed.

    threads    of the numba engine; None: one per core

    An engine has name, batch (the largest number of images per call), logits(images) and activations(images).
    Raises UsageError if engine is 'numba' and numba cannot be imported.
    """
    if engine != 'numpy':
        try:
            from twta.packed.numba_engine import NumbaEngine  # here: numba is optional, and its import compiles

            return NumbaEngine(packed, threads)
        except ImportError as error:
            if engine == 'numba':
                raise UsageError(f'--engine numba: {error}; use --engine numpy') from None
            complain(f'numba, which is much faster, cannot be used: {error}')
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
    """Return the engine for so many images: `engine`, or in place of a numba engine a sliced one."""
    if engine.name != 'numba' or count < MANY:
        return engine
    from twta.packed import numba_engine, sliced_engine  # here: numba is optional

    if engine.sliced:
        return engine.sliced
    if numba_engine.counts_in_vectors() or not sliced_engine.suits(engine.packed):
        return engine
    try:
        engine.sliced = sliced_engine.SlicedEngine(engine.packed, engine.threads)
    except MemoryError:
        return engine
    return engine.sliced


def warm_engine(packed, engine, threads, count=1):
    """Return open_engine's engine after first images have compiled it; print to stderr how long that took.

    count    number of images to come

    Raises UsageError as open_engine does, and TwtaError if there is too little memory.
    """
    start = time.perf_counter()
    first = np.zeros((1, *packed.image), np.uint8)
    try:
        try:
            found = open_engine(packed, engine, threads)
            for number in {1, min(count, found.batch)}:
                engine_for(found, number).logits(first)
        except (ValueError, ImportError, RuntimeError) as error:  # for example of a variable NUMBA_...
            if engine == 'numba':
                raise UsageError(f'--engine numba: {error}; use --engine numpy') from None
            complain(f'numba, which is much faster, cannot be used: {in_a_line(str(error))}')
            found = NumpyEngine(packed)
            found.logits(first)
    except MemoryError:
        raise TwtaError(f'{packed.network}: too little memory for its maps') from None
    threads = f', {found.threads} thread{"s" if found.threads > 1 else ""}' if found.name == 'numba' else ''
    taken = time.perf_counter() - start
    complain(f'engine: {found.name}{threads}, ready after {taken:.1f} s')
    return found
