#!/usr/bin/env python3
"""TWBA_5_5_MNIST: ternary weights and binary activations on MNIST, 5*5 convolutions.

Architecture: 32C5-2P2-64C5-2P2-512
Source:       the quantisers of github.com/edwardzcl/TWBA_Nets, which has no network for MNIST
Accuracy:     99.47 % test (30 epochs, 1 seed; published not given)
Speed:        not run

    python MNIST/TWBA_5_5_MNIST.py --resume False --learning_rate 0.0001 --mode training
    python MNIST/TWBA_5_5_MNIST.py --resume True --learning_rate 0.00001 --mode training
    python MNIST/TWBA_5_5_MNIST.py --resume True --mode inference
"""
from twta.command_line import run

DATASETS = ('mnist', 'digits')  # the first is the default
LEARNING_RATE = 1e-4
EPOCHS = 150
BATCH_SIZE = 200
OPTIONS = ('levels', 'beta_init', 'pooling', 'quantize')


def model(x, is_train, levels, **options):
    """Return the last layer of the network on images x [batch, 28, 28, 1]; its outputs are the logits [batch, 10]."""
    from twta import quantizers  # here, so that --help need not wait for TensorFlow
    from twta.ternary_layers import Network

    activation = {2: quantizers.binarize_activations, 3: quantizers.three_level_activations}[levels]
    net = Network(x, is_train, quantizers.ternarize_weights, activation, **options)
    net.encode(32, 5, padding='VALID')  # 24 * 24 * 32, full-precision weights
    net.pool(32, 2)                     # 12 * 12 * 32
    net.conv(64, 5, padding='VALID')    # 8 * 8 * 64
    net.pool(64, 2)                     # 4 * 4 * 64
    net.dense(512)                      # 512
    return net.classify(10)             # 10, full-precision weights


if __name__ == '__main__':
    run(__file__, __doc__, model, DATASETS, LEARNING_RATE, EPOCHS, BATCH_SIZE, OPTIONS)
