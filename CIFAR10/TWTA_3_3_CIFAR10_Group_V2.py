#!/usr/bin/env python3
"""TWTA_3_3_CIFAR10_Group_V2: ternary weights and ternary activations on CIFAR-10, grouped 3*3 convolutions.

Architecture: 32C3-64C3-256 4P2/4-512C3/16-2P2/8-2048C3/32-1024N1/8-2P2/16-1024C2/16-512N1
Source:       github.com/edwardzcl/TWTA (published with 200 epochs, in its text 200 + 200)
Accuracy:     83.67 % test on JPEG-recompressed images (60 epochs, rest -1, with a teacher, 1 seed; published 88.1 %)
Speed:        663 images/s in training (bfloat16, 2 cores of an AMD EPYC)

    python CIFAR10/TWTA_3_3_CIFAR10_Group_V2.py --resume False --learning_rate 0.01 --mode training
    python CIFAR10/TWTA_3_3_CIFAR10_Group_V2.py --resume True --learning_rate 0.001 --mode training
    python CIFAR10/TWTA_3_3_CIFAR10_Group_V2.py --resume True --mode inference
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
    net.encode(32, 3)                              # 24 * 24 * 32, full-precision weights
    net.conv(64, 3)                                # 24 * 24 * 64
    net.pool(256, 4, padding='SAME', groups=4)     # 12 * 12 * 256
    net.conv(512, 3, groups=16)                    # 12 * 12 * 512
    net.pool(512, 2, groups=8)                     # 6 * 6 * 512
    net.conv(2048, 3, padding='VALID', groups=32)  # 4 * 4 * 2048
    net.conv(1024, 1, groups=8)                    # 4 * 4 * 1024
    net.pool(1024, 2, groups=16)                   # 2 * 2 * 1024
    net.conv(1024, 2, padding='VALID', groups=16)  # 1 * 1 * 1024
    net.conv(512, 1)                               # 1 * 1 * 512
    return net.classify(10)                        # 10, full-precision weights


if __name__ == '__main__':
    run(__file__, __doc__, model, DATASETS, LEARNING_RATE, EPOCHS, BATCH_SIZE, OPTIONS)
