#!/usr/bin/env python3
"""TWTA_2_2_MNIST: ternary weights and ternary activations on MNIST, 2*2 convolutions.

Architecture: 64C2-2P2-64C2-2P2-64C2-2P2-64C2-512
Source:       github.com/edwardzcl/TWTA, which calls the accuracy "very low" and gives no figure
Accuracy:     99.39 ± 0.13 % test (30 epochs, 3 seeds; published not given)
Speed:        2,446 images/s in training (bfloat16, 2 cores of an AMD EPYC)

    python MNIST/TWTA_2_2_MNIST.py --resume False --learning_rate 0.0001 --mode training
    python MNIST/TWTA_2_2_MNIST.py --resume True --learning_rate 0.00001 --mode training
    python MNIST/TWTA_2_2_MNIST.py --resume True --mode inference
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
    net.encode(64, 2)                 # 28 * 28 * 64, full-precision weights
    net.pool(64, 2)                   # 14 * 14 * 64
    net.conv(64, 2)                   # 14 * 14 * 64
    net.pool(64, 2)                   # 7 * 7 * 64
    net.conv(64, 2, padding='VALID')  # 6 * 6 * 64
    net.pool(64, 2)                   # 3 * 3 * 64
    net.conv(64, 2, padding='VALID')  # 2 * 2 * 64
    net.dense(512)                    # 512
    return net.classify(10)           # 10, full-precision weights


if __name__ == '__main__':
    run(__file__, __doc__, model, DATASETS, LEARNING_RATE, EPOCHS, BATCH_SIZE, OPTIONS)
