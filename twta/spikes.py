"""Conversion to spikes: a trained network as integrate-and-fire neurons, simulated, its spikes and operations counted.

A neuron adds up the spikes that reach it, times ternary weights, into its membrane v, and fires where v reaches a
threshold: a whole number, batch normalisation folded in (twta.packing). It has no leak and no bias and begins each
image at 0. The first layer reads images, real-valued: it turns them into spikes. The classifier reads out membranes.

spatial    one step. An activation of several levels is as many neurons, each with its own threshold, in one place; a
           ternary one a neuron that fires positively or negatively; the next layer adds up what fires.
temporal   store and release: one neuron for all levels. It first adds up all spikes of the window, then in each of as
           many steps as there are levels fires where v reaches the first threshold, and is reset by subtraction: v
           loses the distance to the next one. With one level both are the same.

Both fire as often as the network's activations say, so that the predictions are the network's; each run checks it, on
every image. Source: github.com/edwardzcl/Spatio_temporal_SNNs, which has the spatial conversion.

Counted are, with the images in batches of 200, a line a batch:

accuracy.txt     right predictions
spike_num.txt    spikes of all neurons, a negative one is one, the encoder's included
sop_num.txt      synaptic operations: for each spike the neurons that it reaches, in all convolutions and dense layers
                 but encoder and classifier. Borders end at the map; connections of weight 0 count (the table has the
                 number without them). The published counter, of the spatial conversion, has twice that number: it takes
                 2 for an addition.
"""
import argparse
import os
import runpy
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from twta import TwtaError, UsageError, command_line, numpy_engine, packed_file, packed_inference, replacing
from twta import packed as engines
from twta.records import environment, save_picture, write_csv, write_json
from twta.terminal import Parser, errors_in_a_line, natural, number, path, positive_integer, say

BATCH = 200  # images to a line of the .txt files
FIELDS = ('layer', 'neurons', 'spikes', 'negative', 'rate', 'operations', 'nonzero_operations')


# ----------------------------------------------------------------------------------------------------------------------
# Neurons


def store_and_release(membrane, layer):
    """Spikes int8 of neurons with thresholds [levels, filters], in as many steps, one a step at most.

    After each spike the threshold is raised by what the membrane would lose: the same, without rounding.
    """
    spikes = np.zeros(membrane.shape, np.int8)
    for step, threshold in enumerate(layer.upper):
        spikes += (spikes == step) & (membrane >= threshold)
    return spikes


def deletion(noise_ratio, seed):
    """What deletes each of the encoder's spikes with that probability."""
    rng = np.random.default_rng(seed)

    def delete(spikes):
        kept = rng.binomial(np.abs(spikes), 1 - noise_ratio)
        return (np.sign(spikes) * kept).astype(np.int8)

    return delete


def reach(shape, layer):
    """How many neurons a spike reaches, and over how many weights that are not 0: [height, width, channels] each."""
    (top, left), (rows, columns, filters) = packed_file.geometry(shape, layer)
    height, width = layer.weights.shape[:2]
    by_group = layer.weights.reshape(height, width, shape[2] // layer.groups, layer.groups, -1)
    nonzero = np.count_nonzero(by_group, axis=4).reshape(height, width, shape[2])
    counts = np.zeros((2, *shape), np.int64)
    for i in range(height):
        for j in range(width):
            y, x = (np.arange(size) * layer.stride + shift for size, shift in ((rows, i - top), (columns, j - left)))
            at = np.ix_(y[(y >= 0) & (y < shape[0])], x[(x >= 0) & (x < shape[1])])
            counts[0][at] += filters // layer.groups
            counts[1][at] += nonzero[i, j]
    return counts


# ----------------------------------------------------------------------------------------------------------------------
# Simulation


def simulate(simulator, images, steps):
    """Predicted classes of the images; of each batch the spikes of each layer and its operations; a row a layer."""
    packed = simulator.packed
    layers = packed.layers
    outputs = [out for _, _, _, out in packed_file.shapes(packed)]
    reached = [reach(shape, layer) for shape, layer in zip(outputs, layers[1:], strict=False)]
    predicted, spikes, operations = [], [], []
    sums = np.zeros((len(layers), 4))  # spikes, negative ones, operations, those over weights that are not 0
    for start in range(0, len(images), BATCH):
        of_batch = np.zeros((len(layers), 4))
        for first in range(start, min(start + BATCH, len(images)), simulator.batch):
            part = images[first:min(first + simulator.batch, start + BATCH)]
            logits, maps = simulator.run(part)
            predicted.append(logits.argmax(1))
            for index, fired in enumerate(maps):
                number = np.abs(fired).sum(0, dtype=np.int64)
                of_batch[index] += number.sum(), np.sum(fired < 0), 0, 0
                if index + 1 < len(layers):
                    of_batch[index + 1, 2:] += (number * reached[index]).sum((1, 2, 3))
        sums += of_batch
        spikes.append(int(of_batch[:, 0].sum()))
        operations.append(int(of_batch[:, 2].sum()))
    rows = [dict(zip(FIELDS, (layer.name, int(np.prod(out)), *(sums[index, :2] / len(images)),
                              sums[index, 0] / len(images) / np.prod(out) / steps, *(sums[index, 2:] / len(images))),
                     strict=True)) for index, (layer, out) in enumerate(zip(layers, outputs, strict=True))]
    total = {field: sum(row[field] for row in rows) for field in FIELDS[1:]}
    total['rate'] = total['spikes'] / total['neurons'] / steps
    return np.concatenate(predicted), spikes, operations, [*rows, {'layer': 'in all', **total}]


class Engine:
    """The packed engine as a simulator of one step without noise."""

    def __init__(self, packed):
        self.packed, self.engine = packed, engines.open_engine(packed)
        self.batch = min(self.engine.batch, BATCH)

    def run(self, images):
        maps = self.engine.activations(images)
        return numpy_engine.classify(maps[-1], self.packed), maps


def convert(flags, script, model, args, dataset, source, state):
    """Converts the network of a checkpoint, simulates it and compares it with its graph."""
    from twta import experiment, packing

    images = dataset.test.images[:flags.images]
    with experiment.trained(script, model, args, dataset, source) as (network, session):
        packed = packing.pack(network, session, script, args.dataset, dataset, packing.describe_run(args, state),
                              flags.conversion == 'temporal')
        predicted = packing.predict(network, session, images)
    thresholds = packed.layers[0].upper
    steps = len(thresholds) if thresholds.ndim == 2 else 1
    if flags.conversion == 'temporal' and steps == 1:
        say('temporal: one level is one step, the same as spatial')
    plain = Engine(packed) if steps == 1 else numpy_engine.NumpyEngine(packed, store_and_release)
    report(flags, plain, steps, predicted, 'the graph', dataset, images)


def convert_file(flags, packed):
    """Simulates a packed network, which is one of neurons, and compares it with the packed engine."""
    from twta import datasets

    dataset = datasets.load(flags.dataset, flags.data_dir, None)
    packed_inference.check_images(packed, dataset, flags)
    say(f'data: {dataset}')
    say(f'network: {packed.network}, {flags.file}')
    images = dataset.test.images[:flags.images]
    predicted = engines.logits(engines.started(packed, 'auto', None), images).argmax(1)
    report(flags, numpy_engine.NumpyEngine(packed), 1, predicted, 'the packed engine', dataset, images)


def report(flags, plain, steps, expected, whose, dataset, images):
    """Simulates without noise, checks every prediction, simulates with noise where that is asked for, writes it all."""
    labels = dataset.test.labels[:len(images)]
    say(f'{flags.conversion} conversion, {steps} step{"s" * (steps > 1)}: '
        f'{len(images):,} test images in batches of {BATCH}')
    start = time.perf_counter()
    predicted, *counts = simulate(plain, images, steps)
    seconds = time.perf_counter() - start
    differ = int(np.sum(predicted != expected))
    if differ:
        raise TwtaError(f'the neurons predict {differ} images otherwise than {whose}; nothing was written. This is a '
                        'fault of the scripts')
    say(f'checked: the predictions of {whose} on each of the {len(images):,} images ({seconds:.1f} s)')
    without = float(np.mean(predicted == labels))
    say(f'accuracy: {without:.4f}')
    deleted = f'{100 * flags.noise_ratio:.3g}% of the encoder\'s spikes deleted'
    if flags.noise_ratio:
        neuron = numpy_engine.fire if steps == 1 else store_and_release
        noisy = numpy_engine.NumpyEngine(plain.packed, neuron, deletion(flags.noise_ratio, flags.seed))
        predicted, *counts = simulate(noisy, images, steps)
        say(f'accuracy with {deleted}: {np.mean(predicted == labels):.4f}; the table and the files are of that')
    for line in table(counts[2]):
        say(line)
    packed = plain.packed
    choices = ''.join(f', {name} {value}' for name, value in (packed.record.get('choices') or {}).items())
    title = (f'{packed.network}{choices}, on {dataset.title}\n'
             f'{flags.conversion} conversion, {steps} step{"s" * (steps > 1)}'
             + (f', {deleted}' if flags.noise_ratio else ''))
    write(flags.output, title, predicted == labels, *counts, {
        'network': packed.network, 'dataset': flags.dataset, 'conversion': flags.conversion, 'steps': steps,
        'noise_ratio': flags.noise_ratio, 'seed': flags.seed, 'accuracy_without_noise': without, 'seconds': seconds,
        'record': packed.record})


def write(folder, title, right, spikes, operations, rows, record):
    """The files, into a folder; right: for each image whether its class was predicted."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [int(np.sum(right[start:start + BATCH])) for start in range(0, len(right), BATCH)]
    for name, lines in (('accuracy', numbers), ('spike_num', spikes), ('sop_num', operations)):
        with replacing(folder / f'{name}.txt') as part:
            part.write_text(''.join(f'{number}\n' for number in lines))
    write_csv(folder / 'spikes.csv', FIELDS, rows)
    write_json(folder / 'spikes.json', {**record, 'images': len(right), 'accuracy': float(np.mean(right)),
                                        'layers': rows, **environment()})
    say(f'accuracy.txt, spike_num.txt, sop_num.txt, spikes.csv, spikes.json: {folder}')
    if save_picture(folder / 'spikes.png', draw, title, rows):
        say(f'picture: {folder / "spikes.png"}')


def table(rows):
    """Lines for the terminal."""
    yield 'per image       neurons     spikes   negative   rate  sparsity     operations  on weights not 0'
    for row in rows:
        operations = f'{row["operations"]:14,.0f} {row["nonzero_operations"]:17,.0f}' if row['operations'] else '-'
        yield (f'{row["layer"][:12]:12} {row["neurons"]:10,} {row["spikes"]:10,.1f} {row["negative"]:10,.1f} '
               f'{row["rate"]:6.1%} {1 - row["rate"]:9.1%} {operations:>14}')


def draw(title, rows):
    """Spikes and synaptic operations by layer."""
    from matplotlib.figure import Figure  # here: only some commands draw

    *rows, total = rows
    figure = Figure(figsize=(10, 2.2 + 0.32 * len(rows)), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))
    positive = np.array([row['spikes'] - row['negative'] for row in rows])
    left.barh(places, positive, color='tab:blue', label='positive')
    if total['negative']:
        left.barh(places, [row['negative'] for row in rows], left=positive, color='tab:orange', label='negative')
        left.legend(loc='lower right')
    for place, row in enumerate(rows):
        left.text(row['spikes'], place, f' {row["rate"]:.0%}', va='center', fontsize=8)
    left.margins(x=0.12)
    left.set_yticks(places, [row['layer'] for row in rows])
    left.invert_yaxis()
    left.set(xlabel='spikes an image, and their rate (a neuron and step)')
    for shift, field, label, colour in ((-0.2, 'operations', 'all connections', 'tab:grey'),
                                        (0.2, 'nonzero_operations', 'weights that are not 0', 'tab:blue')):
        right.barh(places + shift, [row[field] / 1e6 for row in rows], 0.4, color=colour, label=label)
    right.legend(loc='lower right')
    right.set(xlabel='synaptic operations an image (millions)')
    for axes in (left, right):
        axes.grid(alpha=0.3, axis='x')
    figure.suptitle(f'{title}\n{total["spikes"]:,.0f} spikes and {total["operations"] / 1e6:,.2f} million synaptic '
                    'operations an image')
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# From the shell


def run(script, description, datasets, default):
    """Parses the flags, converts and simulates; the Spiking scripts end in this call. default: of --network."""
    script = Path(script).resolve()
    with errors_in_a_line(script.name):
        start(script, description, datasets, default)


def start(script, description, datasets, default, argv=None):
    """What run does; raises TwtaError."""
    networks = sorted(path.stem for path in script.parent.glob('*.py') if not path.stem.startswith(('FP', 'Spiking')))
    parser = Parser(prog=script.name, description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--network', choices=networks,
        help=f'which trained network, of {", ".join(networks)}; default: {default}')
    add('--conversion', choices=('spatial', 'temporal'), default='spatial',
        help='spatial: a neuron a level, one step; temporal: a step a level, store and release. Default: spatial')
    add('--noise_ratio', type=partial(number, least=0, most=0.99), metavar='P', default=0.0,
        help='delete each spike of the encoder with this probability; default: 0')
    add('--seed', type=natural, default=0, metavar='N', help='of the noise, default: 0')
    add('--images', type=positive_integer, metavar='N', help='of the test images; default: all')
    add('--dataset', choices=datasets, default=datasets[0], help=f'default: {datasets[0]}')
    add('--data_dir', type=path, metavar='DIR', help='default: data/ beside README.md')
    add('--run_dir', type=path, metavar='DIR',
        help="the network's; default: runs/NETWORK-DATASET beside README.md")
    add('--checkpoint', choices=('last', 'best'), help='of the network, default: last')
    add('--file', type=path, metavar='FILE',
        help='a packed network, from --mode export, in place of --network; without TensorFlow, spatial only')
    add('--output', type=path, metavar='DIR',
        help='default: spikes-CONVERSION (with noise, spikes-CONVERSION-noise-P) in the run directory; of a --file, '
             'FILE-spikes-... in the current folder')
    add('--debug', action='store_true', help='show the traceback of an error')
    flags = parser.parse_args(argv)
    for flag in ('network', 'run_dir', 'checkpoint'):
        if flags.file and getattr(flags, flag) is not None:
            raise UsageError(f'--{flag} has no meaning with --file, which has its network; leave one out')
    if flags.file and flags.conversion == 'temporal':
        raise UsageError('--conversion temporal with --file, whose network has been converted spatially; use --network')
    packed = packed_file.read(flags.file) if flags.file else None
    if packed and packed.dataset not in datasets:
        raise TwtaError(f'{flags.file}: a network for {packed.dataset}, not for {" or ".join(datasets)}; use the '
                        'Spiking script of its data set')
    if packed and packed.dataset != flags.dataset:
        raise TwtaError(f'{flags.file}: a network for {packed.dataset}, not {flags.dataset}; give --dataset '
                        f'{packed.dataset}')
    root, name = script.parent.parent, packed.network if packed else flags.network or default
    flags.data_dir = (flags.data_dir or root / 'data').resolve()
    flags.run_dir = (flags.run_dir or root / 'runs' / f'{name}-{flags.dataset}').resolve()
    folder = f'spikes-{flags.conversion}' + (f'-noise-{flags.noise_ratio:g}' if flags.noise_ratio else '')
    usual = Path(f'{flags.file.stem}-{folder}') if packed else flags.run_dir / folder
    flags.output = (flags.output or usual).resolve()
    there = next(path for path in (flags.output, *flags.output.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f'--output {flags.output}: {there} is not a directory that can be written to; choose another')
    if packed:
        convert_file(flags, packed)
        return
    network = script.parent / f'{name}.py'
    module = SimpleNamespace(**runpy.run_path(str(network)))
    if not hasattr(module, 'model'):
        raise UsageError(f'--network {name}: {network} has no model(x, is_train); choose another')
    defaults = command_line.protocol(module.LEARNING_RATE, module.EPOCHS, module.BATCH_SIZE)
    args = command_line.parse(network, '', module.DATASETS, defaults, getattr(module, 'CHOICES', ()), [
        '--mode', 'inference', '--dataset', flags.dataset, '--data_dir', str(flags.data_dir), '--run_dir',
        str(flags.run_dir), '--checkpoint', flags.checkpoint or 'last'])
    from twta import experiment  # imports TensorFlow

    experiment.run(name, module.model, args, defaults, lambda *arguments: convert(flags, *arguments))


