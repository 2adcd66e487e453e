"""The training loop: epochs and steps. Each epoch ends with a checkpoint, a row of log.csv and a line."""
import dataclasses
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
from twta.training.state import PartialEpoch
from twta.training.weights import save_weights


def train_epochs(network, session, workers, store, state, dataset, run_dir, stop):
    """Train to the end of the last stage of the state; if a signal is pending in stop, only to the end of a step.

    workers    cluster.Alone or cluster.Cluster, whose worker 0 this is
    store      a checkpoints.Checkpoints, which saves weights and state after each epoch, and after that step
    """
    stage = state.stages[-1]
    run_directory.write_log(run_dir / 'log.csv', state.history)
    if state.epoch and not state.part:  # the last command may have ended before it wrote them
        save_weights(run_dir / 'model.npz', network.net, session)
    if state.epoch >= stage.last_epoch:
        return
    run_step = workers.step_callable(network, session, stop)
    events = run_directory.Events(run_dir, state.epoch + 1)
    n_steps = len(dataset.train.labels) // stage.batch_size
    epochs = range(state.epoch + 1, stage.last_epoch + 1)
    part = state.part or PartialEpoch()
    with tqdm(total=len(epochs) * n_steps, initial=part.steps, unit='step', leave=False,
              disable=not sys.stderr.isatty()) as bar:
        for epoch in epochs:
            bar.set_description(f'epoch {epoch}/{stage.last_epoch}')
            part = train_epoch(run_step, dataset.train, stage, epoch, part, state.seed, bar, stop, workers.workers.rows)
            if part.steps < n_steps:
                save(store, session, state, dataclasses.replace(state, part=part), is_best=False)
                return
            workers.compare_weights(network, session, epoch)
            row = describe_epoch(network, session, dataset, stage, epoch, part, n_steps)
            validation = row['validation_accuracy']
            is_best = validation is not None and validation > state.best_validation_accuracy
            save(store, session, state, dataclasses.replace(
                state, epoch=epoch, part=None, history=[*state.history, row],
                best_validation_accuracy=validation if is_best else state.best_validation_accuracy), is_best)
            run_directory.write_log(run_dir / 'log.csv', state.history)
            save_weights(run_dir / 'model.npz', network.net, session)
            events.add(row)
            say(f'epoch {epoch}/{stage.last_epoch}  loss {row["loss"]:.4f}  train acc {row["training_accuracy"]:.4f}  '
                + ('' if validation is None else f'val acc {validation:.4f}  ')
                + f'{row["images_per_second"]:,.0f} images/s')
            part = PartialEpoch()
            if stop:
                return


def save(store, session, state, after, is_best):
    """Save a checkpoint with the state `after`; only then the state becomes it."""
    store.save(session, after, is_best)
    state.become(after)


def follow_epochs(network, session, workers, state, dataset, stop):
    """Train the epochs that train_epochs does, as a worker that writes nothing; the state gets only its epoch."""
    stage = state.stages[-1]
    run_step = workers.step_callable(network, session, stop)
    part = state.part or PartialEpoch()
    for epoch in range(state.epoch + 1, stage.last_epoch + 1):
        part = train_epoch(run_step, dataset.train, stage, epoch, part, state.seed, tqdm(disable=True), stop,
                           workers.workers.rows)
        if part.steps < len(dataset.train.labels) // stage.batch_size:
            return
        workers.compare_weights(network, session, epoch)
        state.epoch, part = epoch, PartialEpoch()
        if stop:
            return


def step_callable(network, session):
    """Return a training step: a function of images, labels, rate and number that returns loss and correct predictions.

    The loss is summed over the batch.
    """
    training = network.training
    run = session.make_callable([training.loss, training.predicted, training.step],
                                [network.images, network.labels, network.learning_rate, network.step])

    def step(images, labels, rate, number):
        loss, predicted, _ = run(images, labels, rate, number)
        return loss, int(np.sum(predicted == labels))

    return step


def train_epoch(run_step, split, stage, epoch, part, seed, bar, stop, rows=slice(None)):
    """Train the rest of an epoch and return its running totals; if a signal is pending in stop, train one step only.

    rows    of each batch, which run_step gets; its totals are of the whole batch
    """
    start = time.perf_counter()
    steps, loss, correct, seconds = part
    n_steps = len(split.labels) // stage.batch_size
    batches = shuffled_batches(len(split.labels), stage.batch_size, seed, epoch)
    for batch in itertools.islice(batches, steps, None):
        images, labels = split.images[batch[rows]], split.labels[batch[rows]]
        rate = scheduled_rate(stage, (epoch - stage.first_epoch) * n_steps + steps, n_steps)
        batch_loss, right = run_step(images, labels, rate, (epoch - 1) * n_steps + steps)
        steps += 1
        if not math.isfinite(batch_loss):
            raise FloatingPointError(f'the loss is {batch_loss} at step {steps} of epoch {epoch}')
        loss += float(batch_loss)
        correct += right
        bar.update()
        if stop:
            break
    return PartialEpoch(steps, loss, correct, seconds + time.perf_counter() - start)


def describe_epoch(network, session, dataset, stage, epoch, totals, n_steps):
    """Return the row of a complete epoch in the history: state.FIELDS and shares."""
    n_images = n_steps * stage.batch_size
    rate = scheduled_rate(stage, (epoch - stage.first_epoch + 1) * n_steps - 1, n_steps)
    validation = None  # without validation images no epoch is better than another: never by the test images
    if len(dataset.validation.labels):
        validation = accuracy(evaluate(network, session, dataset.validation)[1])
    return {'epoch': epoch, 'learning_rate': rate, 'loss': totals.loss / n_images,
            'training_accuracy': totals.correct / n_images, 'validation_accuracy': validation,
            'images_per_second': round(n_images / totals.seconds, 1), 'seconds': round(totals.seconds, 3),
            'shares': measure_fractions(network, session, dataset)}


def measure_fractions(network, session, dataset):
    """Return network.value_fractions on a batch of validation images, or training images if there are none.

    Rounded to 4 decimals.
    """
    split = dataset.validation if len(dataset.validation.labels) else dataset.train
    found = session.run(network.value_fractions, {network.images: split.images[:EVALUATION_BATCH]})
    return {kind: {name: [round(float(fraction), 4) for fraction in pair] for name, pair in layers.items()}
            for kind, layers in found.items()}
