"""The state of a run, as a checkpoint holds it in JSON: its keys, and the checks of each."""
import sys
from types import NoneType

from twta.options import WAYS, is_option_value

FIELDS = ('epoch', 'learning_rate', 'loss', 'training_accuracy', 'validation_accuracy', 'images_per_second', 'seconds')


def check_keys(what, entry, keys):
    """Raises ValueError where a JSON object lacks one of the keys, or has no value of its kind there.

    keys: by name, a type, or a tuple of types, or a function that says whether a value will do.
    """
    if not isinstance(entry, dict):
        raise ValueError(f'{what} is no JSON object')
    for key, kind in keys.items():
        value = entry.get(key)
        if key not in entry or not (isinstance(value, kind) if isinstance(kind, type | tuple) else kind(value)):
            raise ValueError(f'{key} of {what} is {"absent" if key not in entry else repr(value)[:50]}')


def check_choices(choices):
    """Raises ValueError where one is not a value of a flag that chooses between networks."""
    for name, value in choices.items():
        if not is_option_value(name, value):
            raise ValueError(f'--{name} {value}'[:80])


def are_objects(value):
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def are_shares(value):
    """Whether it is what experiment.measure_shares returns: two numbers by kind and layer."""
    return isinstance(value, dict) and all(
        isinstance(layers, dict) and all(isinstance(pair, list) and len(pair) == 2 and all(map(is_finite, pair))
                                         for pair in layers.values()) for layers in value.values())


def is_natural(value):
    return type(value) is int and 0 <= value < 2 ** 31


def is_finite(value):
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


STAGE_KEYS = {'first_epoch': is_natural, 'epochs': is_natural, 'learning_rate': is_finite,
              'batch_size': lambda value: is_natural(value) and value > 0,
              **{name: values.__contains__ for name, values in WAYS.items()}}


FORMAT = 5  # 1 knew no --validation, no --schedule and no part of an epoch, 2 no choices, 3 no --augmentation; 4 had
            # neither weights nor precision
KEYS = {'format': is_natural, 'script': str, 'dataset': str, 'data_sha256': str, 'seed': is_natural,
        'validation': is_natural, 'epoch': is_natural, 'part': (dict, NoneType), 'stages': are_objects,
        'history': are_objects, 'best_validation_accuracy': is_finite, 'choices': dict,
        'weights': (str, NoneType), 'precision': lambda names: isinstance(names, list) and all(
            isinstance(name, str) for name in names)}
PART_KEYS = {'steps': is_natural, 'loss': is_finite, 'correct': is_natural, 'seconds': is_finite}
ROW_KEYS = {**dict.fromkeys(FIELDS, is_finite), 'validation_accuracy': lambda value: value is None or is_finite(value),
            'shares': are_shares}  # absent from epochs of older versions


def check_state(state):
    """The state; ValueError where it is not what a run saves."""
    check_keys('its state', state, KEYS)
    check_choices(state['choices'])
    for stage in state['stages']:
        check_keys('a stage', stage, STAGE_KEYS)
        if stage['first_epoch'] > state['epoch'] + 1:
            raise ValueError(f'a stage begins with epoch {stage["first_epoch"]}, after {state["epoch"]}')
    for row in state['history']:
        check_keys('an epoch', {'shares': {}, **row}, ROW_KEYS)
    if state['part']:
        check_keys('the part of an epoch', state['part'], PART_KEYS)
    numbers = [row['epoch'] for row in state['history']]
    if len(numbers) != state['epoch'] or numbers != list(range(1, len(numbers) + 1)):
        raise ValueError(f'its history is not that of {state["epoch"]} epochs')
    layers = [{kind: list(pairs) for kind, pairs in row['shares'].items()} for row in state['history']
              if 'shares' in row]
    if any(names != layers[0] for names in layers):
        raise ValueError('the layers of its history are not the same in every epoch')
    return state
