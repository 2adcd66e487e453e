"""What happens to images before the network sees them: in the graph, vectorised over the batch.

A data set says which with `crop`. 0: whole images, pixels / 256. 24: the published treatment of CIFAR-10, that of
TensorFlow's own tutorial: in training data augmentation (a random crop of 24*24, flip, brightness and contrast), in
evaluation the central crop; then each image is standardised.
"""
from twta.tf1 import tf

PIXEL_RANGE = 256  # as published, not 255; exact in bfloat16
BRIGHTNESS = 63  # at most, either way, in grey levels of 256
CONTRAST = 0.2, 1.8


def for_training(images, crop, seed, step):
    """Images uint8 [batch, height, width, channels] as float32, augmented where there is a crop.

    seed and step, integers or int32 tensors, decide on every draw.
    """
    return standardize(augment(images, crop, seed, step)) if crop else scale(images)


def for_evaluation(images, crop):
    """Images uint8 [batch, height, width, channels] as float32; nothing is drawn.

    The same bits on any machine, and as twta.packed makes them: moments are sums of whole numbers, exact in float64.
    """
    if not crop:
        return scale(images)
    x = tf.cast(central_crop(images, crop), tf.float64)
    values = crop * crop * int(images.shape[-1])
    mean = tf.reduce_sum(x, [1, 2, 3], keepdims=True) / values
    variance = tf.reduce_sum(x * x, [1, 2, 3], keepdims=True) / values - mean * mean
    return tf.cast((x - mean) / tf.maximum(tf.sqrt(variance), values ** -0.5), tf.float32)


def scale(images):
    return tf.cast(images, tf.float32) / PIXEL_RANGE


def central_crop(images, size):
    top, left = ((side - size) // 2 for side in images.shape.as_list()[1:3])
    return images[:, top:top + size, left:left + size]


def augment(images, size, seed, step):
    """Each image cropped anywhere, flipped or not, brightened by d, its contrast about each channel's mean times f.

    d is uniform in [-63, 63), f in [0.2, 1.8). float32 [batch, size, size, channels], not clipped to 0..255.
    """
    height, width, channels = images.shape.as_list()[1:]
    batch = tf.shape(images)[0]
    draws = tf.random.stateless_uniform([batch, 5], tf.stack([seed, step]))
    top, left = (tf.cast(draws[:, i] * (side - size + 1), tf.int32) for i, side in enumerate((height, width)))
    flip = draws[:, 2] < 0.5
    brightness = BRIGHTNESS * (2 * draws[:, 3] - 1)
    contrast = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * draws[:, 4]

    # crop and flip are one gather of pixels from the batch laid out as a single column
    along = tf.range(size)
    rows = top[:, tf.newaxis] + along
    columns = left[:, tf.newaxis] + tf.where(flip, tf.tile([along[::-1]], [batch, 1]), tf.tile([along], [batch, 1]))
    pixels = (tf.range(batch)[:, tf.newaxis] * height + rows)[:, :, tf.newaxis] * width + columns[:, tf.newaxis]
    x = tf.cast(tf.gather(tf.reshape(images, [-1, channels]), pixels), tf.float32)

    x += brightness[:, tf.newaxis, tf.newaxis, tf.newaxis]
    mean = tf.reduce_mean(x, [1, 2], keepdims=True)
    return (x - mean) * contrast[:, tf.newaxis, tf.newaxis, tf.newaxis] + mean


def standardize(images):
    """Each image with mean 0 and standard deviation 1; nearly uniform ones are divided by 1 / sqrt(values) at least."""
    mean, variance = tf.nn.moments(images, [1, 2, 3], keepdims=True)
    least = 1 / float(images.shape[1:].num_elements()) ** 0.5
    return (images - mean) / tf.maximum(tf.sqrt(variance), least)
