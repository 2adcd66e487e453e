"""Kill the workers of a training at random moments, and start whoever has ended again with the same command.

    python tests/cluster_soak.py --kills 20

After a kill, or a stop that lasts (SIGSTOP), every other worker must end with one line and exit code 75 in time. A
second training on as many workers is never killed: both must end with the same weights, bit for bit. The last line is a
summary for tests/README.md.
"""
import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import QUICK, ROOT, assert_same, log, variables
from soak import being_written, epochs_of, kept

SCRIPT = ROOT / 'MNIST' / 'TWTA_5_5_MNIST.py'
PATIENCE = 45  # seconds: on a busy machine a first step may take 20
LIMIT = PATIENCE + 30  # seconds in which a worker must end: 10 after the patience, and the end of Python itself


def free_addresses(count):
    """Return as many addresses of this machine with ports that nobody uses."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(('127.0.0.1', 0))
        return [f'127.0.0.1:{probe.getsockname()[1]}' for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class Worker:
    """A worker in a process of its own, with one thread; its output goes to files in the folder of its output."""

    def __init__(self, addresses, task, run_dir, *flags, script=SCRIPT, **environment):
        self.out, self.err = (run_dir.parent / f'{run_dir.name}-{task}.{kind}' for kind in ('out', 'err'))
        command = [sys.executable, script, '--run_dir', run_dir, '--workers', ','.join(addresses), '--task', task,
                   '--patience', PATIENCE, *flags]
        with open(self.out, 'w') as out, open(self.err, 'w') as err:
            self.process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, env={
                **os.environ, 'TF_NUM_INTRAOP_THREADS': '1', 'TF_NUM_INTEROP_THREADS': '1', **environment})

    def wait(self, limit=LIMIT):
        """Return the exit code; kill the process and fail if it has not ended by then."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f'a worker goes on: {self.out.read_text()}{self.err.read_text()}') from None

    def wait_for(self, text, limit=120):
        """Wait until the worker has written a text to stdout."""
        deadline = time.monotonic() + limit
        while text not in self.out.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.01)


def start_all(addresses, run_dir, *flags, **environment):
    """Return the workers of a training, started together."""
    return [Worker(addresses, task, run_dir, *flags, **environment) for task in range(len(addresses))]


class Training:
    """Workers, each with a supervisor: whoever ends with exit code 75, or is killed, is started again at once."""

    def __init__(self, count, run_dir, *flags):
        self.addresses, self.run_dir, self.flags = free_addresses(count), run_dir, flags
        self.workers = start_all(self.addresses, run_dir, *flags)
        self.ended = [0] * count  # how often

    def tend(self):
        """Start again whoever has ended before the training did; return whether the training has ended."""
        codes = [worker.process.poll() for worker in self.workers]
        if set(codes) == {0}:
            return True
        for task, code in enumerate(codes):
            if code == 0 and any(other not in (None, 0) for other in codes):
                code = 75  # a worker was killed at the very end: all are started again, as a scheduler does
            if code not in (None, 0):
                said = self.workers[task].err.read_text()
                assert code in (75, -9) and said.count('\n') == (code == 75), (code, said)
                self.workers[task] = Worker(self.addresses, task, self.run_dir, *self.flags)
                self.ended[task] += 1
        return False


def soak(folder, kills, epochs, seed, count=2, say=print):
    """Train twice in a folder, with that many kills and without any; raise AssertionError if the results differ.

    Return how many kills hit each worker, how many of them were stops, how many hit while worker 0 wrote, and the
    longest time from a kill to the end of another worker, in seconds.
    """
    rng, run_dir = random.Random(seed), folder / 'killed'
    flags = *QUICK, '--epochs', epochs, '--resume', 'auto'
    training, hits, stops, in_writes, slowest = Training(count, run_dir, *flags), [0] * count, 0, 0, 0
    for number in range(kills):
        deadline = time.monotonic() + rng.uniform(1, 25)  # enough for TensorFlow's start and some epochs
        while not (is_done := training.tend()) and time.monotonic() < deadline:
            time.sleep(0.02)
        if is_done:
            break
        victim, is_stop, in_write = rng.randrange(count), number % 5 == 4, bool(being_written(run_dir))
        others = [worker for task, worker in enumerate(training.workers) if task != victim]
        if 'training:' not in training.workers[0].out.read_text():
            others = []  # they may still wait for the victim, and never miss it
        stopped = training.workers[victim].process
        stopped.send_signal(signal.SIGSTOP if is_stop else signal.SIGKILL)
        began = time.monotonic()
        while any(worker.process.poll() is None for worker in others):
            assert time.monotonic() - began < LIMIT, [worker.err.read_text() for worker in others]
            if not is_stop:
                training.tend()  # the victim is back before the others notice
            time.sleep(0.02)
        took = time.monotonic() - began
        slowest = max(slowest, took)
        if is_stop and not others:
            time.sleep(LIMIT)  # some time to wait for a worker that listens and does not answer
        stopped.kill()
        stopped.wait()
        hits[victim], stops, in_writes = hits[victim] + 1, stops + is_stop, in_writes + in_write
        say(f'kill {number + 1}: worker {victim}{" (stopped)" * is_stop} after {epochs_of(run_dir)} epochs, '
            + (f'the last other ended after {took:.1f} s' if others else 'at the start')
            + f'; started again: {training.ended}')
    while not training.tend():
        time.sleep(0.1)
    whole = start_all(free_addresses(count), folder / 'whole', *flags)
    assert [worker.wait(600) for worker in whole] == [0] * count
    assert_same(variables(run_dir), variables(folder / 'whole'))
    assert (run_dir / 'model.npz').read_bytes() == (folder / 'whole' / 'model.npz').read_bytes()
    assert [int(row['epoch']) for row in log(run_dir)] == list(range(1, epochs + 1))
    assert kept(run_dir) == kept(folder / 'whole')
    return hits, stops, in_writes, slowest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20, help='number of kills (default: 20)')
    parser.add_argument('--workers', type=int, default=2, help='number of workers (default: 2)')
    parser.add_argument('--seed', type=int, default=0, help='random seed for the moments (default: 0)')
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        hits, stops, in_writes, slowest = soak(Path(folder), args.kills, 8 * args.kills, args.seed, args.workers)
    print(f'survived {sum(hits)} kills in {8 * args.kills} epochs ({" and ".join(map(str, hits))} by worker; {stops} '
          f'of them stops, {in_writes} while worker 0 wrote); the others ended within {slowest:.0f} seconds; the '
          f'weights are those of a run never killed, bit for bit; {(time.monotonic() - start) / 60:.0f} minutes')


if __name__ == '__main__':
    main()
