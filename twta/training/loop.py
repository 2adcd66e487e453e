"""The training loop: epochs and steps; each epoch ends with a line, a checkpoint and a row of log.csv."""
import itertools
import math
import sys
import time

import numpy as np
from tqdm import tqdm

from twta.results import accuracy
from twta.terminal import say
from twta.training import run_directory
from twta.training.evaluation import EVALUATION_BATCH, evaluate
from twta.training.schedule import scheduled_rate, shuffled_batches
from twta.training.state import FIELDS
from twta.training.weights import save_weights

NOTHING = {'steps': 0, 'loss': 0.0, 'correct': 0, 'seconds': 0.0}  # of an epoch is done


def train_epochs(network, session, store, state, stage, epochs, dataset, run_dir, stop):
    """Trains until the last epoch or, where stop gets an item, the next step has ended; saved, either way."""
    last, seed, batch_size = epochs[-1], state['seed'], stage['batch_size']
    run_step = step_callable(network, session)
    run_directory.write_log(run_dir / 'log.csv', state['history'])
    events = run_directory.Events(run_dir, epochs[0])
    n_steps = len(dataset.train.labels) // batch_size
    n_images = n_steps * batch_size
    part = state['part'] or NOTHING
    bar = tqdm(total=len(epochs) * n_steps, initial=part['steps'], unit='step', leave=False,
               disable=not sys.stderr.isatty())
    with bar:
        for epoch in epochs:
            bar.set_description(f'epoch {epoch}/{last}')
            part = train_epoch(run_step, dataset.train, stage, epoch, part, seed, bar, stop)
            if part['steps'] < n_steps:
                store.save(session, {**state, 'part': part}, is_best=False)
                state['part'] = part
                return
            loss, train_accuracy, speed = (part['loss'] / n_images, part['correct'] / n_images,
                                           n_images / part['seconds'])
            rate = scheduled_rate(stage, (epoch - stage['first_epoch'] + 1) * n_steps - 1, n_steps)
            validation = None  # without validation images no epoch is better than another: never by the test images
            if len(dataset.validation.labels):
                validation = accuracy(evaluate(network, session, dataset.validation)[1])
            row = dict(zip(FIELDS, (epoch, rate, loss, train_accuracy, validation, round(speed, 1),
                                            round(part['seconds'], 3)), strict=True))
            row['shares'] = measure_shares(network, session, dataset)
            is_best = validation is not None and validation > state['best_validation_accuracy']
            after = {**state, 'epoch': epoch, 'part': None, 'history': state['history'] + [row],
                     'best_validation_accuracy': validation if is_best else state['best_validation_accuracy']}
            store.save(session, after, is_best)
            state.update(after)
            run_directory.write_log(run_dir / 'log.csv', state['history'])
            save_weights(run_dir / 'model.npz', network.net, session)
            events.add(row)
            say(f'epoch {epoch}/{last}  loss {loss:.4f}  train acc {train_accuracy:.4f}  '
                + ('' if validation is None else f'val acc {validation:.4f}  ') + f'{speed:,.0f} images/s')
            part = NOTHING
            if stop:
                return


def step_callable(network, session):
    """A training step as a function of images, labels, rate and number; it returns loss, predictions and None."""
    training = network.training
    return session.make_callable([training.loss, training.predicted, training.step],
                                 [network.images, network.labels, network.learning_rate, network.step])


def train_epoch(run_step, split, stage, epoch, part, seed, bar, stop):
    """The steps of an epoch after those of `part`, or only the next one where stop has an item; returns the sum.

    That is steps, cross-entropy (loss) and right predictions (correct) of the images as they were trained on, seconds.
    """
    start = time.perf_counter()
    steps, loss, correct = part['steps'], part['loss'], part['correct']
    n_steps = len(split.labels) // stage['batch_size']
    batches = shuffled_batches(len(split.labels), stage['batch_size'], seed, epoch)
    for batch in itertools.islice(batches, steps, None):
        labels = split.labels[batch]
        rate = scheduled_rate(stage, (epoch - stage['first_epoch']) * n_steps + steps, n_steps)
        batch_loss, predicted, _ = run_step(split.images[batch], labels, rate, (epoch - 1) * n_steps + steps)
        steps += 1
        if not math.isfinite(batch_loss):
            raise FloatingPointError(f'the loss is {batch_loss} at step {steps} of epoch {epoch}')
        loss += float(batch_loss)
        correct += int(np.sum(predicted == labels))
        bar.update()
        if stop:
            break
    return {'steps': steps, 'loss': loss, 'correct': correct, 'seconds': part['seconds'] + time.perf_counter() - start}


def measure_shares(network, session, dataset):
    """network.shares on a batch of validation images (training images where there are none), rounded to 4 decimals."""
    split = dataset.validation if len(dataset.validation.labels) else dataset.train
    shares = session.run(network.shares, {network.images: split.images[:EVALUATION_BATCH]})
    return {kind: {name: [round(float(share), 4) for share in pair] for name, pair in layers.items()}
            for kind, layers in shares.items()}
