"""The pictures of the pages, drawn from records and trained networks: see twta.report.

Each picture is opaque, dark on white, so that it is legible on light and dark pages. It carries the hash of what it was
drawn from, so that a test can tell whether it is stale.
"""
import hashlib
import json
import re

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from twta import TwtaError
from twta.data import datasets
from twta.files import replacing
from twta.options import SHORT
from twta.packed import cost, engines, file_format
from twta.report import growth, scaling
from twta.report.evidence import (
    PRETRAINED,
    RECOMPRESSED,
    RESULTS,
    ROOT,
    TITLES,
    by_protocol,
    is_whole,
    protocol,
    schedule,
    unusual_device,
)
from twta.spikes import conversion
from twta.terminal import say
from twta.training.records import list_options, name_schedule

FOLDER = RESULTS / 'pictures'
FILTERS = 'TWTA_4_4_MNIST', 'TWTA_3_3_CIFAR10_Group_V2'
MISCLASSIFIED = SPIKING = 'TWTA_4_4_MNIST'  # its errors are shown, and its spikes, layer by layer
LINES = {'constant': '--', 'short': '-'}  # style of a curve, by schedule
OTHERS = '-.', ':', (0, (9, 4)), (0, (1, 4)), (0, (2, 2, 6, 2)), (0, (8, 2, 1, 2, 1, 2))  # the rest, in turn
TIMED = {'TWTA_4_4_MNIST': (97.5, 99.8), 'TWTA_3_3_CIFAR10_Group_V2': (40, 90)}  # accuracy by minutes: the limits
LAYERS = 'TWTA_3_3_CIFAR10_Group_V2'  # its costs are shown layer by layer
FAMILIES = {'FP': ('float32', 'tab:grey', 's'), 'TWTA': ('TWTA', 'tab:blue', 'o'), 'TWBA': ('TWBA', 'tab:orange', '^'),
            'BWBA': ('BWBA', 'tab:red', 'v')}


def sources(records):
    """Return {name of a picture: (function that draws it, arguments: records or the path of a network)}."""
    found = {}
    for name, title in TITLES.items():
        of_data = [record for record in records if record['dataset'] == name]
        if not all(record['data']['published'] for record in of_data):
            title += f', {RECOMPRESSED}'
        found[f'curves-{name}'] = draw_curves, title, of_data
        alike = [record for record in of_data if is_short(record)]
        if len({record['script'] for record in alike}) > 2:
            found[f'cost-{name}'] = draw_cost, title, alike
    for script in FILTERS:
        found[f'filters-{script}'] = draw_filters, PRETRAINED / f'{script}.twta'
        runs = [record for record in records
                if record['script'] == script and is_whole(record) and is_short(record) and record['shares']]
        if runs:
            found[f'shares-{script}'] = draw_fractions, runs[0]
    found['misclassified'] = draw_misclassified, PRETRAINED / f'{MISCLASSIFIED}.twta'
    found[f'cost-layers-{LAYERS}'] = draw_cost_layers, PRETRAINED / f'{LAYERS}.twta'
    found[f'spikes-{SPIKING}'] = draw_spikes, RESULTS / 'spikes' / f'{SPIKING}-spatial.json'
    found['minutes'] = draw_minutes, [record for record in records if record['script'] in TIMED and is_timed(record)]
    found['scaling'] = scaling.draw, ROOT / 'benchmarks' / 'scaling.json'
    found['growth'] = growth.draw, ROOT / 'benchmarks' / 'growth.json'
    return found


def is_short(record):
    """Return whether the run was of the short protocol, with nothing changed."""
    short = SHORT[record['dataset']]
    return (protocol(record), record['epochs']) == (schedule(short), short['epochs'])


def is_timed(record):
    """Return whether the minutes of a run compare with others: one stage, all quantised, on the usual cores."""
    return is_whole(record) and len(record['stages']) == 1 and record['seed'] == 0 and not unusual_device(record)


def write_all(records, data_dir):
    """Draw every picture; a picture that needs test images is left as it is if they are not in data_dir."""
    FOLDER.mkdir(exist_ok=True)
    shown = {draw_misclassified: 'mnist', draw_cost_layers: 'cifar10'}
    for name, (draw, *arguments) in sources(records).items():
        if draw in shown:
            if not (data_dir / shown[draw]).is_dir():
                say(f'{name}.png is left as it is: no {TITLES[shown[draw]]} in {data_dir}')
                continue
            try:
                arguments.append(datasets.load(shown[draw], data_dir))
            except TwtaError as error:
                say(f'{name}.png is left as it is: {error}')
                continue
        save(name, draw(*arguments), fingerprint(arguments))


def fingerprint(arguments):
    """Return the SHA-256 of what a picture is drawn from: files by their content, data sets not at all."""
    parts = [part.read_bytes() if hasattr(part, 'read_bytes') else json.dumps(part, sort_keys=True).encode()
             for part in arguments if not isinstance(part, datasets.Dataset)]
    return hashlib.sha256(b''.join(parts)).hexdigest()


def save(name, figure, source):
    with replacing(FOLDER / f'{name}.png') as part:
        figure.savefig(part, format='png', dpi=100, metadata={'Source': source})
    say(f'{FOLDER / f"{name}.png"}')


def draw_curves(title, records):
    """Draw accuracy by epoch: a line per protocol of each FP and TWTA network, of its first seed, without resumed runs.

    The accuracy is on validation images. If no run of the data set has any, it is on training images, as augmented.
    """
    figure = Figure(figsize=(10.5, 4.8), layout='constrained')
    axes = figure.subplots()
    held_out = any(record['data']['validation_images'] for record in records)
    key = 'validation_accuracy' if held_out else 'training_accuracy'
    networks = [record for record in records
                if record['script'].startswith(('FP', 'TWTA')) and record['curve'][key][-1] is not None]
    scripts = list(dict.fromkeys(record['script'] for record in networks))
    taken = {script: [] for script in scripts}  # a script's curves have one colour, and a style each
    for first, *_ in by_protocol([record for record in networks if len(record['stages']) == 1]):
        script, stage = first['script'], first['stages'][0]
        style = LINES.get(name_schedule(stage['schedule'], stage['augmentation']))
        if style in [None, *taken[script]] or list_options(first['choices']) or first['flags'].get('teacher'):
            style = next((other for other in OTHERS if other not in taken[script]), OTHERS[-1])
        taken[script].append(style)
        axes.plot(first['curve']['epoch'], [100 * value for value in first['curve'][key]],
                  color=f'C{scripts.index(script)}', linewidth=1, linestyle=style,
                  label=f'{script}, {protocol(first)}, {first["epochs"]} epochs')
    kind = 'validation accuracy' if held_out else 'training accuracy'
    axes.set(xlabel='epoch', ylabel=f'{kind} (%)', xscale='log')
    label_log(axes)
    if held_out:
        axes.set_ylim(98.5, 99.8)
    axes.grid(alpha=0.3, which='both')
    figure.legend(fontsize=7, loc='outside lower center', ncols=2, handlelength=4)
    figure.suptitle(f'{title}: {kind} by epoch, one seed each')
    return figure


def draw_minutes(records):
    """Draw accuracy by minutes of training: a panel per network, a line per protocol.

    The accuracy is on validation images; on training images, as augmented, if none were held out. Every epoch of a run
    counts the median of their seconds: other work ran beside some epochs.
    """
    figure = Figure(figsize=(10, 4.5), layout='constrained')
    for axes, (script, limits) in zip(figure.subplots(1, len(TIMED)), TIMED.items(), strict=True):
        for record in records:
            if record['script'] == script:
                curve = record['curve']
                kind = 'validation' if record['data']['validation_images'] else 'training'
                label = f'{protocol(record)}, {record["epochs"]} epochs'
                axes.plot(np.median(curve['seconds']) / 60 * np.array(curve['epoch']),
                          [100 * value for value in curve[f'{kind}_accuracy']], linewidth=1, label=label)
                axes.set(xlabel='minutes of training', ylabel=f'{kind} accuracy (%)', xscale='log', ylim=limits)
        axes.set_title(script, fontsize=9)
        label_log(axes)
        axes.grid(alpha=0.3, which='both')
        axes.legend(fontsize=7, loc='lower right')
    figure.suptitle('Accuracy by minutes of training on 2 cores of an AMD EPYC, seed 0; CIFAR-10 JPEG-recompressed',
                    fontsize=10)
    return figure


def draw_cost(title, records):
    """Draw test accuracy against bytes of the model and operations per image.

    Operations are additions where neither weight nor activation is 0, and the multiply-adds of real-valued layers. A
    float32 network has 4 bytes per parameter.
    """
    figure = Figure(figsize=(10, 2.7), layout='constrained')  # flat: it stands on the README's first screen
    left, right = figure.subplots(1, 2, sharey=True)
    of_float = {record['script'].split('_', 1)[1]: record['packed']['float_multiply_adds'] for record in records
                if 'additions' in record.get('packed', {})}

    points = []  # family, script, accuracy, bytes, operations
    for runs in by_protocol(records):
        family, architecture = runs[0]['script'].split('_', 1)
        costs = [(run['packed']['bytes'], run['packed']['additions'] + run['packed']['multiply_adds']) for run in runs
                 if 'additions' in run.get('packed', {})]
        if family == 'FP':
            costs = [(4 * runs[0]['parameters'], of_float.get(architecture))]
        if costs and None not in costs[0]:
            accuracies = [run['last']['test_accuracy'] for run in runs]
            points.append((family, runs[0]['script'], 100 * np.mean(accuracies), *np.mean(costs, axis=0)))
    heights = [y for _, _, y, *_ in points]
    for axes, costs in ((left, [size / 1e3 for *_, size, _ in points]), (right, [count / 1e6 for *_, count in points])):
        for (family, script, y, *_), x in zip(points, costs, strict=True):
            label, colour, marker = FAMILIES[family]
            axes.plot(x, y, marker, color=colour, label=label)
            is_followed = any(x < other and abs(y - height) < 0.05 * np.ptp(heights)
                              for other, height in zip(costs, heights, strict=True))  # labels would overlap
            axes.annotate(re.sub('_(MNIST|CIFAR10)', '', script), (x, y), fontsize=7, va='center',
                          ha='right' if is_followed else 'left', xytext=(-6 if is_followed else 6, 0),
                          textcoords='offset points')
    left.set(xlabel='model (KB; float32: 4 bytes per parameter)', ylabel='test accuracy (%)')
    right.set(xlabel='operations per image (millions)')
    for axes in (left, right):
        axes.set_xscale('log')
        axes.margins(0.5, 0.12)
        label_log(axes)
        axes.grid(alpha=0.3, which='both')
    handles, labels = left.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    left.legend(by_label.values(), by_label, fontsize=8)
    several = any(len(runs) > 1 for runs in by_protocol(records))
    seeds = 'mean of the seeds' if several else 'one seed each'
    figure.suptitle(f'{title}: accuracy after the short protocol, {seeds}', fontsize=10)
    return figure


def label_log(axes):
    """Label 1, 2, 5, 10, 20, ... on a logarithmic x axis, or 1, 10, ... if it is long."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_fractions(record):
    """Draw the fractions of -1, 0 and +1 in weights and activations, layer by layer, over the epochs."""
    kinds = record['shares']
    layers = list(kinds['activations'])
    epochs = record['curve']['epoch'][-len(kinds['activations'][layers[0]]['negative']):]
    figure = Figure(figsize=(10, 4), layout='constrained')
    grid = figure.subplots(2, len(layers), sharex=True, sharey=True)
    for row, kind in zip(grid, ('weights', 'activations'), strict=True):
        for axes, layer in zip(row, layers, strict=True):
            if layer in kinds[kind]:
                negative, positive = (np.array(kinds[kind][layer][sign]) for sign in ('negative', 'positive'))
                axes.stackplot(epochs, negative, 1 - negative - positive, positive,
                               colors=('tab:blue', 'lightgrey', 'tab:orange'), labels=('-1', '0', '+1'))
            else:
                axes.text(0.5, 0.5, 'real', ha='center', transform=axes.transAxes)
            axes.set_xlim(epochs[0], epochs[-1])
            axes.set_ylim(0, 1)
        row[0].set_ylabel(f'fraction of {kind}')
    for axes, layer in zip(grid[0], layers, strict=True):
        axes.set_title(layer, fontsize=9)
    for axes in grid[1]:
        axes.set_xlabel('epoch')
    figure.legend(*grid[1][0].get_legend_handles_labels(), loc='outside right center', reverse=True, fontsize=8)
    figure.suptitle(f'{record["name"]}: values of weights and activations over the epochs')
    return figure


def draw_filters(file):
    """Draw the real-valued filters of the first convolution, the encoder, each scaled to its own largest weight."""
    network = file_format.read(file)
    weights = network.layers[0].weights.transpose(3, 0, 1, 2)
    is_grey = weights.shape[3] == 1
    columns = 16
    rows = -(-len(weights) // columns)
    figure = Figure(figsize=(8, 0.55 * rows + 0.5), layout='constrained')
    for axes, values in zip(figure.subplots(rows, columns).flat, weights, strict=True):
        scaled = values / np.abs(values).max()
        axes.imshow(scaled[..., 0] if is_grey else (scaled + 1) / 2, cmap='RdBu_r', vmin=-1, vmax=1)
        axes.set_axis_off()
    key = 'red above 0, blue below' if is_grey else 'in colours, grey: 0'
    figure.suptitle(f'{network.network}: the filters of the encoder, {key}', fontsize=10)
    return figure


def draw_cost_layers(file, dataset):
    """Draw operations and energy of a packed network, layer by layer, as --report has them."""
    engine = engines.open_engine(file_format.read(file))
    return cost.draw(engine.packed, dataset, cost.measure(
        engine, dataset.test.images[:cost.IMAGES]))


def draw_spikes(file):
    """Draw spikes and synaptic operations, layer by layer, as a Spiking script has counted them."""
    record = json.loads(file.read_text())
    return conversion.draw(f'{record["network"]} on {TITLES[record["dataset"]]}, {record["conversion"]} conversion',
                       record['layers'])


def draw_misclassified(file, dataset):
    """Draw the first test images that are taken for another digit, with true and predicted class."""
    network = file_format.read(file)
    predicted = engines.logits(engines.open_engine(network), dataset.test.images).argmax(1)
    wrong = np.flatnonzero(predicted != dataset.test.labels)
    most, columns = 40, 10
    rows = -(-min(len(wrong), most) // columns)
    figure = Figure(figsize=(8, 0.95 * rows + 0.5), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, index in zip(grid.flat, wrong[:most], strict=False):
        axes.imshow(dataset.test.images[index, ..., 0], cmap='Greys')
        axes.set_title(f'{dataset.test.labels[index]} as {predicted[index]}', fontsize=8)
    shown = 'all' if len(wrong) <= most else f'the first {most} of'
    figure.suptitle(f'{network.network} on {dataset.title}: {shown} {len(wrong)} misclassified test images, true class '
                    'as predicted class', fontsize=10)
    return figure
