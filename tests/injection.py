"""Let single system calls of a training, an export and a download fail, each in turn, and look at what is left.

    python tests/injection.py              # needs strace (Linux); about half an hour

strace (-e inject) makes the Nth openat, write, fsync, rename or unlink of each thread fail as ERRORS says: "no space
left", "disk quota exceeded", "input/output error", "interrupted". Every N is tried at which the command works
on its own files. A command may fail then, with one line. It may not show a traceback, lose the checkpoint of an earlier
epoch, leave a file half written under its name, or end with exit code 0 without its result.

Each command runs in a fork of this process, which has imported TensorFlow, but opened no session.
"""
import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from conftest import ROOT, load_script, start
from powerloss import OPENED, TEXT, calls, plain

from twta.packed import file_format
from twta.terminal import errors_in_a_line

SCRIPT = 'TWTA_2_2_MNIST'  # the smallest network
COMMANDS = 'train', 'export', 'download'
ERRORS = {'openat': ('ENOSPC', 'EDQUOT', 'EIO', 'EINTR'), 'write': ('ENOSPC', 'EDQUOT', 'EIO', 'EINTR'),
          'fsync': ('ENOSPC', 'EDQUOT', 'EIO', 'EINTR'), 'rename': ('ENOSPC', 'EDQUOT', 'EIO'), 'unlink': ('EIO',)}


def train(folder):
    start(folder / 'run', '--resume', 'True', '--learning_rate', 0.001, '--batch_size', 200, '--epochs', 1,
          script=SCRIPT)


def export(folder):
    start(folder / 'run', '--mode', 'export', '--file', folder / 'network.twta', script=SCRIPT)


def download(folder, url, content):
    from twta.data import download

    download.WAITS = 0,
    download.download([url], folder / 'new' / 'file', len(content), hashlib.sha256(content).hexdigest(), 'wait')


def check_training(folder, succeeded):
    from twta.training import checkpoints

    with contextlib.redirect_stdout(io.StringIO()):
        last = Path(checkpoints.find(folder / 'run', 'last')).name
    assert last in ('last-1', 'last-2'), last
    for path in (folder / 'run').glob('*.json'):
        json.loads(path.read_text())
    if succeeded:
        assert last == 'last-2' and json.loads((folder / 'run' / 'record.json').read_text())['epochs'] == 2


def check_export(folder, succeeded):
    if succeeded or (folder / 'network.twta').exists():
        file_format.read(folder / 'network.twta')


def check_download(folder, succeeded, content):
    if succeeded or (folder / 'new' / 'file').exists():
        assert (folder / 'new' / 'file').read_bytes() == content


def run(command, folder, options):
    """Run a command in a fork under strace with these options; return exit code, stdout and stderr."""
    child = os.fork()
    if not child:
        for number, name in ((1, 'out'), (2, 'err')):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY, 0o666), number)
        sys.stdout, sys.stderr = open(1, 'w'), open(2, 'w')  # noqa: SIM115, the fork ends
        code = 0
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            with errors_in_a_line('command'):
                command(folder)
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 99
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    os.waitpid(child, os.WUNTRACED)
    tracer = subprocess.Popen(['strace', '-f', '-qq', '-p', str(child), *options], stderr=subprocess.DEVNULL)
    status = Path(f'/proc/{child}/status')
    while 'TracerPid:\t0\n' in status.read_text():
        assert tracer.poll() is None, 'strace may not trace here'
        time.sleep(0.002)
    os.kill(child, signal.SIGCONT)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tracer.wait()
    return code, *((folder / name).read_text(errors='replace') for name in ('out', 'err'))


def own_calls(trace, folder):
    """Return the calls of a trace that concern files in the folder, as a sorted list of pairs: name, number N."""
    counts, found = {}, set()
    for name, arguments, _, thread in calls(trace, failed=True):
        counts[thread, name] = counts.get((thread, name), 0) + 1
        opened = OPENED.match(arguments)
        paths = [plain(text) for text, _ in TEXT.findall(arguments)][:2] if name != 'write' else []
        paths.append(plain(opened[2]) if opened else b'')
        is_read = name == 'openat' and 'O_RDONLY' in arguments
        if not is_read and any(str(folder).encode() in path or (not path.startswith(b'/') and path) for path in paths):
            found.add((name, counts[thread, name]))
    return sorted(found)


def inject(command, check, prepared, say=print, only=None, share=(1, 1), names=ERRORS):
    """Run the command with each of its own calls failing; return the number of injections and of exit codes not 0.

    prepared    a folder, copied for each injection
    only        a number: so many of the injections, spread evenly
    share       (k, n): every n-th of these, from the k-th on
    names       of the calls, keys of ERRORS
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / 'f'
        shutil.copytree(prepared, folder)
        trace = Path(scratch) / 'trace'
        code, _, errors = run(command, folder, ['-y', '-xx', '-o', trace, '-e', f'trace={",".join(ERRORS)}'])
        assert code == 0, errors
        check(folder, True)
        tries = [(name, number, error) for name, number in own_calls(trace, folder)
                 for error in ERRORS[name] if name in names]
        tries = tries[::-(-len(tries) // only)] if only else tries
        tries, failed = tries[share[0] - 1::share[1]], 0
        for count, (name, number, error) in enumerate(tries):
            shutil.rmtree(folder)
            shutil.copytree(prepared, folder)
            options = ['-o', '/dev/null', '-e', f'trace={name}', '-e', f'inject={name}:error={error}:when={number}']
            code, _, errors = run(command, folder, options)
            try:
                assert code in (0, 1, 2) and 'Traceback' not in errors and errors.count('\n') <= 1, errors
                assert code == 0 or errors, 'silence'
                check(folder, code == 0)
            except BaseException:
                say(f'{command}: {name} number {number} with {error}, exit {code}')
                raise
            failed += code != 0
            if count % 50 == 49:
                say(f'{count + 1} of {len(tries)} injections, {failed} ended with an error line')
    return len(tries), failed


@contextlib.contextmanager
def prepared_run():
    """Yield a folder with a run of one epoch, trained by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / 'MNIST' / f'{SCRIPT}.py'
        subprocess.run([sys.executable, script, '--dataset', 'digits', '--batch_size', '200', '--learning_rate',
                        '0.001', '--epochs', '1', '--run_dir', f'{folder}/run'], check=True, stdout=subprocess.DEVNULL)
        yield Path(folder)


@contextlib.contextmanager
def server(content):
    """Yield the address of a file with that content on a web server of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 'file').write_bytes(content)
        command = [sys.executable, '-u', '-m', 'http.server', '0', '--bind', '127.0.0.1', '--directory', folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                port = process.stdout.readline().split(' port ')[1].split()[0]
                yield f'http://127.0.0.1:{port}/file'
            finally:  # else the end of this block would wait for the server for ever
                process.kill()


def run_all(only=None, share=(1, 1), names=ERRORS, commands=COMMANDS, say=print):
    """Inject into the commands; return per command: its name, injections, exit codes that are not 0."""
    os.environ.update(TF_NUM_INTRAOP_THREADS='1', TF_NUM_INTEROP_THREADS='1')  # N counts the calls of one thread
    load_script(SCRIPT)
    import twta.data.download
    import twta.export.pack
    import twta.training.evaluation
    import twta.training.experiment  # noqa: F401, the forks need them

    rows, content = [], os.urandom(300_000)
    with prepared_run() as folder:
        for command, check in ((train, check_training), (export, check_export)):
            if command.__name__ in commands:
                rows.append((command.__name__, *inject(command, check, folder, say, only, share, names)))
    if 'download' in commands:
        with server(content) as url, tempfile.TemporaryDirectory() as empty:
            command, check = partial(download, url=url, content=content), partial(check_download, content=content)
            rows.append(('download', *inject(command, check, empty, say, only, share, names)))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', type=int, metavar='N',
                        help='about N injections per command, spread evenly (default: all)')
    parser.add_argument('--share', default='1/1', metavar='K/N',
                        help='the K-th of N shares, for one process per core (default: 1/1)')
    parser.add_argument('--calls', nargs='+', choices=ERRORS, default=list(ERRORS), help='which calls (default: all)')
    parser.add_argument('--commands', nargs='+', choices=COMMANDS, default=COMMANDS, help='which (default: all)')
    args = parser.parse_args()
    begin = time.monotonic()
    for name, tries, failed in run_all(args.only, tuple(map(int, args.share.split('/'))), args.calls, args.commands):
        print(f'{name}: {tries} injections, {failed} ended with one line and an exit code, {tries - failed} did not '
              'matter; nothing was lost')
    print(f'{(time.monotonic() - begin) / 60:.0f} minutes')


if __name__ == '__main__':
    main()
