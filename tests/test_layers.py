"""Layers against plain TensorFlow operations on ternarised weights; batch normalisation against numpy."""
import numpy as np
import pytest

from twta import UsageError
from twta.graph.tf1 import tf, tl
from twta.quantizers import binarize_activations
from twta.ternary_layers import (
    ActivationLayer,
    BatchNormLayer,
    Conv2dLayer,
    DenseLayer,
    Network,
    PoolLayer,
    full_precision,
    ternarize_activations,
)
from twta.training.blocks import read_blocks

pytestmark = pytest.mark.processor
RNG = np.random.default_rng(1)


def numpy_ternary(w):
    d = 0.7 * np.abs(w).mean()
    return (w >= d).astype(np.float32) - (w <= -d)


def ternary_images(*shape):
    return RNG.integers(-1, 2, shape).astype(np.float32)


def input_layer(x):
    return tl.layers.InputLayer(tf.constant(x), name='images')


def outputs_and_weights(session, layer):
    session.run(tf.global_variables_initializer())
    return session.run([layer.outputs, layer.all_params[-1]])


@pytest.mark.parametrize('padding', ['SAME', 'VALID'])
@pytest.mark.parametrize('size, stride', [(1, 1), (2, 2), (3, 1), (4, 1), (4, 2), (5, 1)])
def test_convolution_equals_plain_convolution_on_ternary_weights(session, size, stride, padding):
    x = ternary_images(3, 8, 8, 6)
    layer = Conv2dLayer(input_layer(x), 10, size, stride, padding)
    y, w = outputs_and_weights(session, layer)
    plain = session.run(tf.nn.conv2d(x, numpy_ternary(w), [1, stride, stride, 1], padding))
    assert w.shape == (size, size, 6, 10)
    np.testing.assert_array_equal(y, plain)  # sums of -1, 0, +1 are exact


def test_full_precision_convolution_is_the_plain_one(session):
    x = RNG.normal(size=(2, 7, 7, 3)).astype(np.float32)
    y, w = outputs_and_weights(session, Conv2dLayer(input_layer(x), 5, 3, quantizer=full_precision))
    expected = session.run(tf.nn.conv2d(tf.cast(x, tf.float64), tf.cast(w, tf.float64), [1, 1, 1, 1], 'SAME'))
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())  # order of summation differs


@pytest.mark.parametrize('side, channels, n_filter, size, stride, padding, groups', [
    (6, 16, 24, 3, 1, 'SAME', 2), (6, 16, 24, 4, 2, 'VALID', 4),
    # all grouped layers of both Group_V2 networks
    (24, 64, 256, 4, 2, 'SAME', 4), (12, 512, 512, 2, 2, 'VALID', 8), (2, 1024, 1024, 2, 1, 'VALID', 16),
    # of the 3*3 network only
    (12, 256, 512, 3, 1, 'SAME', 16), (6, 512, 2048, 3, 1, 'VALID', 32), (4, 2048, 1024, 1, 1, 'SAME', 8),
    (4, 1024, 1024, 2, 2, 'VALID', 16),
    # of the 4*4 network only
    (12, 256, 512, 4, 1, 'SAME', 16), (6, 512, 2048, 4, 1, 'SAME', 32), (6, 2048, 1024, 1, 1, 'SAME', 8),
    (6, 1024, 1024, 4, 2, 'VALID', 16),
])
def test_groups_equal_separate_convolutions_on_interleaved_channels(
        session, side, channels, n_filter, size, stride, padding, groups):
    x = ternary_images(2, side, side, channels)
    layer = Conv2dLayer(input_layer(x), n_filter, size, stride, padding, groups)
    upstream = RNG.normal(size=layer.outputs.shape).astype(np.float32)
    w = RNG.integers(-64, 65, layer.all_params[-1].shape).astype(np.float32)  # exact sums, so equal thresholds
    layer.all_params[-1].load(w, session)
    y = session.run(layer.outputs)
    parts = np.split(w, groups, axis=-1)
    inputs, filters = tf.constant(x), [tf.constant(numpy_ternary(part)) for part in parts]
    loop = tf.concat([tf.nn.conv2d(inputs[..., g::groups], filters[g], [1, stride, stride, 1], padding)
                      for g in range(groups)], axis=-1)
    np.testing.assert_array_equal(y, session.run(loop))
    ours = session.run(tf.gradients(layer.outputs, [layer.inputs, layer.all_params[-1]], upstream))
    loops = session.run(tf.gradients(loop, [inputs, *filters], upstream))
    for found, expected in ((ours[0], loops[0]), (ours[1], np.concatenate(loops[1:], axis=-1))):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_groups_that_do_not_divide_are_refused(session):
    with pytest.raises(ValueError, match='16 channels and 6 filters do not divide into 4 groups'):
        Conv2dLayer(input_layer(ternary_images(1, 4, 4, 16)), 6, 3, groups=4)


def test_dense_equals_matrix_product_on_ternary_weights(session):
    x = ternary_images(5, 40)
    layer = DenseLayer(input_layer(x), 12)
    y, w = outputs_and_weights(session, layer)
    np.testing.assert_array_equal(y, x @ numpy_ternary(w))
    gradient = session.run(tf.gradients(layer.outputs, layer.all_params[-1], tf.ones([5, 12])))[0]
    np.testing.assert_allclose(gradient, x.T @ np.ones((5, 12), np.float32))  # straight through


@pytest.mark.parametrize('quantizer', [ternarize_activations, tf.nn.relu])
def test_activation_layer_applies_its_quantizer(session, quantizer):
    x = RNG.normal(size=(4, 9)).astype(np.float32)
    layer = ActivationLayer(input_layer(x), quantizer)
    np.testing.assert_array_equal(*session.run([layer.outputs, quantizer(tf.constant(x))]))


def set_random_batch_norm(session, layer):
    """Load random beta, gamma (some negative) and moving moments; return them as float64."""
    channels = layer.all_params[0].shape[0]
    values = [RNG.normal(size=channels), RNG.normal(size=channels), RNG.normal(size=channels),
              RNG.uniform(0.1, 9, channels)]
    for variable, value in zip(layer.all_params, values, strict=True):
        variable.load(value.astype(np.float32), session)
    return values


@pytest.mark.parametrize('shape', [(8, 5, 5, 7), (32, 7)])
def test_batch_norm_in_training(session, shape):
    x = RNG.normal(2, 3, shape).astype(np.float32)
    layer = BatchNormLayer(input_layer(x), is_train=True)
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    beta, gamma, moving_mean, moving_variance = set_random_batch_norm(session, layer)
    axes = tuple(range(len(shape) - 1))
    mean, variance = x.mean(axes, dtype=np.float64), x.var(axes, dtype=np.float64)  # var: biased, over n
    y, *_ = session.run([layer.outputs, *updates])
    np.testing.assert_allclose(y, gamma * (x - mean) / np.sqrt(variance + 1e-5) + beta, rtol=1e-4, atol=1e-5)
    new_mean, new_variance = session.run(layer.all_params[2:])
    np.testing.assert_allclose(new_mean, 0.9 * moving_mean + 0.1 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new_variance, 0.9 * moving_variance + 0.1 * variance, rtol=1e-5)


@pytest.mark.parametrize('shape', [(8, 5, 5, 7), (32, 7)])
def test_batch_norm_gradients_in_training(session, shape):
    x, upstream = (RNG.normal(size=shape).astype(np.float32) for _ in range(2))
    layer = BatchNormLayer(input_layer(x), is_train=True)
    _, gamma, _, _ = set_random_batch_norm(session, layer)
    gradients = session.run(tf.gradients(layer.outputs, [layer.inputs, *layer.all_params[:2]], upstream))
    axes = tuple(range(len(shape) - 1))
    inverse = 1 / np.sqrt(x.var(axes) + 1e-5)
    normal = (x - x.mean(axes)) * inverse
    through = upstream - upstream.mean(axes) - normal * (upstream * normal).mean(axes)
    np.testing.assert_allclose(gradients[0], gamma * inverse * through, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(gradients[1], upstream.sum(axes), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients[2], (upstream * normal).sum(axes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('shape', [(8, 5, 5, 7), (32, 7)])
def test_batch_norm_in_inference(session, shape):
    x = RNG.normal(2, 3, shape).astype(np.float32)
    layer = BatchNormLayer(input_layer(x), is_train=False)
    assert not tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    beta, gamma, mean, variance = set_random_batch_norm(session, layer)
    expected = gamma * (x - mean) / np.sqrt(variance + 1e-5) + beta
    np.testing.assert_allclose(session.run(layer.outputs), expected, rtol=1e-5, atol=1e-5)


def test_batch_norm_adds_exactly_1e_5_to_the_variance(session):
    layer = BatchNormLayer(input_layer(np.ones((1, 1), np.float32)), is_train=False)
    for variable, value in zip(layer.all_params, (0, 1, 0, 0), strict=True):
        variable.load(np.float32([value]), session)
    np.testing.assert_allclose(session.run(layer.outputs), 1 / np.sqrt(1e-5), rtol=1e-6)  # 1.001e-5 is 5e-4 away


def test_initial_values(session):
    net = Network(tf.zeros([2, 8, 8, 3]), True)
    net.encode(64, 4)
    net.conv(128, 4)
    net.dense(256)
    net = net.classify(10)
    session.run(tf.global_variables_initializer())
    values = {variable.name: session.run(variable) for variable in net.all_params}
    assert values['conv2/W:0'].std() == pytest.approx(0.02 * 0.88, rel=0.02)  # truncated at two standard deviations
    assert np.abs(values['conv2/W:0']).max() <= 0.04
    assert values['dense3/W:0'].std() == pytest.approx(0.1 * 0.88, rel=0.02)
    gammas = np.concatenate([values[f'{name}/bn/gamma:0'] for name in ('conv1', 'conv2', 'dense3')])
    assert gammas.mean() == pytest.approx(1, abs=5e-4) and gammas.std() == pytest.approx(0.002, rel=0.2)
    for name, value in values.items():
        if name.endswith(('beta:0', 'moving_mean:0')):
            assert not value.any()
        if name.endswith('moving_variance:0'):
            assert (value == 1).all()


def test_activations_between_layers_are_ternary_in_training_and_in_inference(session):
    images = tf.constant(RNG.uniform(size=(4, 8, 8, 1)).astype(np.float32))
    found = {}
    for is_train in (True, False):
        with tf.variable_scope(tf.get_variable_scope(), reuse=not is_train):
            net = Network(images, is_train)
            net.encode(8, 3)
            net.pool(8, 2)
            net.dense(16)
            net = net.classify(10)
        found[is_train] = [layer for layer in net.all_layers if '/activation' in layer.name]
    session.run(tf.global_variables_initializer())
    for _ in range(50):  # until the moving moments have settled
        session.run(tf.get_collection(tf.GraphKeys.UPDATE_OPS))
    for activations in found.values():
        values = [set(np.ravel(value)) for value in session.run(activations)]
        assert values == [{-1, 0, 1}] * 3


# ----------------------------------------------------------------------------------------------------------------------
# Thresholds and pooling


def test_a_runtime_threshold_is_the_batch_s_in_training_and_a_moving_average_in_evaluation(session):
    x = [RNG.normal(0, spread, (50, 8)).astype(np.float32) for spread in (0.5, 1, 2)]
    images = tf.placeholder(tf.float32, [None, 8])
    layers = []
    for is_train in (True, False):
        with tf.variable_scope(tf.get_variable_scope(), reuse=not is_train):
            layers.append(ActivationLayer(tl.layers.InputLayer(images, name='images'), threshold='runtime', value=0.7,
                                          is_train=is_train))
    session.run(tf.global_variables_initializer())
    assert not tf.trainable_variables()
    updates, moving = tf.get_collection(tf.GraphKeys.UPDATE_OPS), np.float32(0.7)
    for batch in x:
        d = np.float32(0.7) * np.abs(batch).mean()
        trained, _ = session.run([layers[0].outputs, updates], {images: batch})
        np.testing.assert_array_equal(trained, (batch >= d).astype(int) - (batch <= -d))
        moving = 0.9 * moving + 0.1 * d
        found, evaluated = session.run([layers[1].all_params[-1], layers[1].outputs], {images: batch})
        np.testing.assert_allclose(found, moving, rtol=1e-5)
        np.testing.assert_array_equal(evaluated, (batch >= found).astype(int) - (batch <= -found))


@pytest.mark.parametrize('upstream, bound', [(1, 0.99), (-1, 0.01)])
def test_a_trainable_threshold_stays_between_0_and_1(session, upstream, bound):
    x = np.abs(RNG.normal(size=(20, 4))).astype(np.float32)
    layer = ActivationLayer(input_layer(x), threshold='trainable', value=0.3)
    d, = tf.trainable_variables()
    step = tf.train.AdamOptimizer(0.1).minimize(tf.reduce_sum(upstream * layer.outputs))
    session.run(tf.global_variables_initializer())
    values = [session.run(d)]
    for _ in range(20):
        session.run(step)
        values.append(session.run(d))
    assert values[0] == np.float32(0.3) and (np.diff(values) * upstream >= 0).all()
    assert values[-1] == np.float32(bound)


@pytest.mark.parametrize('kind, pool', [('max', np.max), ('average', np.mean)])
def test_pooling_against_numpy(session, kind, pool):
    x = ternary_images(3, 9, 9, 5)
    y = session.run(PoolLayer(input_layer(x), 2, 2, 'VALID', kind).outputs)
    np.testing.assert_array_equal(y, pool(x[:, :8, :8].reshape(3, 4, 2, 4, 2, 5), axis=(2, 4)))


def test_an_average_over_a_border_is_refused(session):
    for size, side in ((2, 9), (4, 8)):
        with pytest.raises(UsageError, match='--pooling average: pool would average over a border'):
            PoolLayer(input_layer(ternary_images(1, side, side, 2)), size, 2, 'SAME', 'average')


def test_pooling_takes_the_place_of_convolutions_that_keep_the_channels(session):
    for pooling, kinds in (('conv', []), ('max', ['max']), ('average', ['average'])):
        with tf.variable_scope(pooling):
            net = Network(tf.zeros([1, 8, 8, 1]), True, pooling=pooling)
            net.encode(4, 3)
            net.pool(4, 2)
            net.pool(8, 2)  # other number of channels: always a convolution
            kinds_found, layer = [], net.net
            while hasattr(layer, 'prev_layer'):
                kinds_found += [layer.kind] if hasattr(layer, 'kind') else []
                layer = layer.prev_layer
            assert kinds_found == kinds


def test_a_stem_is_real_valued_to_the_encoder_s_sums(session):
    for is_train, dtype in ((True, tf.float32), (False, tf.float64)):
        with tf.variable_scope(tf.get_variable_scope(), reuse=not is_train):
            net = Network(tf.zeros([1, 8, 8, 1]), is_train)
            net.stem(4, 3)
            assert net.net.outputs.dtype == dtype and net.net.activation is tf.nn.relu
            net.encode(4, 3)
            assert net.net.outputs.dtype == tf.float32


def test_batch_norm_in_float64_is_two_operations(session):
    x = RNG.normal(size=(2, 3, 3, 4))
    layer = BatchNormLayer(tl.layers.InputLayer(tf.constant(x), name='images'), is_train=False)
    values = [RNG.normal(size=4).astype(np.float32) for _ in range(3)] + [np.float32([0, 1, 2, 1e-6])]
    for variable, value in zip(layer.all_params, values, strict=True):
        variable.load(value, session)
    beta, gamma, mean, variance = (value.astype(np.float64) for value in values)
    scale = gamma * (1 / np.sqrt(variance + 1e-5))
    np.testing.assert_array_equal(session.run(layer.outputs), x * scale + (beta - mean * scale))


@pytest.mark.parametrize('size, stride, groups, dtype', [
    (3, 1, 1, tf.float32), (4, 2, 2, tf.float32), (4, 1, 1, tf.bfloat16), (2, 2, 4, tf.bfloat16)])
def test_a_border_that_is_not_zero(session, size, stride, groups, dtype):
    """Compare sums and gradients with those of a map that already has the border, and VALID padding."""
    x = RNG.integers(-1, 2, (2, 7, 6, 8)).astype(np.float32)
    out = -(-7 // stride), -(-6 // stride)
    total = [max((n - 1) * stride + size - side, 0) for n, side in zip(out, (7, 6), strict=True)]
    sides = [(t // 2, t - t // 2) for t in total]
    bordered = np.pad(x, ((0, 0), *sides, (0, 0)), constant_values=-1)
    found = []
    for values, padding, reuse in ((x, 'SAME', False), (bordered, 'VALID', True)):
        images = tf.constant(values, dtype)
        with tf.variable_scope(tf.get_variable_scope(), reuse=reuse):
            layer = Conv2dLayer(tl.layers.InputLayer(images), 8, size, stride, padding, groups, border=-1)
        assert layer.outputs.shape[1:3] == out
        found.append([layer.outputs, *tf.gradients(tf.cast(layer.outputs, tf.float32) ** 2, layer.all_params[-1:])])
    session.run(tf.global_variables_initializer())
    (sums, gradient), (expected_sums, expected_gradient) = session.run(found)
    np.testing.assert_array_equal(sums.astype(np.float32), expected_sums.astype(np.float32))
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0.02, atol=1e-3)


def test_rest_decides_on_beta_border_and_gradient(session):
    for rest in (0, -1):
        with tf.variable_scope(f'rest{rest}'):
            network = Network(tf.zeros([1, 6, 6, 1]), True, rest=rest)
            network.encode(4, 3)
            network.conv(4, 3)
            last = network.classify(10)
        session.run(tf.global_variables_initializer())
        blocks = read_blocks(last)
        assert [block.layer.border for block in blocks[:2]] == [0, rest]
        betas = session.run([block.batch_norm.beta for block in blocks])
        assert [set(beta) for beta in betas] == [{rest}, {rest}, {0}]
        assert blocks[0].levels == (-1, 0, 1)


@pytest.mark.parametrize('quantize', ['both', 'weights', 'activations', 'nothing'])
def test_beta_init_is_where_the_betas_before_quantised_activations_begin(session, quantize):
    network = Network(tf.zeros([1, 6, 6, 1]), True, activation=binarize_activations, beta_init=-0.5, quantize=quantize)
    network.stem(4, 3)
    network.encode(4, 3)
    network.conv(4, 3)
    last = network.classify(10)
    session.run(tf.global_variables_initializer())
    betas = session.run([block.batch_norm.beta for block in read_blocks(last)])
    lowered = -0.5 if quantize in ('both', 'activations') else 0
    assert [set(beta) for beta in betas] == [{0}, {lowered}, {lowered}, {0}]
