import csv
import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem: path for family in ('CIFAR10', 'MNIST') for path in sorted((ROOT / family).glob('*.py'))
           if not path.stem.startswith('Spiking')}
MNIST_SCRIPTS = [name for name, path in SCRIPTS.items() if path.parent.name == 'MNIST']


def load_script(name):
    """A script as a module, by its name, or by its path if it is none of ours."""
    path = SCRIPTS.get(name, name)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chosen(module, **choices):
    """The arguments of a script's model() beside x and is_train, the defaults where not given."""
    from twta import options

    return options.complete({**dict.fromkeys(module.CHOICES), **choices})


def image_shape(name):
    """Of the images as the network of a script sees them."""
    return (28, 28, 1) if name in MNIST_SCRIPTS else (24, 24, 3)


def start(run_dir, *flags, script='TWTA_5_5_MNIST'):
    """What a script does after its imports, in this process, on the embedded sample of its family."""
    from twta import command_line

    module = load_script(script)
    defaults = command_line.protocol(module.LEARNING_RATE, module.EPOCHS, module.BATCH_SIZE)
    argv = ['--run_dir', run_dir, '--dataset', module.DATASETS[1], *flags]
    path = SCRIPTS.get(script, script)
    args = command_line.parse(path, '', module.DATASETS, defaults, module.CHOICES, list(map(str, argv)))
    command_line.execute(path.stem, module.model, args, defaults)


def loss_and_gradients(name, images, labels, precision):
    """Initial values by trainable variable, the loss of the first training step, its gradients."""
    from twta.graph.build import build_graph
    from twta.graph.session import open_session
    from twta.graph.tf1 import tf

    script = load_script(name)
    crop = 0 if name in MNIST_SCRIPTS else 24
    network = build_graph(partial(script.model, **chosen(script)), images.shape[1:], crop, 0, precision)
    with network.graph.as_default(), open_session(network.graph, 0) as session:
        session.run(tf.global_variables_initializer())
        trained = tf.trainable_variables()
        wanted = [trained, network.training.loss, tf.gradients(network.training.loss, trained)]
        values, loss, gradients = session.run(wanted, {network.images: images, network.labels: labels, network.step: 0})
        names = [variable.name for variable in trained]
        return dict(zip(names, values, strict=True)), loss, dict(zip(names, gradients, strict=True))


def variables(run_dir):
    """Every variable of the last checkpoint, the run's state as JSON without the times."""
    from twta.graph.tf1 import tf
    from twta.training import checkpoints

    reader = tf.train.load_checkpoint(checkpoints.find(run_dir, 'last'))
    values = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    values['run_state'] = json.loads(values['run_state'])
    for row in values['run_state']['history']:
        row['seconds'] = row['images_per_second'] = None
    return values


def assert_same(found, expected):
    """Two results of variables(), bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert found[name] == value
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def log(run_dir):
    with open(run_dir / 'log.csv', newline='') as file:
        return list(csv.DictReader(file))


def run_script(script, *flags, cwd=ROOT, **environment):
    """Runs a script as a user does; returns the finished process with its stdout and stderr."""
    return subprocess.run([sys.executable, str(script), *map(str, flags)], cwd=cwd, env={**os.environ, **environment},
                          capture_output=True, text=True, timeout=300)


@pytest.fixture
def session():
    """A session on a fresh graph, which is the default one."""
    from twta.graph.tf1 import tf

    with tf.Graph().as_default(), tf.Session() as session:
        yield session


QUICK = ('--dataset', 'digits', '--batch_size', '100', '--learning_rate', '0.001')


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory):
    """A run of four epochs of TWTA_5_5_MNIST on the digits; not to be changed."""
    run_dir = tmp_path_factory.mktemp('finished')
    start(run_dir, *QUICK[2:], '--epochs', 4)
    return run_dir


def random_packed(image, crop, specification, n_classes=3, stem=0):
    """A packed network with random weights and thresholds that let a third of the activations be 0, or so.

    specification    of each layer: filters, kernel (0: the whole map), stride, padding, groups
    stem             so many filters of 3*3 before the encoder, if any
    """
    from twta.packed.file_format import Layer, PackedNetwork, Stem, fan_in, geometry

    rng = np.random.default_rng(0)
    shape, layers = (crop, crop, image[2]) if crop else image, []
    if stem:
        weights = rng.standard_normal((3, 3, shape[2], stem)).astype(np.float32)
        stem = Stem(weights, rng.standard_normal(stem), rng.standard_normal(stem))
        shape = (*shape[:2], len(stem.scale))
    for index, (filters, kernel, stride, padding, groups) in enumerate(specification):
        kernel = (kernel, kernel) if kernel else shape[:2]
        weights = rng.integers(-1, 2, (*kernel, shape[2] // groups, filters)).astype(np.int8)
        spread = max(1, int(fan_in(weights) ** 0.5 / 2))
        upper = rng.integers(-spread // 2, spread + 1, filters).astype(np.int32)
        lower = upper - rng.integers(1, spread + 1, filters).astype(np.int32)
        lower = np.maximum(lower, -fan_in(weights) - 1)
        if not index:
            weights = rng.standard_normal(weights.shape).astype(np.float32)
            upper, lower = (upper / 2).astype(np.float32), (lower / 2).astype(np.float32)
        layers.append(Layer(f'layer{index}', weights, upper, lower, stride, padding, groups))
        shape = geometry(shape, layers[-1])[1]
    weights = rng.standard_normal((np.prod(shape), n_classes)).astype(np.float32)
    return PackedNetwork('network', 'data', image, crop, tuple(f'class{k}' for k in range(n_classes)), tuple(layers),
                         weights, np.ones(n_classes, np.float32), np.zeros(n_classes, np.float32), {'epoch': 3},
                         stem or None)
