"""Preprocessing and augmentation of images, in the graph, vectorised over the batch.

The `crop` of a data set selects the treatment. 0: whole images, pixels / 256. 24: the published treatment of CIFAR-10,
from TensorFlow's tutorial. Training takes a random crop of 24*24 with random flip, brightness and contrast; evaluation
takes the central crop. Each image is then standardised.

Two other ways of --augmentation are not published. geometric: whole images are warped; crops keep brightness and
contrast. cutout: the same, and a square of each image is erased ("Improved Regularization of Convolutional Neural
Networks with Cutout", arXiv:1708.04552).
"""
from twta.graph.tf1 import tf
from twta.workers import ALONE

PIXEL_RANGE = 256  # as published, not 255; exact in bfloat16
BRIGHTNESS = 63  # largest change, up or down, in grey levels
CONTRAST = 0.2, 1.8  # range of the factor
BEND = 0.15  # largest difference between an entry of a warp's 2*2 matrix and the identity's
SQUARE = 8  # side of what cutout erases, in pixels
SHIFT = 2  # largest shift of a warp, in pixels, along each axis


def for_training(images, crop, seed, step, augmentation='published', workers=ALONE):
    """Return images, uint8 [batch, height, width, channels], as augmented float32 images.

    augmentation    'published', 'geometric' or 'cutout'
    seed, step      integers or int32 tensors that determine all random draws
    workers         Workers; if there are several, the images are this worker's rows of the global batch, and each gets
                    the draws that it would get in the whole batch
    """
    if not crop and augmentation == 'published':
        return scale(images)
    erases = augmentation == 'cutout'
    shape = [workers.count * tf.shape(images)[0], (5 if crop else 6) + 2 * erases]
    draws = tf.random.stateless_uniform(shape, tf.stack([seed, step]))[workers.rows]
    if crop:
        x = crop_and_flip(images, crop, draws[:, :3])
        x = standardize(jitter(x, draws[:, 3:5]) if augmentation == 'published' else x)
    else:
        x = warp(scale(images), draws[:, :6])
    return erase(x, draws[:, -2:]) if erases else x


def for_evaluation(images, crop):
    """Return images, uint8 [batch, height, width, channels], as float32 images, without random draws.

    The result is bit for bit the same on any machine and in twta.packed.numpy_engine: the moments are sums of
    integers, exact in float64.
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
    """Return each image under a random affine map about its centre: bilinear, 0 beyond the border.

    draws   [batch, 6], uniform in [0, 1): they choose the map from new to old pixels, x -> (I + E) x + t, with the
            entries of E in [-0.15, 0.15) and of t in [-2, 2) pixels
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
    """Return randomly cropped and flipped images, float32 [batch, size, size, channels], by draws [batch, 3]."""
    height, width, channels = images.shape.as_list()[1:]
    batch = tf.shape(images)[0]
    top, left = (tf.cast(draws[:, i] * (side - size + 1), tf.int32) for i, side in enumerate((height, width)))
    flip = draws[:, 2] < 0.5
    # crop and flip in one gather from the batch, reshaped to one column of pixels
    along = tf.range(size)
    rows = top[:, tf.newaxis] + along
    columns = left[:, tf.newaxis] + tf.where(flip, tf.tile([along[::-1]], [batch, 1]), tf.tile([along], [batch, 1]))
    pixels = (tf.range(batch)[:, tf.newaxis] * height + rows)[:, :, tf.newaxis] * width + columns[:, tf.newaxis]
    return tf.cast(tf.gather(tf.reshape(images, [-1, channels]), pixels), tf.float32)


def jitter(x, draws):
    """Return images with random brightness and contrast, by draws [batch, 2]; not clipped to 0..255.

    Each image is brightened by d in [-63, 63); then contrast about each channel's mean is scaled by f in [0.2, 1.8).
    """
    draws = draws[:, tf.newaxis, tf.newaxis, tf.newaxis]
    x += BRIGHTNESS * (2 * draws[..., 0] - 1)
    mean = tf.reduce_mean(x, [1, 2], keepdims=True)
    return (x - mean) * (CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * draws[..., 1]) + mean


def erase(images, draws):
    """Return images with 0 in a square of 8*8 pixels; its centre, by draws [batch, 2], is anywhere in the image."""
    rows, columns = (tf.abs(tf.range(0.5, side) - draws[:, i:i + 1] * side) < SQUARE / 2
                     for i, side in enumerate(images.shape.as_list()[1:3]))
    square = rows[:, :, tf.newaxis, tf.newaxis] & columns[:, tf.newaxis, :, tf.newaxis]
    return images * tf.cast(~square, images.dtype)


def standardize(images):
    """Return each image with mean 0 and standard deviation 1; the divisor is at least 1 / sqrt(values per image)."""
    mean, variance = tf.nn.moments(images, [1, 2, 3], keepdims=True)
    least = 1 / float(images.shape[1:].num_elements()) ** 0.5
    return (images - mean) / tf.maximum(tf.sqrt(variance), least)
