"""Runs that are stopped, killed or refused; checkpoints, weights and losses that are damaged or do not fit."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import powerloss
import pytest
import soak
from conftest import QUICK, ROOT, assert_same, log, run_script, start, variables

from twta import TwtaError, UsageError, results
from twta.graph.tf1 import tf
from twta.training import checkpoints, experiment, loop, run_directory
from twta.training import state as state_module

SCRIPT = ROOT / 'MNIST' / 'TWTA_4_4_MNIST.py'
SCRIPT_5_5 = ROOT / 'MNIST' / 'TWTA_5_5_MNIST.py'  # finished_run is a run of this script


def in_epoch(monkeypatch, number, act):
    """Make the training call act() in that epoch, after five batches."""
    whole = loop.shuffled_batches

    def batches(n_images, batch_size, seed, epoch):
        for i, batch in enumerate(whole(n_images, batch_size, seed, epoch)):
            if epoch == number and i == 5:
                act()
            yield batch

    monkeypatch.setattr(loop, 'shuffled_batches', batches)


@pytest.mark.parametrize('epoch, number', [(1, signal.SIGTERM), (3, signal.SIGINT)])
def test_stopped_and_resumed_equals_never_stopped(finished_run, tmp_path, monkeypatch, capsys, epoch, number):
    """Check that the step ends, that the partial epoch is saved, and that resuming gives the same bits."""
    before = signal.signal(number, signal.default_int_handler)  # SIGINT is ignored if the suite runs in the background
    with monkeypatch.context() as context, pytest.raises(SystemExit) as stopped:
        in_epoch(context, epoch, lambda: signal.raise_signal(number))
        start(tmp_path, *QUICK[2:], '--epochs', 4)
    assert signal.signal(number, before) is signal.default_int_handler  # the handler is restored
    assert stopped.value.code == 128 + number
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [f'stopped after step 6 of epoch {epoch}', 'go on with --resume True and the same flags']
    assert len(log(tmp_path)) == epoch - 1
    start(tmp_path, '--resume', 'True')  # without flags, the stage keeps its own
    assert_same(variables(tmp_path), variables(finished_run))
    assert [row['epoch'] for row in log(tmp_path)] == ['1', '2', '3', '4']
    assert (tmp_path / 'model.npz').read_bytes() == (finished_run / 'model.npz').read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# Weights and checkpoints


class Malicious:
    def __reduce__(self):
        return os.mkdir, ('/tmp/twta-malicious-npz-ran',)


def test_weights_that_do_not_fit_are_refused(finished_run, tmp_path):
    with np.load(finished_run / 'model.npz') as file:
        weights = dict(file)
    path = tmp_path / 'weights.npz'

    def refused(reason, **changed):
        np.savez(path, **{name: value for name, value in {**weights, **changed}.items() if value is not None})
        with pytest.raises(TwtaError, match=reason) as error:
            start(tmp_path / 'new', '--mode', 'inference', '--weights', path)
        assert str(path) in str(error.value) and '\n' not in str(error.value)
        assert not (tmp_path / 'new').exists()

    refused('conv1/W:0 is absent there', **{'conv1/W:0': None})
    refused('more is .* there and absent here', more=np.zeros(1, np.float32))
    refused(r'conv1/W:0 is \[1\] there and \[5, 5, 1, 32\] here', **{'conv1/W:0': np.zeros(1, np.float32)})
    refused('conv1/W:0 holds NaN', **{'conv1/W:0': np.full((5, 5, 1, 32), np.nan, np.float32)})
    refused('conv1/bn/moving_variance:0 holds .* a negative variance', **{
        'conv1/bn/moving_variance:0': np.full(32, -1, np.float32)})
    refused('conv1/W:0 is int64, weights are float32', **{'conv1/W:0': np.zeros((5, 5, 1, 32), np.int64)})
    refused('conv1/W:0 is object, weights are float32', **{
        'conv1/W:0': np.full((5, 5, 1, 32), Malicious(), object)})
    assert not os.path.exists('/tmp/twta-malicious-npz-ran')
    for content in (b'', b'PK\x03\x04', b'\x80\x04', (finished_run / 'model.npz').read_bytes()[:-99]):
        path.write_bytes(content)
        with pytest.raises(TwtaError, match='not an npz file'):
            start(tmp_path / 'new', '--mode', 'inference', '--weights', path)
    np.save(tmp_path / 'array.npy', weights['conv1/W:0'])
    with pytest.raises(TwtaError, match='not an npz file'):
        start(tmp_path / 'new', '--mode', 'inference', '--weights', tmp_path / 'array.npy')


def test_checkpoints_that_do_not_fit_are_refused(finished_run, tmp_path, monkeypatch):
    with pytest.raises(TwtaError, match='a checkpoint of TWTA_5_5_MNIST on digits, not of TWTA_4_4_MNIST on digits'):
        start(finished_run, '--resume', 'True', script='TWTA_4_4_MNIST')
    with pytest.raises(UsageError, match=r'--seed 7: the run in .* was started with --seed 0'):
        start(finished_run, '--resume', 'True', '--seed', 7)
    state = checkpoints.read_state(checkpoints.find(finished_run, 'last'), 'TWTA_5_5_MNIST', 'digits')

    def save(state):
        with tf.Graph().as_default(), tf.Session() as session:
            store = checkpoints.Checkpoints(tmp_path)
            session.run(tf.global_variables_initializer())
            store.save(session, state, is_best=False)

    save(state)  # the right script without its weights, as if model() had been edited
    with pytest.raises(TwtaError, match='of another network: classify/W:0 is absent there'):
        start(tmp_path, '--resume', 'True')
    for number, age in ((99, 'a newer'), (4, 'an older')):
        with monkeypatch.context() as context:
            context.setattr(state_module, 'FORMAT', number)
            save(state)
        with pytest.raises(TwtaError, match=f'written by {age} version'):
            start(tmp_path, '--resume', 'True')
    for path in tmp_path.glob('last-4.index'):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TwtaError, match='damaged, and no older checkpoint is whole'):
        start(tmp_path, '--resume', 'True')
    (tmp_path / 'checkpoint').write_text('')
    for path in tmp_path.glob('last-*'):
        path.unlink()
    with pytest.raises(TwtaError, match='names no checkpoint'):
        start(tmp_path, '--resume', 'True')


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def replace_by_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = [lambda path: path.write_bytes(path.read_bytes()[:1000]), lambda path: path.write_bytes(b''), flip_a_bit,
           Path.unlink, replace_by_a_folder]


@pytest.mark.parametrize('kind', ['data-00000-of-00001', 'index'])
@pytest.mark.parametrize('damage', DAMAGES)
def test_the_newest_whole_checkpoint_is_used(finished_run, tmp_path, capsys, damage, kind):
    """Damage the last checkpoint, then the one before it: training and inference say so in one line."""
    run_dir = tmp_path / 'run'
    shutil.copytree(finished_run, run_dir)
    assert checkpoints.find(run_dir, 'last').endswith('last-4')
    damage(run_dir / f'last-4.{kind}')
    assert checkpoints.find(run_dir, 'last').endswith('last-3')
    said = capsys.readouterr().out
    assert f'{run_dir}/last-4: damaged' in said and f'{run_dir}/last-3: whole, and used in its place' in said
    damage(run_dir / f'last-3.{kind}')
    for flags in (('--resume', 'True'), ('--mode', 'inference')):
        with pytest.raises(TwtaError, match='damaged, and no older') as error:
            start(run_dir, *flags)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('damage', [lambda path: path.write_text(''), lambda path: path.write_text('garbage {'),
                                    lambda path: path.write_text('model_checkpoint_path: "elsewhere"'),
                                    lambda path: path.write_text(path.read_text().replace('last-4', 'last-6')),
                                    Path.unlink, replace_by_a_folder])
def test_a_damaged_list_of_checkpoints_loses_nothing(finished_run, tmp_path, damage):
    shutil.copytree(finished_run, tmp_path / 'run')
    damage(tmp_path / 'run' / 'checkpoint')
    checkpoints.remove_leftovers(tmp_path / 'run')
    assert (tmp_path / 'run' / 'last-3.index').exists()
    assert checkpoints.find(tmp_path / 'run', 'last').endswith('last-4')


def test_leftovers_of_kills_are_removed_and_other_files_stay(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    before = set(os.listdir(tmp_path))
    for name in ('last-1.index', 'last-1.data-00000-of-00001', 'last-5.data-00000-of-00001.tempstate123',
                 'best-1.index', '.part.7.checkpoint', '.part.7.log.csv', 'last-2.7.index'):
        (tmp_path / name).write_text('')
    others = {'best-model.npz', '.part.film.mp4', '.part.log.csv', 'last-2.index.bak', 'best-2-copy.index', 'mine_temp',
              'checkpoint.txt', 'last-2'}
    for name in others:
        (tmp_path / name).mkdir()
    checkpoints.remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == before | others


def test_a_training_leaves_alone_what_an_evaluation_beside_it_is_writing(tmp_path, monkeypatch):
    """Its checkpoints remove no temporary file; only the start of the next training does."""
    in_epoch(monkeypatch, 1, lambda: (tmp_path / '.part.7.result.json').touch())
    start(tmp_path, *QUICK[2:], '--epochs', 2)
    assert (tmp_path / '.part.7.result.json').exists()
    start(tmp_path, *QUICK[2:], '--epochs', 1, '--resume', 'True')
    assert not (tmp_path / '.part.7.result.json').exists()


# ----------------------------------------------------------------------------------------------------------------------
# Losses, clocks, directories, disks


@pytest.mark.parametrize('saved, message', [
    (None, 'start again with --resume False'),
    ('epoch 1', 'go on from epoch 1, which is saved, with --resume True'),
    ('step 6 of epoch 2', 'go on from step 6 of epoch 2, which is saved, with --resume True')])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, saved, message):
    if saved:
        start(tmp_path, *QUICK[2:], '--epochs', 1)
    flags = '--learning_rate', 1e38, '--batch_size', 100, '--epochs', 1
    if saved == 'step 6 of epoch 2':
        with monkeypatch.context() as context, pytest.raises(SystemExit):
            in_epoch(context, 2, lambda: signal.raise_signal(signal.SIGTERM))
            start(tmp_path, '--resume', 'True', *QUICK[2:], '--epochs', 1)
        flags = ()
        monkeypatch.setattr(loop, 'scheduled_rate', lambda *_: 1e38)
    with pytest.raises(TwtaError, match=rf'^the loss is \S+ at step \d+ of epoch \d; {message}, the other flags as '
                                        'before and a lower --learning_rate$'):
        start(tmp_path, '--resume', str(bool(saved)), *flags)
    if saved:
        assert variables(tmp_path)['run_state']['epoch'] == 1 and len(log(tmp_path)) == 1


def test_weights_that_are_not_finite_are_never_saved(finished_run, tmp_path, monkeypatch):
    """Check the weights themselves: the loss hides them if they are ternary, or if the step was the last one."""
    shutil.copytree(finished_run, tmp_path / 'run')
    before = variables(finished_run)
    monkeypatch.setattr(experiment, 'set_weights',
                        lambda net, weights, session: net.all_params[0].load(np.full((5, 5, 1, 32), np.inf), session))
    monkeypatch.setattr(loop.math, 'isfinite', lambda loss: True)
    with pytest.raises(TwtaError, match=r'^the weights are no longer finite .* from epoch 4, which is saved'):
        start(tmp_path / 'run', '--resume', 'True', '--epochs', 1)
    assert_same(variables(tmp_path / 'run'), before)


def test_a_clock_that_goes_backwards_changes_nothing(finished_run, tmp_path, monkeypatch):
    now = iter(range(2 ** 31, 0, -1000))
    monkeypatch.setattr(time, 'time', lambda: float(next(now)))
    start(tmp_path, *QUICK[2:], '--epochs', 4)
    assert_same(variables(tmp_path), variables(finished_run))
    assert all(float(row['images_per_second']) > 0 for row in log(tmp_path))


def test_a_directory_that_vanishes(tmp_path, monkeypatch):
    run_dir = tmp_path / 'run'
    in_epoch(monkeypatch, 2, lambda: shutil.rmtree(run_dir))
    with pytest.raises(TwtaError, match='the directory has vanished; start again with') as error:
        start(run_dir, *QUICK[2:], '--epochs', 3)
    assert str(run_dir) in str(error.value) and '\n' not in str(error.value)
    assert not run_dir.exists()


def has_namespaces():
    """Return whether this process may mount a small disk in a namespace of its own."""
    return bool(shutil.which('unshare')) and not subprocess.run(
        ['unshare', '-rm', 'mount', '-t', 'tmpfs', 'none', '/mnt'], capture_output=True).returncode


on_a_disk = pytest.mark.skipif(not has_namespaces(), reason='needs Linux and the right to mount (unshare -rm)')


def mounted(folder, commands):
    """Run shell commands that may mount a disk on the folder; return the finished process."""
    return subprocess.run(['unshare', '-rm', 'bash', '-c', commands], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'DISK': str(folder), 'TRAIN': f'{sys.executable} {SCRIPT_5_5}'})


@on_a_disk
@pytest.mark.parametrize('megabytes, epoch', [(20, 1), (25, 2)])  # full at the second checkpoint, or just after it
def test_a_full_disk_stops_and_costs_no_more_than_the_epoch(finished_run, tmp_path, megabytes, epoch):
    (tmp_path / 'disk').mkdir()
    finished = mounted(tmp_path / 'disk', f'''
        mount -t tmpfs -o size={megabytes}m none $DISK
        $TRAIN {" ".join(QUICK)} --epochs 4 --run_dir $DISK/run
        echo exit $?
        mount -o remount,size=100m $DISK
        $TRAIN {" ".join(QUICK)} --epochs 4 --run_dir $DISK/run --resume True
        cp -r $DISK/run {tmp_path}''')
    assert 'exit 1\n' in finished.stdout
    assert finished.stderr.count('\n') == 1 and 'No space left on device' in finished.stderr
    assert f'go on from epoch {epoch}, which is saved' in finished.stderr
    assert_same(variables(tmp_path / 'run'), variables(finished_run))
    assert [row['epoch'] for row in log(tmp_path / 'run')] == ['1', '2', '3', '4']
    assert not [path for path in (tmp_path / 'run').iterdir() if 'temp' in path.name or 'part' in path.name]


@on_a_disk
def test_a_stop_on_a_full_disk_says_what_is_saved(tmp_path):
    """Fill the disk, then send SIGTERM: the message names the last epoch of which a checkpoint is on the disk."""
    (tmp_path / 'disk').mkdir()
    finished = mounted(tmp_path / 'disk', f'''
        mount -t tmpfs -o size=40m none $DISK
        $TRAIN {" ".join(QUICK)} --epochs 400 --run_dir $DISK/run >{tmp_path}/out &
        until grep -qs "^epoch 1/" {tmp_path}/out; do sleep 0.1; done
        kill -STOP $!
        cat /dev/zero >$DISK/other 2>/dev/null
        kill -CONT $!
        kill -TERM $!
        wait $!
        echo exit $?
        ls $DISK/run''')
    saved = max(int(epoch) for epoch in re.findall(r'^last-(\d+)\.index$', finished.stdout, re.MULTILINE))
    assert 'exit 1\n' in finished.stdout and f'go on from epoch {saved}, which is saved' in finished.stderr
    assert finished.stderr.count('\n') == 1 and 'No space left on device' in finished.stderr


@on_a_disk
@pytest.mark.parametrize('flags, named', [('--run_dir $DISK/run', '--run_dir'), ('--run_dir $DISK', '--run_dir'),
                                          ('--mode export --file $DISK/network.twta', '--file')])
def test_a_read_only_directory_is_refused_at_once(tmp_path, flags, named):
    finished = mounted(tmp_path, f'mount -t tmpfs -o ro none $DISK; $TRAIN --dataset digits {flags}')
    assert finished.returncode == 2 and finished.stdout == '' and finished.stderr.count('\n') == 1
    assert f'{named} {tmp_path}' in finished.stderr
    assert f'{tmp_path} is not a directory that can be written to' in finished.stderr


def test_two_trainings_on_one_run_dir_are_refused(finished_run, tmp_path):
    before = variables(finished_run)
    for flags in ((), ('--resume', 'True')):
        with run_directory.locked(finished_run), pytest.raises(UsageError, match='another training is writing there'):
            start(finished_run, *QUICK[2:], *flags)
    assert_same(variables(finished_run), before)
    assert not (finished_run / 'earlier-1').exists()


def test_a_run_is_read_only_once_it_is_locked(finished_run, monkeypatch):
    """Check the order: otherwise another training could end in between, and its epochs would be lost."""
    monkeypatch.setattr(checkpoints, 'read_state', lambda *_: pytest.fail('read without the lock'))
    with run_directory.locked(finished_run), pytest.raises(UsageError, match='another training is writing there'):
        start(finished_run, '--resume', 'True')


def test_a_batch_must_fit_into_the_training_set(tmp_path):
    with pytest.raises(UsageError, match='--batch_size 1201: more than the 1,200 training images'):
        start(tmp_path / 'new', '--batch_size', 1201)
    assert not (tmp_path / 'new').exists()


def fail(*arguments):
    raise RuntimeError('latex was not able to\nprocess')


def test_a_picture_that_cannot_be_drawn_costs_no_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_directory, 'draw_curve', fail)
    monkeypatch.setattr(results, 'draw_confusion', fail)
    start(tmp_path / 'run', *QUICK, '--epochs', 1)
    lines = capsys.readouterr().out.splitlines()
    for name in ('curve', 'confusion'):
        assert f'no picture {tmp_path / "run" / name}.png: latex was not able to process' in lines
    assert {path.name for path in (tmp_path / 'run').iterdir()} > {'record.json', 'result.json', 'log.csv', 'model.npz'}
    assert not list((tmp_path / 'run').glob('*.png'))


@pytest.mark.parametrize('method', ['__init__', 'write', 'flush'])
def test_events_that_cannot_be_written_cost_no_result(tmp_path, monkeypatch, capsys, method):
    """Let TensorBoard's file fail at its start, or in between: one line, and the training goes on."""
    def fail(*arguments):
        raise tf.errors.ResourceExhaustedError(None, None, 'No space left\non device')

    monkeypatch.setattr(tf.python_io.TFRecordWriter, method, fail)
    start(tmp_path, *QUICK[2:], '--epochs', 2)
    said = capsys.readouterr()
    assert said.out.count('no TensorBoard events from here on: No space left on device') == 1 and said.err == ''
    assert (tmp_path / 'record.json').exists()


def test_labels_of_logarithmic_axes_are_plain(tmp_path):
    row = {'training_accuracy': 0.5, 'validation_accuracy': None}
    history = [{**row, 'epoch': epoch, 'loss': loss} for epoch, loss in ((1, 30.0), (2, 0.02))]
    figures = []

    def draw(*arguments):
        figures.append(run_directory.draw_curve(*arguments))
        return figures[0]

    assert results.save_picture(tmp_path / 'curve.png', draw, 'title', history)
    axes = figures[0].axes[0]
    labels = [label.get_text() for label in axes.yaxis.get_ticklabels()]
    assert axes.get_yscale() == 'log' and '0.1' in labels and not any('$' in label for label in labels)


@pytest.mark.parametrize('settings', [
    {'MPLBACKEND': 'module://matplotlib_inline.backend_inline'}, {'MPLBACKEND': 'of this name there is none'},
    {'MATPLOTLIBRC': 'text.usetex: True\n'}])
def test_settings_of_matplotlib_do_not_matter(finished_run, tmp_path, settings):
    """Try the settings of a notebook, of a broken profile and of LaTeX, and a name that mathtext would parse."""
    run_dir = tmp_path / 'net_$SEED_$LR'
    shutil.copytree(finished_run, run_dir)
    for path in run_dir.glob('*.png'):
        path.unlink()
    if 'MATPLOTLIBRC' in settings:
        (tmp_path / 'matplotlibrc').write_text(settings['MATPLOTLIBRC'])
        settings = {'MATPLOTLIBRC': str(tmp_path / 'matplotlibrc')}
    finished = run_script(SCRIPT_5_5, *QUICK[:2], '--mode', 'inference', '--weights', run_dir / 'model.npz',
                          '--run_dir', run_dir, **settings)
    assert finished.returncode == 0, finished.stderr
    assert 'test acc: ' in finished.stdout and 'Traceback' not in finished.stderr
    assert (run_dir / 'result-weights.json').exists()
    assert (run_dir / 'confusion-weights.png').exists() != ('no picture' in finished.stdout)


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed_on_one_core(tmp_path):
    """Send SIGKILL at a random moment and in the middle of a write, with --deterministic; soak.py does it 50 times."""
    hits, in_writes = soak.soak(tmp_path, kills=2, epochs=12, seed=5)
    assert hits == 2 and in_writes


def can_trace():
    """Return whether strace is there and may trace a process."""
    return bool(shutil.which('strace')) and not subprocess.run(['strace', '-o', '/dev/null', 'true'],
                                                               capture_output=True).returncode


traced = pytest.mark.skipif(not can_trace(), reason='needs strace, and the right to trace (Linux)')


@traced
def test_after_a_power_cut_the_newest_checkpoint_is_whole(tmp_path):
    """Look at each seventh system call of two epochs; powerloss.py looks at all of four."""
    n_calls, states = powerloss.run(tmp_path, epochs=2, every=7, say=lambda line: None)
    assert n_calls > 200 and states > 50


@traced
@pytest.mark.slow
def test_a_system_call_that_fails_loses_nothing(tmp_path):
    """Let some calls of a training, an export and a download fail; injection.py takes all."""
    finished = subprocess.run([sys.executable, ROOT / 'tests' / 'injection.py', '--only', '8'], capture_output=True,
                              text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count('nothing was lost') == 3


def test_ctrl_c_ends_cleanly(tmp_path):
    process = subprocess.Popen([sys.executable, str(SCRIPT), '--run_dir', str(tmp_path), *QUICK],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               # a shell starts background jobs with SIGINT ignored; this suite may be one
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in process.stdout:
        if line.startswith('epoch 2/'):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert 'stopped after' in out and out.endswith('go on with --resume True and the same flags\n') and err == ''
