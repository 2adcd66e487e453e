"""Evaluation on the test images of the network in a session, and --mode inference."""
import contextlib

import numpy as np

from twta import results
from twta.graph.build import build_graph
from twta.graph.session import open_session
from twta.terminal import say
from twta.training import checkpoints
from twta.training.weights import read_weights, set_weights

EVALUATION_BATCH = 500  # images; it decides on memory and speed, not on the result


def evaluate(network, session, split):
    """Mean cross-entropy and confusion matrix [true class, predicted class] over a split."""
    loss, predicted = 0.0, []
    for start in range(0, len(split.labels), EVALUATION_BATCH):
        batch = slice(start, start + EVALUATION_BATCH)
        batch_loss, batch_predicted = session.run(
            [network.evaluation.loss, network.evaluation.predicted],
            {network.images: split.images[batch], network.labels: split.labels[batch]})
        loss += float(batch_loss)
        predicted.append(batch_predicted)
    n_classes = int(network.net.outputs.shape[-1])
    return loss / len(split.labels), results.confusion_matrix(split.labels, np.concatenate(predicted), n_classes)


def infer(script, model, args, dataset, source, state):
    """Evaluates the network of a checkpoint, source, or of --weights on the test images."""
    with trained(script, model, args, dataset, source) as (network, session):
        report(script, network, session, dataset, args, state['epoch'] if state else None)


@contextlib.contextmanager
def trained(script, model, args, dataset, source):
    """The network for evaluation and a session in which it has the weights of a checkpoint, source, or of --weights."""
    network = build_graph(model, dataset.test.images.shape[1:], dataset.crop, seed=0)
    with network.graph.as_default(), open_session(network.graph, args.gpu) as session:
        if args.weights:
            set_weights(network.net, read_weights(args.weights, network.net), session)
        else:
            checkpoints.restore(session, source, network.net, network.net.all_params)
        describe_network(script, network.net, args.choices, source or args.weights, args.verbose)
        yield network, session


def report(script, network, session, dataset, args, epoch):
    """Evaluates the weights after an epoch, or, where that is None, of --weights, on the test images; returns that."""
    loss, confusion = evaluate(network, session, dataset.test)
    kind, weights = ('weights', args.weights.resolve()) if epoch is None else (args.checkpoint, args.checkpoint)
    results.report(script, args, args.choices, dataset, kind, weights, epoch, loss, confusion)
    return loss, confusion


def describe_network(script, net, choices, source, verbose):
    if verbose:
        net.print_layers()
        net.print_params(details=False)
    chosen = ''.join(f', {name} {value}' for name, value in choices.items())
    say(f'network: {script}{chosen}, {net.count_params():,} parameters, {source}')
