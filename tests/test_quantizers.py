"""The quantisers: values, ties, zeros, thresholds per group; gradients against numpy."""
import numpy as np
import pytest

from twta.graph.tf1 import tf
from twta.quantizers import (
    binarize_activations,
    binarize_weights,
    full_precision,
    median_quantizer,
    ternarize_activations,
    ternarize_from_rest,
    ternarize_weights,
    three_level_activations,
)

pytestmark = pytest.mark.processor
RNG = np.random.default_rng(0)
ABOVE, BELOW = np.nextafter(np.float32(0.5), np.float32(1)), np.nextafter(np.float32(0.5), np.float32(0))
ONE_ABOVE = np.nextafter(np.float32(1), np.float32(2))


def forward_and_gradient(session, quantizer, value, upstream, dtype=tf.float32):
    x = tf.constant(np.asarray(value, np.float32), dtype)
    y = quantizer(x)
    gradient = tf.gradients(y, x, grad_ys=tf.constant(np.asarray(upstream, np.float32), dtype))[0]
    return session.run([tf.cast(y, tf.float32), tf.cast(gradient, tf.float32)])


@pytest.mark.parametrize('dtype', [tf.float32, tf.bfloat16])
def test_activations_at_and_around_their_thresholds(session, dtype):
    x = [-2, -1, -0.75, -0.5, -0.25, -0.0, 0.0, 0.25, 0.5, 0.75, 1, 2]
    y, _ = forward_and_gradient(session, ternarize_activations, x, np.ones(12), dtype)
    np.testing.assert_array_equal(y, [-1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1])


def test_activation_ties_go_outward_and_one_step_inside_does_not(session):
    y, _ = forward_and_gradient(session, ternarize_activations, [ABOVE, 0.5, BELOW, -BELOW, -0.5, -ABOVE], np.ones(6))
    np.testing.assert_array_equal(y, [1, 1, 0, 0, -1, -1])


def test_activation_gradient_passes_up_to_one_inclusive(session):
    x = np.array([-ONE_ABOVE, -1, -0.5, 0, 0.5, 1, ONE_ABOVE, 3], np.float32)
    upstream = RNG.normal(size=8).astype(np.float32)
    _, gradient = forward_and_gradient(session, ternarize_activations, x, upstream)
    np.testing.assert_array_equal(gradient, np.where(np.abs(x) <= 1, upstream, 0))


def test_activations_equal_clip_then_ternarize(session):
    x = RNG.normal(size=(50, 20)).astype(np.float32)
    upstream = RNG.normal(size=x.shape).astype(np.float32)
    y, gradient = forward_and_gradient(session, ternarize_activations, x, upstream)
    clipped = np.clip(x, -1, 1)
    np.testing.assert_array_equal(y, np.sign(np.sign(clipped + 0.5) + np.sign(clipped - 0.5)))
    np.testing.assert_array_equal(gradient, upstream * (clipped == x))


def test_ternary_values_are_fixed_points(session):
    x = np.array([-1, 0, 1], np.float32)
    np.testing.assert_array_equal(session.run(ternarize_activations(tf.constant(x))), x)
    np.testing.assert_array_equal(session.run(ternarize_weights(tf.constant(x))), x)


@pytest.mark.parametrize('shape', [(3, 3, 8, 16), (40, 10)])
def test_weights_against_numpy(session, shape):
    w = RNG.normal(0, 0.02, shape).astype(np.float32)
    w.flat[::7] = 0
    upstream = RNG.normal(size=shape).astype(np.float32)
    y, gradient = forward_and_gradient(session, ternarize_weights, w, upstream)
    d = 0.7 * np.abs(w.astype(np.float64)).mean()
    assert np.abs(np.abs(w) - d).min() > 1e-8, 'no weight is so near its threshold that rounding decides'
    np.testing.assert_array_equal(y, np.where(w >= d, 1, np.where(w <= -d, -1, 0)))
    assert {-1, 0, 1} == set(y.flat)
    np.testing.assert_array_equal(gradient, upstream)  # nothing through the threshold, no clipping


def test_weight_ties_go_outward(session):
    # d = 0.7 * mean|w| = 0.7: 20 weights of +-0.7, and 20 of +-1.3 so that mean|w| = 1
    w = np.array([0.7, -0.7] * 10 + [1.3, -1.3] * 10, np.float64)
    w = w.astype(np.float32)
    d = session.run(0.7 * tf.reduce_mean(tf.abs(tf.constant(w))))
    w[np.abs(w) < 1] = np.copysign(d, w[np.abs(w) < 1])
    d = session.run(0.7 * tf.reduce_mean(tf.abs(tf.constant(w))))
    at_threshold = np.abs(w) == d
    assert at_threshold.sum() == 20, 'the example has weights exactly at the threshold'
    y = session.run(ternarize_weights(tf.constant(w[:, np.newaxis])))[:, 0]
    np.testing.assert_array_equal(y, np.sign(w))


def test_all_zero_weights_give_the_outward_tie_on_both_sides(session):
    # d = 0, so 0 >= d and 0 <= -d both hold and cancel: the weights are 0
    y = session.run(ternarize_weights(tf.zeros([2, 2, 3, 4])))
    np.testing.assert_array_equal(y, np.zeros((2, 2, 3, 4)))


@pytest.mark.parametrize('groups', [2, 4])
def test_each_group_has_a_threshold_of_its_own(session, groups):
    w = RNG.normal(size=(3, 3, 5, 8)).astype(np.float32)
    w *= np.repeat(10.0 ** np.arange(groups), 8 // groups).astype(np.float32)  # one common threshold would zero most
    y = session.run(ternarize_weights(tf.constant(w), groups))
    alone = [session.run(ternarize_weights(tf.constant(part))) for part in np.split(w, groups, axis=-1)]
    np.testing.assert_array_equal(y, np.concatenate(alone, axis=-1))
    assert (y != session.run(ternarize_weights(tf.constant(w)))).any()


def test_full_precision_changes_nothing(session):
    w = tf.constant(RNG.normal(size=(4, 4)).astype(np.float32))
    assert full_precision(w) is w


# ----------------------------------------------------------------------------------------------------------------------
# Binary, three levels, k and B


def test_binary_weights(session):
    w = np.concatenate([RNG.normal(0, 0.02, 400), [0, -0.0, 1e-37, -1e-37]]).astype(np.float32)
    upstream = RNG.normal(0, 1.5, w.shape).astype(np.float32)
    y, gradient = forward_and_gradient(session, binarize_weights, w, upstream)
    np.testing.assert_array_equal(y, np.where(w >= 0, 1, -1))
    assert set(y) == {-1, 1}
    np.testing.assert_array_equal(gradient, np.clip(upstream, -1, 1))
    assert (np.abs(upstream) > 1).any()


@pytest.mark.parametrize('dtype', [tf.float32, tf.bfloat16])
def test_binary_activations(session, dtype):
    x = np.array([-3, -1, -0.5, -2.0 ** -100, -0.0, 0, 2.0 ** -100, 0.5, 1, 3])
    y, gradient = forward_and_gradient(session, binarize_activations, x, np.full(10, 0.5), dtype)
    np.testing.assert_array_equal(y, [0, 0, 0, 0, 1, 1, 1, 1, 1, 1])  # a tie gives 1
    np.testing.assert_array_equal(gradient, [0, *[0.25] * 8, 0])
    _, gradient = forward_and_gradient(session, binarize_activations, x, np.full(10, -8), dtype)
    np.testing.assert_array_equal(gradient, [0, *[-1] * 8, 0])


def test_three_levels(session):
    d = np.float32(0.4)
    x = np.array([-2, -d, np.nextafter(-d, np.float32(0)), 0, np.nextafter(d, np.float32(0)), d, 1, 2], np.float32)
    y, gradient = forward_and_gradient(session, three_level_activations, x, np.full(8, 3))
    np.testing.assert_array_equal(y, [0, 0, 0.5, 0.5, 0.5, 1, 1, 1])
    np.testing.assert_array_equal(gradient, [0, 2, 2, 2, 2, 2, 2, 0])


@pytest.mark.parametrize('k, B', [(0, 1), (0, 2), (0, 4), (1, 1), (1, 2), (1, 4), (2, 3)])
def test_median_quantizer(session, k, B):
    n = 2 ** k
    quantizer = median_quantizer(k, B)
    x = np.concatenate([RNG.uniform(-1, B + 1, 1000), np.arange(-1, n * B + 2) / n]).astype(np.float32)
    upstream = RNG.normal(size=x.shape).astype(np.float32)
    y, gradient = forward_and_gradient(session, quantizer, x, upstream)
    np.testing.assert_array_equal(y, np.floor(np.clip(x, 0, B) * n + 0.5 + 1e-5) / n)
    assert tuple(np.unique(y)) == quantizer.levels == tuple(i / n for i in range(n * B + 1))
    np.testing.assert_array_equal(gradient, np.where((x > 0) & (x <= B), upstream, 0))
    halves = (np.arange(n * B) + 0.5) / n  # exact halves go up
    for dtype in (tf.float32, tf.bfloat16):
        rounded = session.run(tf.cast(quantizer(tf.constant(halves, dtype)), tf.float32))
        np.testing.assert_array_equal(rounded, np.ceil(halves * n) / n)


@pytest.mark.parametrize('quantizer', [binarize_activations, three_level_activations, ternarize_activations,
                                       median_quantizer(1, 2)])
def test_activations_rise_and_have_their_levels(session, quantizer):
    x = np.sort(np.append(RNG.normal(0, 2, 2000), [-9, 9])).astype(np.float32)
    y = session.run(quantizer(tf.constant(x)))
    assert (np.diff(y) >= 0).all() and tuple(np.unique(y)) == quantizer.levels


@pytest.mark.parametrize('d', [0.1, 0.5, 0.9])
def test_the_gradient_of_a_threshold(session, d):
    """The gradient of sum(upstream * x') is -sum(sign(x) * upstream) over |x| <= 1; x' has its steps at -d and d."""
    x = RNG.normal(size=500).astype(np.float32)
    upstream = RNG.normal(size=500).astype(np.float32)
    threshold = tf.constant(d)
    y = ternarize_activations(tf.constant(x), threshold)
    gradient = tf.gradients(y, threshold, grad_ys=tf.constant(upstream))[0]
    y, gradient = session.run([y, gradient])
    np.testing.assert_array_equal(y, (x >= np.float32(d)).astype(int) - (x <= -np.float32(d)))
    np.testing.assert_allclose(gradient, -np.sum((np.sign(x) * upstream)[np.abs(x) <= 1]), rtol=1e-4)


def test_ternary_activations_from_rest(session):
    x = tf.constant([-1.5, -1, -0.5, 0.4, 0.5, 1.5, 3, 3.5])
    values = ternarize_from_rest(x)
    found, gradient = session.run([values, tf.gradients(values, x)[0]])
    np.testing.assert_array_equal(found, [-1, -1, -1, 0, 1, 1, 1, 1])
    np.testing.assert_allclose(gradient, [0, 0.5, 1, 1, 1, 0, 0, 0])
