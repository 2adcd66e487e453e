#!/usr/bin/env python3
"""TWTA_5_5_MNIST: ternary weights and ternary activations on MNIST, 5*5 convolutions.

Architecture: 32C5-2P2-64C5-2P2-512
Source:       github.com/edwardzcl/TWTA (published with 150 epochs)
Accuracy:     99.60 ± 0.06 % test (30 epochs, 3 seeds; published 99.32 %)
Speed:        4,932 images/s in training (bfloat16, 2 cores of an AMD EPYC)

    python MNIST/TWTA_5_5_MNIST.py --resume False --learning_rate 0.0001 --mode training
    python MNIST/TWTA_5_5_MNIST.py --resume True --learning_rate 0.00001 --mode training
    python MNIST/TWTA_5_5_MNIST.py --resume True --mode inference
"""
from twta.command_line import run

DATASETS = ('mnist', 'digits')  # the first is the default
LEARNING_RATE = 1e-4
EPOCHS = 150
BATCH_SIZE = 200
OPTIONS = ('threshold', 'threshold_value', 'pooling', 'rest', 'quantize')


def model(x, is_train, **options):
    """Return the last layer of the network on images x [batch, 28, 28, 1]; its outputs are the logits [batch, 10]."""
    from twta.ternary_layers import Network  # here, so that --help need not wait for TensorFlow

    net = Network(x, is_train, **options)
    net.encode(32, 5, padding='VALID')  # 24 * 24 * 32, full-precision weights
    net.pool(32, 2)                     # 12 * 12 * 32
    net.conv(64, 5, padding='VALID')    # 8 * 8 * 64
    net.pool(64, 2)                     # 4 * 4 * 64
    net.dense(512)                      # 512
    return net.classify(10)             # 10, full-precision weights


if __name__ == '__main__':
    run(__file__, __doc__, model, DATASETS, LEARNING_RATE, EPOCHS, BATCH_SIZE, OPTIONS)
