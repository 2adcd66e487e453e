#!/usr/bin/env python3
"""Images per second in training and inference: these scripts, the published way and PyTorch, interleaved in one run.

    python benchmarks/training_speed.py            # three networks, about 5 minutes
    python benchmarks/training_speed.py --all      # all nine, 17 minutes
    pip install torch==2.13.0 && python benchmarks/training_speed.py --torch

    project           what a script runs: the loop of twta.training with feeding and augmentation, in the type that
                      --precision auto takes, and the end of an epoch (checkpoint, log, weights, summaries) shared out
                      among its 50,000 images. Inference: as --mode inference evaluates, from uint8 images, float32,
                      the encoder in float64, batches of 500
    project float32   the same with --precision float32
    published         the same network the published way, from stock parts: TensorLayer's unfused BatchNormLayer, signs
                      under gradient_override_map, each group a slice with a convolution and a BatchNormLayer of its
                      own, feed_dict on MNIST, queue runners that augment image by image on CIFAR-10; float32. On MNIST
                      an epoch ends, as there, with another pass over the training images, and a checkpoint; its
                      validation, and the project's, are in neither. Inference: images at hand, batches of 200
    torch ...         the same in PyTorch, eager and compiled, float32 and bfloat16 (autocast), channels last, on one
                      batch of 200 that is at hand: no feeding, no augmentation, no end of an epoch

Each is a process that trains or infers when it is told to. Images are random, weights the initial ones: the time does
not depend on them.
"""
import argparse
import importlib.util
import json
import os
import runpy
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
from yardsticks import BATCH, INFERRED, SCRIPTS, random_images

from twta import processor
from twta.results import environment, installed
from twta.terminal import output_file, positive_integer

EPOCH_IMAGES = 50_000
SECONDS = 0.5  # that a timing lasts, at least
SHORT = ('TWTA_4_4_MNIST', 'TWTA_3_3_CIFAR10_VGG13', 'TWTA_3_3_CIFAR10_Group_V2')
TENSORFLOW = ('project', 'project float32', 'published')
TORCH = ('torch eager float32', 'torch eager bfloat16', 'torch compiled float32', 'torch compiled bfloat16')


# ----------------------------------------------------------------------------------------------------------------------
# The ways. Each is a function that gives train(steps), infer() and, where it has one, epoch_end()


def project(name, precision):
    from tqdm import tqdm

    from twta.graph.build import build_graph
    from twta.graph.session import choose_precision, open_session
    from twta.graph.tf1 import tf
    from twta.training import checkpoints, evaluation, loop, run_directory
    from twta.training.state import FIELDS, PartialEpoch, Stage, State
    from twta.training.weights import save_weights

    images, labels, crop = random_images(name)
    data = SimpleNamespace(images=images, labels=labels)
    model = runpy.run_path(str(SCRIPTS[name]))['model']
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
    """Return the ways to time; PyTorch's in bfloat16 only if the processor multiplies it: emulated, they take hours."""
    from twta.graph.session import multiplies_bfloat16

    torch = TORCH if multiplies_bfloat16(None) else [way for way in TORCH if way.endswith('float32')]
    return (*TENSORFLOW, *(torch if with_torch else ()))


def start(name, way, layers, is_ternary):
    layers = [yardsticks.Layer(*layer) for layer in layers]
    if way == 'published':
        return yardsticks.published(name, layers, is_ternary)
    kind, *words = way.split()
    if kind == 'project':
        return project(name, *words or ['auto'])
    return yardsticks.pytorch(name, words[1], words[0] == 'compiled', layers, is_ternary)


# ----------------------------------------------------------------------------------------------------------------------
# Where the time goes

KINDS = {  # what an operation's name has in it; the first that fits
    "filters' gradient": ('BackpropFilter',), "input's gradient": ('BackpropInput',),
    'convolution forward': ('Conv2D',), 'products of matrices': ('MatMul',), 'batch normalisation': ('BatchNorm',),
    'quantisers (XLA)': ('PartitionedCall',), 'layout': ('Transpose', 'Gather', 'Pad', 'Concat'), 'Adam': ('Adam',),
    'casts': ('Cast',), 'the rest': ('',)}


def profile(name, repetitions):
    """Prints the share of each kind of operation in a training step, and the speed of the products."""
    from twta.graph.blocks import read_blocks
    from twta.graph.build import build_graph
    from twta.graph.session import choose_precision, configuration
    from twta.graph.tf1 import native_chatter_hidden, tf

    images, labels, crop = random_images(name)
    precision = choose_precision('auto', None)
    network = build_graph(runpy.run_path(str(SCRIPTS[name]))['model'], images.shape[1:], crop, 0, precision)
    products = [np.prod(layer.all_params[-1].shape.as_list()) * np.prod(layer.outputs.shape[1:-1].as_list() or [1])
                for layer, _, _ in read_blocks(network.net)]
    operations = 2 * BATCH * (3 * sum(products) - products[0])  # nobody wants the images' gradient
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
            if index < 3:  # XLA compiles, memory is taken
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
    """Do a child's work: report its start-up, then do what each line of the input says, and answer with the seconds.

    network is what layers_of returns, as JSON.
    """
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
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
            status = Path('/proc/self/status').read_text()  # getrusage would count the process that started this one
            print(1024 * int(status.split('VmHWM:')[1].split()[0]), file=answers)
            continue
        start_time = time.perf_counter()
        todo[what](int(count))
        print(time.perf_counter() - start_time, file=answers)


class Worker:
    """A child process that works as `work` says."""

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
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f'{self.way}: failed; see why with: {shlex.join(self.process.args)} </dev/null')
        return json.loads(line)

    def ask(self, what, count=1):
        print(f'{what} {count}', file=self.process.stdin, flush=True)
        return self.answer()

    def repeat(self):
        for what, calls in self.calls.items():
            time.sleep(0.1)  # until the threads of the one before have stopped spinning
            self.ask(what)
            self.times[what].append(self.ask(what, calls) / calls)

    def seconds_an_image(self, what):
        """Of each repetition: 'inference', 'step' or 'training', which is steps and ends of epochs."""
        inference = [seconds / INFERRED for seconds in self.times['infer']]
        if what == 'inference':
            return inference
        step = [seconds / BATCH for seconds in self.times['train']]
        if what == 'step':
            return step
        return [a + (self.epoch_end + self.passes * INFERRED * b) / EPOCH_IMAGES
                for a, b in zip(step, inference, strict=True)]


def measure(name, ways, repetitions):
    """Prints and returns a row for each way."""
    network = json.dumps(yardsticks.layers_of(name))
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        try:
            for way in ways:  # one after another, so that each starts up alone
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
    """A row: images per second, and how many times as many the first of the workers did."""
    row = {'network': name, 'way': worker.way, 'processor': processor.kind()}
    for what in ('training', 'step', 'inference'):
        own, its = worker.seconds_an_image(what), first.seconds_an_image(what)
        row[f'{what}_images_per_second'] = 1 / statistics.median(own)
        # of each repetition, so that a slow minute slows both sides
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
    parser.add_argument('networks', nargs='*', metavar='NETWORK',
                        help=f'of {", ".join(SCRIPTS)}; default: {", ".join(SHORT)}')
    parser.add_argument('--all', action='store_true', help='every network')
    parser.add_argument('--torch', action='store_true', help='PyTorch as well; it must be installed')
    parser.add_argument('--repetitions', type=positive_integer, default=5, metavar='N',
                        help='of which the median is taken; default: 5')
    parser.add_argument('--json', type=output_file, metavar='FILE', help='write the rows there as well')
    parser.add_argument('--profile', choices=SCRIPTS, metavar='NETWORK',
                        help='only where a training step spends its time')
    parser.add_argument('--work', nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(*args.work[:2], float(args.work[2]), args.work[3])
    unknown = set(args.networks) - SCRIPTS.keys()
    if unknown:
        parser.error(f'{min(unknown)}: unknown; valid are {", ".join(SCRIPTS)}')
    if args.profile:
        if args.networks or args.all or args.torch or args.json:
            parser.error('--profile: goes with --repetitions only; leave out the rest')
        return profile(args.profile, args.repetitions)
    if args.torch and not importlib.util.find_spec('torch'):
        parser.error('--torch: PyTorch is not installed; pip install torch==2.13.0')
    if args.all and args.networks:
        parser.error('--all: goes without names of networks')
    print('images/s; x: how many times as many the project does, steps: without the ends of epochs; seconds from the '
          'command\nto the first step, and how many of them the import of TensorFlow or PyTorch takes')
    print(f'{"network":26} {"way":23}  training      x  steps  inference      x   peak MiB  first step  import')
    rows = []
    for name in SCRIPTS if args.all else args.networks or SHORT:
        rows += measure(name, ways(args.torch), args.repetitions)
        if args.json:
            record = {'environment': environment(), 'others': dict(installed(('torch',))),
                      'repetitions': args.repetitions, 'rows': rows}
            args.json.write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    main()
