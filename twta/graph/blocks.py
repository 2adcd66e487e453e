"""A built network read back, layer by layer, and the fractions of its values."""
from twta import ternary_layers
from twta.graph.tf1 import tf


def read_blocks(layer):
    """Each layer with its batch normalisation and activation, or None, from the first to the last."""
    blocks, batch_norm, activation = [], None, None
    while hasattr(layer, 'prev_layer'):
        if isinstance(layer, ternary_layers.ActivationLayer):
            activation = layer
        elif isinstance(layer, ternary_layers.BatchNormLayer):
            batch_norm = layer
        elif hasattr(layer, 'quantized') or pooling(layer):
            blocks.append((layer, batch_norm, activation))
            batch_norm = activation = None
        layer = layer.prev_layer
    return blocks[::-1]


def pooling(layer):
    """Return 'max' or 'average'; '' if the layer has weights."""
    return layer.kind if isinstance(layer, ternary_layers.PoolLayer) else ''


def value_fractions(net):
    """Return the fractions [negative, positive] of each layer's quantised weights and activations, by layer name."""
    blocks = [block for block in read_blocks(net) if block[2] and hasattr(block[2].activation, 'levels')]
    found = {'weights': {layer.name: layer.quantized for layer, *_ in blocks[1:] if not pooling(layer)},
             'activations': {layer.name: activation.outputs for layer, _, activation in blocks}}
    return {kind: {name: tf.stack([tf.reduce_mean(tf.cast(values < 0, tf.float32)),
                                   tf.reduce_mean(tf.cast(values > 0, tf.float32))])
                   for name, values in layers.items()} for kind, layers in found.items()}
