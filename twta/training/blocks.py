"""A built network read back as blocks, and the fractions of its values."""
from typing import NamedTuple

from twta.graph.tf1 import tf
from twta.ternary_layers import ActivationLayer, BatchNormLayer, Conv2dLayer, DenseLayer, PoolLayer


class Block(NamedTuple):
    """One call of Network: a layer and what follows it."""
    layer: Conv2dLayer | DenseLayer | PoolLayer
    batch_norm: BatchNormLayer | None
    activation: ActivationLayer | None  # the classifier has none

    @property
    def levels(self):
        """The values of the activations, ascending; () if they are not quantised."""
        return getattr(self.activation and self.activation.activation, 'levels', ())

    @property
    def pooling(self):
        """'max' or 'average'; '' if the layer has weights."""
        return self.layer.kind if isinstance(self.layer, PoolLayer) else ''

    @property
    def groups(self):
        """Groups of the layer's filters."""
        return self.layer.groups if isinstance(self.layer, Conv2dLayer) else 1


def read_blocks(layer):
    """Return the Blocks of a network, the first one first, from its last layer."""
    blocks, batch_norm, activation = [], None, None
    while hasattr(layer, 'prev_layer'):  # but for the images, every layer has it
        if isinstance(layer, ActivationLayer):
            activation = layer
        elif isinstance(layer, BatchNormLayer):
            batch_norm = layer
        elif isinstance(layer, Conv2dLayer | DenseLayer | PoolLayer):
            blocks.append(Block(layer, batch_norm, activation))
            batch_norm = activation = None
        layer = layer.prev_layer
    return blocks[::-1]


def value_fractions(net):
    """Return which fractions of values are negative and positive, in the layers with quantised activations.

    By kind, 'weights' or 'activations', and name of the layer: a tensor [negative, positive]. The weights of the
    encoder and of the classifier are left out; with --quantize activations the others are in full precision too.
    """
    blocks = [block for block in read_blocks(net) if block.levels]
    found = {'weights': {block.layer.name: block.layer.quantized for block in blocks[1:] if not block.pooling},
             'activations': {block.layer.name: block.activation.outputs for block in blocks}}
    return {kind: {name: tf.stack([tf.reduce_mean(tf.cast(values < 0, tf.float32)),
                                   tf.reduce_mean(tf.cast(values > 0, tf.float32))])
                   for name, values in layers.items()} for kind, layers in found.items()}
