"""The quantisers: each a function with its forward and its backward rule side by side.

Weights w are [..., filters], in a grouped layer group by group. Activations x are batch-normalised sums of any shape;
a quantiser of activations tells in `levels` the values that it gives, ascending. All compute in the type of their
input.

Sources: the published scripts, github.com/edwardzcl/TWTA (ternary), TWBA_Nets (binary) and Spatio_temporal_SNNs
(levels); thresholds of the weights from "Ternary Weight Networks" (arXiv:1605.04711), section 2.2, without its scale
factor; straight-through gradients from "Estimating or Propagating Gradients Through Stochastic Neurons"
(arXiv:1308.3432), section 4.
"""
from twta.graph.fast import compiled
from twta.graph.tf1 import tf

# ----------------------------------------------------------------------------------------------------------------------
# Weights


def full_precision(w, groups=1):
    """The weights themselves: w' = w, dL/dw = dL/dw'."""
    return w


def ternarize_weights(w, groups=1):
    """Ternary weights w' in {-1, 0, +1} of latent weights w.

    forward   w' = +1 where w >= d, -1 where w <= -d, else 0;  d = 0.7 * mean|w|, no scale factor
    backward  dL/dw = dL/dw', nothing through d

    w is [..., filters]. In a grouped layer the filters stand group by group, and each group has a threshold of its
    own: the mean is over that group's weights.
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
    """Binary weights w' in {-1, +1} of latent weights w.

    forward   w' = +1 where w >= 0, else -1
    backward  dL/dw = dL/dw', clipped to [-1, 1]
    """
    return straight_through_sign(w)


# ----------------------------------------------------------------------------------------------------------------------
# Activations


def ternarize_activations(x, d=0.5):
    """Ternary activations x' in {-1, 0, +1} of batch-normalised sums x; d may be a scalar tensor.

    forward   x' = +1 where x >= d, -1 where x <= -d, else 0
    backward  dL/dx = dL/dx' where |x| <= 1, else 0: the gradient of the clip to [-1, 1] that comes before
              dL/dd = -sum(sign(x) * dL/dx): to that gradient the step at d rises over all of [0, 1], the one at -d
              over [-1, 0], and a higher d moves them apart
    """

    @tf.custom_gradient
    def straight_through(x, d):
        def backward(gradient):
            passed = pass_unclipped(x, gradient)
            return passed, -tf.reduce_sum(tf.sign(x) * passed)

        return ternarize(x, d), backward

    return straight_through(x, tf.cast(d, x.dtype))


ternarize_activations.levels = -1, 0, 1


@tf.custom_gradient
def binarize_activations(x):
    """Binary activations x' in {0, 1}: spikes.

    forward   x' = 1 where x >= 0, else 0
    backward  dL/dx = dL/dx' / 2 clipped to [-1, 1], where |x| <= 1, else 0: x' = (sign(x) + 1) / 2
    """
    return tf.cast(x >= 0, x.dtype), lambda gradient: pass_unclipped(x, tf.clip_by_value(gradient / 2, -1, 1))


binarize_activations.levels = 0, 1


@tf.custom_gradient
def three_level_activations(x):
    """Activations x' in {0, 0.5, 1}: what the published TWBA_Nets code computes where its text says {0, 1}.

    forward   x' = 1 where x >= 0.4, 0 where x <= -0.4, else 0.5
    backward  dL/dx = dL/dx' clipped to [-2, 2], where |x| <= 1, else 0
    """
    return (ternarize(x, tf.constant(0.4, x.dtype)) + 1) / 2, \
        lambda gradient: pass_unclipped(x, tf.clip_by_value(gradient, -2, 2))


three_level_activations.levels = 0, 0.5, 1


def median_quantizer(k, B):
    """The quantiser of Spatio_temporal_SNNs: activations x' in {0, 1/n, 2/n, ..., B} of x, n = 2 ** k.

    forward   x' = floor(n * clip(x, 0, B) + 0.5 + 1e-5) / n: i/n where n * x is in [i - 0.5, i + 0.5)
    backward  dL/dx = dL/dx' where 0 < x <= B, else 0
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
    """+1 where x >= d, -1 where x <= -d, else 0: the forward rule of both."""
    return tf.cast(x >= d, x.dtype) - tf.cast(x <= -d, x.dtype)


@compiled
def pass_unclipped(x, gradient):
    """The gradient where |x| <= 1, else 0: the backward rule of the activations."""
    return tf.where(tf.abs(x) <= 1, gradient, tf.zeros_like(gradient))
