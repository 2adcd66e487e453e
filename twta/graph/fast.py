"""The layers' arithmetic in the form that is fastest on a CPU.

Sums of ternary values equal those of TensorFlow's own kernels bit for bit; other sums agree to rounding. Besides the
products themselves, two things cost most in a training step (figures: benchmarks/README.md):

filter gradients       TensorFlow's bfloat16 kernel (oneDNN) is slow if the rows of a feature map are short. It takes up
                       to twenty times as long as one matrix product with the same result.
passes over memory     An activation is compared, cast and subtracted in five operations. XLA compiles them into one.

On a GPU, TensorFlow's own kernels do everything: XLA needs parts of CUDA that TensorFlow does not.

Some processors lack two things, which this module replaces:

oneDNN                 Without oneDNN, TensorFlow on a CPU has no gradient of grouped convolutions: each group becomes a
                       separate convolution. TensorFlow's input gradient is slow: a convolution replaces it.
bfloat16               If the processor cannot multiply bfloat16, layers still round inputs and sums to bfloat16, but
                       multiply and add in float32. TensorFlow's own kernels would add in bfloat16: ten times as slow,
                       and less exact.
"""
import numpy as np

from twta.graph.session import find_gpus, multiplies_bfloat16
from twta.graph.tf1 import ONEDNN, tf

SHORT_ROW = 8  # in bfloat16, a matrix product is faster if the output has fewer columns; in float32 it is not
MANY_CHANNELS = 256  # without oneDNN, matrix products are faster from this number of channels on
MANY_FILTERS = 128  # without oneDNN, convolving with flipped filters is faster from this number of filters on
ON_CPU = not find_gpus()
BFLOAT16_IS_EMULATED = ON_CPU and not multiplies_bfloat16(None)


def compiled(function):
    """Return the function of tensors, compiled by XLA on a CPU: 0.1 s per shape, at the first run."""
    return tf.function(function, jit_compile=True, autograph=False) if ON_CPU else function


def type_of_sums(dtype):
    """Return the type in which layers multiply and add values of `dtype`: float32 if bfloat16 is emulated."""
    return tf.float32 if BFLOAT16_IS_EMULATED and dtype == tf.bfloat16 else dtype


def factors(x, w):
    """Return x and w in the type in which layers multiply them; w is first rounded to the type of x."""
    dtype = type_of_sums(x.dtype)
    return tf.cast(x, dtype), tf.cast(tf.cast(w, x.dtype), dtype)


def convolve(x, w, stride, padding, groups=1, border=0):
    """Return the convolution of x [batch, height, width, channels] with w [size, size, channels / groups, filters].

    Group g of G reads the channels g, g + G, g + 2G, ...; the filters are ordered group by group. Only the batch size
    of x may be unknown. SAME padding adds cells that hold `border`.
    """
    size = int(w.shape[0])
    if border and padding == 'SAME':
        x, padding = add_border(x, size, stride, border), 'VALID'
    height, width, channels = x.shape.as_list()[1:]
    tiled = size == stride and not height % size and not width % size
    whole = padding == 'VALID' and size == height == width
    if ON_CPU and (tiled or whole) and (ONEDNN or channels >= MANY_CHANNELS):
        return multiply_patches(x, w, groups)
    if groups > 1:  # TensorFlow's groups are blocks of adjacent channels
        x = tf.reshape(x, [-1, height, width, channels // groups, groups])
        x = tf.reshape(tf.transpose(x, [0, 1, 2, 4, 3]), [-1, height, width, channels])
        if ON_CPU and not ONEDNN:
            parts = zip(tf.split(x, groups, axis=-1), tf.split(w, groups, axis=-1), strict=True)
            return tf.concat([convolve(*part, stride, padding) for part in parts], axis=-1)
    in_a_row = -(-width // stride) if padding == 'SAME' else (width - size) // stride + 1
    multiplied = ON_CPU and groups == 1 and in_a_row < SHORT_ROW and x.dtype == tf.bfloat16
    flipped = ON_CPU and stride == 1 and not ONEDNN and w.shape[3] >= MANY_FILTERS
    if multiplied or flipped:
        return convolve_with_gradients(x, w, stride, padding, multiplied, flipped)
    return tf.nn.conv2d(x, w, [1, stride, stride, 1], padding)


def add_border(x, size, stride, border):
    """Return the images x with the cells of SAME padding around them, as a convolution of this size and stride has."""
    totals = [max((-(-side // stride) - 1) * stride + size - side, 0) for side in x.shape.as_list()[1:3]]
    sides = [[total // 2, total - total // 2] for total in totals]
    return tf.pad(x, [[0, 0], *sides, [0, 0]], constant_values=tf.cast(border, x.dtype))


def multiply_patches(x, w, groups):
    """Return a convolution whose patches do not overlap, as one matrix product with a row per patch."""
    size, _, channels, filters = w.shape.as_list()
    rows, columns = (side // size for side in x.shape.as_list()[1:3])
    values = size * size * channels
    x = tf.reshape(x, [-1, rows, size, columns, size, channels, groups])
    x = tf.reshape(tf.transpose(x, [6, 0, 1, 3, 2, 4, 5]), [groups, -1, values])
    w = tf.transpose(tf.reshape(w, [values, groups, filters // groups]), [1, 0, 2])
    return tf.reshape(tf.transpose(tf.matmul(x, w), [1, 0, 2]), [-1, rows, columns, filters])


def convolve_with_gradients(x, w, stride, padding, multiplied, flipped):
    """Return tf.nn.conv2d of x and w, with other gradients.

    multiplied  compute the gradient by w as one matrix product, of patches and upstream gradient
    flipped     compute the gradient by x (stride 1) as a convolution of the upstream gradient with flipped filters;
                without oneDNN, this is up to twenty times as fast as TensorFlow's kernel
    """
    strides = [1, stride, stride, 1]

    @tf.custom_gradient
    def convolve(x, w):
        def gradient(upstream):
            by_x = (convolve_flipped(upstream, w, padding) if flipped
                    else tf.nn.conv2d_backprop_input(tf.shape(x), w, upstream, strides, padding))
            by_w = (filter_gradient(x, upstream, w.shape, stride) if multiplied
                    else tf.nn.conv2d_backprop_filter(x, w.shape, upstream, strides, padding))
            return by_x, by_w

        return tf.nn.conv2d(x, w, strides, padding), gradient

    return convolve(x, w)


def filter_gradient(x, upstream, shape, stride):
    """Return the gradient by filters of `shape`: the matrix product of the patches of x and the upstream gradients."""
    size, _, channels, filters = shape.as_list()
    rows, columns = upstream.shape.as_list()[1:3]
    values = tf.reshape(extract_patches(x, size, stride, rows, columns), [-1, size * size * channels])
    return tf.reshape(tf.matmul(values, tf.reshape(upstream, [-1, filters]), transpose_a=True), shape)


def convolve_flipped(upstream, w, padding):
    """Return the gradient by the input of a convolution with stride 1: a convolution with flipped filters."""
    size = int(w.shape[0])
    before, after = ((size - 1) // 2, size // 2) if padding == 'SAME' else (0, 0)  # zeros around the input
    around = [size - 1 - before, size - 1 - after]
    padded = tf.pad(upstream, [[0, 0], around, around, [0, 0]])
    return tf.nn.conv2d(padded, tf.transpose(tf.reverse(w, [0, 1]), [0, 1, 3, 2]), [1] * 4, 'VALID')


def extract_patches(x, size, stride, rows, columns):
    """Return the zero-padded input patch of each output pixel: [batch, rows * columns, size ** 2, channels].

    This equals tf.image.extract_patches, but gathers whole pixels and takes a fifth of the time.
    """
    height, width, channels = x.shape.as_list()[1:]
    missing = [max((count - 1) * stride + size - side, 0) for side, count in ((height, rows), (width, columns))]
    x = tf.pad(x, [[0, 0], *([zeros // 2, zeros - zeros // 2] for zeros in missing), [0, 0]])
    height, width = x.shape.as_list()[1:3]
    down, across = (np.arange(count)[:, np.newaxis] * stride + np.arange(size) for count in (rows, columns))
    inside = down[:, np.newaxis, :, np.newaxis] * width + across[np.newaxis, :, np.newaxis]
    first = height * width * tf.range(tf.shape(x)[0])[:, np.newaxis, np.newaxis]
    return tf.gather(tf.reshape(x, [-1, channels]), first + inside.reshape(rows * columns, -1).astype(np.int32))
