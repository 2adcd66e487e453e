"""The layers' arithmetic in the form in which a processor computes it fastest.

Sums of ternary values come out bit for bit as TensorFlow's own kernels give them, others to rounding. Beside the
products themselves two things cost most in a training step (benchmarks/README.md has the figures):

the filters' gradient  in bfloat16, TensorFlow's kernel for it (oneDNN) starves if the rows of a map are short: it takes
                       up to twenty times as long as the same products in one product of matrices
passes over memory     an activation is compared, cast and subtracted in five operations; XLA compiles them into one

None of it was tried on a GPU, where XLA wants parts of CUDA that TensorFlow does without: with one, TensorFlow's own
kernels do everything.

Two things are missing on some processors, and are made up for here:

oneDNN                 without it, TensorFlow has no gradient of a grouped convolution on a CPU: each group is a
                       convolution of its own; and the input's gradient is so slow that a convolution takes its place
bfloat16               if the processor does not multiply it, layers round their inputs and sums to bfloat16, as a
                       processor with bfloat16 does, but multiply and add in float32. TensorFlow's own kernels add in
                       bfloat16: ten times as slowly, and less exactly
"""
import numpy as np

from twta.graph.session import find_gpus, multiplies_bfloat16
from twta.graph.tf1 import ONEDNN, tf

SHORT_ROW = 8  # with fewer sums in a row of the output the product of matrices is faster, in bfloat16; not in float32
MANY_CHANNELS = 256  # without oneDNN, products of matrices are faster from so many channels on,
MANY_FILTERS = 128  # and turned filters from so many filters on
ON_CPU = not find_gpus()
BFLOAT16_IS_EMULATED = ON_CPU and not multiplies_bfloat16(None)


def compiled(function):
    """The function of tensors, compiled by XLA for a processor, at its first run and for each shape (0.1 s)."""
    return tf.function(function, jit_compile=True, autograph=False) if ON_CPU else function


def type_of_sums(dtype):
    """Return the type in which layers multiply and add values of the type: another one if bfloat16 is emulated."""
    return tf.float32 if BFLOAT16_IS_EMULATED and dtype == tf.bfloat16 else dtype


def factors(x, w):
    """Return x and w in the type in which layers multiply them; w rounds to the type of x first."""
    dtype = type_of_sums(x.dtype)
    return tf.cast(x, dtype), tf.cast(tf.cast(w, x.dtype), dtype)


def convolve(x, w, stride, padding, groups=1):
    """Return the convolution of x [batch, height, width, channels] with w [size, size, channels / groups, filters].

    Group g of G reads the channels g, g + G, g + 2G, ...; the filters stand group by group. Of x only the batch may be
    unknown.
    """
    size = int(w.shape[0])
    height, width, channels = x.shape.as_list()[1:]
    tiled = size == stride and not height % size and not width % size
    whole = padding == 'VALID' and size == height == width
    if ON_CPU and (tiled or whole) and (ONEDNN or channels >= MANY_CHANNELS):
        return multiply_windows(x, w, groups)
    if groups > 1:  # TensorFlow's groups are blocks of neighbours: bring each group's channels together
        x = tf.reshape(x, [-1, height, width, channels // groups, groups])
        x = tf.reshape(tf.transpose(x, [0, 1, 2, 4, 3]), [-1, height, width, channels])
        if ON_CPU and not ONEDNN:
            parts = zip(tf.split(x, groups, axis=-1), tf.split(w, groups, axis=-1), strict=True)
            return tf.concat([convolve(*part, stride, padding) for part in parts], axis=-1)
    in_a_row = -(-width // stride) if padding == 'SAME' else (width - size) // stride + 1
    multiplied = ON_CPU and groups == 1 and in_a_row < SHORT_ROW and x.dtype == tf.bfloat16
    turned = ON_CPU and stride == 1 and not ONEDNN and w.shape[3] >= MANY_FILTERS
    if multiplied or turned:
        return convolve_with_gradients(x, w, stride, padding, multiplied, turned)
    return tf.nn.conv2d(x, w, [1, stride, stride, 1], padding)


def multiply_windows(x, w, groups):
    """A convolution whose windows tile the map, or are the map: no value is in two, so they are rows of a matrix."""
    size, _, channels, filters = w.shape.as_list()
    rows, columns = (side // size for side in x.shape.as_list()[1:3])
    values = size * size * channels
    x = tf.reshape(x, [-1, rows, size, columns, size, channels, groups])
    x = tf.reshape(tf.transpose(x, [6, 0, 1, 3, 2, 4, 5]), [groups, -1, values])
    w = tf.transpose(tf.reshape(w, [values, groups, filters // groups]), [1, 0, 2])
    return tf.reshape(tf.transpose(tf.matmul(x, w), [1, 0, 2]), [-1, rows, columns, filters])


def convolve_with_gradients(x, w, stride, padding, multiplied, turned):
    """Return tf.nn.conv2d of x and w, with gradients of our own.

    multiplied  the filters' gradient is one product of matrices: each value of a window by the window's gradient
    turned      the input's gradient, of stride 1, is a convolution of the upstream gradient with filters turned by 180
                degrees: without oneDNN up to twenty times as fast as TensorFlow's kernel for it
    """
    strides = [1, stride, stride, 1]

    @tf.custom_gradient
    def convolve(x, w):
        def gradient(upstream):
            by_x = (convolve_turned(upstream, w, padding) if turned
                    else tf.nn.conv2d_backprop_input(tf.shape(x), w, upstream, strides, padding))
            by_w = (multiply_by_gradient(x, upstream, w.shape, stride) if multiplied
                    else tf.nn.conv2d_backprop_filter(x, w.shape, upstream, strides, padding))
            return by_x, by_w

        return tf.nn.conv2d(x, w, strides, padding), gradient

    return convolve(x, w)


def multiply_by_gradient(x, upstream, shape, stride):
    """Return the gradient by filters of that shape: the product of all windows of x with their upstream gradients."""
    size, _, channels, filters = shape.as_list()
    rows, columns = upstream.shape.as_list()[1:3]
    values = tf.reshape(windows(x, size, stride, rows, columns), [-1, size * size * channels])
    return tf.reshape(tf.matmul(values, tf.reshape(upstream, [-1, filters]), transpose_a=True), shape)


def convolve_turned(upstream, w, padding):
    """Return the gradient by the input of a convolution with stride 1."""
    size = int(w.shape[0])
    before, after = ((size - 1) // 2, size // 2) if padding == 'SAME' else (0, 0)  # zeros around the input
    around = [size - 1 - before, size - 1 - after]
    padded = tf.pad(upstream, [[0, 0], around, around, [0, 0]])
    return tf.nn.conv2d(padded, tf.transpose(tf.reverse(w, [0, 1]), [0, 1, 3, 2]), [1] * 4, 'VALID')


def windows(x, size, stride, rows, columns):
    """What lies under each of rows * columns sums, zeros around the map: [batch, rows * columns, size ** 2, channels].

    That is tf.image.extract_patches, by a gather that copies whole pixels and takes a fifth of the time.
    """
    height, width, channels = x.shape.as_list()[1:]
    missing = [max((count - 1) * stride + size - side, 0) for side, count in ((height, rows), (width, columns))]
    x = tf.pad(x, [[0, 0], *([zeros // 2, zeros - zeros // 2] for zeros in missing), [0, 0]])
    height, width = x.shape.as_list()[1:3]
    down, across = (np.arange(count)[:, np.newaxis] * stride + np.arange(size) for count in (rows, columns))
    inside = down[:, np.newaxis, :, np.newaxis] * width + across[np.newaxis, :, np.newaxis]
    first = height * width * tf.range(tf.shape(x)[0])[:, np.newaxis, np.newaxis]
    return tf.gather(tf.reshape(x, [-1, channels]), first + inside.reshape(rows * columns, -1).astype(np.int32))
