"""TensorLayer layers with quantised weights and activations; the quantisers are in twta.quantizers.

Each layer is given its quantiser and computes in the type of its input: float32, or bfloat16, in which -1, 0 and +1
are exact. Variables (latent weights, batch normalisation, thresholds) are always float32 and listed in `all_params`.
Images are NHWC. Each layer keeps its arguments, and the layer before it as `prev_layer`; training.blocks reads them.
Source: the published TWTA scripts (github.com/edwardzcl/TWTA).
"""
from twta import UsageError
from twta.graph import collectives
from twta.graph.fast import convolve, factors, type_of_sums
from twta.graph.tf1 import tf, tl
from twta.graph.variables import get_variable, update_moving
from twta.quantizers import full_precision, ternarize_activations, ternarize_from_rest, ternarize_weights

EPSILON = 1e-5  # added to the variance


class Conv2dLayer(tl.layers.Layer):
    """A convolution without bias, with quantised weights W.

    prev_layer  a layer with outputs [batch, height, width, channels]
    groups      G > 1: group g reads the interleaved input channels g, g + G, g + 2G, ...; the outputs are ordered
                group by group, so that the layer also shuffles channels
    W           [filter_size, filter_size, channels / groups, n_filter], truncated normal, stddev 0.02
    exact       sum in float64, output float32: sums of real-valued products then do not depend on the machine, unless
                a sum is within 2 ** -53 of a tie (sums of ternary products never depend on it)
    border      value of the cells that SAME padding adds
    outputs     [batch, height', width', n_filter]

    Raises ValueError if channels or n_filter is not a multiple of groups.
    """

    def __init__(self, prev_layer, n_filter, filter_size, stride=1, padding='SAME', groups=1,
                 quantizer=ternarize_weights, exact=False, border=0, name='conv'):
        super().__init__(prev_layer=prev_layer, name=name)
        self.prev_layer, self.stride, self.padding, self.groups = prev_layer, stride, padding, groups
        self.border, x = border, prev_layer.outputs
        self.inputs, channels = x, int(x.shape[-1])
        if channels % groups or n_filter % groups:
            raise ValueError(f'{name}: {channels} channels and {n_filter} filters do not divide into {groups} groups')
        with tf.variable_scope(name):
            shape = [filter_size, filter_size, channels // groups, n_filter]
            weights = get_variable('W', shape, tf.truncated_normal_initializer, stddev=0.02)
            self.quantized = quantizer(weights.value(), groups)
            x = tf.cast(x, tf.float64) if exact else x
            sums = convolve(*factors(x, self.quantized), stride, padding, groups, border)
            self.outputs = tf.cast(sums, tf.float32 if exact else x.dtype)
        self.all_layers.append(self.outputs)
        self.all_params.append(weights)


class PoolLayer(tl.layers.Layer):
    """Pooling without weights; kind is 'max' or 'average'.

    prev_layer  a layer with outputs [batch, height, width, channels]
    outputs     [batch, height', width', channels], as of a convolution with this filter_size, stride and padding

    Raises UsageError if an average would include padding: TensorFlow leaves padding out of averages.
    """

    def __init__(self, prev_layer, filter_size, stride, padding, kind, name='pool'):
        super().__init__(prev_layer=prev_layer, name=name)
        self.prev_layer, self.filter_size, self.stride, self.padding, self.kind = (
            prev_layer, filter_size, stride, padding, kind)
        x = self.inputs = prev_layer.outputs
        tiled = filter_size == stride and not x.shape[1] % stride and not x.shape[2] % stride
        if kind == 'average' and padding == 'SAME' and not tiled:
            raise UsageError(f'--pooling average: {name} would average over a border; use --pooling conv or max')
        with tf.name_scope(name):
            pool = tf.nn.max_pool if kind == 'max' else tf.nn.avg_pool
            self.outputs = tf.cast(pool(tf.cast(x, type_of_sums(x.dtype)), filter_size, stride, padding), x.dtype)
        self.all_layers.append(self.outputs)


class DenseLayer(tl.layers.Layer):
    """A dense layer without bias, with quantised weights W.

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
            self.outputs = tf.cast(tf.matmul(*factors(x, self.quantized)), x.dtype)
        self.all_layers.append(self.outputs)
        self.all_params.append(weights)


class BatchNormLayer(tl.layers.Layer):
    """Batch normalisation (arXiv:1502.03167, section 3): gamma * (x - mean) / sqrt(variance + 1e-5) + beta, fused.

    prev_layer  a layer with outputs [batch, height, width, channels] or [batch, channels]
    is_train    True: the moments of the batch, and tf.GraphKeys.UPDATE_OPS gets the updates of the moving moments
                (decay 0.9, biased variance); False: the moving moments. The batch is what this process computes or,
                if the graph has collectives.OF_BATCH_NORM, that of all workers
    beta, gamma, moving_mean, moving_variance    [channels] each, in this order in all_params; beta begins at beta_init
    """

    def __init__(self, prev_layer, is_train, name='bn', beta_init=0):
        super().__init__(prev_layer=prev_layer, name=name)
        self.prev_layer, self.beta_init = prev_layer, beta_init
        x = self.inputs = prev_layer.outputs
        shape = [int(x.shape[-1])]
        with tf.variable_scope(name):
            self.beta = get_variable('beta', shape, tf.constant_initializer, value=beta_init)
            self.gamma = get_variable('gamma', shape, tf.random_normal_initializer, mean=1.0, stddev=0.002)
            self.moving_mean = get_variable('moving_mean', shape, tf.zeros_initializer, trainable=False)
            self.moving_variance = get_variable('moving_variance', shape, tf.ones_initializer, trainable=False)
            if x.dtype == tf.float64:  # in evaluation; in two operations that any program can repeat bit for bit
                scale = tf.cast(self.gamma, x.dtype) * tf.rsqrt(tf.cast(self.moving_variance, x.dtype) + EPSILON)
                self.outputs = x * scale + (tf.cast(self.beta, x.dtype) - tf.cast(self.moving_mean, x.dtype) * scale)
            elif is_train and tf.get_collection(collectives.OF_BATCH_NORM):
                self.outputs = self.across_workers(x)
            else:
                self.outputs = self.fused(x, is_train)
        self.all_layers.append(self.outputs)
        self.all_params.extend([self.beta, self.gamma, self.moving_mean, self.moving_variance])

    def fused(self, x, is_train):
        channels = int(x.shape[-1])
        image = tf.cast(x if x.shape.rank == 4 else tf.reshape(x, [-1, 1, 1, channels]), type_of_sums(x.dtype))
        mean, variance = ([], []) if is_train else (self.moving_mean, self.moving_variance)
        # not tf.nn.fused_batch_norm, which raises epsilon to 1.001e-5
        y, batch_mean, batch_variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=image, scale=self.gamma, offset=self.beta, mean=mean, variance=variance, epsilon=EPSILON,
            is_training=is_train)
        if is_train:
            n = tf.cast(tf.size(image) // channels, tf.float32)  # the fused variance is over n - 1, ours over n
            update_moving(self.moving_mean, batch_mean)
            update_moving(self.moving_variance, batch_variance * ((n - 1) / n))
        return tf.cast(y if x.shape.rank == 4 else tf.reshape(y, [-1, channels]), x.dtype)

    def across_workers(self, x):
        y, mean, variance = collectives.normalize(x, self.gamma, self.beta, self.moving_mean, EPSILON)
        update_moving(self.moving_mean, mean)
        update_moving(self.moving_variance, variance)
        return y


class ActivationLayer(tl.layers.Layer):
    """An activation: ternarize_activations, tf.nn.relu, ...; outputs have the shape of the inputs.

    threshold    source of the threshold d of ternarize_activations; None for other activations
                 'fixed'      d = value
                 'trainable'  d is a variable: it starts at value, is trained with the weights and stays in [0.01, 0.99]
                 'runtime'    in training, d = value * mean|x| of the batch, without a gradient through d; in
                              evaluation, d is the moving average (decay 0.9)
    d            the variable or moving average, if any, in all_params
    """

    def __init__(self, prev_layer, activation=ternarize_activations, threshold=None, value=None, is_train=False,
                 name='activation'):
        super().__init__(prev_layer=prev_layer, name=name)
        self.prev_layer, self.activation = prev_layer, activation
        x = self.inputs = prev_layer.outputs
        with tf.variable_scope(name):
            d = value
            if threshold in ('trainable', 'runtime'):
                d = get_variable('d', [], tf.constant_initializer, threshold == 'trainable',
                                 lambda d: tf.clip_by_value(d, 0.01, 0.99), value=value)
                self.all_params.append(d)
            if threshold == 'runtime' and is_train:
                size, = collectives.means([tf.reduce_mean(tf.abs(tf.cast(x, tf.float32)))])
                moving, d = d, tf.stop_gradient(value * size)
                update_moving(moving, d)
            self.outputs = activation(x) if threshold is None else activation(x, d)
        self.all_layers.append(self.outputs)


class Network:
    """A network, written like its architecture string: each call adds a layer, batch normalisation and activation.

    x           images [batch, height, width, channels], float32 or bfloat16
    is_train    see BatchNormLayer
    weights     quantiser of all layers but the first (stem, encode) and the last (classify)
    activation  quantiser after each batch normalisation
    threshold, threshold_value    of ternary activations, see ActivationLayer
    pooling     'conv': pool() is a convolution (learned); 'max', 'average': it has no weights if it keeps the channels
    rest        -1: activations are ternarize_from_rest after betas that begin at -1, ternary layers pad with -1; 0: as
                published
    beta_init   first value of the betas before quantised activations; 0: as published; with rest -1: -1
    quantize    'both'; 'weights', with ReLU; 'activations', with full-precision weights; 'nothing'
    exact       sum in float64 up to the encoder's sums, see Conv2dLayer; None: in evaluation
    """

    def __init__(self, x, is_train, weights=ternarize_weights, activation=ternarize_activations, threshold=None,
                 threshold_value=None, pooling='conv', rest=0, beta_init=0, quantize='both', exact=None):
        weights = full_precision if quantize in ('activations', 'nothing') else weights
        if quantize in ('weights', 'nothing'):
            activation, threshold, rest, beta_init = tf.nn.relu, None, 0, 0
        self.net, self.exact = tl.layers.InputLayer(x, name='images'), not is_train if exact is None else exact
        self.is_train, self.weights, self.pooling, self.rest = is_train, weights, pooling, rest
        self.activation = ternarize_from_rest if rest else activation
        self.threshold, self.beta_init, self.depth = (threshold, threshold_value), rest or beta_init, 0

    def stem(self, n_filter, filter_size):
        """Add a convolution before the encoder, e.g. 32C3, with full-precision weights and ReLU."""
        if self.exact:
            self.net = tl.layers.InputLayer(tf.cast(self.net.outputs, tf.float64), name='images')
        self.depth += 1
        name = f'stem{self.depth}'
        layer = Conv2dLayer(self.net, n_filter, filter_size, quantizer=full_precision, name=name)
        layer = BatchNormLayer(layer, self.is_train, f'{name}/bn')
        self.net = ActivationLayer(layer, tf.nn.relu, name=f'{name}/activation')

    def encode(self, n_filter, filter_size, padding='SAME'):
        """Add the first convolution, e.g. 32C4, with full-precision weights: it turns images into activations."""
        self.add('conv', Conv2dLayer, n_filter, filter_size, 1, padding, 1, full_precision, self.exact)

    def conv(self, n_filter, filter_size, padding='SAME', stride=1, groups=1, kind='conv'):
        """Add a convolution, e.g. 64C4 (64 filters of 4*4), or 512C3/16 in 16 groups."""
        self.add(kind, Conv2dLayer, n_filter, filter_size, stride, padding, groups, self.weights, border=self.rest)

    def pool(self, n_filter, filter_size, padding='VALID', groups=1):
        """Add a pooling layer, e.g. 2P2: a 2*2 convolution with stride 2 (learned), or as --pooling says."""
        if self.pooling == 'conv' or n_filter != self.net.outputs.shape[-1]:
            self.conv(n_filter, filter_size, padding, stride=2, groups=groups, kind='pool')
        else:
            self.add('pool', PoolLayer, filter_size, 2, padding, self.pooling)

    def dense(self, n_units):
        """Add a dense layer, e.g. 512, on the flattened map."""
        self.flat()
        self.add('dense', DenseLayer, n_units, self.weights)

    def classify(self, n_classes, batch_norm=True):
        """Add the last dense layer, with full-precision weights and no activation; return it: it gives the logits."""
        net = DenseLayer(self.flat(), n_classes, full_precision, 'classify')
        return BatchNormLayer(net, self.is_train, 'classify/bn') if batch_norm else net

    def add(self, kind, layer, *arguments, **named):
        """Add a layer of a class, with these arguments, then batch normalisation and activation."""
        self.depth += 1
        name = f'{kind}{self.depth}'
        net = layer(self.net, *arguments, **named, name=name)
        net = BatchNormLayer(net, self.is_train, f'{name}/bn', self.beta_init)
        self.net = ActivationLayer(net, self.activation, *self.threshold, self.is_train, f'{name}/activation')

    def flat(self):
        if self.net.outputs.shape.rank == 4:
            before, self.net = self.net, tl.layers.FlattenLayer(self.net, name='flatten')
            self.net.prev_layer = before
        return self.net
