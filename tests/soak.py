"""Kill a training again and again, at random moments and in the middle of writes, and resume it each time.

    python tests/soak.py --kills 50

A second training, on one core, is never killed. Both must end with the same weights, bit for bit. log.csv must have
each epoch once, and no half-written file may be left. The last line is a summary for tests/README.md.
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
LONGEST = 12  # seconds from start to random kill, at most: enough for TensorFlow's start and some epochs


def train(run_dir, epochs, resume=False, before=None):
    """Return a process that trains; it calls `before` first."""
    return subprocess.Popen([sys.executable, SCRIPT, *QUICK, '--deterministic', '--epochs', str(epochs), '--run_dir',
                             run_dir, '--resume', str(resume)], stdout=subprocess.DEVNULL, preexec_fn=before)


def one_core():
    """Keep this process and its children on one core; only Linux can do so."""
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def being_written(run_dir):
    """Return the names of files in the run directory that are written but not yet in place."""
    names = os.listdir(run_dir) if run_dir.exists() else []
    return {name for name in names if 'temp' in name or '.tmp' in name or name.startswith('.part')}


def kept(run_dir):
    """Return the names in a run directory, except what kills add: files of events, and runs without a checkpoint."""
    return {path.name for path in run_dir.iterdir() if not path.name.startswith(('events.', 'earlier-'))}


def epochs_of(run_dir):
    """Return the number of epochs in a run's log."""
    return len(log(run_dir)) if (run_dir / 'log.csv').exists() else 0


def kill(process, run_dir, rng, moment):
    """Kill the process and return the names of the files that it was writing.

    moment    'start': at random within LONGEST; 'epoch': at random after the next epoch; 'write': while it writes
    """
    old, begun = being_written(run_dir), epochs_of(run_dir)
    deadline = time.monotonic() + (rng.uniform(0, LONGEST) if moment == 'start' else 300)
    while process.poll() is None and time.monotonic() < deadline:
        if moment == 'write' and being_written(run_dir) - old:
            process.send_signal(signal.SIGSTOP)  # else the write may end before the kill
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
    """Train twice in a folder, with that many kills and without any; raise AssertionError if the results differ.

    Return the number of kills that hit a training, and the number of these that hit it in the middle of a write.
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
            break  # the training ended before the kills did
    assert train(run_dir, epochs, resume=(run_dir / 'checkpoint').exists()).wait() == 0
    assert train(folder / 'whole', epochs, before=one_core).wait() == 0
    assert_same(variables(run_dir), variables(folder / 'whole'))
    assert (run_dir / 'model.npz').read_bytes() == (folder / 'whole' / 'model.npz').read_bytes()
    assert [int(row['epoch']) for row in log(run_dir)] == list(range(1, epochs + 1))
    assert kept(run_dir) == kept(folder / 'whole')
    return hits, in_writes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50, help='number of kills (default: 50)')
    parser.add_argument('--seed', type=int, default=0, help='random seed for the moments (default: 0)')
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        hits, in_writes = soak(Path(folder), args.kills, 4 * args.kills, args.seed)
    print(f'survived {hits} kills in {4 * args.kills} epochs, {in_writes} of them in the middle of a write; the '
          f'weights are those of a run never killed, bit for bit; {(time.monotonic() - start) / 60:.0f} minutes')


if __name__ == '__main__':
    main()
