"""The workers of one training: their addresses, and which of them this process is.

They come from --workers and --task, or from the environment variable TF_CONFIG, by which clusters tell a TensorFlow
process the same: {"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}.
"""
import argparse
import json
import os
import re
from typing import NamedTuple

from twta import UsageError

ADDRESS = re.compile(r'[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?:(?P<port>[1-9]\d{0,4})')


class Workers(NamedTuple):
    """Addresses, HOST:PORT, of the workers, and the index of this process; without addresses it trains alone."""
    addresses: tuple = ()
    task: int = 0

    @property
    def count(self):
        return max(1, len(self.addresses))

    @property
    def rows(self):
        """The rows of the global batch that this worker takes."""
        return slice(self.task, None, self.count)


ALONE = Workers()


def addresses(text):
    """Return the addresses of a list with commas, as a type of flag values."""
    found = tuple(text.split(','))
    for address in found:
        parts = ADDRESS.fullmatch(address)
        if not parts or int(parts['port']) > 65535:
            raise argparse.ArgumentTypeError(f'{text[:80]!r}: {address[:80]!r} is not HOST:PORT, such as node1:4711; '
                                             'ports go up to 65535, and commas separate workers')
        if found.count(address) > 1:
            raise argparse.ArgumentTypeError(f'{text[:80]!r}: {address!r} is there twice; each worker has its own '
                                             'HOST:PORT')
    return found


def choose(given, task):
    """Return the Workers of a training.

    given, task    values of --workers and --task; TF_CONFIG counts if both are None

    Raises UsageError if a value is not valid.
    """
    if given is None and task is None:
        return read_tf_config(os.environ.get('TF_CONFIG', ''))
    if given is None or task is None:
        raise UsageError('--workers and --task go together: the addresses of all workers, the same on each, and the '
                         'index of this one; give both')
    return check(Workers(given, task), f'--task {task}')


def check(workers, source):
    """Return the Workers, or those of an ordinary run if there is one; raises UsageError if the index is too high."""
    if workers.task >= workers.count:
        raise UsageError(f'{source}: there are {workers.count} workers, valid are 0 to {workers.count - 1}')
    return workers if workers.count > 1 else Workers()


def read_tf_config(text):
    """Return the Workers that TF_CONFIG names; without a cluster in it, those of an ordinary run."""
    if not text.strip():
        return Workers()
    try:
        config = json.loads(text)
        cluster, task = config.get('cluster') or {}, config.get('task') or {}
        others = sorted(job for job, given in cluster.items() if given and job != 'worker')
        kind, index, listed = task.get('type', 'worker'), task.get('index'), cluster.get('worker')
        is_list = isinstance(listed, list) and all(isinstance(address, str) for address in listed)
    except (ValueError, AttributeError, RecursionError):
        raise UsageError(f'TF_CONFIG={text[:80]}: not a JSON object with cluster and task; see docs/scale.md, or unset '
                         'it') from None
    if not cluster:
        return Workers()
    if others or kind != 'worker':
        job = others[0] if others else str(kind)[:20]
        raise UsageError(f'TF_CONFIG: it has the job {job!r}, valid is "worker" alone: every process trains, and '
                         'worker 0 writes')
    if not listed or not is_list or not str(index).isdecimal():
        raise UsageError(f'TF_CONFIG={text[:80]}: cluster.worker is a list of HOST:PORT, and task.index the index of '
                         'this process in it')
    try:
        return check(Workers(addresses(','.join(listed)), int(index)), f'TF_CONFIG, task.index {index}')
    except argparse.ArgumentTypeError as error:
        raise UsageError(f'TF_CONFIG, cluster.worker: {error}') from None
