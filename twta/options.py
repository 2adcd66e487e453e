"""Ways of training and choices between networks: valid values, defaults, and the texts of their flags."""
import argparse
from functools import partial

from twta.terminal import natural, number

NOTHING_TO_PACK = ('has full-precision activations, there is nothing to pack or to convert; take one of the networks '
                   'with quantised activations')
SUFFIXES = {'twta': '.twta', 'npz': '.npz', 'c': '.h', 'onnx': '.onnx'}  # of what export writes, by --format

WAYS = {'schedule': ('constant', 'cosine'), 'augmentation': ('published', 'geometric'),
        'protocol': ('published', 'short')}  # of training: valid values by flag

SHORT = {dataset: {'protocol': 'short', 'learning_rate': learning_rate, 'epochs': epochs, 'schedule': 'cosine',
                   'augmentation': 'geometric'}  # what --protocol short stands for, by data set
         for dataset, learning_rate, epochs in (('mnist', 2e-3, 30), ('digits', 2e-3, 30),
                                                ('cifar10', 5e-3, 40), ('shapes', 5e-3, 40))}

OPTIONS = {  # flags that choose between networks of one architecture; a script says which it has
    'threshold': ('fixed', {'choices': ('fixed', 'trainable', 'runtime'), 'help':
                  'd of the activations, +1 where x >= d, -1 where x <= -d: fixed, the published 0.5; trainable, one a '
                  'layer, trained with the weights; runtime, from the mean of |x|, of the batch in training, of a '
                  'moving average in evaluation. Default: fixed'}),
    'threshold_value': (None, {'type': partial(number, least=0.01, most=0.99), 'metavar': 'D', 'help':
                        'fixed: d itself, default 0.5; trainable: where d begins, default 0.5; runtime: d / mean|x|, '
                        'default 0.7. Between 0.01 and 0.99'}),
    'pooling': ('conv', {'choices': ('conv', 'max', 'average'), 'help':
                'what P tokens are: conv, learned, as published; max or average, without weights, where the number of '
                'channels stays. Batch normalisation and activation follow. Default: conv'}),
    'levels': (2, {'type': partial(natural, least=2, most=3), 'metavar': '{2,3}', 'help':
               'of the activations: 2, {0, 1}, binary; 3, {0, 0.5, 1}, as the published code has it. Default: 2'}),
    'k': (1, {'type': partial(natural, most=3), 'metavar': 'K', 'help':
          'activations go in steps of 1 / 2 ** K, default: 1. No more than 8 steps up to B: on export each is a '
          'neuron of its own, with the weights of its own and in the next layer'}),
    'B': (2, {'type': partial(natural, least=1, most=8), 'metavar': 'B', 'help': 'up to B, default: 2'}),
}


def with_defaults(choices):
    """The choices with the defaults where they are None."""
    chosen = {name: OPTIONS[name][0] if value is None else value for name, value in choices.items()}
    if 'threshold_value' in chosen and chosen['threshold_value'] is None:
        chosen['threshold_value'] = 0.7 if chosen.get('threshold') == 'runtime' else 0.5
    return chosen


def is_option_value(name, value):
    """Whether it is a value of a flag of that name in OPTIONS."""
    if name not in OPTIONS:
        return False
    flag = OPTIONS[name][1]
    try:
        return value in flag['choices'] if 'choices' in flag else flag['type'](str(value)) == value
    except argparse.ArgumentTypeError:
        return False
