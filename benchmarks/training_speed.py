#!/usr/bin/env python3
"""Images per second in training and inference: these scripts, the published way and PyTorch, interleaved in one run.

    python benchmarks/training_speed.py
    pip install torch==2.13.0 && python benchmarks/training_speed.py --torch TWTA_4_4_MNIST TWTA_3_3_CIFAR10_VGG13

    project           what a script runs: the loop of twta.experiment with feeding and augmentation, in the type that
                      --precision auto takes, and the end of an epoch (checkpoint, log, weights, summaries) shared out
                      among the images of one. Inference: as --mode inference evaluates, float32 and exact
    project float32   the same with --precision float32
    published         the same network the published way, from stock parts: TensorLayer's unfused BatchNormLayer, signs
                      under gradient_override_map, each group a slice with a convolution and a BatchNormLayer of its
                      own, feed_dict on MNIST, queue runners that augment image by image on CIFAR-10; float32. The end
                      of an epoch, as there: on MNIST another pass over the training images, and a checkpoint
    torch ...         the same in PyTorch, eager and compiled, float32 and bfloat16 (autocast), channels last, on one
                      batch that is at hand: no feeding, no augmentation

Each is a process that trains or infers when it is told to. Images are random, weights the initial ones: the time does
not depend on them.
"""
import argparse
import importlib.util
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

from twta.records import environment, installed, say

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem: path for folder in ('MNIST', 'CIFAR10') for path in sorted((ROOT / folder).glob('*_*.py'))}
BATCH = 200
INFERRED = 1000  # images that a call of infer does
EPOCH_IMAGES = 50_000
SECONDS = 0.5  # that a timing lasts, at least
TENSORFLOW = ('project', 'project float32', 'published')
TORCH = ('torch eager float32', 'torch eager bfloat16', 'torch compiled float32', 'torch compiled bfloat16')


def random_images(name):
    """Images uint8 as the files have them, labels, and the side of the crop that the network sees, or 0."""
    random = np.random.default_rng(0)
    shape, crop = ((28, 28, 1), 0) if SCRIPTS[name].parent.name == 'MNIST' else ((32, 32, 3), 24)
    return random.integers(0, 256, (INFERRED, *shape)).astype(np.uint8), random.integers(0, 10, INFERRED), crop


# ----------------------------------------------------------------------------------------------------------------------
# The ways. Each is a function that gives train(steps), infer() and, where it has one, epoch_end()


def project(name, precision):
    from tqdm import tqdm

    from twta import checkpoints, experiment, records
    from twta.session import choose_precision, open_session
    from twta.tf1 import tf

    images, labels, crop = random_images(name)
    data = SimpleNamespace(images=images, labels=labels)
    model = runpy.run_path(str(SCRIPTS[name]))['model']
    network = experiment.build(model, SimpleNamespace(test=data, crop=crop), 0, choose_precision(precision, None))
    with network.graph.as_default():
        session = open_session(network.graph, 0)
        session.run(tf.global_variables_initializer())
        folder = Path(tempfile.mkdtemp(dir=os.getcwd()))
        store, events = checkpoints.Checkpoints(folder), records.Events(folder, 1)
    run_step = session.make_callable(
        [network.training.loss, network.training.predicted, network.training.step],
        [network.images, network.labels, network.learning_rate, network.step])

    def train(steps):
        part = np.arange(steps * BATCH) % INFERRED
        split = SimpleNamespace(images=images[part], labels=labels[part])
        stage = {'first_epoch': 1, 'epochs': 1, 'batch_size': BATCH, 'learning_rate': 1e-4, 'schedule': 'constant'}
        experiment.train_epoch(run_step, split, stage, 1, experiment.NOTHING, 0, tqdm(disable=True), [])

    def epoch_end():
        row = dict.fromkeys(records.FIELDS, 1)
        with network.graph.as_default():
            store.save(session, {'epoch': 1, 'part': None}, is_best=False)
            records.write_log(folder / 'log.csv', [row])
            records.save_weights(folder / 'model.npz', network.net, session)
            events.add(row)

    return train, lambda: experiment.evaluate(network, session, data), epoch_end


def layers_of(name):
    """The layers of a script's network as (kind, filters, size, stride, padding, groups, is_quantized), and whether it
    is ternary: what its model() asks of twta.ternary_layers.Network, which this stands in for."""
    layers = []

    class Network:
        def __init__(self, x, is_train, weights=None, activation=None):
            self.is_ternary = weights is None

        def encode(self, filters, size, padding='SAME'):
            layers.append(('conv', filters, size, 1, padding, 1, False))

        def conv(self, filters, size, padding='SAME', stride=1, groups=1):
            layers.append(('conv', filters, size, stride, padding, groups, self.is_ternary))

        def pool(self, filters, size, padding='VALID', groups=1):
            self.conv(filters, size, padding, 2, groups)

        def dense(self, units):
            layers.append(('dense', units, None, None, None, None, self.is_ternary))

        def classify(self, classes, batch_norm=True):
            layers.append(('classify', classes, None, None, None, None, batch_norm))
            return self

    stand_in = SimpleNamespace(Network=Network, full_precision=True)
    tf1 = SimpleNamespace(tf=SimpleNamespace(nn=SimpleNamespace(relu=None)))
    with mock.patch.dict(sys.modules, {'twta.ternary_layers': stand_in, 'twta.tf1': tf1}):
        net = runpy.run_path(str(SCRIPTS[name]))['model'](None, True)
    return layers, net.is_ternary


def published(name):
    from twta.tf1 import tf, tl

    tf.RegisterGradient('Through')(lambda operation, gradient: gradient)
    layers, is_ternary = layers_of(name)
    images, labels, crop = random_images(name)

    def ternary(x, threshold):
        with tf.get_default_graph().gradient_override_map({'Sign': 'Through'}):
            return tf.sign(tf.sign(x + threshold) + tf.sign(x - threshold))

    class Products(tl.layers.Layer):
        """A convolution, or a dense layer where it has no size, without a bias."""

        def __init__(self, prev_layer, filters, size, stride, padding, is_quantized, name):
            super().__init__(prev_layer=prev_layer, name=name)
            x = prev_layer.outputs
            shape = ([size, size] if size else []) + [int(x.shape[-1]), filters]
            with tf.variable_scope(name):
                deviation = tf.truncated_normal_initializer(stddev=0.02 if size else 0.1)
                w = tf.get_variable('W', shape, initializer=deviation)
                w = ternary(w, 0.7 * tf.reduce_mean(tf.abs(w))) if is_quantized else w
                self.outputs = tf.nn.conv2d(x, w, [1, stride, stride, 1], padding) if size else tf.matmul(x, w)

    def activation(x):
        return ternary(tf.clip_by_value(x, -1, 1), 0.5) if is_ternary else tf.nn.relu(x)

    def network(x, y, is_train):
        """Loss and accuracy; a group is a slice of the channels with a convolution and a normalisation of its own."""
        with tf.variable_scope('net', reuse=not is_train):
            net = tl.layers.InputLayer(x, name='input')
            for index, (kind, filters, size, stride, padding, groups, is_quantized) in enumerate(layers):
                if kind != 'conv' and net.outputs.shape.rank == 4:
                    net = tl.layers.FlattenLayer(net, name='flatten')
                parts = []
                for group in range(groups or 1):
                    name = f'{kind}{index}_{group}'
                    part = net[:, :, :, group::groups] if (groups or 1) > 1 else net
                    part = Products(part, filters // (groups or 1), size, stride, padding,
                                    is_quantized and kind != 'classify', name)
                    if kind != 'classify' or is_quantized:
                        part = tl.layers.BatchNormLayer(part, act=tf.identity if kind == 'classify' else activation,
                                                        is_train=is_train, name=f'{name}_bn')
                    parts.append(part)
                net = tl.layers.ConcatLayer(parts, name=f'concat{index}') if len(parts) > 1 else parts[0]
        accuracy = tf.reduce_mean(tf.cast(tf.equal(tf.argmax(net.outputs, 1), y), tf.float32))
        return tl.cost.cross_entropy(net.outputs, y, f'cost{is_train}'), accuracy

    def augmented(image):
        image = tf.random_crop(tf.cast(image, tf.float32), [crop, crop, 3])
        image = tf.image.random_contrast(tf.image.random_brightness(tf.image.random_flip_left_right(image), 63),
                                         0.2, 1.8)
        return tf.image.per_image_standardization(image)

    x = tf.placeholder(tf.float32, [BATCH, *([crop, crop, 3] if crop else images.shape[1:])])
    y = tf.placeholder(tf.int64, [BATCH])
    x_train, y_train = x, y
    if crop:
        image, label = tf.train.slice_input_producer([tf.constant(images), tf.constant(labels)])
        x_train, y_train = tf.train.shuffle_batch([augmented(image), label], BATCH, 2000, 1000, num_threads=32)
    trained = network(x_train, y_train, True)
    step = tf.train.AdamOptimizer(1e-4).minimize(trained[0])
    inferred = network(x, y, False)
    saver = tf.train.Saver()
    session = tf.Session()
    session.run(tf.global_variables_initializer())
    if crop:
        tf.train.start_queue_runners(session)
        images = images[:, 4:4 + crop, 4:4 + crop]
    images = images.astype(np.float32) / 256

    def feeds(steps):
        for _ in range(steps):
            part = np.random.permutation(INFERRED)[:BATCH]
            yield {x: images[part], y: labels[part]}

    def train(steps):
        for feed in feeds(steps):
            session.run([trained, step] if crop else step, None if crop else feed)

    def infer():
        for feed in feeds(INFERRED // BATCH):
            session.run(inferred, feed)

    def epoch_end():
        if not crop:  # its scripts for MNIST go through the training images again, for loss and accuracy
            for _ in range(EPOCH_IMAGES // INFERRED):
                infer()
            saver.save(session, tempfile.mkdtemp(dir=os.getcwd()) + '/model')

    return train, infer, epoch_end


def torch(name, precision, is_compiled):
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(0)
    layers, is_ternary = layers_of(name)
    images, labels, crop = random_images(name)
    x = torch.randn(BATCH, images.shape[-1], *[crop or 28] * 2).to(memory_format=torch.channels_last)
    y = torch.tensor(labels[:BATCH])

    class Through(torch.autograd.Function):
        """Ternary x; the gradient passes where |x| is at most the limit."""

        @staticmethod
        def forward(context, x, threshold, limit):
            context.save_for_backward(x.abs() <= limit if limit else None)
            return (x >= threshold).to(x.dtype) - (x <= -threshold).to(x.dtype)

        @staticmethod
        def backward(context, gradient):
            mask, = context.saved_tensors
            return gradient if mask is None else gradient * mask, None, None

    class Layer(nn.Module):
        def __init__(self, kind, channels, filters, size, stride, padding, groups, is_quantized):
            super().__init__()
            self.kind, self.size, self.stride, self.padding, self.groups = kind, size, stride, padding, groups
            self.is_quantized = is_quantized and kind != 'classify'
            shape = (filters, channels // groups, size, size) if kind == 'conv' else (filters, channels)
            self.weight = nn.Parameter(torch.randn(shape) * (0.02 if kind == 'conv' else 0.1))
            normalize = nn.BatchNorm2d if kind == 'conv' else nn.BatchNorm1d
            self.normalize = normalize(filters) if kind != 'classify' or is_quantized else nn.Identity()

        def forward(self, x):
            w = self.weight
            if self.is_quantized:
                by_group = w.reshape(self.groups or 1, -1)
                w = Through.apply(by_group, 0.7 * by_group.abs().mean(1, keepdim=True), None).reshape(w.shape)
            if self.kind == 'conv':
                if self.groups > 1:
                    x = x.unflatten(1, (-1, self.groups)).transpose(1, 2).flatten(1, 2)
                total = self.size - self.stride if self.padding == 'SAME' else 0
                if total % 2:
                    x = functional.pad(x, [0, 1] * 2)
                x = functional.conv2d(x, w, stride=self.stride, padding=total // 2, groups=self.groups)
            else:
                x = functional.linear(x.flatten(1), w)
            x = self.normalize(x)
            if self.kind == 'classify':
                return x
            return Through.apply(x, 0.5, 1) if is_ternary else torch.relu(x)

    modules, shape = [], x
    for kind, filters, size, stride, padding, groups, is_quantized in layers:
        channels = shape.shape[1] if kind == 'conv' else shape[0].numel()
        modules.append(Layer(kind, channels, filters, size, stride, padding, groups or 1, is_quantized))
        with torch.no_grad():
            shape = modules[-1].eval()(shape)
    net = nn.Sequential(*modules).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)

    def loss():
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
            logits = net(x)
        return functional.cross_entropy(logits.float(), y)

    compiled = torch.compile(loss) if is_compiled else loss

    def train(steps):
        net.train()
        for _ in range(steps):
            optimizer.zero_grad()
            compiled().backward()
            optimizer.step()

    def infer():
        net.eval()
        with torch.no_grad():
            for _ in range(INFERRED // BATCH):
                compiled()

    return train, infer, None


def start(name, way):
    if way == 'published':
        return published(name)
    kind, *words = way.split()
    if kind == 'project':
        return project(name, *words or ['auto'])
    return torch(name, words[1], words[0] == 'compiled')


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def work(name, way, began):
    """A child: reports its start-up, then does what it is told line by line and answers with the seconds."""
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    before = time.time()
    if way.startswith('torch'):
        import torch.nn  # noqa: F401
    else:
        import twta.tf1  # noqa: F401
    imported = time.time()
    train, infer, epoch_end = start(name, way)
    train(1)
    print(json.dumps({'first_step': time.time() - began, 'import': imported - before}), file=answers)
    todo = {'train': train, 'infer': lambda _: infer(), 'epoch_end': lambda _: epoch_end and epoch_end()}
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

    def __init__(self, name, way, folder):
        self.way = way
        self.process = subprocess.Popen([sys.executable, __file__, '--work', name, way, repr(time.time())], cwd=folder,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        text=True)
        self.startup = self.answer()
        self.times = {'step': [], 'inference': []}
        self.ask('train', 2)
        self.ask('infer')
        self.steps = 1 + int(SECONDS / self.ask('train'))
        self.epoch_end = self.ask('epoch_end')

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f'{self.way}: failed; run it alone to see why: '
                     f'{" ".join(map(str, self.process.args[:-1]))} 0 </dev/null')
        return json.loads(line)

    def ask(self, what, count=1):
        print(f'{what} {count}', file=self.process.stdin, flush=True)
        return self.answer()

    def repeat(self):
        self.times['step'].append(self.ask('train', self.steps) / self.steps)
        self.times['inference'].append(self.ask('infer'))


def measure(name, ways, repetitions):
    """Prints and returns a row for each way."""
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        try:
            for way in ways:  # one after another, so that each starts up alone
                workers.append(Worker(name, way, folder))
            for _ in range(repetitions):
                for worker in workers:
                    worker.repeat()
            rows = [summarize(name, worker, workers[0]) for worker in workers]
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.wait()
    return rows


def summarize(name, worker, first):
    """A row: images per second, and how many times as many the first of the workers did."""
    row = {'network': name, 'way': worker.way, 'epoch_end': worker.epoch_end, 'peak_memory': worker.ask('memory'),
           **worker.startup}
    for what in ('step', 'training', 'inference'):
        own, its = seconds_an_image(worker, what), seconds_an_image(first, what)
        row[what] = 1 / statistics.median(own)
        # of each repetition, so that a slow minute slows both sides
        row[f'{what}_ratio'] = statistics.median(a / b for a, b in zip(own, its, strict=True))
    say(f'{name:26} {row["way"]:23} {row["training"]:9,.0f} {row["training_ratio"]:6.2f} {row["step_ratio"]:6.2f} '
        f'{row["inference"]:10,.0f} {row["inference_ratio"]:6.2f} {row["peak_memory"] / 2 ** 20:10,.0f} '
        f'{row["first_step"]:11.1f} {row["import"]:7.1f}')
    return row


def seconds_an_image(worker, what):
    """Of each repetition: 'inference', 'step' or 'training', which is steps and ends of epochs."""
    if what == 'inference':
        return [seconds / INFERRED for seconds in worker.times['inference']]
    epoch_end = worker.epoch_end / EPOCH_IMAGES if what == 'training' else 0
    return [seconds / BATCH + epoch_end for seconds in worker.times['step']]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('networks', nargs='*', metavar='NETWORK', help=f'of {", ".join(SCRIPTS)}; default all')
    parser.add_argument('--torch', action='store_true', help='PyTorch as well; it must be installed')
    parser.add_argument('--repetitions', type=int, default=5, metavar='N', help='of which the median is taken')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the rows there as well')
    parser.add_argument('--work', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(*args.work[:2], float(args.work[2]))
    unknown = set(args.networks) - SCRIPTS.keys()
    if unknown:
        parser.error(f'{min(unknown)}: unknown; valid are {", ".join(SCRIPTS)}')
    if args.torch and not importlib.util.find_spec('torch'):
        parser.error('--torch: PyTorch is not installed; pip install torch==2.13.0')
    if args.repetitions < 1:
        parser.error(f'--repetitions {args.repetitions}: at least 1')
    print('images/s; x: how many times as many the project does, steps: without the ends of epochs; seconds to the '
          'first step, of them import')
    print(f'{"network":26} {"way":23}  training      x  steps  inference      x   peak MiB  first step  import')
    rows = []
    for name in args.networks or SCRIPTS:
        rows += measure(name, TENSORFLOW + (TORCH if args.torch else ()), args.repetitions)
    if args.json:
        args.json.write_text(json.dumps({'environment': environment(), 'others': dict(installed(('torch',))),
                                         'repetitions': args.repetitions, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
