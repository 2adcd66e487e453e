"""The plain statement of what a packed network computes, with numpy: preparation, sums, thresholds, classifier.

It is the fall-back where numba is not installed, and what every other engine is compared with.
"""
import numpy as np

from twta.packed import file_format


def prepare(images, crop):
    """Return images uint8 [n, height, width, channels] as the float32 that the encoder sees.

    The graph does the same in twta.graph.preprocessing.for_evaluation.
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
    """What the encoder reads of uint8 images, float64: the images, prepared, or what the stem makes of them."""
    x = prepare(images, packed.crop).astype(np.float64)
    if not packed.stem:
        return x
    weights, scale, shift = packed.stem
    layer = file_format.Layer('stem', weights, None, None, 1, 'SAME', 1)
    return np.maximum(convolve(x, layer) * scale + shift, 0)


def convolve(x, layer):
    """Sums [n, height', width', filters] of a layer on maps [n, height, width, channels], in the type of x."""
    n, channels = len(x), x.shape[3]
    (top, left), (rows, columns, filters) = file_format.geometry(x.shape[1:], layer)
    height, width = layer.weights.shape[:2]
    whole = file_format.border(x.shape[1:], layer)[1]
    x = np.pad(x, ((0, 0), (top, whole[0] - top - x.shape[1]), (left, whole[1] - left - x.shape[2]), (0, 0)))
    x = x.reshape(*x.shape[:3], channels // layer.groups, layer.groups)
    weights = layer.weights.reshape(height, width, channels // layer.groups, layer.groups, -1).astype(x.dtype)
    y = np.zeros((n, rows, columns, layer.groups, filters // layer.groups), x.dtype)
    for i in range(height):
        for j in range(width):
            part = x[:, i::layer.stride, j::layer.stride][:, :rows, :columns]
            for group in range(layer.groups):
                y[..., group, :] += part[..., group] @ weights[i, j, :, group]
    return y.reshape(n, rows, columns, filters)


def fire(sums, layer):
    """Activations int8: +1 where a sum >= upper, -1 where <= lower, else 0."""
    return (sums >= layer.upper).astype(np.int8) - (sums <= layer.lower)


class NumpyEngine:
    """Runs a packed network with numpy: ternary sums in float32, exact up to 2 ** 24.

    neuron     from sums to activations, with the layer's thresholds
    between    what happens to the encoder's activations before the next layer
    """

    name, batch = 'numpy', 64

    def __init__(self, packed, neuron=fire, between=None):
        self.packed, self.neuron, self.between = packed, neuron, between

    def run(self, images):
        """Logits float32 [n, classes] of at most `batch` images, and the activations of each layer, int8 NHWC."""
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
    """Logits from the last layer's activations [n, height, width, channels]."""
    return scale_logits(activations.reshape(len(activations), -1).astype(np.float64) @ packed.weights, packed)


def scale_logits(sums, packed):
    """Logits from the classifier's float64 sums."""
    return sums.astype(np.float32) * packed.scale + packed.shift
