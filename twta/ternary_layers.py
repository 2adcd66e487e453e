"""Ternary layers: the quantisers, and TensorLayer layers that compute with them.

A quantiser is a function with its forward and its backward rule side by side. A layer takes the quantiser it uses and
computes in the type of its input: float32, or bfloat16, in which -1, 0 and +1 are exact. The variables (latent
weights, batch normalisation) are float32 in either case, and `all_params` holds them. Images are NHWC. Each layer
keeps the one before it as `prev_layer`, and what it was built with: twta.packing reads a network so.

Sources: the published TWTA scripts (github.com/edwardzcl/TWTA); thresholds of the weights from "Ternary Weight
Networks" (arXiv:1605.04711), section 2.2, without its scale factor; straight-through gradients from
"Estimating or Propagating Gradients Through Stochastic Neurons" (arXiv:1308.3432), section 4.
"""
from twta.fast import compiled, convolve
from twta.tf1 import tf, tl

DECAY = 0.9  # of the moving moments
EPSILON = 1e-5  # added to the variance


# ----------------------------------------------------------------------------------------------------------------------
# Quantisers


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
def ternarize_activations(x):
    """Ternary activations x' in {-1, 0, +1} of batch-normalised sums x.

    forward   x' = +1 where x >= 0.5, -1 where x <= -0.5, else 0
    backward  dL/dx = dL/dx' where |x| <= 1, else 0: the gradient of the clip to [-1, 1] that comes before
    """
    return ternarize(x, tf.constant(0.5, x.dtype)), lambda gradient: pass_unclipped(x, gradient)


@compiled
def ternarize(x, d):
    """+1 where x >= d, -1 where x <= -d, else 0: the forward rule of both."""
    return tf.cast(x >= d, x.dtype) - tf.cast(x <= -d, x.dtype)


@compiled
def pass_unclipped(x, gradient):
    """The gradient where |x| <= 1, else 0: the backward rule of the activations."""
    return tf.where(tf.abs(x) <= 1, gradient, tf.zeros_like(gradient))


# ----------------------------------------------------------------------------------------------------------------------
# Layers


def get_variable(name, shape, initializer, trainable=True, **arguments):
    """A float32 variable of the current scope; its initial value depends on the graph's seed and its position only.

    TensorFlow alone would count every operation before it, so that float32 and bfloat16 would not start alike.
    """
    if initializer is not tf.zeros_initializer and initializer is not tf.ones_initializer:
        arguments['seed'] = len(tf.global_variables())
    return tf.get_variable(name, shape, tf.float32, initializer(**arguments), trainable=trainable)


class Conv2dLayer(tl.layers.Layer):
    """Convolution without a bias; its weights W go through the quantiser.

    prev_layer  a layer with outputs [batch, height, width, channels]
    groups      G > 1: group g reads the interleaved input channels g, g + G, g + 2G, ... and the outputs of the
                groups follow each other in order, so that the layer also shuffles channels
    W           [filter_size, filter_size, channels / groups, n_filter], truncated normal, stddev 0.02
    exact       sum in float64: real-valued products then have the same sum, once rounded to float32, in any order of
                summation, on any machine, but where it falls within 2 ** -53 of a tie (ternary ones always have it)
    outputs     [batch, height', width', n_filter]

    Raises ValueError where channels or n_filter is not a multiple of groups.
    """

    def __init__(self, prev_layer, n_filter, filter_size, stride=1, padding='SAME', groups=1,
                 quantizer=ternarize_weights, exact=False, name='conv'):
        super().__init__(prev_layer=prev_layer, name=name)
        self.prev_layer, self.stride, self.padding, self.groups = prev_layer, stride, padding, groups
        x = self.inputs = prev_layer.outputs
        channels = int(x.shape[-1])
        if channels % groups or n_filter % groups:
            raise ValueError(f'{name}: {channels} channels and {n_filter} filters do not divide into {groups} groups')
        with tf.variable_scope(name):
            shape = [filter_size, filter_size, channels // groups, n_filter]
            weights = get_variable('W', shape, tf.truncated_normal_initializer, stddev=0.02)
            self.quantized = quantizer(weights.value(), groups)
            dtype = tf.float64 if exact else x.dtype
            sums = convolve(tf.cast(x, dtype), tf.cast(self.quantized, dtype), stride, padding, groups)
            self.outputs = tf.cast(sums, x.dtype)
        self.all_layers.append(self.outputs)
        self.all_params.append(weights)


class DenseLayer(tl.layers.Layer):
    """Dense layer without a bias; its weights W go through the quantiser.

    prev_layer  a layer with outputs [batch, n_in]
    W           [n_in, n_units], truncated normal, stddev 0.1
    outputs     [batch, n_units]
    """

    def __init__(self, prev_layer, n_units, quantizer=ternarize_weights, name='dense'):
        super().__init__(prev_layer=prev_layer, name=name)
        self.prev_layer = prev_layer
        x = self.inputs = prev_layer.outputs
        with tf.variable_scope(name):
            weights = get_variable('W', [int(x.shape[-1]), n_units], tf.truncated_normal_initializer, stddev=0.1)
            self.quantized = quantizer(weights.value())
            self.outputs = tf.matmul(x, tf.cast(self.quantized, x.dtype))
        self.all_layers.append(self.outputs)
        self.all_params.append(weights)


class BatchNormLayer(tl.layers.Layer):
    """Batch normalisation (arXiv:1502.03167, section 3): gamma * (x - mean) / sqrt(variance + 1e-5) + beta, fused.

    prev_layer  a layer with outputs [batch, height, width, channels] or [batch, channels]
    is_train    True: the moments of the batch, and tf.GraphKeys.UPDATE_OPS gets the updates of the moving moments
                (decay 0.9, biased variance); False: the moving moments
    params      beta, gamma, moving_mean, moving_variance, [channels] each, in this order in all_params
    """

    def __init__(self, prev_layer, is_train, name='bn'):
        super().__init__(prev_layer=prev_layer, name=name)
        self.prev_layer = prev_layer
        x = self.inputs = prev_layer.outputs
        channels = int(x.shape[-1])
        with tf.variable_scope(name):
            beta = get_variable('beta', [channels], tf.zeros_initializer)
            gamma = get_variable('gamma', [channels], tf.random_normal_initializer, mean=1.0, stddev=0.002)
            mean = get_variable('moving_mean', [channels], tf.zeros_initializer, trainable=False)
            variance = get_variable('moving_variance', [channels], tf.ones_initializer, trainable=False)
            image = x if x.shape.rank == 4 else tf.reshape(x, [-1, 1, 1, channels])
            moments = ([], []) if is_train else (mean, variance)
            # not tf.nn.fused_batch_norm, which raises epsilon to 1.001e-5
            y, batch_mean, batch_variance, *_ = tf.raw_ops.FusedBatchNormV3(
                x=image, scale=gamma, offset=beta, mean=moments[0], variance=moments[1],
                epsilon=EPSILON, is_training=is_train)
            if is_train:
                n = tf.cast(tf.size(image) // channels, tf.float32)  # the fused variance is over n - 1, ours over n
                for moving, batch in ((mean, batch_mean), (variance, batch_variance * ((n - 1) / n))):
                    tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, moving.assign(DECAY * moving + (1 - DECAY) * batch))
            self.outputs = y if x.shape.rank == 4 else tf.reshape(y, [-1, channels])
        self.all_layers.append(self.outputs)
        self.all_params.extend([beta, gamma, mean, variance])


class ActivationLayer(tl.layers.Layer):
    """An activation: ternarize_activations, tf.nn.relu, ...; outputs have the shape of the inputs."""

    def __init__(self, prev_layer, activation=ternarize_activations, name='activation'):
        super().__init__(prev_layer=prev_layer, name=name)
        self.prev_layer, self.activation = prev_layer, activation
        self.inputs = prev_layer.outputs
        with tf.name_scope(name):
            self.outputs = activation(self.inputs)
        self.all_layers.append(self.outputs)


# ----------------------------------------------------------------------------------------------------------------------
# Networks


class Network:
    """Writes a network as its architecture string: one call a token, each a layer, batch normalisation, activation.

    x           images [batch, height, width, channels], float32 or bfloat16
    is_train    see BatchNormLayer
    weights     the quantiser of every layer but the first (encode) and the last (classify)
    activation  the quantiser after every batch normalisation
    """

    def __init__(self, x, is_train, weights=ternarize_weights, activation=ternarize_activations):
        self.net = tl.layers.InputLayer(x, name='images')
        self.is_train, self.weights, self.activation = is_train, weights, activation
        self.depth = 0

    def encode(self, n_filter, filter_size, padding='SAME'):
        """The first convolution, e.g. 32C4, with full-precision weights: it turns images into activations."""
        self.conv(n_filter, filter_size, padding, weights=full_precision, exact=not self.is_train)

    def conv(self, n_filter, filter_size, padding='SAME', stride=1, groups=1, kind='conv', weights=None, exact=False):
        """A convolution, e.g. 64C4 (64 filters of 4*4), or 512C3/16 in 16 groups."""
        name = self.next_name(kind)
        self.activate(Conv2dLayer(self.net, n_filter, filter_size, stride, padding, groups,
                                  weights or self.weights, exact, name), name)

    def pool(self, n_filter, filter_size, padding='VALID', groups=1):
        """Learned pooling, e.g. 2P2: a convolution 2*2 with stride 2."""
        self.conv(n_filter, filter_size, padding, stride=2, groups=groups, kind='pool')

    def dense(self, n_units):
        """A dense layer, e.g. 512, on the flattened map."""
        name = self.next_name('dense')
        self.activate(DenseLayer(self.flat(), n_units, self.weights, name), name)

    def classify(self, n_classes, batch_norm=True):
        """The last dense layer, full-precision weights, no activation; returned, for its outputs are the logits."""
        net = DenseLayer(self.flat(), n_classes, full_precision, 'classify')
        return BatchNormLayer(net, self.is_train, 'classify/bn') if batch_norm else net

    def next_name(self, kind):
        self.depth += 1
        return f'{kind}{self.depth}'

    def activate(self, layer, name):
        layer = BatchNormLayer(layer, self.is_train, f'{name}/bn')
        self.net = ActivationLayer(layer, self.activation, f'{name}/activation')

    def flat(self):
        if self.net.outputs.shape.rank == 2:
            return self.net
        layer = tl.layers.FlattenLayer(self.net, name='flatten')
        layer.prev_layer = self.net
        return layer
