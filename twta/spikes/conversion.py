"""A network as spiking neurons: converted, simulated on test images, checked against the network, written as files."""
import time

import numpy as np

from twta import TwtaError, UsageError
from twta.data import datasets
from twta.export.rewrite import count_from_rest
from twta.files import replacing
from twta.packed import engines, inference, numpy_engine
from twta.results import environment, save_picture, write_csv, write_json
from twta.spikes.simulation import BATCH, FIELDS, PackedSimulator, deletion, simulate, store_and_release
from twta.terminal import say
from twta.training.records import list_options

FILES = 'accuracy.txt', 'spike_num.txt', 'sop_num.txt', 'spikes.csv', 'spikes.json'


def convert(experiment, flags):
    """Convert the network of a checkpoint, simulate it and compare it with its graph.

    flags    of twta.spikes.command: images, conversion, and those of report

    Raises TwtaError if a prediction differs.
    """
    from twta.export.pack import header_of, pack, predict  # here, and below: they import TensorFlow
    from twta.training.evaluation import trained

    dataset = experiment.dataset
    images = first_images(dataset, flags.images)
    with trained(experiment) as (network, session, experiment):
        packed = pack(network.net, session, header_of(experiment), flags.conversion == 'temporal')
        predicted = predict(network, session, images)
    plain, steps = open_simulator(packed, flags.conversion, PackedSimulator)
    if flags.conversion == 'temporal' and steps == 1:
        say('temporal: one level is one step, the same as spatial')
    report(flags, plain, steps, predicted, 'the graph', dataset, images)


def convert_file(flags, packed):
    """Simulate a packed network, whose activations are neurons already, and compare it with the packed engine.

    flags    of twta.spikes.command: file, dataset, data_dir, images, and those of report

    Raises TwtaError if a prediction differs or the network is for other images.
    """
    plain, steps = open_simulator(packed, flags.conversion, numpy_engine.NumpyEngine)
    dataset = datasets.load(flags.dataset, flags.data_dir, None)
    inference.check_images(packed, dataset, flags)
    say(f'data: {dataset}')
    say(f'network: {packed.network}, {flags.file}')
    images = first_images(dataset, flags.images)
    engine = engines.warm_engine(packed, 'auto', None, len(images))
    predicted = engines.logits(engine, images).argmax(1)
    report(flags, plain, steps, predicted, f'the packed engine ({engine.name})', dataset, images)


def first_images(dataset, count):
    """Return so many test images, None for all. Raises UsageError if there are fewer."""
    images = dataset.test.images
    if count and count > len(images):
        raise UsageError(f'--images {count}: {dataset.name} has {len(images):,} test images; give fewer, or leave '
                         'it out for all')
    return images[:count]


def open_simulator(packed, conversion, of_one_step):
    """Return a simulator of a packed network without noise, and its number of time steps per image.

    of_one_step    PackedSimulator, or NumpyEngine if the packed engine is what it is compared with
    """
    if conversion == 'rest':
        packed = count_from_rest(packed, temporal=True)
    thresholds = packed.layers[0].upper
    if thresholds.ndim == 1:
        return of_one_step(packed), 1
    return numpy_engine.NumpyEngine(packed, store_and_release), len(thresholds)


def report(flags, plain, steps, expected, whose, dataset, images):
    """Simulate, check every prediction, simulate again with noise if there is any, print and write the results.

    flags       conversion, noise_ratio, seed, dataset, output
    plain       simulator without noise
    steps       time steps per image
    expected    classes [n] that the network predicts; whose: its name in messages
    images      the first images of the data set's test split, uint8 [n, height, width, channels]

    Raises TwtaError if a prediction without noise differs.
    """
    labels = dataset.test.labels[:len(images)]
    say(f'{flags.conversion} conversion, {steps} step{"s" * (steps > 1)}: '
        f'{len(images):,} test images in batches of {BATCH}')
    start = time.perf_counter()
    predicted, *counts = simulate(plain, images, steps)
    seconds = time.perf_counter() - start
    differ = int(np.sum(predicted != expected))
    if differ:
        raise TwtaError(f'the neurons predict {differ} images otherwise than {whose}; nothing was written; this is a '
                        'fault of the scripts')
    say(f'checked: the predictions of {whose} on each of the {len(images):,} images ({seconds:.1f} s)')
    without = float(np.mean(predicted == labels))
    say(f'accuracy: {without:.4f}')
    deleted = f'{100 * flags.noise_ratio:.3g}% of the encoder\'s spikes deleted'
    if flags.noise_ratio:
        neuron = numpy_engine.fire if steps == 1 else store_and_release
        noisy = numpy_engine.NumpyEngine(plain.packed, neuron, deletion(flags.noise_ratio, flags.seed))
        predicted, *counts = simulate(noisy, images, steps)
        say(f'accuracy with {deleted}: {np.mean(predicted == labels):.4f}; table and files are with this noise')
    for line in table(counts[2]):
        say(line)
    packed = plain.packed
    network = ', '.join([packed.network, *list_options(packed.record.get('choices') or {})])
    title = (f'{network}, on {dataset.title}\n'
             f'{flags.conversion} conversion, {steps} step{"s" * (steps > 1)}'
             + (f', {deleted}' if flags.noise_ratio else ''))
    write(flags.output, title, predicted == labels, *counts, {
        'network': packed.network, 'dataset': flags.dataset, 'conversion': flags.conversion, 'steps': steps,
        'noise_ratio': flags.noise_ratio, 'seed': flags.seed, 'accuracy_without_noise': without, 'seconds': seconds,
        'record': packed.record})


def write(folder, title, right, spikes, operations, rows, record):
    """Write the files into a folder.

    right                 bool [n], if the predicted class is the image's
    spikes, operations    of each batch, from simulate; rows: of its table
    record                what spikes.json holds beside the counts
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [int(np.sum(right[start:start + BATCH])) for start in range(0, len(right), BATCH)]
    *texts, table_file, json_file = FILES
    for name, lines in zip(texts, (numbers, spikes, operations), strict=True):
        with replacing(folder / name) as part:
            part.write_text(''.join(f'{number}\n' for number in lines))
    write_csv(folder / table_file, FIELDS, rows)
    write_json(folder / json_file, {**record, 'images': len(right), 'accuracy': float(np.mean(right)),
                                    'layers': rows, **environment()})
    say(f'{", ".join(FILES)}: {folder}')
    if save_picture(folder / 'spikes.png', draw, title, rows):
        say(f'picture: {folder / "spikes.png"}')


def table(rows):
    """Yield the lines of the table for the terminal."""
    yield 'per image       neurons     spikes   negative   rate  sparsity     operations  on weights not 0'
    for row in rows:
        operations = f'{row["operations"]:14,.0f} {row["nonzero_operations"]:17,.0f}' if row['operations'] else '-'
        yield (f'{row["layer"][:12]:12} {row["neurons"]:10,} {row["spikes"]:10,.1f} {row["negative"]:10,.1f} '
               f'{row["rate"]:6.1%} {1 - row["rate"]:9.1%} {operations:>14}')


def draw(title, rows):
    """Return the picture: spikes and synaptic operations by layer."""
    from matplotlib.figure import Figure  # here: few commands draw

    *rows, total = rows
    figure = Figure(figsize=(10, 2.2 + 0.32 * len(rows)), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))
    positive = np.array([row['spikes'] - row['negative'] for row in rows])
    left.barh(places, positive, color='tab:orange', label='positive')
    if total['negative']:
        left.barh(places, [row['negative'] for row in rows], left=positive, color='tab:blue', label='negative')
        left.legend(loc='lower right')
    for place, row in enumerate(rows):
        left.text(row['spikes'], place, f' {row["rate"]:.0%}', va='center', fontsize=8)
    left.margins(x=0.12)
    left.set_yticks(places, [row['layer'] for row in rows])
    left.invert_yaxis()
    left.set(xlabel='spikes per image, and their rate (per neuron and step)')
    for shift, field, label, colour in ((-0.2, 'operations', 'all connections', 'tab:grey'),
                                        (0.2, 'nonzero_operations', 'weights that are not 0', 'tab:blue')):
        right.barh(places + shift, [row[field] / 1e6 for row in rows], 0.4, color=colour, label=label)
    right.legend(loc='lower right')
    right.set(xlabel='synaptic operations per image (millions)')
    for axes in (left, right):
        axes.grid(alpha=0.3, axis='x')
    figure.suptitle(f'{title}\n{total["spikes"]:,.0f} spikes and {total["operations"] / 1e6:,.2f} million synaptic '
                    'operations per image')
    return figure
