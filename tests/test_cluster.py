"""Several workers: their addresses, the numbers that they compute, their faults."""
import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys

import cluster_soak
import cluster_steps
import numpy as np
import pytest
from cluster_soak import PATIENCE, Worker, free_addresses, start_all
from conftest import QUICK, ROOT, assert_same, log, start, variables

from twta import UsageError, workers
from twta.graph import preprocessing, server
from twta.graph.tf1 import tf
from twta.training import cluster
from twta.workers import Workers

TWO = ('a:1', 'b:2')


# ----------------------------------------------------------------------------------------------------------------------
# Addresses


def tf_config(jobs=None, **task):
    return json.dumps({'cluster': {'worker': TWO} if jobs is None else jobs, 'task': {'type': 'worker', **task}})


@pytest.mark.parametrize('text, expected', [
    ('', Workers()), ('{}', Workers()), (tf_config(index=1), Workers(TWO, 1)), (tf_config(index='0'), Workers(TWO)),
    (tf_config({'worker': ['a:1']}, index=0), Workers()), (tf_config({'worker': TWO, 'ps': []}, index=0), Workers(TWO))
])
def test_tf_config_is_read(monkeypatch, text, expected):
    monkeypatch.setenv('TF_CONFIG', text)
    assert workers.choose(None, None) == expected
    assert workers.choose(('c:1', 'd:1'), 1) == Workers(('c:1', 'd:1'), 1)  # flags come first


@pytest.mark.parametrize('text, words', [
    ('{', 'not a JSON object'), ('[]', 'not a JSON object'), ('{"cluster": 3}', 'not a JSON object'),
    ('[' * 100_000, 'not a JSON object'), (tf_config(index=2), 'valid are 0 to 1'), (tf_config(), 'task.index'),
    (tf_config(index=-1), 'task.index'), (tf_config(index=True), 'task.index'), (tf_config(type='ps', index=0), "'ps'"),
    (tf_config({'worker': TWO, 'chief': ['c:1']}, index=0), "'chief'"), (tf_config({'worker': 'a:1'}, index=0), 'list'),
    (tf_config({'worker': [1, 2]}, index=0), 'list'), (tf_config({'worker': ['a:1', 'a:1']}, index=0), 'twice'),
    (tf_config({'worker': ['a:1', 'b']}, index=0), "'b' is not HOST:PORT"),
    (tf_config({'worker': TWO, 'evaluator': ['c:1']}, index=0), "'evaluator'")])
def test_a_bad_tf_config_gets_a_line(monkeypatch, text, words):
    monkeypatch.setenv('TF_CONFIG', text)
    with pytest.raises(UsageError, match=r'^TF_CONFIG') as error:
        workers.choose(None, None)
    assert words in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('text', ['', 'a', 'a:', ':1', 'a:0', 'a:65536', 'a:1,', 'a:1,a:1', 'a b:1', 'a:1;b:2', '-a:1'])
def test_bad_addresses(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r'HOST:PORT'):
        workers.addresses(text)


@pytest.mark.parametrize('given, task, words', [(TWO, None, 'go together'), (None, 1, 'go together'),
                                                (TWO, 2, 'valid are 0 to 1')])
def test_flags_that_do_not_fit(given, task, words):
    with pytest.raises(UsageError, match=words):
        workers.choose(given, task)


def test_a_batch_must_divide(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, 'joined', lambda *_: contextlib.nullcontext(cluster.Alone()))
    with pytest.raises(UsageError, match='--batch_size 101: not a multiple of the 2 workers'):
        start(tmp_path / 'run', '--workers', ','.join(TWO), '--task', 0, '--batch_size', 101)
    assert not (tmp_path / 'run').exists()


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize('crop, augmentation', [(24, 'published'), (24, 'geometric'), (0, 'geometric')])
def test_each_image_is_augmented_as_in_the_whole_batch(crop, augmentation):
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)

    def augment(some):
        with tf.Graph().as_default(), tf.Session() as session:
            return session.run(preprocessing.for_training(
                tf.constant(images[some.rows]), crop, 3, 7, augmentation, some))

    whole = augment(Workers())
    for task in range(3):
        some = Workers(('a:1', 'b:1', 'c:1'), task)
        np.testing.assert_array_equal(augment(some), whole[some.rows])


def steps(folder, count, network, batch_norm):
    """Return what cluster_steps.py writes on each worker; check that all workers have the same bits."""
    addresses, files = ','.join(free_addresses(count)), [folder / f'{task}.npz' for task in range(count)]
    environment = {**os.environ, 'TF_NUM_INTRAOP_THREADS': '1', 'TF_NUM_INTEROP_THREADS': '1'}
    processes = [subprocess.Popen([sys.executable, ROOT / 'tests' / 'cluster_steps.py', '--workers', addresses,
                                   '--task', str(task), '--network', network, '--batch_norm', batch_norm, '--file',
                                   files[task]], stdout=subprocess.DEVNULL, env=environment) for task in range(count)]
    assert [process.wait(300) for process in processes] == [0] * count
    found = [dict(np.load(file)) for file in files]
    for name, value in found[0].items():
        for other in found[1:]:
            assert value.tobytes() == other[name].tobytes(), name
    return found[0]


def distance(values, others, names, origin=None):
    """Return the Euclidean distance of variables, by the length of the others, or their distance from an origin."""
    def norm(first, second):
        return sum(np.sum((first[name] - (second[name] if second else 0)) ** 2) for name in names) ** 0.5

    return norm(values, others) / norm(others, origin)


def compare(found, network):
    """Return how far workers are from one process: loss and gradients after a step, largest loss and weights after all.

    The first two and the last one are relative; the weights to the distance that they went.
    """
    losses, (begin, first, last) = cluster_steps.train(network, cluster_steps.STEPS, 'shard')
    for name, value in begin.items():
        np.testing.assert_array_equal(found[f'0 {name}'], value)
    of_first, of_last = ({name: found[f'{moment} {name}'] for name in begin} for moment in (1, 2))
    gradients = [name for name in begin if name.endswith('/Adam:0')]  # after one step, the gradient times a constant
    weights = [name for name in begin if name.endswith('/W:0')]
    off = np.abs(found['losses'] - losses)
    return off[0] / losses[0], distance(of_first, first, gradients), off.max(), distance(of_last, last, weights, begin)


def test_two_workers_compute_what_one_does(tmp_path):
    """Train 20 steps in float32 with --batch_norm global, then with shard, and compare with one process.

    Where the network has kinks (ReLU, thresholds), rounding can move a gradient; then Adam, whose first steps are the
    signs of gradients, makes it grow. The control is one process with the rows of each batch in another order:

                loss, step 1       gradients, step 1    losses, 20 steps    weights, 20 steps
    control     8e-8 to 6e-7       6e-4 to 5e-3         0.007 to 0.034      0.07 to 0.30
    global      2e-7               5e-3                 0.010 to 0.029      0.24
    shard       1.5e-2             0.38                 0.16 to 0.18        0.68
    """
    loss, gradient, largest, weights = compare(steps(tmp_path, 2, 'FP_5_5_MNIST', 'global'), 'FP_5_5_MNIST')
    assert loss < 2e-6 and gradient < 0.02 and largest < 0.08 and weights < 0.5
    loss, gradient, *_ = compare(steps(tmp_path, 2, 'FP_5_5_MNIST', 'shard'), 'FP_5_5_MNIST')
    assert loss > 1e-3 and gradient > 0.1  # the comparison can tell


@pytest.mark.slow
@pytest.mark.parametrize('network, count, most', [('TWTA_3_3_CIFAR10_Group_V2', 2, 1e-3), ('TWTA_5_5_MNIST', 3, 0.4)])
def test_several_workers_of_ternary_networks(tmp_path, network, count, most):
    """Check gradients of grouped convolutions, crops and augmentation; and three workers.

    Gradients after a step, measured: Group_V2 1.5e-5, as no activation crosses a threshold by rounding; TWTA_5_5_MNIST
    0.18, and 1e-3 to 0.07 in one process with the rows in another order. Losses of 20 steps: 0.19, and 0.08 to 0.23.
    """
    loss, gradient, largest, _ = compare(steps(tmp_path, count, network, 'global'), network)
    assert loss < 0.01 and gradient < most and largest < 0.4


# ----------------------------------------------------------------------------------------------------------------------
# Faults


def test_killed_and_stopped_and_resumed_equals_never_stopped(tmp_path):
    """Kill worker 0, then send SIGTERM to worker 1; worker 1 has a folder of its own, in which it writes nothing."""
    flags = *QUICK, '--epochs', 6, '--resume', 'auto'
    addresses, run_dir, other = free_addresses(2), tmp_path / 'run', tmp_path / 'other'

    def both():
        return [Worker(addresses, 0, run_dir, *flags), Worker(addresses, 1, other, *flags)]

    first, second = both()
    first.wait_for('epoch 1/')
    first.process.kill()
    assert second.wait() == 75
    assert 'error: worker 0 has ended' in second.err.read_text() and second.err.read_text().count('\n') == 1
    first, second = both()
    first.wait_for('epoch 3/')
    second.process.send_signal(signal.SIGTERM)
    assert (first.wait(), second.wait()) == (75, 128 + signal.SIGTERM)
    assert first.out.read_text().endswith('go on with the same command\n') and first.err.read_text() == ''
    assert [worker.wait() for worker in both()] == [0, 0]
    assert [worker.wait() for worker in both()] == [0, 0]  # done
    assert not other.exists()
    assert [worker.wait() for worker in start_all(free_addresses(2), tmp_path / 'whole', *flags)] == [0, 0]
    assert_same(variables(run_dir), variables(tmp_path / 'whole'))
    assert (run_dir / 'model.npz').read_bytes() == (tmp_path / 'whole' / 'model.npz').read_bytes()
    assert [int(row['epoch']) for row in log(run_dir)] == [1, 2, 3, 4, 5, 6]
    config = json.loads((run_dir / 'config.json').read_text())['flags']
    assert (config['workers'], config['batch_norm']) == (2, 'shard')
    assert '127.0.0.1' not in (run_dir / 'record.json').read_text()


def test_workers_that_do_not_fit_all_end_with_one_line(tmp_path):
    addresses = free_addresses(2)
    pair = [Worker(addresses, 0, tmp_path / 'run', *QUICK), Worker(addresses, 1, tmp_path / 'run', *QUICK, '--seed', 1)]
    assert [worker.wait() for worker in pair] == [2, 2]
    for worker in pair:
        assert worker.err.read_text().endswith('error: --seed is None on worker 0 and 1 on worker 1; it must be the '
                                               'same on every worker\n')
    assert not (tmp_path / 'run').exists()


def test_a_worker_that_is_alone_waits_no_longer_than_the_patience(tmp_path):
    """Try an address where nobody listens, and a port that is taken."""
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        addresses = [f'127.0.0.1:{taken.getsockname()[1]}', *free_addresses(1)]
        alone = Worker(free_addresses(2), 1, tmp_path / 'alone', *QUICK, '--patience', 2)
        without_port = Worker(addresses, 0, tmp_path / 'port', *QUICK)
        assert (alone.wait(), without_port.wait()) == (75, 2)
    assert 'waiting for worker 0 at 127.0.0.1' in alone.out.read_text()
    assert alone.err.read_text().count('\n') == without_port.err.read_text().count('\n') == 1
    assert 'worker 0 at 127.0.0.1' in alone.err.read_text() and 'Connection refused' in alone.err.read_text()
    assert f'{addresses[0]}: this worker cannot use the port' in without_port.err.read_text()


def test_a_silent_worker_is_named_if_it_has_ended():
    with socket.socket() as listening:
        listening.bind(('127.0.0.1', 0))
        listening.listen()
        there = f'127.0.0.1:{listening.getsockname()[1]}'
        assert cluster.describe_silence(45, Workers((there, *free_addresses(1)), 1)) == (
            'another worker has not answered for 45 seconds')
        assert cluster.describe_silence(45, Workers((there, *free_addresses(1)), 0)) == (
            'worker 1 has ended, or cannot be reached any more')


@pytest.mark.parametrize('names', [['the script'], ['--epochs', 'the SHA-256 of the data'], ['the hash of the code']])
def test_what_differs_is_named(monkeypatch, names):
    ours, theirs = {'--epochs': 3, **dict.fromkeys(names, 'ours')}, {'--epochs': 3, **dict.fromkeys(names, 'theirs')}
    joined = object.__new__(cluster.Cluster)
    joined.workers, left = Workers(TWO, 0), []
    text = json.dumps(theirs).encode().ljust(cluster.FACTS)
    monkeypatch.setattr(joined, 'add_up', lambda rows: np.stack([rows[0], np.frombuffer(text, np.int32)]))
    monkeypatch.setattr(joined, 'leave', lambda: left.append(True))
    with pytest.raises(UsageError, match=f'^{names[0]} is ours on worker 0 and theirs on worker 1'):
        joined.compare(lambda: ours)
    assert left


@pytest.mark.skipif(sys.platform != 'linux', reason='needs filters of the Linux kernel')
def test_only_workers_can_connect():
    with socket.create_server(('', 0), backlog=100) as four, contextlib.ExitStack() as stack:
        listening = {'127.0.0.1': four}
        if socket.has_dualstack_ipv6():
            listening['::1'] = stack.enter_context(socket.create_server(('::1', 0), family=socket.AF_INET6))

        def connects(source, host='127.0.0.1'):
            port = listening[host].getsockname()[1]
            try:
                socket.create_connection((host, port), 1, (source, 0)).close()
            except TimeoutError:
                return False
            return True

        assert connects('127.0.0.1') and connects('127.0.0.9')
        for host, socket_ in listening.items():
            server.admit_only(['127.0.0.1', '127.0.0.2'], socket_.getsockname()[1])
            assert connects('127.0.0.1') and connects('127.0.0.2') and not connects('127.0.0.9')
            if host == '::1':
                assert not connects('::1', '::1')
                server.admit_only(['127.0.0.1', '::1'], socket_.getsockname()[1])
                assert connects('::1', '::1')
        with pytest.raises(OSError, match='no socket of this process'):
            server.admit_only(['127.0.0.1'], int(free_addresses(1)[0].split(':')[1]))


@pytest.mark.slow
def test_killed_again_and_again_equals_never_killed(tmp_path):
    """Five kills, of which the last is a stop; cluster_soak.py does it 20 times."""
    hits, stops, _, slowest = cluster_soak.soak(tmp_path, kills=5, epochs=100, seed=3)
    assert sum(hits) == 5 and stops == 1 and slowest < PATIENCE + 20
