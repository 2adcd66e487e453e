#!/usr/bin/env python3
"""TWBA_CIFAR10_Model2: ternary weights and binary activations on CIFAR-10, grouped convolutions.

Architecture: 32C3-64C3-256C4s2/2-512C3/8-512C2s2/4-2048C3/16-1024N1/4-1024C2s2/8-1024C2/8-512N1
              (s2: stride 2; the first two convolutions keep full-precision weights)
Source:       github.com/edwardzcl/TWBA_Nets, "Model-2" (Zou et al., ASICON 2019)
Accuracy:     79.60 % test on JPEG-recompressed images (3 epochs, beta_init -0.5, from other weights, 1 seed; published
              88.19 %)
Speed:        not run

    python CIFAR10/TWBA_CIFAR10_Model2.py --resume False --learning_rate 0.01 --mode training
    python CIFAR10/TWBA_CIFAR10_Model2.py --resume True --learning_rate 0.001 --mode training
    python CIFAR10/TWBA_CIFAR10_Model2.py --resume True --mode inference
"""
from twta.command_line import run

DATASETS = ('cifar10', 'shapes')  # the first is the default
LEARNING_RATE = 1e-2
EPOCHS = 200
BATCH_SIZE = 200
OPTIONS = ('levels', 'beta_init', 'quantize')


def model(x, is_train, levels, **options):
    """Return the last layer of the network on images x [batch, 24, 24, 3]; its outputs are the logits [batch, 10]."""
    from twta import quantizers  # here, so that --help need not wait for TensorFlow
    from twta.ternary_layers import Network

    activation = {2: quantizers.binarize_activations, 3: quantizers.three_level_activations}[levels]
    net = Network(x, is_train, quantizers.ternarize_weights, activation, **options)
    net.stem(32, 3)                                # 24 * 24 * 32, full-precision weights, ReLU
    net.encode(64, 3)                              # 24 * 24 * 64, full-precision weights
    net.conv(256, 4, stride=2, groups=2)           # 12 * 12 * 256
    net.conv(512, 3, groups=8)                     # 12 * 12 * 512
    net.conv(512, 2, stride=2, groups=4)           # 6 * 6 * 512
    net.conv(2048, 3, padding='VALID', groups=16)  # 4 * 4 * 2048
    net.conv(1024, 1, groups=4)                    # 4 * 4 * 1024
    net.conv(1024, 2, stride=2, groups=8)          # 2 * 2 * 1024
    net.conv(1024, 2, padding='VALID', groups=8)   # 1 * 1 * 1024
    net.conv(512, 1)                               # 1 * 1 * 512
    return net.classify(10)                        # 10, full-precision weights


if __name__ == '__main__':
    run(__file__, __doc__, model, DATASETS, LEARNING_RATE, EPOCHS, BATCH_SIZE, OPTIONS)
