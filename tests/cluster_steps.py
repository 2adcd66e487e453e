"""Train some steps as one of several workers, without a command: test_cluster.py compares the weights.

    python tests/cluster_steps.py --workers 127.0.0.1:4711,127.0.0.1:4712 --task 0 --network FP_5_5_MNIST --file w0.npz
"""
import argparse
import functools

import numpy as np
from conftest import chosen, load_script

from twta import workers
from twta.data import datasets
from twta.graph.tf1 import tf
from twta.training import cluster, loop
from twta.training.build import build_graph
from twta.training.experiment import float_variables

STEPS, BATCH = 20, 60


def train(network, steps, batch_norm, augmentation='published', some=workers.Workers()):  # noqa: B008
    """Return the loss of each step and the variables by name: at first, after one step, after all; float32, seed 0."""
    module = load_script(network)
    dataset = datasets.load(module.DATASETS[1], '')
    train = dataset.train
    with cluster.joined(some, 0, 60) as joined:
        model = functools.partial(module.model, **chosen(module))
        graph = build_graph(model, train.images.shape[1:], dataset.crop, 0, tf.float32, augmentation, None, some,
                            60, batch_norm)
        with graph.graph.as_default(), joined.open_session(graph.graph) as session:
            session.run(tf.global_variables_initializer())
            joined.spread(session, float_variables())
            step = joined.step_callable(graph, session, joined.agreed([]))
            wanted = {variable.name: variable for variable in float_variables()}
            losses, values = [], [session.run(wanted)]
            for number, batch in enumerate(loop.shuffled_batches(len(train.labels), BATCH, 0, 1)[:steps]):
                rows = batch[joined.workers.rows]
                losses.append(step(train.images[rows], train.labels[rows], 1e-3, number)[0] / BATCH)
                if number in (0, steps - 1):
                    values.append(session.run(wanted))
    return np.array(losses), values


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workers', type=workers.addresses, required=True, help='HOST:PORT of each worker')
    parser.add_argument('--task', type=int, required=True, help='index of this worker')
    parser.add_argument('--network', required=True, help='name of a script')
    parser.add_argument('--batch_norm', default='global', help='shard or global (default: global)')
    parser.add_argument('--augmentation', default='published', help='published or geometric (default: published)')
    parser.add_argument('--steps', type=int, default=STEPS, help='number of steps (default: %(default)s)')
    parser.add_argument('--file', required=True, help='file for losses and variables')
    args = parser.parse_args()
    losses, values = train(args.network, args.steps, args.batch_norm, args.augmentation,
                           workers.Workers(args.workers, args.task))
    np.savez(args.file, losses=losses, **{
        f'{moment} {name}': value for moment, found in enumerate(values) for name, value in found.items()})


if __name__ == '__main__':
    main()
