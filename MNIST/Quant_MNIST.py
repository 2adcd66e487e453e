#!/usr/bin/env python3
"""Quant_MNIST: ternary weights and activations in steps of 1 / 2^k up to B on MNIST, for the conversion to spikes.

Architecture: 16C5-16C5-2P2-32C5-2P2-256C4
Source:       github.com/edwardzcl/Spatio_temporal_SNNs with k = 1, B = 2 (published with 200 epochs)
Accuracy:     99.64 % test (30 epochs, 1 seed; published 99.37 %)
Speed:        not run

    python MNIST/Quant_MNIST.py --resume False --learning_rate 0.0001 --mode training --k 1 --B 2
    python MNIST/Quant_MNIST.py --resume True --learning_rate 0.00001 --mode training
    python MNIST/Quant_MNIST.py --resume True --mode inference
    python MNIST/Spiking_MNIST.py --network Quant_MNIST
"""
from twta.command_line import run

DATASETS = ('mnist', 'digits')  # the first is the default
LEARNING_RATE = 1e-4
EPOCHS = 200
BATCH_SIZE = 128
OPTIONS = ('k', 'B', 'quantize')


def model(x, is_train, k, B, **options):
    """Return the last layer of the network on images x [batch, 28, 28, 1]; its outputs are the logits [batch, 10]."""
    from twta.quantizers import median_quantizer  # here, so that --help need not wait for TensorFlow
    from twta.ternary_layers import Network

    net = Network(x, is_train, activation=median_quantizer(k, B), **options)
    net.encode(16, 5)                         # 28 * 28 * 16, full-precision weights
    net.conv(16, 5, padding='VALID')          # 24 * 24 * 16
    net.pool(16, 2)                           # 12 * 12 * 16
    net.conv(32, 5, padding='VALID')          # 8 * 8 * 32
    net.pool(32, 2)                           # 4 * 4 * 32
    net.conv(256, 4, padding='VALID')         # 1 * 1 * 256
    return net.classify(10, batch_norm=False)  # 10, full-precision weights


if __name__ == '__main__':
    run(__file__, __doc__, model, DATASETS, LEARNING_RATE, EPOCHS, BATCH_SIZE, OPTIONS)
