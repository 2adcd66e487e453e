"""Runs that are stopped, killed or refused; checkpoints, weights and losses that are not as they should be."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, ROOT, assert_same, log, start, variables

from twta import TwtaError, UsageError, checkpoints, experiment, records
from twta.tf1 import tf

SCRIPT = ROOT / 'MNIST' / 'TWTA_4_4_MNIST.py'


def stop_in_epoch(monkeypatch, number, signal_number):
    """The signal in that epoch, half-way through its batches."""
    whole = experiment.shuffled_batches

    def batches(n_images, batch_size, seed, epoch):
        for i, batch in enumerate(whole(n_images, batch_size, seed, epoch)):
            if epoch == number and i == 5:
                signal.raise_signal(signal_number)
            yield batch

    monkeypatch.setattr(experiment, 'shuffled_batches', batches)


@pytest.mark.parametrize('epoch, number', [(1, signal.SIGTERM), (3, signal.SIGINT)])
def test_stopped_and_resumed_equals_never_stopped(finished_run, tmp_path, monkeypatch, capsys, epoch, number):
    """The signal lets the step end; the part of the epoch is saved, and the rest follows, bit for bit."""
    before = signal.signal(number, signal.default_int_handler)  # a suite in the background has SIGINT ignored
    with monkeypatch.context() as context, pytest.raises(SystemExit) as stopped:
        stop_in_epoch(context, epoch, number)
        start(tmp_path, *QUICK[2:], '--epochs', 4)
    assert signal.signal(number, before) is signal.default_int_handler  # put back as it was
    assert stopped.value.code == 128 + number
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [f'stopped after 6 steps of epoch {epoch}', 'go on with --resume True and the same flags']
    assert len(log(tmp_path)) == epoch - 1
    start(tmp_path, '--resume', 'True')  # no other flags: the stage's own
    assert_same(variables(tmp_path), variables(finished_run))
    assert [row['epoch'] for row in log(tmp_path)] == ['1', '2', '3', '4']
    assert (tmp_path / 'model.npz').read_bytes() == (finished_run / 'model.npz').read_bytes()


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
    refused('conv1/W:0 is int64, weights are float32', **{'conv1/W:0': np.zeros((5, 5, 1, 32), np.int64)})
    refused('not an npz file', **{'conv1/W:0': np.array([Malicious()], object)})
    assert not os.path.exists('/tmp/twta-malicious-npz-ran')
    for content in (b'', b'PK\x03\x04', b'\x80\x04', (finished_run / 'model.npz').read_bytes()[:-99]):
        path.write_bytes(content)
        with pytest.raises(TwtaError, match='not an npz file'):
            start(tmp_path / 'new', '--mode', 'inference', '--weights', path)
    np.save(tmp_path / 'array.npy', weights['conv1/W:0'])
    with pytest.raises(TwtaError, match='not an npz file'):
        start(tmp_path / 'new', '--mode', 'inference', '--weights', tmp_path / 'array.npy')


def test_checkpoints_that_do_not_fit_are_refused(finished_run, tmp_path):
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

    save(state)  # the right script, but without its weights: as if model() had been edited
    with pytest.raises(TwtaError, match='of another network: classify/W:0 is absent there'):
        start(tmp_path, '--resume', 'True')
    save({**state, 'format': 99})
    with pytest.raises(TwtaError, match='written by a newer version'):
        start(tmp_path, '--resume', 'True')
    for path in tmp_path.glob('last-4.index'):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TwtaError, match='damaged, and no older checkpoint is whole'):
        start(tmp_path, '--resume', 'True')
    (tmp_path / 'checkpoint').write_text('')
    with pytest.raises(TwtaError, match='names no checkpoint'):
        start(tmp_path, '--resume', 'True')


def test_checkpoints_from_before_schedules_and_validation_splits_are_read(finished_run, tmp_path):
    state = checkpoints.read_state(checkpoints.find(finished_run, 'last'), 'TWTA_5_5_MNIST', 'digits')
    old = {key: value for key, value in state.items() if key not in ('validation', 'choices')}
    old.update(format=1, stages=[{key: value for key, value in stage.items()
                                  if key not in ('schedule', 'augmentation', 'protocol')} for stage in state['stages']])
    with tf.Graph().as_default(), tf.Session() as session:
        store = checkpoints.Checkpoints(tmp_path)
        session.run(tf.global_variables_initializer())
        store.save(session, old, is_best=False)
    found = checkpoints.read_state(checkpoints.find(tmp_path, 'last'), 'TWTA_5_5_MNIST', 'digits')
    assert found == {**state, 'choices': {}}


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
    """Of the last two; where neither is whole, one line says so, for training and inference."""
    run_dir = tmp_path / 'run'
    shutil.copytree(finished_run, run_dir)
    assert checkpoints.find(run_dir, 'last').endswith('last-4')
    damage(run_dir / f'last-4.{kind}')
    assert checkpoints.find(run_dir, 'last').endswith('last-3')
    assert f'{run_dir}/last-4: damaged' in capsys.readouterr().out
    damage(run_dir / f'last-3.{kind}')
    for flags in (('--resume', 'True'), ('--mode', 'inference')):
        with pytest.raises(TwtaError, match='damaged, and no older') as error:
            start(run_dir, *flags)
        assert '\n' not in str(error.value)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    start(tmp_path, *QUICK[2:], '--epochs', 1)
    with pytest.raises(TwtaError, match=r'the loss is .* at step \d+ of epoch 2; go on from epoch 1, which is'):
        start(tmp_path, '--resume', 'True', '--learning_rate', 1e38, '--batch_size', 100, '--epochs', 1)
    assert variables(tmp_path)['run_state']['epoch'] == 1 and len(log(tmp_path)) == 1


def test_two_trainings_on_one_run_dir_are_refused(finished_run, tmp_path):
    before = variables(finished_run)
    for flags in ((), ('--resume', 'True')):
        with records.locked(finished_run), pytest.raises(UsageError, match='another training is writing there'):
            start(finished_run, *QUICK[2:], *flags)
    assert_same(variables(finished_run), before)
    assert not (finished_run / 'earlier-1').exists()


def test_a_batch_must_fit_into_the_training_set(tmp_path):
    with pytest.raises(UsageError, match='--batch_size 1201: more than the 1,200 training images'):
        start(tmp_path / 'new', '--batch_size', 1201)
    assert not (tmp_path / 'new').exists()


def test_killed_at_any_moment_and_resumed(tmp_path):
    """Three times SIGKILL, then to the end: every epoch is in the log once, with the numbers of an unkilled run."""
    flags = ('--run_dir', tmp_path, *QUICK, '--epochs', '12')
    for kill_after in (1, 3, 4):  # rows in the log
        resume = (tmp_path / 'checkpoint').exists()
        process = subprocess.Popen([sys.executable, str(SCRIPT), *map(str, flags), '--resume', str(resume)],
                                   stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not (
                (tmp_path / 'log.csv').exists() and len(log(tmp_path)) >= kill_after):
            time.sleep(0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    start(tmp_path, '--resume', 'True', script='TWTA_4_4_MNIST')
    assert [int(row['epoch']) for row in log(tmp_path)] == list(range(1, 13))
    assert not list(tmp_path.glob('*temp*')) and not list(tmp_path.glob('.part*'))
    start(tmp_path / 'unkilled', *QUICK[2:], '--epochs', '12', script='TWTA_4_4_MNIST')
    assert_same(variables(tmp_path), variables(tmp_path / 'unkilled'))


def test_ctrl_c_ends_cleanly(tmp_path):
    process = subprocess.Popen([sys.executable, str(SCRIPT), '--run_dir', str(tmp_path), *QUICK],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               # a shell starts background jobs, this suite perhaps, with SIGINT ignored
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in process.stdout:
        if line.startswith('epoch 2/'):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert 'stopped after' in out and out.endswith('go on with --resume True and the same flags\n') and err == ''
