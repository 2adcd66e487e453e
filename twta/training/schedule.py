"""What a step is trained with: the stage that its epoch belongs to, its learning rate, its batch.

A stage is what one command trains: first_epoch, epochs, learning_rate, batch_size, schedule, augmentation, protocol.
"""
import math

import numpy as np

from twta.options import SHORT
from twta.terminal import say


def next_stage(state, args, defaults, judged=True):
    """The stage to train, the last in state['stages']: an interrupted one where the flags are its own, or a new one.

    judged: whether all that was trained has its record; a stage that ended without is its own continuation.
    """
    flags = {flag: getattr(args, flag) for flag in defaults if getattr(args, flag) is not None}
    defaults = {**defaults, **SHORT[args.dataset]} if args.protocol == 'short' else defaults
    if state['stages']:
        stage = state['stages'][-1]
        done = state['epoch'] - stage['first_epoch'] + 1
        if (done < stage['epochs'] or not judged) and flags.items() <= stage.items():
            return stage
        if done < stage['epochs']:
            say(f'the training of epochs {stage["first_epoch"]} to {stage["first_epoch"] + stage["epochs"] - 1} was '
                f'stopped after {state["epoch"]} and is given up: other flags begin a new one')
            stage['epochs'] = done
            if state['part']:  # the weights have taken these steps, so the record tells of them
                stage['part_steps'], state['part'] = state['part']['steps'], None
            elif not done:
                state['stages'].pop()
    stage = {'first_epoch': state['epoch'] + 1, **defaults, **flags}
    state['stages'].append(stage)
    return stage


def describe_stage(stage):
    cosine = ' (cosine)' if stage['schedule'] == 'cosine' else ''
    return (f'learning rate {stage["learning_rate"]:g}{cosine}, {stage["augmentation"]} augmentation, batches of '
            f'{stage["batch_size"]}')


def scheduled_rate(stage, step, epoch_steps):
    """The rate of a step, from 0 on, of a stage that has epoch_steps of them an epoch.

    cosine: up in a straight line for an epoch (a quarter of the stage where that is less), then half a cosine to 0.
    """
    peak, n_steps = stage['learning_rate'], stage['epochs'] * epoch_steps
    if stage['schedule'] == 'constant':
        return peak
    warm_up = min(epoch_steps, n_steps // 4)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (1 + math.cos(math.pi * (step - warm_up) / (n_steps - warm_up))) / 2


def shuffled_batches(n_images, batch_size, seed, epoch):
    """The epoch's batches of indices, from seed and epoch alone; images that fill no batch sit the epoch out."""
    order = np.random.default_rng([seed, epoch]).permutation(n_images)
    return order[:n_images // batch_size * batch_size].reshape(-1, batch_size)
