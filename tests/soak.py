"""Kills a training again and again, at random moments and in the middle of checkpoint writes, and resumes it.

    python tests/soak.py --kills 50

It must end with the same weights, bit for bit, as one that was never killed, which is trained on one core; log.csv must
have every epoch once, and nothing half-written may be left. What it did is printed and ends in a line for README.md.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import QUICK, ROOT, assert_same, log, variables

SCRIPT = ROOT / 'MNIST' / 'TWTA_4_4_MNIST.py'
LONGEST = 12  # seconds from the start of a training to a kill at random: TensorFlow's start, then some epochs


def train(run_dir, epochs, resume=False, before=None):
    return subprocess.Popen([sys.executable, SCRIPT, *QUICK, '--deterministic', '--epochs', str(epochs), '--run_dir',
                             run_dir, '--resume', str(resume)], stdout=subprocess.DEVNULL, preexec_fn=before)


def one_core():
    """Has this process, and those it starts, run on one of its cores; where the system can (Linux)."""
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def being_written(run_dir):
    """The names of what a save, or a replacement of a file, has not yet put into place."""
    names = os.listdir(run_dir) if run_dir.exists() else []
    return {name for name in names if 'temp' in name or '.tmp' in name or name.startswith('.part')}


def kept(run_dir):
    """The names in a run's directory, without those that a kill may leave: events, and runs without a checkpoint."""
    return {path.name for path in run_dir.iterdir() if not path.name.startswith(('events.', 'earlier-'))}


def epochs_of(run_dir):
    return len(log(run_dir)) if (run_dir / 'log.csv').exists() else 0


def kill(process, run_dir, rng, moment):
    """Kills the process at a moment: 'start' or later, in an 'epoch', in a 'write'; returns what it was writing."""
    old, begun = being_written(run_dir), epochs_of(run_dir)
    deadline = time.monotonic() + (rng.uniform(0, LONGEST) if moment == 'start' else 300)
    while process.poll() is None and time.monotonic() < deadline:
        if moment == 'write' and being_written(run_dir) - old:
            process.send_signal(signal.SIGSTOP)  # or the write may end before the kill
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if being_written(run_dir) - old:
                break
            process.send_signal(signal.SIGCONT)
        if moment == 'epoch' and epochs_of(run_dir) > begun:
            moment, deadline = 'start', time.monotonic() + rng.uniform(0, LONGEST / 4)
        if moment != 'write':
            time.sleep(0.001)
    process.kill()
    process.wait()
    return being_written(run_dir) - old


def soak(folder, kills, epochs, seed, say=print):
    """Trains twice in a folder, with that many kills and without; AssertionError where the results differ.

    Returns how many kills hit a training, how many of these a checkpoint or another file half-written.
    """
    rng, run_dir, hits, in_writes = random.Random(seed), folder / 'killed', 0, 0
    for number in range(kills):
        process = train(run_dir, epochs, resume=(run_dir / 'checkpoint').exists())
        written = kill(process, run_dir, rng, ('epoch', 'write', 'start')[number % 3])
        assert process.returncode in (0, -9), f'kill {number + 1}: exit {process.returncode}'
        hits += process.returncode == -9
        in_writes += bool(written)
        say(f'kill {number + 1}: after {epochs_of(run_dir)} epochs'
            + (f', writing {", ".join(written)}' if written else ''))
        if not process.returncode:
            break  # it was faster than the kills
    assert train(run_dir, epochs, resume=(run_dir / 'checkpoint').exists()).wait() == 0
    assert train(folder / 'whole', epochs, before=one_core).wait() == 0
    assert_same(variables(run_dir), variables(folder / 'whole'))
    assert (run_dir / 'model.npz').read_bytes() == (folder / 'whole' / 'model.npz').read_bytes()
    assert [int(row['epoch']) for row in log(run_dir)] == list(range(1, epochs + 1))
    assert kept(run_dir) == kept(folder / 'whole')
    return hits, in_writes


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        hits, in_writes = soak(Path(folder), args.kills, 4 * args.kills, args.seed)
    print(f'survived {hits} kills in {4 * args.kills} epochs, {in_writes} of them in the middle of a write; the '
          f'weights are those of a run never killed, bit for bit; {(time.monotonic() - start) / 60:.0f} minutes')


if __name__ == '__main__':
    main()
