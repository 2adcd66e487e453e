#!/usr/bin/env python3
"""Time training and inference of each network: as these scripts do it, the published way and, with --torch, in PyTorch.

    python benchmarks/training_speed.py            # three networks, about 5 minutes
    python benchmarks/training_speed.py --all      # all nine, 17 minutes
    pip install torch==2.13.0 && python benchmarks/training_speed.py --torch

Ways:

    project          What a script runs: the loop of twta.training with feeding and augmentation, in the type that
                     --precision auto takes. The time of the end of an epoch (checkpoint, log, weights, summaries) is
                     spread over its 50,000 images. Inference is that of --mode inference: uint8 images in batches of
                     500, float32, the encoder in float64.
    project float32  The same with --precision float32.
    published        The same network in float32 from stock parts, the published way: TensorLayer's unfused
                     BatchNormLayer, signs under gradient_override_map, one slice, convolution and BatchNormLayer per
                     group. feed_dict feeds MNIST; queue runners feed CIFAR-10 and augment image by image. On MNIST an
                     epoch ends, as published, with a second pass over the training images and a checkpoint. Inference
                     takes prepared images in batches of 200.
    torch ...        The same network in PyTorch: eager or compiled, float32 or bfloat16 (autocast), channels last. It
                     repeats one batch of 200 that lies in memory: no feeding, no augmentation, no end of an epoch.

No way includes the validation after an epoch. Each way runs in a process of its own. The processes take turns, so that
a slow minute slows all of them. Images are random and weights are the initial ones; neither changes the time.

Columns:

    training, inference   images per second, the median of the repetitions
    x                     speed of project divided by the speed of this way, in the column before
    steps                 the same for training without the ends of epochs
    peak MiB              peak memory of the process
    first step, import    seconds from the command to the end of the first step; seconds of them in which TensorFlow or
                          PyTorch is imported
"""
import argparse
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yardsticks
from speed import add_flags, choose_networks, peak_memory, write_rows
from yardsticks import BATCH, INFERRED, SCRIPTS, random_examples

from twta import processor
from twta.scripts import load_script

EPOCH_IMAGES = 50_000
SECONDS = 0.5  # least duration of a timing
TENSORFLOW = ('project', 'project float32', 'published')
TORCH = ('torch eager float32', 'torch eager bfloat16', 'torch compiled float32', 'torch compiled bfloat16')


# ----------------------------------------------------------------------------------------------------------------------
# The ways. Each is a function that returns train(steps), infer() and epoch_end(), or None without an end of an epoch


def project(name, precision):
    """Return the way of these scripts."""
    from tqdm import tqdm

    from twta.graph.session import choose_precision, open_session
    from twta.graph.tf1 import tf
    from twta.training import checkpoints, evaluation, loop, run_directory
    from twta.training.build import build_graph
    from twta.training.state import FIELDS, PartialEpoch, Stage, State
    from twta.training.weights import save_weights

    images, labels, crop = random_examples(name)
    data = SimpleNamespace(images=images, labels=labels)
    model = load_script(SCRIPTS[name]).model
    network = build_graph(model, images.shape[1:], crop, 0, choose_precision(precision, None))
    with network.graph.as_default():
        session = open_session(network.graph, 0)
        session.run(tf.global_variables_initializer())
        folder = Path(tempfile.mkdtemp(dir=os.getcwd()))
        store, events = checkpoints.Checkpoints(folder), run_directory.Events(folder, 1)
    run_step = loop.step_callable(network, session)

    def train(steps):
        part = np.arange(steps * BATCH) % INFERRED
        split = SimpleNamespace(images=images[part], labels=labels[part])
        stage = Stage(1, 1, 1e-4, BATCH, 'constant', 'published', 'published')
        loop.train_epoch(run_step, split, stage, 1, PartialEpoch(), 0, tqdm(disable=True), [])

    def epoch_end():
        row = dict.fromkeys(FIELDS, 1)
        with network.graph.as_default():
            store.save(session, State(name, 'benchmark', '', 0, 0, {}, None, epoch=1), is_best=False)
            run_directory.write_log(folder / 'log.csv', [row])
            save_weights(folder / 'model.npz', network.net, session)
            events.add(row)

    return train, lambda: evaluation.evaluate(network, session, data), epoch_end


def ways(with_torch):
    """Return the names of the ways to time.

    PyTorch's ways in bfloat16 need a processor that multiplies it: they take hours if it is emulated.
    """
    from twta.graph.session import multiplies_bfloat16

    torch = TORCH if multiplies_bfloat16(None) else [way for way in TORCH if way.endswith('float32')]
    return (*TENSORFLOW, *(torch if with_torch else ()))


def start(name, way, layers, is_ternary):
    """Return train, infer and epoch_end of a way; layers and is_ternary come from layers_of, as JSON holds them."""
    layers = [yardsticks.Layer(*layer) for layer in layers]
    if way == 'published':
        return yardsticks.published(name, layers, is_ternary)
    kind, *words = way.split()
    if kind == 'project':
        return project(name, *words or ['auto'])
    return yardsticks.pytorch(name, words[1], words[0] == 'compiled', layers, is_ternary)


# ----------------------------------------------------------------------------------------------------------------------
# Where the time goes

KINDS = {  # parts of the name of an operation; the first kind with a match counts
    "filters' gradient": ('BackpropFilter',), "input's gradient": ('BackpropInput',),
    'convolution forward': ('Conv2D',), 'products of matrices': ('MatMul',), 'batch normalisation': ('BatchNorm',),
    'quantisers (XLA)': ('PartitionedCall',), 'layout': ('Transpose', 'Gather', 'Pad', 'Concat'), 'Adam': ('Adam',),
    'casts': ('Cast',), 'the rest': ('',)}


def profile(name, repetitions):
    """Print the time of each kind of operation in a training step, and the speed of the products."""
    from twta.graph.session import choose_precision, configuration
    from twta.graph.tf1 import native_chatter_hidden, tf
    from twta.training.blocks import read_blocks
    from twta.training.build import build_graph

    images, labels, crop = random_examples(name)
    precision = choose_precision('auto', None)
    network = build_graph(load_script(SCRIPTS[name]).model, images.shape[1:], crop, 0, precision)
    products = [np.prod(layer.all_params[-1].shape.as_list()) * np.prod(layer.outputs.shape[1:-1].as_list() or [1])
                for layer, _, _ in read_blocks(network.net)]
    operations = 2 * BATCH * (3 * sum(products) - products[0])  # the images need no gradient
    feed = {network.images: images[:BATCH], network.labels: labels[:BATCH], network.learning_rate: 1e-4,
            network.step: 0}
    config = configuration(inter_op_parallelism_threads=1)  # one operation at a time, each on all cores
    options = tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE)
    spent = dict.fromkeys(KINDS, 0)
    with native_chatter_hidden(), network.graph.as_default(), tf.Session(config=config) as session:
        session.run(tf.global_variables_initializer())
        for index in range(repetitions + 3):
            trace = tf.RunMetadata()
            session.run(network.training.step, feed, options, trace)
            if index < 3:  # XLA still compiles, and TensorFlow allocates memory
                continue
            for node in (node for device in trace.step_stats.dev_stats for node in device.node_stats):
                operation = node.timeline_label.partition(' = ')[2].partition('(')[0] or node.node_name
                kind = next(kind for kind, words in KINDS.items() if any(word in operation for word in words))
                spent[kind] += (node.op_end_rel_micros - node.op_start_rel_micros) / repetitions / 1000
    total = sum(spent.values())
    print(f'{name}: milliseconds of a training step of {BATCH} images, {precision.name}, as traced')
    for kind, taken in sorted(spent.items(), key=lambda item: -item[1]):
        print(f'{kind:22} {taken:8.1f} {taken / total:6.0%}')
    multiplied = sum(taken for kind, taken in spent.items() if 'gradient' in kind or kind.startswith(('conv', 'prod')))
    print(f'{"in all":22} {total:8.1f}; {operations / 1e9:.1f} G operations in {multiplied:.1f} ms: '
          f'{operations / multiplied / 1e6:,.0f} G/s')


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def work(name, way, began, network):
    """Do the work of a child process: report its start-up, then read commands and answer each with its seconds.

    name, way    of the network and of the way
    began        time.time() when the command was given
    network      what layers_of returns, as JSON

    A command is a line of stdin: train, infer or epoch_end and a count. The answer to "memory 1" is a number of bytes.
    """
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)  # what a library prints must not look like an answer
    before = time.time()
    if way.startswith('torch'):
        import torch.nn  # noqa: F401
    else:
        import twta.graph.tf1  # noqa: F401
    imported = time.time()
    train, infer, epoch_end = start(name, way, *json.loads(network))
    train(1)
    print(json.dumps({'first_step': time.time() - began, 'import': imported - before}), file=answers)
    todo = {'train': train, 'infer': lambda count: [infer() for _ in range(count)],
            'epoch_end': lambda _: epoch_end and epoch_end()}
    for line in sys.stdin:
        what, count = line.split()
        if what == 'memory':
            print(peak_memory(), file=answers)
            continue
        start_time = time.perf_counter()
        todo[what](int(count))
        print(time.perf_counter() - start_time, file=answers)


class Worker:
    """A child process that runs `work`, and the times that it has answered."""

    def __init__(self, name, way, network, folder):
        self.way = way
        command = [sys.executable, __file__, '--work', name, way, repr(time.time()), network]
        self.process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True,
                                        env={**os.environ, 'CUDA_VISIBLE_DEVICES': '',
                                             'TORCHINDUCTOR_CACHE_DIR': folder})
        self.startup = self.answer()
        self.times = {'train': [], 'infer': []}
        self.calls = {}
        for what in self.times:
            self.ask(what, 2)
            self.calls[what] = 1 + int(SECONDS / self.ask(what))
        self.memory = self.ask('memory')
        self.epoch_end = statistics.median([self.ask('epoch_end') for _ in range(4)][1:])
        if way == 'published' and SCRIPTS[name].parent.name == 'MNIST':
            self.passes = EPOCH_IMAGES // INFERRED
        else:
            self.passes = 0

    def answer(self):
        """Return the next answer; end this process with a message if the child has ended."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f'training_speed.py: error: {self.way} has failed; see why with: '
                     f'{shlex.join(self.process.args)} </dev/null')
        return json.loads(line)

    def ask(self, what, count=1):
        """Send a command to the child and return its answer."""
        print(f'{what} {count}', file=self.process.stdin, flush=True)
        return self.answer()

    def repeat(self):
        """Time training and inference once, each after an untimed call."""
        for what, calls in self.calls.items():
            time.sleep(0.1)  # the threads of the worker before may still spin
            self.ask(what)
            self.times[what].append(self.ask(what, calls) / calls)

    def seconds_per_image(self, what):
        """Return the seconds of each repetition for 'inference', 'step' or 'training': steps and ends of epochs."""
        inference = [seconds / INFERRED for seconds in self.times['infer']]
        if what == 'inference':
            return inference
        step = [seconds / BATCH for seconds in self.times['train']]
        if what == 'step':
            return step
        return [a + (self.epoch_end + self.passes * INFERRED * b) / EPOCH_IMAGES
                for a, b in zip(step, inference, strict=True)]


def measure(name, ways, repetitions):
    """Print and return one row per way; the ways take turns."""
    network = json.dumps(yardsticks.layers_of(name))
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        try:
            for way in ways:  # one after the other, so that each starts up alone
                workers.append(Worker(name, way, network, folder))
            for _ in range(repetitions):
                for worker in workers:
                    worker.repeat()
            return [summarize(name, worker, workers[0]) for worker in workers]
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.wait()


def summarize(name, worker, first):
    """Print and return the row of a worker: images per second, and the speed of the first worker divided by its own."""
    row = {'network': name, 'way': worker.way, 'processor': processor.kind()}
    for what in ('training', 'step', 'inference'):
        own, its = worker.seconds_per_image(what), first.seconds_per_image(what)
        row[f'{what}_images_per_second'] = 1 / statistics.median(own)
        # the ratio of each repetition first, so that a slow minute slows both sides
        row[f'{what}_ratio'] = statistics.median(a / b for a, b in zip(own, its, strict=True))
    row.update(epoch_end_seconds=worker.epoch_end, peak_memory_bytes=worker.memory,
               **{f'{what}_seconds': value for what, value in worker.startup.items()})
    print(f'{name:26} {worker.way:23} {row["training_images_per_second"]:9,.0f} {row["training_ratio"]:6.2f} '
          f'{row["step_ratio"]:6.2f} {row["inference_images_per_second"]:10,.0f} {row["inference_ratio"]:6.2f} '
          f'{worker.memory / 2 ** 20:10,.0f} {row["first_step_seconds"]:11.1f} {row["import_seconds"]:7.1f}',
          flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, SCRIPTS, 5, 'print where a training step of this network spends its time, and nothing else')
    parser.add_argument('--torch', action='store_true', help='time the ways of PyTorch too; it must be installed')
    parser.add_argument('--work', nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(*args.work[:2], float(args.work[2]), args.work[3])
    networks = choose_networks(parser, args, SCRIPTS)
    if args.profile and args.torch:
        parser.error('--profile: goes with --repetitions only; leave out --torch')
    if args.profile:
        return profile(args.profile, args.repetitions)
    if args.torch and not importlib.util.find_spec('torch'):
        parser.error('--torch: PyTorch is not installed; install it with: pip install torch==2.13.0')
    print('images per second; x: speed of project divided by the speed of this way; steps: x without the ends of '
          'epochs;\nfirst step and import in seconds')
    print(f'{"network":26} {"way":23}  training      x  steps  inference      x   peak MiB  first step  import')
    rows = []
    for name in networks:
        rows += measure(name, ways(args.torch), args.repetitions)
        if args.json:
            write_rows(args.json, ('torch',), args.repetitions, rows)


if __name__ == '__main__':
    main()
