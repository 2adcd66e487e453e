"""The state of a run: what a checkpoint holds beside the variables, in JSON, and the checks of each part."""
import dataclasses
import sys
from types import NoneType
from typing import NamedTuple

from twta.options import WAYS, is_option_value

FORMAT = 5  # of the JSON text; older formats were never released
LATER = {'teacher': None, 'devices': [], 'code': []}  # what runs of older versions do not have
FIELDS = ('epoch', 'learning_rate', 'loss', 'training_accuracy', 'validation_accuracy', 'images_per_second', 'seconds')


class Stage(NamedTuple):
    """What one command trains."""
    first_epoch: int
    epochs: int
    learning_rate: float
    batch_size: int
    schedule: str
    augmentation: str
    protocol: str
    part_steps: int = 0  # steps of one more epoch, which was then given up for another stage

    @property
    def last_epoch(self):
        return self.first_epoch + self.epochs - 1

    def to_json(self):
        """Return a dictionary; files hold part_steps only if there are any."""
        return {name: value for name, value in self._asdict().items() if name != 'part_steps' or value}

    @classmethod
    def from_json(cls, entry):
        """Return the stage of a dictionary; raises ValueError if a value is absent or not valid."""
        check_keys('a stage', entry, STAGE_KEYS)
        check_keys('a stage', {'part_steps': 0, **entry}, {'part_steps': is_natural})
        return cls(**{name: entry[name] for name in cls._fields if name in entry})


class PartialEpoch(NamedTuple):
    """The running totals of an epoch that is not complete."""
    steps: int = 0
    loss: float = 0.0  # sum of the cross-entropy over the images as they were trained on
    correct: int = 0  # of these images, those that were predicted correctly
    seconds: float = 0.0


@dataclasses.dataclass
class State:
    """The state of a run."""
    script: str  # its name
    dataset: str
    data_sha256: str
    seed: int
    validation: int  # images held out
    options: dict  # of the network; 'choices' in JSON
    weights: str | None  # the file that it began with, from --weights
    precision: list = dataclasses.field(default_factory=list)  # every type that it was trained in
    epoch: int = 0  # complete epochs
    part: PartialEpoch | None = None  # of the next one
    stages: list = dataclasses.field(default_factory=list)  # of Stage, in order
    history: list = dataclasses.field(default_factory=list)  # per epoch a dictionary of FIELDS and shares
    best_validation_accuracy: float = -1.0
    teacher: dict | None = None  # of --teacher: file and sha256
    devices: list = dataclasses.field(default_factory=list)  # every device that it was trained on, in words
    code: list = dataclasses.field(default_factory=list)  # every version of the code that trained it

    def to_json(self):
        entry = {'format': FORMAT, **vars(self), 'choices': self.options,
                 'part': self.part._asdict() if self.part else None,
                 'stages': [stage.to_json() for stage in self.stages]}
        del entry['options']
        return {name: value for name, value in entry.items() if name not in LATER or value}

    @classmethod
    def from_json(cls, entry):
        """Return the state of a dictionary; raises ValueError if it is not what a run saves."""
        entry = {**LATER, **entry}
        check_keys('its state', entry, KEYS)
        check_options(entry['choices'])
        stages = [Stage.from_json(stage) for stage in entry['stages']]
        for stage in stages:
            if stage.first_epoch > entry['epoch'] + 1:
                raise ValueError(f'a stage begins with epoch {stage.first_epoch}, after {entry["epoch"]}')
        part = None
        if entry['part']:
            check_keys('the part of an epoch', entry['part'], PART_KEYS)
            part = PartialEpoch(**{name: entry['part'][name] for name in PartialEpoch._fields})
        check_history(entry['history'], entry['epoch'])
        entry = {**entry, 'options': entry['choices'], 'part': part, 'stages': stages}
        return cls(**{field.name: entry[field.name] for field in dataclasses.fields(cls)})

    def end(self):
        """Return `epoch`, the number of complete epochs, and `part_steps` of the next one, if it has any."""
        return {'epoch': self.epoch, **({'part_steps': self.part.steps} if self.part else {})}

    def become(self, other):
        """Take over everything from another state."""
        vars(self).update(vars(other))


def check_history(history, epochs):
    """Raise ValueError if the history has not one valid row per epoch, or other layers in some of them."""
    for row in history:
        check_keys('an epoch', {'shares': {}, **row}, ROW_KEYS)
    numbers = [row['epoch'] for row in history]
    if len(numbers) != epochs or numbers != list(range(1, len(numbers) + 1)):
        raise ValueError(f'its history is not that of {epochs} epochs')
    layers = [{kind: list(pairs) for kind, pairs in row['shares'].items()} for row in history if 'shares' in row]
    if any(names != layers[0] for names in layers):
        raise ValueError('the layers of its history are not the same in every epoch')


# ----------------------------------------------------------------------------------------------------------------------
# Checks of JSON


def check_keys(what, entry, keys):
    """Raise ValueError if a JSON object lacks one of the keys, or has a value there that is not valid.

    keys    by name: a type, a tuple of types, or a function that returns whether a value is valid
    """
    if not isinstance(entry, dict):
        raise ValueError(f'{what} is no JSON object')
    for key, kind in keys.items():
        value = entry.get(key)
        if key not in entry or not (isinstance(value, kind) if isinstance(kind, type | tuple) else kind(value)):
            raise ValueError(f'{key} of {what} is {"absent" if key not in entry else repr(value)[:50]}')


def check_options(options):
    """Raise ValueError if a value is not valid for the option of the network that it is given for."""
    for name, value in options.items():
        if not is_option_value(name, value):
            raise ValueError(f'--{name} {value}'[:80])


def are_objects(value):
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def are_names(value):
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def are_fractions(value):
    """Return whether the value is what loop.measure_fractions returns: two numbers by kind and layer."""
    return isinstance(value, dict) and all(
        isinstance(layers, dict) and all(isinstance(pair, list) and len(pair) == 2 and all(map(is_finite, pair))
                                         for pair in layers.values()) for layers in value.values())


def is_natural(value):
    return type(value) is int and 0 <= value < 2 ** 31


def is_finite(value):
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_teacher(value):
    return value is None or (isinstance(value, dict) and value.keys() == {'file', 'sha256'}
                             and all(isinstance(text, str) for text in value.values()))


STAGE_KEYS = {'first_epoch': is_natural, 'epochs': is_natural, 'learning_rate': is_finite,
              'batch_size': lambda value: is_natural(value) and value > 0,
              **{name: values.__contains__ for name, values in WAYS.items()}}
KEYS = {'format': is_natural, 'script': str, 'dataset': str, 'data_sha256': str, 'seed': is_natural,
        'validation': is_natural, 'epoch': is_natural, 'part': (dict, NoneType), 'stages': are_objects,
        'history': are_objects, 'best_validation_accuracy': is_finite, 'choices': dict,
        'weights': (str, NoneType), 'precision': are_names, 'devices': are_names, 'code': are_names,
        'teacher': is_teacher}
PART_KEYS = {'steps': is_natural, 'loss': is_finite, 'correct': is_natural, 'seconds': is_finite}
ROW_KEYS = {**dict.fromkeys(FIELDS, is_finite), 'validation_accuracy': lambda value: value is None or is_finite(value),
            'shares': are_fractions}  # epochs of older versions have no shares
