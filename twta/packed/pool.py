"""numba's threads: how many, who holds them, and what a fork leaves of them.

numba has one pool of threads per process, and the pool serves one caller at a time. A fork copies the pool without its
threads. So a process that was forked from one that had used them computes in one thread, by kernels compiled for that.
"""
import hashlib
import os
import pickle
import threading
import types
from pathlib import Path

import numba
from numba.core.compiler_lock import global_compiler_lock
from numba.np.ufunc import parallel as numba_threads

from twta import files, in_a_line, processor
from twta.terminal import complain

POOL = {'lock': threading.Lock(), 'opening': threading.Lock(), 'is_used': False, 'is_lost': False}
KERNELS = 'vectors.py', 'encoder_kernels.py', 'pooling_kernels.py', 'passes.py', 'kernels.py', 'paired_kernels.py', \
    'sliced_kernels.py'
# numba's cache looks at the file of the outermost function only, so a digest of all kernels is in its name
SOURCES = hashlib.sha256(b''.join(Path(__file__).with_name(name).read_bytes()
                                  for name in KERNELS)).hexdigest()[:8]


def after_fork():
    is_used = POOL['is_used'] or getattr(numba_threads, '_is_initialized', False)  # by other code than ours
    POOL.update(lock=threading.Lock(), opening=threading.Lock(), is_lost=POOL['is_lost'] or is_used)
    global_compiler_lock.release()


if hasattr(os, 'register_at_fork'):  # a fork waits while another thread compiles, else the child would for ever
    os.register_at_fork(before=global_compiler_lock.acquire, after_in_parent=global_compiler_lock.release,
                        after_in_child=after_fork)


def count_threads(threads):
    """Return the number of threads, or one per available core if it is None; at most as many as numba has."""
    return min(threads or processor.available_cores(), numba.config.NUMBA_NUM_THREADS)


def call(kernels, threads, *arguments):
    """Call the function `run` of a module of kernels, which has `threads` among its arguments, in so many threads.

    The caller holds POOL['lock'].

    If numba's cache of it is damaged, or its disk is full, it is compiled without the cache.
    """
    if POOL['is_lost']:
        name = 'run_in_one_thread'
        if not hasattr(kernels, name):
            setattr(kernels, name, compiled(in_one_thread(kernels.run.py_func)))
    else:
        name, POOL['is_used'] = 'run', True
        if threads > 1:
            numba.set_num_threads(threads)
    try:
        getattr(kernels, name)(*arguments)
    except (*files.UNREADABLE, pickle.PickleError) as error:
        complain(f"numba's cache cannot be used ({in_a_line(str(error))[:80]}): compiling for this process alone")
        setattr(kernels, name, numba.njit(parallel=name == 'run')(getattr(kernels, name).py_func))
        getattr(kernels, name)(*arguments)


def in_one_thread(function):
    """Return a copy of a function under another name: numba's cache does not tell parallel code from other code."""
    copy = types.FunctionType(function.__code__, function.__globals__, f'{function.__name__}_in_one_thread')
    copy.__qualname__, copy.__module__ = copy.__name__, function.__module__
    return copy


def compiled(function, parallel=False):
    """Return a function compiled by numba, and cached if there is a folder for the cache."""
    function.__qualname__ += f'_{SOURCES}'
    try:
        return numba.njit(parallel=parallel, cache=True)(function)
    except RuntimeError:
        return numba.njit(parallel=parallel)(function)
