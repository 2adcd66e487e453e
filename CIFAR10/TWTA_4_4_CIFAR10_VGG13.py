#!/usr/bin/env python3
"""TWTA_4_4_CIFAR10_VGG13: ternary weights and ternary activations on CIFAR-10, 4*4 convolutions.

Architecture: 64C3-64C4-64C4-2P2-128C4-128C4-2P2-256C4-256C4-4P2-512C2-512N1
Source:       github.com/edwardzcl/TWTA (published with 200 epochs, in its text 200 + 200)
Accuracy:     83.87 % test on JPEG-recompressed images (7 epochs, rest -1, from other weights, with a teacher, 1 seed;
              published 90.1 %)
Speed:        298 images/s in training (bfloat16, 2 cores of an AMD EPYC)

    python CIFAR10/TWTA_4_4_CIFAR10_VGG13.py --resume False --learning_rate 0.01 --mode training
    python CIFAR10/TWTA_4_4_CIFAR10_VGG13.py --resume True --learning_rate 0.001 --mode training
    python CIFAR10/TWTA_4_4_CIFAR10_VGG13.py --resume True --mode inference
"""
from twta.command_line import run

DATASETS = ('cifar10', 'shapes')  # the first is the default
LEARNING_RATE = 1e-2
EPOCHS = 200
BATCH_SIZE = 200
OPTIONS = ('threshold', 'threshold_value', 'pooling', 'rest', 'quantize')


def model(x, is_train, **options):
    """Return the last layer of the network on images x [batch, 24, 24, 3]; its outputs are the logits [batch, 10]."""
    from twta.ternary_layers import Network  # here, so that --help need not wait for TensorFlow

    net = Network(x, is_train, **options)
    net.encode(64, 3)                          # 24 * 24 * 64, full-precision weights
    net.conv(64, 4)                            # 24 * 24 * 64
    net.conv(64, 4)                            # 24 * 24 * 64
    net.pool(64, 2)                            # 12 * 12 * 64
    net.conv(128, 4)                           # 12 * 12 * 128
    net.conv(128, 4)                           # 12 * 12 * 128
    net.pool(128, 2)                           # 6 * 6 * 128
    net.conv(256, 4)                           # 6 * 6 * 256
    net.conv(256, 4)                           # 6 * 6 * 256
    net.pool(256, 4)                           # 2 * 2 * 256
    net.conv(512, 2, padding='VALID')          # 1 * 1 * 512
    net.conv(512, 1)                           # 1 * 1 * 512
    return net.classify(10, batch_norm=False)  # 10, full-precision weights


if __name__ == '__main__':
    run(__file__, __doc__, model, DATASETS, LEARNING_RATE, EPOCHS, BATCH_SIZE, OPTIONS)
