"""Evaluation of the network in a session on the test images, and --mode inference."""
import contextlib

import numpy as np

from twta import results
from twta.graph.session import open_session
from twta.options import has_meaning
from twta.terminal import say
from twta.training import checkpoints
from twta.training.build import build_graph
from twta.training.weights import read_weights, set_weights

EVALUATION_BATCH = 500  # images; the number changes memory and speed, not the result


def evaluate(network, session, split):
    """Return the mean cross-entropy and the confusion matrix [true class, predicted class] over a split."""
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


def infer(experiment):
    """Evaluate the network of a checkpoint, or of --weights, on the test images."""
    with trained(experiment) as (network, session, experiment):
        loss, confusion = evaluate(network, session, experiment.dataset.test)
    results.say_accuracy(loss, confusion)
    save(experiment, loss, confusion, experiment.state)


@contextlib.contextmanager
def trained(experiment):
    """Build the network for evaluation; give it, a session that holds its weights, and the experiment that they are of.

    The weights are those of --weights or of a checkpoint. If a training beside this command has removed the checkpoint
    meanwhile, they are those of the newest one.
    """
    dataset = experiment.dataset
    network = build_graph(experiment.model, dataset.test.images.shape[1:], dataset.crop, seed=0)
    with network.graph.as_default(), open_session(network.graph, experiment.gpu) as session:
        if experiment.weights:
            set_weights(network.net, read_weights(experiment.weights, network.net), session)
        else:
            if not checkpoints.is_there(experiment.source):
                source = checkpoints.find(experiment.run_dir, experiment.checkpoint)
                state = checkpoints.read_state(source, experiment.script, experiment.dataset_name)
                experiment = experiment._replace(source=source, state=state)
            checkpoints.restore(session, experiment.source, network.net, network.net.all_params)
        describe_network(experiment, network.net, experiment.source or experiment.weights)
        yield network, session, experiment


def save(experiment, loss, confusion, state):
    """Write the result of an evaluation into the run directory.

    loss, confusion    from evaluate
    state              of the weights; None: they are of --weights
    """
    kind, weights = experiment.checkpoint, experiment.checkpoint
    if not state:
        kind, weights = 'weights', str(experiment.weights.resolve())
    results.save(experiment.run_dir, experiment.dataset, loss, confusion, kind, {
        'script': experiment.script, 'choices': experiment.options, 'weights': weights,
        **(state.end() if state else {'epoch': None})})


def describe_network(experiment, net, source):
    """Print a line about the network; with --verbose its layers and parameters too."""
    if experiment.is_verbose:
        net.print_layers()
        net.print_params(details=False)
    options = ''.join(f', {name} {value}' for name, value in experiment.options.items()
                      if has_meaning(name, experiment.options))
    say(f'network: {experiment.script}{options}, {net.count_params():,} parameters, {source}')
