"""Record the system calls of a short training, and open what a power cut after each of them may leave on the disk.

    python tests/powerloss.py              # needs strace (Linux); some minutes

A write is on the disk for certain only once its file was synced, a new name (create, rename, unlink) only once its
folder was. So after each call, these states of the run directory are possible: names not synced are all there, all
absent, one of them absent, or one alone there; of contents not synced everything, nothing or one half is there. The
models of ALICE (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014) are of this kind.

In each state the newest whole checkpoint must be found. It must not be older than the last epoch that the training had
printed, and no JSON file, table or archive may be half there.
"""
import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from conftest import QUICK, ROOT

from twta.training import checkpoints

SCRIPT = ROOT / 'MNIST' / 'TWTA_2_2_MNIST.py'  # the smallest network
CALLS = 'open,openat,creat,lseek,write,writev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat'
OTHERS = 'pwrite64', 'pwritev', 'ftruncate', 'truncate', 'link', 'linkat', 'mkdir', 'mkdirat'  # must not occur
CALL = re.compile(r'(\w+)\((.*)\) += (-?\d+)')
TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
OPENED = re.compile(r'(-?\d+)<((?:\\x[0-9a-f]{2})*|[^>]*)>')


def record(run_dir, trace, epochs):
    """Train in run_dir under strace, which writes the calls into the file `trace`."""
    traced = f'trace={CALLS},{",".join(OTHERS)}'
    command = ['strace', '-f', '-y', '-xx', '-s', '99999999', '--seccomp-bpf', '-e', traced, '-o', trace,
               sys.executable, SCRIPT, *QUICK, '--epochs', epochs, '--run_dir', run_dir]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def plain(text):
    """Return the bytes that strace wrote as \\x61\\x62..."""
    return bytes.fromhex(text.replace('\\x', ''))


def calls(trace, failed=False):
    """Yield the calls of a trace as name, arguments, result and thread; only successful ones, unless failed is True.

    A call that strace shows in two lines is put together.
    """
    begun = {}
    with open(trace) as file:
        for line in file:
            thread, _, line = line.rstrip('\n').partition(' ')
            line = line.strip()
            if line.endswith('<unfinished ...>'):
                begun[thread] = line.removesuffix('<unfinished ...>').rstrip()
                continue
            if line.startswith('<...'):
                line = begun.pop(thread) + line.partition('resumed>')[2].lstrip()
            found = CALL.match(line)
            if found and (failed or int(found[3]) >= 0):
                yield found[1], found[2], int(found[3]), thread


class Disk:
    """The files of one folder: as programs see them, and what is on the disk for certain.

    names      name: number of the file, as programs see them
    content    the bytes of each file; synced: its bytes when it was last synced
    certain    names as on the disk; pending: changes of names since then, as (what, name, new name or file)
    """

    def __init__(self, folder):
        self.folder = str(folder)
        self.names, self.content, self.synced, self.certain, self.pending = {}, {}, {}, {}, []

    def name(self, path):
        """Return the name of a path in the folder, or None."""
        inside = path.removeprefix(self.folder + '/')
        return inside if inside != path and '/' not in inside else None

    def create(self, name, truncate):
        if name not in self.names:
            number = len(self.content)
            self.content[number], self.synced[number] = bytearray(), b''
            self.change('link', name, number)
        elif truncate:
            self.content[self.names[name]].clear()

    def change(self, what, name, other=None):
        self.pending.append((what, name, other))
        apply(self.names, what, name, other)

    def sync(self, path):
        if path == self.folder:
            self.certain, self.pending = dict(self.names), []
        elif self.name(path) in self.names:
            number = self.names[self.name(path)]
            self.synced[number] = bytes(self.content[number])

    def states(self):
        """Yield what a power cut may leave: dictionaries of name: bytes."""
        changes = self.pending
        selections = [(), changes, *(changes[:i] + changes[i + 1:] for i in range(len(changes))),
                      *([change] for change in changes)]
        for selection in selections:
            names = dict(self.certain)
            for change in selection:
                apply(names, *change)
            for kept in (1, 0.5, 0):
                yield {name: self.left(number, kept) for name, number in names.items()}

    def left(self, number, kept):
        """Return what is left of a file if of the bytes that are not synced that part is kept."""
        now, before = bytes(self.content[number]), self.synced[number]
        if kept == 1 or now == before:
            return now
        if not now.startswith(before):
            return before if not kept else now[:len(now) // 2]
        return now[:len(before) + int(kept * (len(now) - len(before)))]


def apply(names, what, name, other):
    """Apply a change of names to a dictionary; a change of a name that is not there changes nothing."""
    if what == 'link':
        names[name] = other
    elif what == 'unlink':
        names.pop(name, None)
    elif name in names:
        names[other] = names.pop(name)


def replay(trace, folder):
    """Yield the Disk and the number of epochs that were printed, after each call that concerns the folder."""
    disk, epochs, position = Disk(folder), 0, {}

    def absolute(text):  # only TensorFlow gives relative paths, and only while it works in the folder
        return os.path.normpath(os.path.join(folder, text.decode()))

    for name, arguments, result, _ in calls(trace):
        texts = [plain(text) for text, _ in TEXT.findall(arguments)]
        opened = OPENED.match(arguments)
        path = plain(opened[2]).decode() if opened else ''
        if opened and opened[1] == '1' and name == 'write':
            epochs = max([epochs, *map(int, re.findall(rb'^epoch (\d+)/', texts[-1], re.M))])
        elif name == 'lseek' and disk.name(path):
            position[opened[1]] = result
            continue
        elif name in OTHERS:
            assert not any(disk.name(where) for where in (path, *map(absolute, texts))), f'{name} is not replayed'
            continue
        elif name in ('write', 'writev') and disk.name(path) in disk.names:
            content = disk.content[disk.names[disk.name(path)]]
            at = position[opened[1]]
            content[at:at + result] = b''.join(texts)[:result]
            position[opened[1]] = at + result
        elif name in ('open', 'openat', 'creat') and 'O_CREAT' in arguments and disk.name(absolute(texts[0])):
            disk.create(disk.name(absolute(texts[0])), 'O_TRUNC' in arguments)
            position[str(result)] = 0
        elif name.startswith('rename'):
            old, new = (absolute(text) for text in texts)
            if disk.name(old) not in disk.names:
                continue
            disk.change('rename', disk.name(old), disk.name(new))
        elif name.startswith('unlink') and disk.name(absolute(texts[0])) in disk.names:
            disk.change('unlink', disk.name(absolute(texts[0])))
        elif name in ('fsync', 'fdatasync') and (path == disk.folder or disk.name(path)):
            disk.sync(path)
        else:
            continue
        yield disk, epochs


def check(state, epochs, folder):
    """Open the state of a run directory, made in an empty folder; raise AssertionError if something is lost."""
    for name, content in state.items():
        (folder / name).write_bytes(content)
    with contextlib.redirect_stdout(io.StringIO()):
        for _ in range(2):  # before and after a command has tidied up
            found = 0
            if checkpoints.listed(folder, 'last'):
                with contextlib.suppress(checkpoints.TwtaError):
                    found = int(Path(checkpoints.find(folder, 'last')).name.partition('-')[2])
            assert found >= epochs, f'the checkpoint of epoch {found} is found, {epochs} epochs were printed'
            checkpoints.remove_leftovers(folder)
    for path in folder.iterdir():
        if path.name.startswith('.part.'):
            continue
        if path.suffix == '.json':
            json.loads(path.read_text())
        elif path.suffix == '.npz':
            with np.load(path) as file:
                [file[name] for name in file]
        elif path.suffix == '.csv':
            assert path.read_text().endswith('\n')


def run(folder, epochs, every=1, say=print):
    """Record a training of that many epochs in the folder and check each `every`-th call; return calls and states."""
    run_dir = folder / 'run'
    record(run_dir, folder / 'trace', epochs)
    seen, n_calls = set(), 0
    for disk, printed in replay(folder / 'trace', run_dir):
        n_calls += 1
        if n_calls % every:
            continue
        for state in disk.states():
            digests = sorted((name, hashlib.sha1(content).digest()) for name, content in state.items())
            key = hashlib.sha1(repr((digests, printed)).encode()).digest()
            if key in seen:
                continue
            seen.add(key)
            with tempfile.TemporaryDirectory(dir='/dev/shm' if os.path.isdir('/dev/shm') else None) as empty:
                check(state, printed, Path(empty))
        if not n_calls % 100:
            say(f'{n_calls} calls, {len(seen)} states, {printed} epochs printed')
    final = {name: bytes(disk.content[number]) for name, number in disk.names.items()}
    there = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    assert final == there, 'the replay differs from the folder: ' + str(
        [name for name in final.keys() | there.keys() if final.get(name) != there.get(name)])
    assert printed == epochs
    return n_calls, len(seen)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=4, help='epochs of the training (default: 4)')
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        n_calls, states = run(Path(folder), args.epochs)
    print(f'{n_calls} system calls of {args.epochs} epochs: each of {states:,} states after a power cut has the newest '
          f'checkpoint whole; {(time.monotonic() - start) / 60:.0f} minutes')


if __name__ == '__main__':
    main()
