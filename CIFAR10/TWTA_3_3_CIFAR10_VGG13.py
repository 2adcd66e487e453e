#!/usr/bin/env python3
"""TWTA_3_3_CIFAR10_VGG13: ternary weights and ternary activations on CIFAR-10, 3*3 convolutions.

Architecture: 64C3-64C3-64C3-2P2-128C3-128C3-2P2-256C3-256C3-2P2-512C3-512C3
Source:       github.com/edwardzcl/TWTA
Accuracy:     85.29 % test on JPEG-recompressed images (40 epochs, rest -1, with a teacher, 1 seed; published not given)
Speed:        418 images/s in training (bfloat16, 2 cores of an AMD EPYC)

    python CIFAR10/TWTA_3_3_CIFAR10_VGG13.py --resume False --learning_rate 0.01 --mode training
    python CIFAR10/TWTA_3_3_CIFAR10_VGG13.py --resume True --learning_rate 0.001 --mode training
    python CIFAR10/TWTA_3_3_CIFAR10_VGG13.py --resume True --mode inference
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
    net.conv(64, 3)                            # 24 * 24 * 64
    net.conv(64, 3)                            # 24 * 24 * 64
    net.pool(64, 2)                            # 12 * 12 * 64
    net.conv(128, 3)                           # 12 * 12 * 128
    net.conv(128, 3)                           # 12 * 12 * 128
    net.pool(128, 2)                           # 6 * 6 * 128
    net.conv(256, 3)                           # 6 * 6 * 256
    net.conv(256, 3)                           # 6 * 6 * 256
    net.pool(256, 2)                           # 3 * 3 * 256
    net.conv(512, 3)                           # 3 * 3 * 512
    net.conv(512, 3, padding='VALID')          # 1 * 1 * 512
    return net.classify(10, batch_norm=False)  # 10, full-precision weights


if __name__ == '__main__':
    run(__file__, __doc__, model, DATASETS, LEARNING_RATE, EPOCHS, BATCH_SIZE, OPTIONS)
