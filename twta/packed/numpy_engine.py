"""The plain statement of what a packed network computes, in numpy: preparation, sums, thresholds, classifier.

Every other engine is compared with this one, and it runs if numba is not installed.
"""
import numpy as np

from twta.packed import file_format


def check_images(images, packed, most):
    """Raise ValueError if images are not uint8 [n, *packed.image], or more than `most`."""
    if not isinstance(images, np.ndarray):
        raise ValueError(f'images are a {type(images).__name__}, not an array of numpy')
    if images.dtype != np.uint8 or images.shape[1:] != tuple(packed.image) or len(images) > most:
        limit = f', n at most {most}' if len(images) > most else ''
        raise ValueError(f'images {images.dtype} {list(images.shape)}, not uint8 [n, '
                         f'{", ".join(map(str, packed.image))}]{limit}')


def prepare(images, crop):
    """Return images, uint8 [n, height, width, channels], as the graph prepares them, float32.

    Without a crop (0): pixels / 256. With one: the central crop * crop pixels, with mean 0 and standard deviation 1
    per image. twta.graph.preprocessing.for_evaluation does the same in the graph.
    """
    if not crop:
        return images / np.float32(256)
    top, left = ((side - crop) // 2 for side in images.shape[1:3])
    x = images[:, top:top + crop, left:left + crop].astype(np.float64)
    values = x[0].size
    mean = x.sum((1, 2, 3), keepdims=True) / values
    variance = (x * x).sum((1, 2, 3), keepdims=True) / values - mean * mean
    return ((x - mean) / np.maximum(np.sqrt(variance), values ** -0.5)).astype(np.float32)


def encoder_input(images, packed):
    """Return what the encoder reads, float64 NHWC: the prepared images or, of a network with a stem, its maps."""
    x = prepare(images, packed.crop).astype(np.float64)
    if not packed.stem:
        return x
    weights, scale, shift = packed.stem
    layer = file_format.Layer('stem', weights, None, None, 1, 'SAME', 1)
    return np.maximum(convolve(x, layer) * scale + shift, 0)


def convolve(x, layer):
    """Return a layer's sums [n, height', width', filters] of maps x [n, height, width, channels], in the type of x."""
    n, channels = len(x), x.shape[3]
    (top, left), (rows, columns, filters) = file_format.geometry(x.shape[1:], layer)
    height, width = layer.weights.shape[:2]
    padded = file_format.border(x.shape[1:], layer)[1]
    x = np.pad(x, ((0, 0), (top, padded[0] - top - x.shape[1]), (left, padded[1] - left - x.shape[2]), (0, 0)),
               constant_values=layer.border)
    x = x.reshape(*x.shape[:3], channels // layer.groups, layer.groups)
    weights = layer.weights.reshape(height, width, channels // layer.groups, layer.groups, -1).astype(x.dtype)
    y = np.zeros((n, rows, columns, layer.groups, filters // layer.groups), x.dtype)
    for i in range(height):
        for j in range(width):
            under = x[:, i::layer.stride, j::layer.stride][:, :rows, :columns]  # what the weights [i, j] multiply
            for group in range(layer.groups):
                y[..., group, :] += under[..., group] @ weights[i, j, :, group]
    return y.reshape(n, rows, columns, filters)


def fire(sums, layer):
    """Return activations, int8: +1 if a sum >= upper, -1 if a sum <= lower, else 0."""
    return (sums >= layer.upper).astype(np.int8) - (sums <= layer.lower)


class NumpyEngine:
    """The engine on plain arrays; ternary sums are in float32, exact up to 2 ** 24.

    neuron     function of sums and layer that returns activations
    between    function of the encoder's activations that returns what the next layer reads; None: they are unchanged
    """

    name, batch = 'numpy', 64

    def __init__(self, packed, neuron=fire, between=None):
        self.packed, self.neuron, self.between = packed, neuron, between

    def run(self, images):
        """Return logits, float32 [n, classes], and each layer's activations, int8 NHWC, of images, in one batch.

        Raises ValueError if images have another type or shape.
        """
        check_images(images, self.packed, len(images))
        encoder, *layers = self.packed.layers
        maps = [self.neuron(convolve(encoder_input(images, self.packed), encoder).astype(np.float32), encoder)]
        if self.between:
            maps[0] = self.between(maps[0])
        for layer in layers:
            maps.append(self.neuron(convolve(maps[-1].astype(np.float32), layer), layer))
        return classify(maps[-1], self.packed), maps

    def logits(self, images):
        return self.run(images)[0]

    def activations(self, images):
        return self.run(images)[1]


def classify(activations, packed):
    """Return logits, float32 [n, classes], of the last layer's activations [n, height, width, channels]."""
    return scale_logits(activations.reshape(len(activations), -1).astype(np.float64) @ packed.weights, packed)


def scale_logits(sums, packed):
    """Return logits of the classifier's sums, float64 [n, classes]: times scale plus shift, in float32."""
    return sums.astype(np.float32) * packed.scale + packed.shift
