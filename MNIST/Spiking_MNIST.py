#!/usr/bin/env python3
"""Spiking_MNIST: a network trained on MNIST, as integrate-and-fire neurons with the same predictions.

The network is converted (--conversion) and simulated on the test images. Each prediction is compared with that of the
graph. Spikes and synaptic operations are counted, layer by layer. Definitions: docs/spikes.md.

    python MNIST/Spiking_MNIST.py --network TWTA_4_4_MNIST
    python MNIST/Spiking_MNIST.py --network Quant_MNIST --conversion temporal
    python MNIST/Spiking_MNIST.py --network TWTA_4_4_MNIST --noise_ratio 0.1
"""
from twta.spikes.command import run

DATASETS = ('mnist', 'digits')  # the first is the default

if __name__ == '__main__':
    run(__file__, __doc__, DATASETS, default='TWTA_4_4_MNIST')
