"""The fast forms of the arithmetic against the plain ones: forward, gradients, whole networks."""
import numpy as np
import pytest

from tests.conftest import load_script
from twta import datasets, experiment, fast, ternary_layers
from twta.tf1 import tf

RNG = np.random.default_rng(2)


def plain(x, w, stride, padding, groups=1):
    """The convolution as the published scripts have it: a loop over groups, TensorFlow's gradients."""
    filters = tf.split(w, groups, axis=-1)
    return tf.concat([tf.nn.conv2d(x[..., g::groups], filters[g], [1, stride, stride, 1], padding)
                      for g in range(groups)], axis=-1)


GEOMETRIES = [  # height, width, channels, filters, size, stride, padding, groups
    (6, 6, 8, 12, 2, 2, 'VALID', 1), (6, 4, 8, 12, 2, 2, 'SAME', 4),  # windows that tile the map
    (9, 3, 4, 5, 3, 3, 'VALID', 1), (5, 7, 8, 6, 1, 1, 'SAME', 2), (1, 1, 16, 8, 1, 1, 'VALID', 1),
    (3, 3, 6, 10, 3, 1, 'VALID', 1), (2, 2, 12, 8, 2, 1, 'VALID', 4), (4, 4, 6, 10, 4, 2, 'VALID', 1),  # that are it
    (6, 6, 5, 7, 3, 1, 'SAME', 1), (7, 7, 5, 7, 4, 1, 'VALID', 1), (6, 6, 5, 7, 4, 1, 'SAME', 1),  # short rows
    (6, 6, 5, 7, 4, 2, 'VALID', 1), (9, 5, 3, 4, 4, 2, 'SAME', 1), (5, 8, 3, 4, 2, 2, 'SAME', 1),
    (7, 7, 3, 4, 2, 2, 'VALID', 1), (2, 2, 3, 4, 3, 1, 'SAME', 1), (3, 5, 3, 4, 3, 2, 'VALID', 1),
    (12, 12, 4, 6, 3, 1, 'SAME', 1), (12, 12, 8, 12, 4, 2, 'SAME', 4), (6, 6, 8, 16, 3, 1, 'VALID', 4)]  # TensorFlow's


@pytest.mark.parametrize('dtype, bound', [('float32', 1e-6), ('bfloat16', 0.025)])
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_convolution_and_its_gradients_equal_the_plain_ones(session, geometry, dtype, bound):
    """The sums bit for bit, the gradients within the bound times the largest of the plain float32 ones.

    Measured in bfloat16: at most 0.019, where TensorFlow's own kernel computes it; products of matrices 0.006.
    """
    height, width, channels, filters, size, stride, padding, groups = geometry
    x = RNG.integers(-1, 2, (3, height, width, channels))
    w = RNG.integers(-1, 2, (size, size, channels // groups, filters))
    upstream = None
    results = []
    for function, kind in ((plain, 'float32'), (fast.convolve, dtype)):
        variables = tf.constant(x, kind), tf.constant(w, kind)
        sums = function(*variables, stride, padding, groups)
        if upstream is None:
            upstream = session.run(tf.cast(tf.cast(tf.random_normal(sums.shape), dtype), tf.float32))
        gradients = tf.gradients(sums, variables, tf.constant(upstream, kind))
        results.append(session.run([tf.cast(value, tf.float32) for value in (sums, *gradients)]))
    (plain_sums, *plain_gradients), (sums, *gradients) = results
    np.testing.assert_array_equal(sums, plain_sums)
    for ours, theirs in zip(gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.abs(theirs).max())


def test_convolution_of_a_batch_of_unknown_size(session):
    x = tf.placeholder(tf.float32, [None, 6, 6, 4])
    sums = fast.convolve(x, tf.ones([3, 3, 4, 2]), 1, 'SAME')
    gradient = tf.gradients(sums, x)[0]
    for batch in (1, 5):
        assert session.run(gradient, {x: np.ones((batch, 6, 6, 4))}).shape == (batch, 6, 6, 4)


def test_quantisers_are_compiled_on_a_processor_only(monkeypatch):
    assert fast.compiled(abs) is not abs
    monkeypatch.setattr(fast, 'ON_CPU', False)
    assert fast.compiled(abs) is abs


def loss_and_gradients(name, images, labels, precision):
    """Of a training step from the initial weights, by variable."""
    data = datasets.load(load_script(name).DATASETS[1], '')
    network = experiment.build(load_script(name).model, data, 0, precision)
    with network.graph.as_default(), tf.Session(graph=network.graph) as session:
        session.run(tf.global_variables_initializer())
        trained = tf.trainable_variables()
        wanted = [network.training.loss, tf.gradients(network.training.loss, trained)]
        loss, values = session.run(wanted, {network.images: images, network.labels: labels, network.step: 0})
        return loss, {variable.name: value for variable, value in zip(trained, values, strict=True)}


@pytest.mark.parametrize('name', ['TWTA_4_4_MNIST', 'TWTA_4_4_CIFAR10_VGG13', 'TWTA_3_3_CIFAR10_Group_V2'])
def test_network_has_the_gradients_of_the_plain_one(monkeypatch, name):
    """In float32: the same loss, each gradient to 1e-4 of its norm (measured: 1e-6)."""
    data = datasets.load(load_script(name).DATASETS[1], '').train
    batch = data.images[:20], data.labels[:20]
    loss, gradients = loss_and_gradients(name, *batch, tf.float32)
    monkeypatch.setattr(ternary_layers, 'convolve', plain)
    for function in ('ternarize', 'pass_clipped'):
        monkeypatch.setattr(ternary_layers, function, getattr(ternary_layers, function).python_function)
    plain_loss, plain_gradients = loss_and_gradients(name, *batch, tf.float32)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for variable, expected in plain_gradients.items():
        difference = np.linalg.norm(gradients[variable] - expected) / np.linalg.norm(expected)
        assert difference < 1e-4, variable
