"""Options of training and of networks: valid values, defaults and help lines."""
import argparse
from functools import partial

from twta.terminal import natural, number

NOTHING_TO_PACK = ('has full-precision activations: there is nothing to pack or to convert; choose a network with '
                   'quantised activations')
SUFFIXES = {'twta': '.twta', 'npz': '.npz', 'c': '.h', 'onnx': '.onnx', 'qonnx': '.qonnx.onnx',
            'nir': '.nir', 'html': '.html'}  # end of the file name for each --format

# valid values of the training flags
WAYS = {'schedule': ('constant', 'cosine'), 'augmentation': ('published', 'geometric', 'cutout'),
        'protocol': ('published', 'short')}

# --protocol short, per data set
SHORT = {dataset: {'protocol': 'short', 'learning_rate': learning_rate, 'epochs': epochs, 'schedule': 'cosine',
                   'augmentation': 'geometric'}
         for dataset, learning_rate, epochs in (('mnist', 2e-3, 30), ('digits', 2e-3, 30),
                                                ('cifar10', 5e-3, 40), ('shapes', 5e-3, 40))}

OPTIONS = {  # network options by flag: default, arguments of the parser; each script names its own in OPTIONS
    'threshold': ('fixed', {'choices': ('fixed', 'trainable', 'runtime'), 'help':
                  'threshold d of the activations, which are +1 if x >= d, -1 if x <= -d, else 0. fixed: a constant; '
                  'trainable: one d per layer, trained with the weights; runtime: proportional to mean|x|, of the '
                  'batch in training, of a moving average in evaluation (default: fixed)'}),
    'threshold_value': (None, {'type': partial(number, least=0.01, most=0.99), 'metavar': 'D', 'help':
                        'from 0.01 to 0.99. --threshold fixed: d (default: 0.5, as published); trainable: initial d '
                        '(default: 0.5); runtime: d / mean|x| (default: 0.7)'}),
    'pooling': ('conv', {'choices': ('conv', 'max', 'average'), 'help':
                'kind of the pooling layers (P). conv: learned, as published; max, average: without weights if the '
                'number of channels stays the same. Batch normalisation and activation follow (default: conv)'}),
    'rest': (0, {'type': int, 'choices': (0, -1), 'help':
             'state of rest of the activations. 0: as published; -1: the betas before them begin at -1 and ternary '
             'layers pad with -1: activations begin as a ReLU in three steps and learn faster (default: 0)'}),
    'quantize': ('both', {'choices': ('both', 'weights', 'activations', 'nothing'), 'help':
                 'what is quantised. Activations that are not quantised are ReLU; weights that are not quantised are '
                 'in full precision. nothing trains a teacher for --teacher, or shows what quantisation costs '
                 '(default: both)'}),
    'beta_init': (0, {'type': partial(number, least=-2, most=2), 'metavar': 'BETA', 'help':
                  'first value of the beta of batch normalisation before each quantised activation, from -2 to 2. 0: '
                  'as published; -0.5: a binary activation begins as a ReLU that is rounded to 0 or 1, for a training '
                  'that begins with the weights of --quantize nothing (default: 0)'}),
    'levels': (2, {'type': partial(natural, least=2, most=3), 'metavar': '{2,3}', 'help':
               'number of activation levels. 2: {0, 1}, binary; 3: {0, 0.5, 1}, as in the published code (default: '
               '2)'}),
    'k': (1, {'type': partial(natural, most=3), 'metavar': 'K', 'help':
          'exponent of the activation steps of 1 / 2 ** K (default: 1). At most 8 steps up to B: export turns each '
          'step into a separate neuron with its own weights, in its layer and in the next'}),
    'B': (2, {'type': partial(natural, least=1, most=8), 'metavar': 'B', 'help': 'largest activation (default: 2)'}),
}
# without meaning if activations are not quantised
OF_ACTIVATIONS = 'rest', 'threshold', 'threshold_value', 'beta_init', 'levels', 'k', 'B'


def with_defaults(options):
    """Return the options with the default for each value of None."""
    options = {name: OPTIONS[name][0] if value is None else value for name, value in options.items()}
    if 'threshold_value' in options and options['threshold_value'] is None:
        options['threshold_value'] = 0.7 if options.get('threshold') == 'runtime' else 0.5
    return options


def is_fp(script):
    """Return whether the script of that name trains in full precision: FP scripts have no --quantize and need none."""
    return script.startswith('FP_')


def is_full_precision(options):
    """Return whether the options of a network tell that nothing of it is quantised."""
    return options.get('quantize') == 'nothing'


def has_meaning(name, options):
    """Return whether an option has a meaning beside the others: some have none if the activations are ReLU."""
    return name not in OF_ACTIVATIONS or options.get('quantize') not in ('weights', 'nothing')


def is_option_value(name, value):
    """Return whether `name` is an option and `value` is one of its valid values."""
    if name not in OPTIONS:
        return False
    flag = OPTIONS[name][1]
    try:
        return value in flag['choices'] if 'choices' in flag else flag['type'](str(value)) == value
    except argparse.ArgumentTypeError:
        return False
