"""What happens to images before the network sees them: in the graph, vectorised over the batch.

A data set says which with `crop`. 0: whole images, pixels / 256. 24: the published treatment of CIFAR-10, that of
TensorFlow's own tutorial: in training data augmentation (a random crop of 24*24, flip, brightness and contrast), in
evaluation the central crop; then each image is standardised.

--augmentation geometric is ours: in training, whole images are warped, and cropped ones keep brightness and contrast.
"""
from twta.graph.tf1 import tf

PIXEL_RANGE = 256  # as published, not 255; exact in bfloat16
BRIGHTNESS = 63  # at most, either way, in grey levels of 256
CONTRAST = 0.2, 1.8
BEND = 0.15  # of a warped image: how far each entry of its 2*2 matrix is from the identity, at most
SHIFT = 2  # and how far it is moved, at most, in pixels, either way


def for_training(images, crop, seed, step, augmentation='published'):
    """Images uint8 [batch, height, width, channels] as float32; augmentation is 'published' or 'geometric'.

    seed and step, integers or int32 tensors, decide on every draw.
    """
    if not crop and augmentation == 'published':
        return scale(images)
    draws = tf.random.stateless_uniform([tf.shape(images)[0], 5 if crop else 6], tf.stack([seed, step]))
    if not crop:
        return warp(scale(images), draws)
    x = crop_and_flip(images, crop, draws[:, :3])
    return standardize(jitter(x, draws[:, 3:]) if augmentation == 'published' else x)


def for_evaluation(images, crop):
    """Images uint8 [batch, height, width, channels] as float32; nothing is drawn.

    The same bits on any machine, and as twta.packed.numpy_engine makes them: moments are sums of whole numbers, exact
    in float64.
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


def warp(images, draws):
    """Each image under a random affine map about its centre, bilinear, with 0 beyond the border.

    draws   [batch, 6], uniform in [0, 1): of the map from the new image's pixels to the old one's, x -> (I + E) x + t,
            with E in [-0.15, 0.15) in each entry and t in [-2, 2) pixels
    """
    height, width = images.shape.as_list()[1:3]
    draws = 2 * draws - 1
    (a, b, c, d), (right, down) = tf.unstack(BEND * draws[:, :4], axis=1), tf.unstack(SHIFT * draws[:, 4:], axis=1)
    x, y = (width - 1) / 2, (height - 1) / 2
    rows = [1 + a, b, right - a * x - b * y, c, 1 + d, down - c * x - d * y, tf.zeros_like(a), tf.zeros_like(a)]
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images, transforms=tf.stack(rows, axis=1), output_shape=[height, width], fill_value=0.0,
        interpolation='BILINEAR', fill_mode='CONSTANT')


def crop_and_flip(images, size, draws):
    """Each image cropped anywhere and flipped or not, by draws [batch, 3]; float32 [batch, size, size, channels]."""
    height, width, channels = images.shape.as_list()[1:]
    batch = tf.shape(images)[0]
    top, left = (tf.cast(draws[:, i] * (side - size + 1), tf.int32) for i, side in enumerate((height, width)))
    flip = draws[:, 2] < 0.5
    # crop and flip are one gather of pixels from the batch laid out as a single column
    along = tf.range(size)
    rows = top[:, tf.newaxis] + along
    columns = left[:, tf.newaxis] + tf.where(flip, tf.tile([along[::-1]], [batch, 1]), tf.tile([along], [batch, 1]))
    pixels = (tf.range(batch)[:, tf.newaxis] * height + rows)[:, :, tf.newaxis] * width + columns[:, tf.newaxis]
    return tf.cast(tf.gather(tf.reshape(images, [-1, channels]), pixels), tf.float32)


def jitter(x, draws):
    """Each image brightened by d in [-63, 63), its contrast about each channel's mean times f in [0.2, 1.8).

    By draws [batch, 2]; not clipped to 0..255.
    """
    draws = draws[:, tf.newaxis, tf.newaxis, tf.newaxis]
    x += BRIGHTNESS * (2 * draws[..., 0] - 1)
    mean = tf.reduce_mean(x, [1, 2], keepdims=True)
    return (x - mean) * (CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * draws[..., 1]) + mean


def standardize(images):
    """Each image with mean 0 and standard deviation 1; nearly uniform ones are divided by 1 / sqrt(values) at least."""
    mean, variance = tf.nn.moments(images, [1, 2, 3], keepdims=True)
    least = 1 / float(images.shape[1:].num_elements()) ** 0.5
    return (images - mean) / tf.maximum(tf.sqrt(variance), least)
