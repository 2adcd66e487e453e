#!/usr/bin/env python3
"""Quant_CIFAR10: ternary weights and activations in steps of 1 / 2^k up to B on CIFAR-10, for the conversion to spikes.

Architecture: 64C3-64C3-64C3-2P2-128C3-128C3-2P2-256C3-256C3-2P2-512C3-512C3
Source:       github.com/edwardzcl/Spatio_temporal_SNNs with k = 1, B = 2 (published with 400 epochs)
Accuracy:     81.95 % test on JPEG-recompressed images (14 epochs, 1 seed; published 91.91 %)
Speed:        not run

    python CIFAR10/Quant_CIFAR10.py --resume False --learning_rate 0.001 --mode training --k 1 --B 2
    python CIFAR10/Quant_CIFAR10.py --resume True --learning_rate 0.0001 --mode training
    python CIFAR10/Quant_CIFAR10.py --resume True --mode inference
    python CIFAR10/Spiking_CIFAR10.py --network Quant_CIFAR10
"""
from twta.command_line import run

DATASETS = ('cifar10', 'shapes')  # the first is the default
LEARNING_RATE = 1e-3
EPOCHS = 200
BATCH_SIZE = 200
OPTIONS = ('k', 'B', 'quantize')


def model(x, is_train, k, B, **options):
    """Return the last layer of the network on images x [batch, 24, 24, 3]; its outputs are the logits [batch, 10]."""
    from twta.quantizers import median_quantizer  # here, so that --help need not wait for TensorFlow
    from twta.ternary_layers import Network

    net = Network(x, is_train, activation=median_quantizer(k, B), **options)
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
