"""Situations from users' bug reports: odd names, streams that are closed, schedulers, folders with other files."""
import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import NETWORKS, QUICK, ROOT, assert_same, log, random_images, random_packed, run_script, start, variables
from PIL import Image
from test_faults import SCRIPT, SCRIPT_5_5, in_epoch

from twta import TwtaError, UsageError, files, results, terminal
from twta.packed import cost, numpy_engine
from twta.training import checkpoints, evaluation, run_directory

# ----------------------------------------------------------------------------------------------------------------------
# Names and folders


@pytest.mark.parametrize('name', ['lr[1e-3]', 'a*b?', 'back\\slash', '~', 'Прогон 跑 %d $HOME'])
def test_any_name_of_a_run_directory_works(finished_run, tmp_path, name):
    """Train two epochs, resume for the third, evaluate; a neighbour that the name matches as a pattern stays."""
    neighbour = tmp_path / 'lr1' / 'last-1.index'
    neighbour.parent.mkdir()
    neighbour.write_text('mine')
    run_dir = tmp_path / name
    start(run_dir, *QUICK[2:], '--epochs', 2)
    start(run_dir, *QUICK[2:], '--epochs', 1, '--resume', 'True')
    start(run_dir, '--mode', 'inference')
    assert len(log(run_dir)) == 3 and neighbour.read_text() == 'mine'
    assert sorted(path.name for path in run_dir.glob('last-*.index')) == ['last-2.index', 'last-3.index']


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert terminal.path('~/runs') == tmp_path / 'runs' and terminal.output_file('~/x.png') == tmp_path / 'x.png'
    assert terminal.path('./~') == Path('~')
    with pytest.raises(terminal.argparse.ArgumentTypeError, match='not a usable path'):
        terminal.path('~nobody-of-this-name/runs')


def test_links_in_a_circle_are_refused(tmp_path):
    os.symlink(tmp_path / 'a', tmp_path / 'b')
    os.symlink(tmp_path / 'b', tmp_path / 'a')
    with pytest.raises((UsageError, SystemExit, TwtaError)) as error:
        start(tmp_path / 'a', *QUICK[2:])
    assert '\n' not in str(error.value)


THEIRS = {'checkpoints/epoch1.pt': 'theirs', 'best-model.pt': 'theirs', '.part.film.mp4': 'theirs', 'lasting.txt': 'x'}


def test_files_of_others_in_the_run_directory_stay(tmp_path):
    for name, text in THEIRS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for _ in range(2):  # the second run moves the first one aside
        start(tmp_path, *QUICK[2:], '--epochs', 1)
    assert {name: (tmp_path / name).read_text() for name in THEIRS} == THEIRS
    assert (tmp_path / 'earlier-1' / 'last-1.index').exists()


@pytest.mark.parametrize('name', ['config.json', 'log.csv', 'model.npz', 'checkpoint'])
def test_a_folder_whose_files_would_be_replaced_is_refused(tmp_path, name):
    (tmp_path / name).write_text('{"theirs": 1}')
    for resume in 'False', 'auto':
        with pytest.raises(UsageError, match=f'{name} there is not of a run; choose an empty or a new folder'):
            start(tmp_path, *QUICK[2:], '--epochs', 1, '--resume', resume)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == '{"theirs": 1}'


def test_the_lock_of_another_program_is_no_sign_of_a_run(tmp_path):
    (tmp_path / 'config.json').write_text('{"theirs": 1}')
    (tmp_path / 'lock').write_text('4711')
    with pytest.raises(UsageError, match='not of a run'):
        run_directory.check_is_ours(tmp_path)
    (tmp_path / 'lock').write_text('')
    run_directory.check_is_ours(tmp_path)


def test_lists_of_numbers_are_in_a_line_and_texts_stay(tmp_path):
    record = {'path': 'a [1   2] "b   [3,   4]"\\', 'numbers': [1, -2.5e-7, None], 'rows': [[1, 2], [3, 4]]}
    results.write_json(tmp_path / 'x.json', record)
    text = (tmp_path / 'x.json').read_text()
    assert json.loads(text) == record
    assert '"numbers": [ 1, -2.5e-07, null ]\n' in text.replace('],', ']') and '[ 3, 4 ]\n' in text


def test_two_that_write_one_file_use_two_temporary_files(tmp_path, monkeypatch):
    (tmp_path / '.part.x.json').write_text('theirs')
    for process in (1, 2):
        monkeypatch.setattr(os, 'getpid', lambda process=process: process)
        with files.replacing(tmp_path / 'x.json') as part:
            assert part.name == f'.part.{process}.x.json'
            part.write_text(str(process))
    assert (tmp_path / 'x.json').read_text() == '2' and (tmp_path / '.part.x.json').read_text() == 'theirs'


def test_the_record_does_not_depend_on_result_json(tmp_path):
    (tmp_path / 'result.json').mkdir()
    (tmp_path / 'lock').touch()
    start(tmp_path, *QUICK[2:], '--epochs', 1)
    (tmp_path / 'record.json').unlink()
    (tmp_path / 'result.json').unlink()
    (tmp_path / 'result.json').mkdir()
    with pytest.raises(TwtaError, match='Is a directory'):
        start(tmp_path, *QUICK[2:], '--epochs', 1, '--resume', 'auto')
    assert json.loads((tmp_path / 'record.json').read_text())['epochs'] == 1


def test_a_folder_with_an_earlier_inference_is_not_refused(tmp_path):
    results.write_json(tmp_path / 'result-packed.json', {'script': 'TWTA_5_5_MNIST'})
    run_directory.check_is_ours(tmp_path)
    run_directory.check_is_ours(tmp_path / 'absent')


unprivileged = pytest.mark.skipif(os.name != 'posix' or (os.geteuid() == 0 and not shutil.which('setpriv')),
                                  reason='needs a user without rights (setpriv)')


def as_nobody(*command, **how):
    """Run a command as a user without rights; return the finished process."""
    drop = ['setpriv', '--reuid', '65534', '--clear-groups'] if os.geteuid() == 0 else []
    return subprocess.run([*drop, *map(str, command)], capture_output=True, text=True, **how)


def test_a_run_is_evaluated_beside_its_training(finished_run, tmp_path, monkeypatch, capsys):
    """While the graph is built, the training replaces the checkpoint that was found."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    build = evaluation.build_graph

    def build_late(*arguments, **named):
        monkeypatch.setattr(evaluation, 'build_graph', build)
        start(tmp_path, '--resume', 'True', '--epochs', 2)
        return build(*arguments, **named)

    monkeypatch.setattr(evaluation, 'build_graph', build_late)
    start(tmp_path, '--mode', 'inference')
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith('test acc: ')]
    assert len(said) == 2 and said[0] == said[1]
    assert json.loads((tmp_path / 'result.json').read_text())['epoch'] == 6


@unprivileged
def test_the_run_of_a_colleague_can_be_evaluated(finished_run, tmp_path):
    """Evaluate a run in a folder without write permission: accuracy, one line, exit code 0."""
    shutil.copytree(finished_run, tmp_path / 'run')
    for path in (tmp_path / 'run', *(tmp_path / 'run').iterdir()):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    finished = as_nobody(sys.executable, SCRIPT_5_5, '--dataset', 'digits', '--mode', 'inference', '--run_dir',
                         tmp_path / 'run', env={**os.environ, 'HOME': '/tmp'})
    assert finished.returncode == 0 and finished.stderr == ''
    assert 'test acc: ' in finished.stdout
    assert f'not saved: {tmp_path / "run" / "result.json"}: Permission denied' in finished.stdout


@pytest.mark.parametrize('number', [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_costs_that_may_not_be_saved_have_been_printed(tmp_path, monkeypatch, capsys, number):
    packed = random_packed(*NETWORKS['dense'])
    images = random_images(packed, 3)
    dataset = SimpleNamespace(test=SimpleNamespace(images=images), title='the sample')
    monkeypatch.setattr(results, 'write_csv', lambda path, *_: fail(number, path))
    with contextlib.nullcontext() if number != errno.ENOSPC else pytest.raises(OSError, match='No space left'):
        cost.report(numpy_engine.NumpyEngine(packed), dataset, tmp_path)
    said = capsys.readouterr().out
    assert 'in all' in said and ('not saved: ' in said) == (number != errno.ENOSPC)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('number', [errno.EACCES, errno.EROFS])
def test_costs_whose_folder_may_not_be_made_have_been_printed(tmp_path, monkeypatch, capsys, number):
    packed = random_packed(*NETWORKS['dense'])
    dataset = SimpleNamespace(test=SimpleNamespace(images=random_images(packed, 3)), title='the sample')
    monkeypatch.setattr(cost, 'make_folder', lambda path: fail(number, path))
    cost.report(numpy_engine.NumpyEngine(packed), dataset, tmp_path / 'run')
    said = capsys.readouterr().out
    assert 'in all' in said and 'not saved: ' in said


def fail(number, path):
    raise OSError(number, os.strerror(number), str(path))


@unprivileged
def test_a_folder_that_can_be_written_to_but_not_read(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    drop = tmp_path / 'drop'
    drop.mkdir()
    drop.chmod(0o1733)
    finished = as_nobody(sys.executable, SCRIPT, *QUICK, '--epochs', 1, '--run_dir', drop / 'run',
                         env={**os.environ, 'HOME': '/tmp'})
    assert finished.returncode == 0 and finished.stderr == ''
    assert (drop / 'run' / 'record.json').exists()


@pytest.mark.parametrize('name, words', [('fifo.png', 'not a file path'), ('in.png', 'this file is read'),
                                         ('n.twta', 'ends in .png'), ('out.jpg', 'ends in .png')])
def test_a_picture_replaces_nothing_that_is_needed(tmp_path, name, words):
    shutil.copy(ROOT / 'pretrained' / 'TWTA_2_2_MNIST.twta', tmp_path / 'n.twta')
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / 'in.png')
    os.mkfifo(tmp_path / 'fifo.png')
    before = (tmp_path / 'n.twta').read_bytes(), (tmp_path / 'in.png').read_bytes()
    finished = run_packed(tmp_path, 'n.twta', 'in.png', '--picture', name)
    assert finished.returncode == 2 and words in finished.stderr and finished.stderr.count('\n') == 1
    assert ((tmp_path / 'n.twta').read_bytes(), (tmp_path / 'in.png').read_bytes()) == before
    assert (tmp_path / 'fifo.png').is_fifo()


def test_a_picture_that_cannot_be_written_is_told_on_stderr(tmp_path):
    shutil.copy(ROOT / 'pretrained' / 'TWTA_2_2_MNIST.twta', tmp_path / 'n.twta')
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / 'in\nput.png')
    (tmp_path / 'matplotlib.py').write_text('raise ImportError("broken")')
    finished = run_packed(tmp_path, 'n.twta', 'in\nput.png', '--picture', 'out.png', PYTHONPATH=f'{tmp_path}:{ROOT}')
    assert finished.returncode == 0 and finished.stdout.count('\n') == 1 and finished.stdout.startswith('in put.png: ')
    assert f'no picture {tmp_path}/out.png: broken' in finished.stderr


def run_packed(folder, *arguments, **environment):
    """Run python -m twta.packed in a folder with the numpy engine; return the finished process."""
    return subprocess.run([sys.executable, '-m', 'twta.packed', *arguments, '--engine', 'numpy'], cwd=folder,
                          capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT), **environment})


@pytest.mark.parametrize('settings', [{'NUMBA_NUM_THREADS': '0'}, {'NUMBA_THREADING_LAYER': 'nonsense'}])
def test_settings_of_numba_that_it_refuses(tmp_path, settings):
    np.save(tmp_path / 'x.npy', np.zeros((2, 28, 28), np.uint8))
    command = [sys.executable, '-m', 'twta.packed', ROOT / 'pretrained' / 'TWTA_2_2_MNIST.twta', tmp_path / 'x.npy']
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **settings})
    assert finished.returncode == 0 and len(finished.stdout.split()) == 2
    assert 'numba, which is much faster, cannot be used: ' in finished.stderr and 'Traceback' not in finished.stderr


def test_a_working_folder_that_is_gone(tmp_path):
    (tmp_path / 'gone').mkdir()
    finished = shell(f'rmdir {tmp_path}/gone; $TRAIN --mode export; $TRAIN', tmp_path / 'gone', tmp_path / 'run')
    assert 'Traceback' not in finished.stderr and finished.stderr.count('\n') <= 1
    assert (tmp_path / 'run' / 'record.json').exists()


# ----------------------------------------------------------------------------------------------------------------------
# Streams


def shell(command, tmp_path, run_dir=None, **environment):
    """Run a shell command in a folder; in it, $TRAIN trains two epochs of the digits in tmp_path/run, or run_dir."""
    train = f'{sys.executable} {SCRIPT} {" ".join(QUICK)} --epochs 2 --run_dir {run_dir or tmp_path / "run"}'
    return subprocess.run(['bash', '-c', command], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'TRAIN': train, **environment})


@pytest.mark.parametrize('command', ['$TRAIN >&-', '$TRAIN 2>&-', '$TRAIN >&- 2>&- <&-', '$TRAIN > /dev/full',
                                     'set -o pipefail; $TRAIN | head -2'])
def test_a_training_outlives_its_streams(tmp_path, command):
    finished = shell(command, tmp_path)
    assert finished.returncode == 0 and 'Traceback' not in finished.stderr
    assert (tmp_path / 'run' / 'record.json').exists() and len(log(tmp_path / 'run')) == 2
    assert checkpoints.find(tmp_path / 'run', 'last').endswith('last-2')


def test_messages_are_never_among_the_results(tmp_path):
    np.save(tmp_path / 'x.npy', np.zeros((3, 28, 28), np.uint8))
    finished = shell(f'{sys.executable} -m twta.packed {ROOT}/pretrained/TWTA_4_4_MNIST.twta x.npy --engine numpy 2>&-',
                     tmp_path, PYTHONPATH=str(ROOT))
    assert finished.returncode == 0 and len(finished.stdout.split()) == 3


@pytest.mark.parametrize('settings', [{'PYTHONIOENCODING': 'ascii'}, {'LC_ALL': 'C', 'PYTHONUTF8': '0',
                                                                      'PYTHONCOERCECLOCALE': '0'}])
def test_an_encoding_without_the_characters_of_a_path(tmp_path, settings):
    """A name in Cyrillic letters is written with escapes, or refused in one line."""
    finished = shell('$TRAIN/Прогон', tmp_path, **settings)
    refused = finished.returncode == 2 and finished.stderr.count('\n') == 1
    assert 'Traceback' not in finished.stderr and (refused or not finished.returncode)
    assert refused or (tmp_path / 'run' / 'Прогон' / 'record.json').exists()


def test_a_page_in_an_encoding_without_its_characters(tmp_path):
    finished = shell(f'{sys.executable} -m twta.export {ROOT}/pretrained/TWTA_2_2_MNIST.twta --format html', tmp_path,
                     LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', PYTHONPATH=str(ROOT))
    assert finished.returncode == 0, finished.stderr
    assert '\N{MULTIPLICATION SIGN}' in (tmp_path / 'TWTA_2_2_MNIST.html').read_text(encoding='utf-8')


def test_a_terminal_that_is_closed(tmp_path):
    """Close the terminal of a training: it saves, and nothing is lost."""
    import pty

    process, terminal_of_it = pty.fork()
    if not process:
        command = [sys.executable, str(SCRIPT), *QUICK, '--epochs', '4000', '--run_dir', f'{tmp_path}/run']
        os.execv(sys.executable, command)
    seen = b''
    while b'epoch 2/4000' not in seen:
        seen += os.read(terminal_of_it, 1000)
    os.close(terminal_of_it)  # the kernel sends SIGHUP
    deadline = time.monotonic() + 60
    while not (ended := os.waitpid(process, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.1)
    if not ended[0]:
        os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(ended[1]) == 128 + signal.SIGHUP
    state = variables(tmp_path / 'run')['run_state']
    assert state['epoch'] >= 2 and (state['part'] or state['epoch'] == len(log(tmp_path / 'run')))


# ----------------------------------------------------------------------------------------------------------------------
# Schedulers


@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGUSR1])
def test_one_command_to_repeat(finished_run, tmp_path, monkeypatch, capsys, number):
    """Preempt a training of --resume auto, repeat the command, repeat it once more: as if it had never stopped."""
    command = *QUICK[2:], '--epochs', 4, '--resume', 'auto'
    with monkeypatch.context() as context, pytest.raises(SystemExit) as stopped:
        in_epoch(context, 3, lambda: signal.raise_signal(number))
        start(tmp_path, *command)
    assert stopped.value.code == 128 + number
    assert capsys.readouterr().out.splitlines()[-1] == 'go on with the same command'
    start(tmp_path, '--mode', 'inference')
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['epoch'] == 2 and result['part_steps'] > 0
    start(tmp_path, *command)
    assert_same(variables(tmp_path), variables(finished_run))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    start(tmp_path, *command)
    assert capsys.readouterr().out.splitlines()[-1].startswith('the 4 epochs are done, and ')
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    with pytest.raises(UsageError, match=r'--learning_rate 0.5: --resume auto repeats .* has --learning_rate 0.001'):
        start(tmp_path, *command, '--learning_rate', 0.5)


def test_auto_begins_with_weights_and_goes_on_without(finished_run, tmp_path):
    command = *QUICK[2:], '--epochs', 1, '--resume', 'auto', '--weights', finished_run / 'model.npz'
    for _ in range(2):
        start(tmp_path, *command)
    assert variables(tmp_path)['run_state']['weights'] == str(finished_run / 'model.npz')
    with pytest.raises(UsageError, match=r'--weights .*: --resume auto repeats .* began with .*model.npz; leave'):
        start(tmp_path, *command[:-1], tmp_path / 'model.npz')
    assert not (tmp_path / 'earlier-1').exists() and len(log(tmp_path)) == 1
    start(tmp_path, *QUICK[2:], '--epochs', 1, '--weights', tmp_path / 'model.npz')  # they are moved aside
    assert variables(tmp_path)['run_state']['weights'] == str(tmp_path / 'earlier-1' / 'model.npz')


def test_a_run_begun_meanwhile_is_not_moved_aside(finished_run, tmp_path, monkeypatch):
    """Let another command begin the run between the look for a checkpoint and the lock."""
    import twta.command_line as command_line

    shutil.copytree(finished_run, tmp_path / 'run')
    monkeypatch.setattr(command_line, 'has_checkpoint', lambda run_dir: False)
    with pytest.raises(UsageError, match='another command has begun this run meanwhile; repeat the command'):
        start(tmp_path / 'run', *QUICK[2:], '--epochs', 4, '--resume', 'auto')
    assert (tmp_path / 'run' / 'last-4.index').exists()


# ----------------------------------------------------------------------------------------------------------------------
# File systems, Python


@pytest.mark.parametrize('number', [*files.WITHOUT_LOCKS, files.errno.EIO])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, 'flock', flock)
    if number == files.errno.EIO:
        with pytest.raises(OSError, match='Input/output error'), files.holding(tmp_path / 'lock', None):
            pass
        return
    with files.holding(tmp_path / 'lock', None):
        assert f'WARNING: {tmp_path}: its file system has no locks' in capsys.readouterr().out


@pytest.mark.parametrize('flags', [('-O',), ('-OO',)])
def test_python_without_docstrings(tmp_path, flags):
    np.save(tmp_path / 'x.npy', np.zeros((2, 28, 28), np.uint8))
    commands = [['-m', 'twta.packed', ROOT / 'pretrained/TWTA_4_4_MNIST.twta', tmp_path / 'x.npy', '--engine', 'numpy'],
                [SCRIPT, *QUICK, '--epochs', '1', '--run_dir', tmp_path / 'run'],
                ['-m', 'twta.report', '--help'], [ROOT / 'MNIST' / 'Spiking_MNIST.py', '--help']]
    for command in commands:
        command = [sys.executable, *flags, *map(str, command)]
        finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert finished.returncode == 0 and 'Traceback' not in finished.stderr, finished.stderr


@pytest.mark.slow
def test_the_package_alone_runs_packed_networks(tmp_path):
    """Build a wheel, install it into an empty environment, classify a picture's pixels."""
    def run(*command):
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, timeout=600,
                              env={name: value for name, value in os.environ.items() if name != 'PYTHONPATH'})

    (tmp_path / 'clone').mkdir()
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, tmp_path / 'clone')
    shutil.copytree(ROOT / 'twta', tmp_path / 'clone' / 'twta')
    built = run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '-w', tmp_path, tmp_path / 'clone')
    if 'connection' in built.stderr.lower():
        pytest.skip('needs a package index')
    assert built.returncode == 0, built.stderr
    run(sys.executable, '-m', 'venv', tmp_path / 'empty')
    python = tmp_path / 'empty' / 'bin' / 'python'
    installed = run(python, '-m', 'pip', 'install', *tmp_path.glob('twta-*.whl'))
    assert installed.returncode == 0, installed.stderr
    np.save(tmp_path / 'x.npy', np.zeros((2, 28, 28), np.uint8))
    finished = run(python, '-m', 'twta.packed', ROOT / 'pretrained' / 'TWTA_4_4_MNIST.twta', 'x.npy')
    assert finished.returncode == 0 and len(finished.stdout.split()) == 2, finished.stderr
    packages = json.loads(run(python, '-m', 'pip', 'list', '--format', 'json').stdout)
    assert {package['name'] for package in packages} <= {'numpy', 'twta', 'pip', 'setuptools'}


def test_a_script_that_is_called_by_a_link(tmp_path):
    """The root is that of the script itself, not of a link to it."""
    os.symlink(SCRIPT, tmp_path / 'train.py')
    finished = run_script(tmp_path / 'train.py', '--help', cwd=tmp_path)
    assert finished.returncode == 0 and 'TWTA_4_4_MNIST' in finished.stdout
