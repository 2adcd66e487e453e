#!/usr/bin/env python3
"""FP_5_5_MNIST: full precision on MNIST, 5*5 convolutions; compare with TWTA_5_5_MNIST.

Architecture: 32C5-2P2-64C5-2P2-512
Source:       github.com/edwardzcl/TWTA
Accuracy:     99.66 ± 0.01 % test (30 epochs, 3 seeds; published not given)
Speed:        5,088 images/s in training (bfloat16, 2 cores of an AMD EPYC)

    python MNIST/FP_5_5_MNIST.py --resume False --learning_rate 0.0001 --mode training
    python MNIST/FP_5_5_MNIST.py --resume True --learning_rate 0.00001 --mode training
    python MNIST/FP_5_5_MNIST.py --resume True --mode inference
"""
from twta.command_line import run

DATASETS = ('mnist', 'digits')  # the first is the default
LEARNING_RATE = 1e-4
EPOCHS = 150
BATCH_SIZE = 200
OPTIONS = ('pooling',)


def model(x, is_train, **options):
    """Return the last layer of the network on images x [batch, 28, 28, 1]; its outputs are the logits [batch, 10]."""
    from twta.graph.tf1 import tf
    from twta.quantizers import full_precision  # here, so that --help need not wait for TensorFlow
    from twta.ternary_layers import Network

    net = Network(x, is_train, weights=full_precision, activation=tf.nn.relu, **options)
    net.encode(32, 5, padding='VALID')  # 24 * 24 * 32
    net.pool(32, 2)                     # 12 * 12 * 32
    net.conv(64, 5, padding='VALID')    # 8 * 8 * 64
    net.pool(64, 2)                     # 4 * 4 * 64
    net.dense(512)                      # 512
    return net.classify(10)             # 10


if __name__ == '__main__':
    run(__file__, __doc__, model, DATASETS, LEARNING_RATE, EPOCHS, BATCH_SIZE, OPTIONS)
