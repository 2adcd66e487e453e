#!/usr/bin/env python3
"""Spiking_CIFAR10: a network trained on CIFAR-10, as integrate-and-fire neurons with the same predictions.

The network is converted (--conversion) and simulated on the test images. Each prediction is compared with that of the
graph. Spikes and synaptic operations are counted, layer by layer. Definitions: docs/spikes.md.

    python CIFAR10/Spiking_CIFAR10.py --network TWTA_3_3_CIFAR10_VGG13
    python CIFAR10/Spiking_CIFAR10.py --network Quant_CIFAR10 --conversion temporal
    python CIFAR10/Spiking_CIFAR10.py --network TWTA_3_3_CIFAR10_VGG13 --noise_ratio 0.1
"""
from twta.spikes.command import run

DATASETS = ('cifar10', 'shapes')  # the first is the default

if __name__ == '__main__':
    run(__file__, __doc__, DATASETS, default='TWTA_3_3_CIFAR10_VGG13')
