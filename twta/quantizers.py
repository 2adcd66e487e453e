"""The quantisers: each function has its forward and its backward rule side by side.

Weights w are [..., filters]; in a grouped layer, the filters are ordered group by group. Activations x are
batch-normalised sums of any shape. The `levels` of an activation quantiser are its output values, ascending. Each
quantiser computes in the type of its input.

Sources: the published scripts, github.com/edwardzcl/TWTA (ternary), TWBA_Nets (binary) and Spatio_temporal_SNNs
(levels). Weight thresholds: "Ternary Weight Networks" (arXiv:1605.04711), section 2.2, without its scale factor.
Straight-through gradients: "Estimating or Propagating Gradients Through Stochastic Neurons" (arXiv:1308.3432),
section 4.
"""
from twta.graph.fast import compiled
from twta.graph.tf1 import tf

# ----------------------------------------------------------------------------------------------------------------------
# Weights


def full_precision(w, groups=1):
    """Return the weights unchanged: w' = w, dL/dw = dL/dw'."""
    return w


def ternarize_weights(w, groups=1):
    """Return ternary weights w' in {-1, 0, +1} for latent weights w.

    forward   w' = +1 if w >= d, -1 if w <= -d, else 0;  d = 0.7 * mean|w|, no scale factor
    backward  dL/dw = dL/dw', no gradient through d

    Each group of a grouped layer has its own d, from the mean over its own weights.
    """

    @tf.custom_gradient
    def straight_through(w):
        by_group = tf.reshape(w, [-1, groups, w.shape[-1] // groups])
        d = 0.7 * tf.reduce_mean(tf.abs(by_group), axis=[0, 2], keepdims=True)
        return tf.reshape(ternarize(by_group, d), w.shape), lambda gradient: gradient

    return straight_through(w)


@tf.custom_gradient
def straight_through_sign(w):
    return tf.where(w >= 0, tf.ones_like(w), -tf.ones_like(w)), lambda gradient: tf.clip_by_value(gradient, -1, 1)


def binarize_weights(w, groups=1):
    """Return binary weights w' in {-1, +1} for latent weights w.

    forward   w' = +1 if w >= 0, else -1
    backward  dL/dw = dL/dw', clipped to [-1, 1]
    """
    return straight_through_sign(w)


# ----------------------------------------------------------------------------------------------------------------------
# Activations


def ternarize_activations(x, d=0.5, passed=None):
    """Return ternary activations x' in {-1, 0, +1} for batch-normalised sums x; d may be a scalar tensor.

    passed    function of x and dL/dx' that returns dL/dx; None: pass_unclipped

    forward   x' = +1 if x >= d, -1 if x <= -d, else 0
    backward  dL/dx = dL/dx' if |x| <= 1, else 0: the gradient of a clip to [-1, 1] before the steps; or what `passed`
              returns
              dL/dd = -sum(sign(x) * dL/dx): this gradient treats the step at d as a ramp over [0, 1], the step at -d
              as a ramp over [-1, 0]; a higher d moves the ramps apart
    """
    passed = passed or pass_unclipped

    @tf.custom_gradient
    def straight_through(x, d):
        def backward(gradient):
            by_x = passed(x, gradient)
            return by_x, -tf.reduce_sum(tf.sign(x) * by_x)

        return ternarize(x, d), backward

    return straight_through(x, tf.cast(d, x.dtype))


ternarize_activations.levels = -1, 0, 1


def ternarize_from_rest(x, d=0.5):
    """Return ternary activations as a ReLU in three steps: -1 stands for 0, the state of rest. See Network on `rest`.

    forward   as in ternarize_activations
    backward  dL/dx = dL/dx' * clip(1.5 - |x|, 0, 1): around each of the two steps a triangle of half width 1, as in
              surrogate gradients of spiking neurons (arXiv:1901.09948)
    """
    return ternarize_activations(x, d, passed=pass_near_steps)


ternarize_from_rest.levels = ternarize_activations.levels


@tf.custom_gradient
def binarize_activations(x):
    """Return binary activations x' in {0, 1}: spikes.

    forward   x' = 1 if x >= 0, else 0
    backward  dL/dx = dL/dx' / 2 clipped to [-1, 1] if |x| <= 1, else 0: x' = (sign(x) + 1) / 2
    """
    return tf.cast(x >= 0, x.dtype), lambda gradient: pass_unclipped(x, tf.clip_by_value(gradient / 2, -1, 1))


binarize_activations.levels = 0, 1


@tf.custom_gradient
def three_level_activations(x):
    """Return activations x' in {0, 0.5, 1}: the published TWBA_Nets code computes these, although its text says {0, 1}.

    forward   x' = 1 if x >= 0.4, 0 if x <= -0.4, else 0.5
    backward  dL/dx = dL/dx' clipped to [-2, 2] if |x| <= 1, else 0
    """
    return (ternarize(x, tf.constant(0.4, x.dtype)) + 1) / 2, \
        lambda gradient: pass_unclipped(x, tf.clip_by_value(gradient, -2, 2))


three_level_activations.levels = 0, 0.5, 1


def median_quantizer(k, B):
    """Return the quantiser of Spatio_temporal_SNNs: activations x' in {0, 1/n, 2/n, ..., B} for x, n = 2 ** k.

    forward   x' = floor(n * clip(x, 0, B) + 0.5 + 1e-5) / n: i/n if n * x is in [i - 0.5, i + 0.5)
    backward  dL/dx = dL/dx' if 0 < x <= B, else 0
    """
    n = 2 ** k

    @tf.custom_gradient
    def quantize(x):
        def backward(gradient):
            return tf.where((x > 0) & (x <= B), gradient, tf.zeros_like(gradient))

        return tf.floor(n * tf.clip_by_value(x, 0, B) + (0.5 + 1e-5)) / n, backward

    quantize.levels = tuple(i / n for i in range(n * B + 1))
    return quantize


@compiled
def ternarize(x, d):
    """Return +1 if x >= d, -1 if x <= -d, else 0: the forward rule of ternary weights and activations."""
    return tf.cast(x >= d, x.dtype) - tf.cast(x <= -d, x.dtype)


@compiled
def pass_unclipped(x, gradient):
    """Return the gradient if |x| <= 1, else 0: the backward rule of the activations."""
    return tf.where(tf.abs(x) <= 1, gradient, tf.zeros_like(gradient))


@compiled
def pass_near_steps(x, gradient):
    """Return the gradient times clip(1.5 - |x|, 0, 1): the backward rule of ternarize_from_rest."""
    return gradient * tf.clip_by_value(1.5 - tf.abs(x), 0, 1)
