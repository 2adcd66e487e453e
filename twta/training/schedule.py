"""What a step is trained with: the stage that its epoch belongs to, its learning rate, its batch."""
import math

import numpy as np

from twta.options import SHORT
from twta.terminal import say
from twta.training.state import Stage


def next_stage(state, flags, defaults, has_record=True):
    """Return the stage to train, the last in state.stages: an interrupted stage if the flags are its own, or a new one.

    flags         those of a stage that the command line gives, by name; defaults: the values of all of them
    has_record    whether all that was trained has its record; a stage that ended without one is continued
    """
    if flags.get('protocol') == 'short':
        defaults = {**defaults, **SHORT[state.dataset]}
    if state.stages:
        stage = state.stages[-1]
        done = state.epoch - stage.first_epoch + 1
        if (done < stage.epochs or not has_record) and flags.items() <= stage._asdict().items():
            return stage
        if done < stage.epochs:
            give_up(state, stage, done)
    stage = Stage(**{'first_epoch': state.epoch + 1, **defaults, **flags})
    state.stages.append(stage)
    return stage


def give_up(state, stage, done):
    """End the last stage after so many of its epochs."""
    say(f'the training of epochs {stage.first_epoch} to {stage.last_epoch} was stopped after {state.epoch} and is '
        'given up: other flags begin a new one')
    if not done and not state.part:
        state.stages.pop()
        return
    stage = stage._replace(epochs=done)
    if state.part:  # the weights have taken these steps, so the record tells of them
        stage = stage._replace(part_steps=state.part.steps)
        state.part = None
    state.stages[-1] = stage


def describe_stage(stage):
    cosine = ' (cosine)' if stage.schedule == 'cosine' else ''
    return (f'learning rate {stage.learning_rate:g}{cosine}, {stage.augmentation} augmentation, batches of '
            f'{stage.batch_size}')


def scheduled_rate(stage, step, epoch_steps):
    """Return the learning rate of a step of the stage, counted from 0; an epoch has epoch_steps of them.

    cosine: the rate rises in a straight line for one epoch, or a quarter of the stage if that is less. Then it falls to
    0 along half a cosine.
    """
    peak, n_steps = stage.learning_rate, stage.epochs * epoch_steps
    if stage.schedule == 'constant':
        return peak
    warm_up = min(epoch_steps, n_steps // 4)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (1 + math.cos(math.pi * (step - warm_up) / (n_steps - warm_up))) / 2


def shuffled_batches(n_images, batch_size, seed, epoch):
    """Return the batches of an epoch, indices [batches, batch_size]; only seed and epoch decide on their order.

    The images left over, fewer than a batch, are not used in this epoch.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n_images)
    return order[:n_images // batch_size * batch_size].reshape(-1, batch_size)
