"""What several test files share: scripts, runs on the samples, networks with random or hostile parameters."""
import contextlib
import csv
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from twta import scripts

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = scripts.find_scripts()
MNIST_SCRIPTS = [name for name, path in SCRIPTS.items() if path.parent.name == 'MNIST']


def load_script(name):
    """Return a script as a module, by its name, or by its path if it is not in SCRIPTS."""
    return scripts.load_script(SCRIPTS.get(name, name))


def chosen(module, **options):
    """Return the arguments of a script's model() after x and is_train: these options, and defaults for the others."""
    from twta.options import with_defaults

    return with_defaults({**dict.fromkeys(module.OPTIONS), **options})


def image_shape(name):
    """Return the shape of the images as the network of a script sees them."""
    return (28, 28, 1) if name in MNIST_SCRIPTS else (24, 24, 3)


def start(run_dir, *flags, script='TWTA_5_5_MNIST'):
    """Run the command of a script in this process, on the sample of its data set."""
    from twta import command_line

    module = load_script(script)
    argv = ['--run_dir', run_dir, '--dataset', module.DATASETS[1], *flags]
    path = SCRIPTS.get(script, script)
    args, defaults = command_line.parse_script(path, module, list(map(str, argv)))
    command_line.execute(path.stem, module.model, args, defaults)


def loss_and_gradients(name, images, labels, precision):
    """Return the initial values by trainable variable, the loss of the first training step, and its gradients."""
    from twta.graph.session import open_session
    from twta.graph.tf1 import tf
    from twta.training.build import build_graph

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
    """Return every variable of the last checkpoint; the run's state is parsed, its times are left out."""
    from twta.training import checkpoints

    with checkpoints.reading(checkpoints.find(run_dir, 'last')) as reader:
        values = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    values['run_state'] = json.loads(values['run_state'])
    for row in values['run_state']['history']:
        row['seconds'] = row['images_per_second'] = None
    return values


def assert_same(found, expected):
    """Check that two results of variables() are equal, bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert found[name] == value
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def log(run_dir):
    """Return the rows of a run's log.csv."""
    with open(run_dir / 'log.csv', newline='') as file:
        return list(csv.DictReader(file))


def run_script(script, *flags, cwd=ROOT, **environment):
    """Run a script as a user does; return the finished process with its stdout and stderr."""
    return subprocess.run([sys.executable, str(script), *map(str, flags)], cwd=cwd, env={**os.environ, **environment},
                          capture_output=True, text=True, timeout=900)


@pytest.fixture
def session():
    """A session on a new graph, which is the default graph."""
    from twta.graph.tf1 import tf

    with tf.Graph().as_default(), tf.Session() as session:
        yield session


QUICK = ('--dataset', 'digits', '--batch_size', '100', '--learning_rate', '0.001')


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory):
    """The directory of a run of four epochs of TWTA_5_5_MNIST on the digits; tests must not change it."""
    run_dir = tmp_path_factory.mktemp('finished')
    start(run_dir, *QUICK[2:], '--epochs', 4)
    return run_dir


def random_packed(image, crop, specification, n_classes=3, stem=0, border=0):
    """Return a packed network with random weights; its thresholds make about a third of the activations 0.

    specification    per layer: filters, kernel (0: the whole map), stride, padding, groups
    stem             number of 3*3 filters before the encoder, or 0
    border           of all layers but the encoder
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
        layers.append(Layer(f'layer{index}', weights, upper, lower, stride, padding, groups, border if index else 0))
        shape = geometry(shape, layers[-1])[1]
    weights = rng.standard_normal((np.prod(shape), n_classes)).astype(np.float32)
    return PackedNetwork('network', 'data', image, crop, tuple(f'class{k}' for k in range(n_classes)), tuple(layers),
                         weights, np.ones(n_classes, np.float32), np.zeros(n_classes, np.float32), {'epoch': 3},
                         stem or None)


NETWORKS = {  # for random_packed: image, crop, layers (filters, kernel, stride, padding, groups), classes, stem
    'dense': ((9, 8, 1), 0, [(5, 3, 1, 'SAME', 1), (33, 0, 1, 'VALID', 1), (7, 0, 1, 'VALID', 1)]),
    'odd': ((13, 11, 2), 0, [(20, 3, 1, 'SAME', 1), (12, 2, 1, 'SAME', 4), (18, 3, 2, 'SAME', 3),
                             (30, 2, 1, 'VALID', 6)]),
    'strides': ((17, 17, 3), 16, [(24, 5, 2, 'SAME', 1), (64, 4, 2, 'SAME', 1), (40, 2, 2, 'VALID', 2)]),
    'wide strides': ((20, 20, 1), 0, [(8, 3, 3, 'VALID', 1), (16, 1, 2, 'VALID', 1), (16, 2, 3, 'SAME', 1)]),
    'pieces': ((12, 12, 3), 8, [(64, 1, 1, 'SAME', 1), (256, 4, 2, 'SAME', 4), (64, 3, 1, 'SAME', 16),
                                (128, 2, 2, 'VALID', 8), (256, 1, 1, 'SAME', 32), (16, 2, 1, 'VALID', 1)]),
    'one bit': ((6, 6, 1), 0, [(16, 1, 1, 'SAME', 1), (16, 3, 1, 'SAME', 16), (1, 1, 1, 'SAME', 1)]),
    'stem': ((11, 10, 3), 8, [(16, 3, 1, 'SAME', 1), (12, 2, 2, 'SAME', 2), (9, 0, 1, 'VALID', 1)], 3, 5),
    'rest': ((12, 11, 3), 8, [(10, 3, 1, 'SAME', 1), (24, 4, 2, 'SAME', 2), (12, 3, 1, 'SAME', 3)], 3, 0, -1),
    'many words': ((4, 4, 1), 0, [(512, 2, 1, 'SAME', 1), (520, 3, 1, 'SAME', 1)]),
}


def random_images(packed, count, seed=0):
    """Return uint8 images [count, height, width, channels] for a packed network."""
    return np.random.default_rng(seed).integers(0, 256, (count, *packed.image)).astype(np.uint8)


def sample_of(name):
    """Return the sample of a script's data set: digits or shapes."""
    from twta.data import datasets

    return datasets.load('digits' if name in MNIST_SCRIPTS else 'shapes', Path('/absent'), None)


@contextlib.contextmanager
def graph_of(name, dataset, parameters, **options):
    """Yield the evaluation graph of a script, and a session in which its parameters are set.

    parameters    function of a parameter's name and initial value that returns the value to set
    """
    from twta.graph.session import open_session
    from twta.graph.tf1 import tf
    from twta.training.build import build_graph

    module = load_script(name)
    network = build_graph(partial(module.model, **chosen(module, **options)), dataset.test.images.shape[1:],
                          dataset.crop, seed=0)
    with network.graph.as_default(), open_session(network.graph, 0) as session:
        session.run(tf.global_variables_initializer())
        for variable in network.net.all_params:
            variable.load(parameters(variable.name, session.run(variable)), session)
        yield network, session


def hostile(name, value):
    """Return a value that strains the thresholds, for a parameter of batch normalisation; other parameters keep theirs.

    Gammas are negative, zero or tiny; channels are constant or without variance; sums fall on break points.
    """
    rng = np.random.default_rng(sum(name.encode()))
    if 'gamma' in name:
        return rng.choice(np.float32([1, -1, 0.5, -2, 0, -0.0, 1e-30, -1e-30, 1e-3, 30]), value.shape)
    if 'beta' in name:
        return rng.choice(np.float32([0, 0.5, -0.5, 0.6, -0.6, 0.1, 0.49999997]), value.shape)
    if 'moving_mean' in name:
        return np.where(rng.random(value.shape) < 0.5, rng.integers(-20, 20, value.shape),
                        rng.normal(0, 5, value.shape)).astype(np.float32)
    if 'moving_variance' in name:
        return rng.choice(np.float32([0, 1, 4, 100, 400, 37.5, 1e6]), value.shape)
    return value
