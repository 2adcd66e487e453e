#!/usr/bin/env python3
"""Time a training step on one worker and on two, and the sums between them: what twta.report.scaling draws from.

    python benchmarks/scaling.py --json benchmarks/scaling.json    # three networks, about 4 minutes, two cores

Settings, each in processes of its own:

    one worker        one process with one thread per core, and one on a single core; also with smaller batches, which
                      tell what part of a step does not shrink with them (Adam, the starts of operations)
    two workers       two processes on a core each, with half of the batch each, over the loopback interface; with
                      --batch_norm shard and global
    sums              vectors of some sizes, summed over two such workers

A step is that of the scripts in the type that --precision auto takes: feeding, augmentation, gradients, Adam.
Images are random. Columns: workers, cores, batch norm, images per step, milliseconds per step (the median), images per
second, bytes that a worker sums per step.
"""
import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

import numpy as np
from speed import add_flags, choose_networks, write_rows
from yardsticks import BATCH, SCRIPTS, random_examples

from twta import processor
from twta.scripts import load_script
from twta.workers import Workers

BATCHES = BATCH, BATCH // 2, BATCH // 4
SIZES = 1, 10_000, 1_000_000, 10_000_000  # of the summed vectors, in floats
PATIENCE = 60  # seconds


def use_cores(cores):
    """Keep this process on these cores; TensorFlow then takes as many threads."""
    if cores and hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, cores)


def free_addresses(count):
    """Return as many addresses of this machine with ports that nobody uses; none for one worker."""
    probes = [socket.create_server(('127.0.0.1', 0)) for _ in range(count if count > 1 else 0)]
    addresses = [f'127.0.0.1:{probe.getsockname()[1]}' for probe in probes]
    for probe in probes:
        probe.close()
    return addresses


def work(task, addresses, name, batch_norm, repetitions):
    """Print the seconds of steps and sums as one worker, as JSON: {'steps': {images: seconds}, 'sums': ..., ...}."""
    from twta.graph.session import choose_precision
    from twta.graph.tf1 import tf
    from twta.training import cluster
    from twta.training.build import build_graph
    from twta.training.experiment import float_variables

    workers = Workers(tuple(addresses.split(',')), task) if addresses else Workers()
    images, labels, crop = random_examples(name)
    answer = {'steps': {}, 'sums': {}}
    with cluster.joined(workers, 0, PATIENCE) as joined:
        network = build_graph(load_script(SCRIPTS[name]).model, images.shape[1:], crop, 0,
                              choose_precision('auto', None), workers=workers, patience=PATIENCE, batch_norm=batch_norm)
        with network.graph.as_default(), joined.open_session(network.graph) as session:
            session.run(tf.global_variables_initializer())
            joined.spread(session, float_variables())
            step = joined.step_callable(network, session, joined.agreed([]))
            for batch in (BATCH,) if addresses else BATCHES:
                rows = np.arange(batch)[joined.workers.rows]
                answer['steps'][batch] = time_calls(lambda number, rows=rows: step(images[rows], labels[rows], 1e-4,
                                                                                   number), repetitions)
            if addresses and batch_norm == 'shard':
                vector = network.graph.get_operation_by_name('CollectiveReduce').outputs[0]
                answer['bytes'] = 4 * vector.shape.num_elements()
        for size in SIZES if 'bytes' in answer else ():
            answer['sums'][4 * size] = time_sums(joined, size, repetitions)
    answer['parameters'] = int(network.net.count_params())
    print(json.dumps(answer), file=sys.stderr)


def time_calls(call, repetitions):
    """Return the median seconds of call(number), after three calls that are not timed."""
    seconds = []
    for number in range(repetitions + 3):
        start = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def time_sums(joined, size, repetitions):
    """Return the median seconds of a vector's sum over the workers, without feeding and fetching it."""
    from twta.graph import collectives
    from twta.graph.tf1 import tf

    joined.keys += 1
    with tf.Graph().as_default() as graph, joined.open_session(graph) as session:
        x = tf.get_variable('x', initializer=tf.zeros([size]))
        session.run(x.initializer)
        run = session.make_callable(collectives.add_up(x, joined.group, joined.keys).op, accept_options=True)
        return time_calls(lambda _: run(options=collectives.run_options()), 3 * repetitions)


def measure(name, repetitions):
    """Print and return the rows of a network: steps and sums."""
    every = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
    rows = []
    for count, cores, batch_norm in ((1, every, ''), (1, every[:1], ''), (2, every[:2], 'shard'),
                                     (2, every[:2], 'global')):
        addresses = ','.join(free_addresses(count))
        processes = [subprocess.Popen(
            [sys.executable, __file__, name, '--repetitions', str(repetitions), '--work', str(task), addresses,
             batch_norm or 'shard'], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda task=task, count=count, cores=cores: use_cores(cores if count == 1 else cores[task:][:1]))
            for task in range(count)]
        said = [process.communicate()[1] for process in processes]
        if any(process.returncode for process in processes):
            sys.exit(f'scaling.py: error: a worker has failed: {said}')
        answer = json.loads(said[0].splitlines()[-1])
        common = {'network': name, 'parameters': answer['parameters'], 'workers': count, 'cores': len(cores) or None,
                  'batch_norm': batch_norm, 'processor': processor.kind()}
        for batch, seconds in answer['steps'].items():
            rows.append({**common, 'batch': int(batch), 'seconds_per_step': seconds,
                         'images_per_second': int(batch) / seconds, 'bytes': answer.get('bytes')})
            print(f'{name:26} {count} {common["cores"]} {batch_norm:6} {batch:>4} {1000 * seconds:9.2f} '
                  f'{int(batch) / seconds:9,.0f} {answer.get("bytes") or "":>11}', flush=True)
        for size, seconds in answer['sums'].items():
            rows.append({**common, 'sum_bytes': int(size), 'seconds': seconds})
            print(f'{name:26} sum of {int(size):>11,} bytes {1000 * seconds:9.2f} ms', flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, SCRIPTS, 9, argparse.SUPPRESS)
    parser.add_argument('--work', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    networks = choose_networks(parser, args, SCRIPTS)
    if args.work:
        return work(int(args.work[0]), args.work[1], networks[0], args.work[2], args.repetitions)
    rows = []
    for name in networks:
        rows += measure(name, args.repetitions)
        if args.json:
            write_rows(args.json, (), args.repetitions, rows)


if __name__ == '__main__':
    main()
