"""The pictures of README.md, drawn from records and trained networks: see twta.report.

Each is opaque, dark on white, so that it is legible on light and dark pages, and carries the hash of what it was drawn
from, so that a test can tell whether it is stale.
"""
import hashlib
import json

import numpy as np
from matplotlib.figure import Figure

from twta import TwtaError, datasets, packed, packed_file, replacing
from twta.records import say
from twta.report import PRETRAINED, RESULTS, TITLES, by_protocol, protocol

FOLDER = RESULTS / 'pictures'
MISCLASSIFIED = 'TWTA_4_4_MNIST'  # whose errors are shown
FILTERS = 'TWTA_4_4_MNIST', 'TWTA_3_3_CIFAR10_Group_V2'
FAMILIES = {'FP': ('float32', 'tab:grey', 's'), 'TWTA': ('TWTA', 'tab:blue', 'o'), 'TWBA': ('TWBA', 'tab:orange', '^'),
            'BWBA': ('BWBA', 'tab:red', 'v'), 'Quant': ('ternary weights, 5 levels', 'tab:green', 'D')}


def sources(records):
    """By the picture's name: the function that draws it, what from, and that once more as bytes to hash."""
    found = {}
    for name, title in TITLES.items():
        of_data = [record for record in records if record['dataset'] == name]
        found[f'curves-{name}'] = draw_curves, (title, of_data)
        found[f'cost-{name}'] = draw_cost, (title, of_data)
    for script in FILTERS:
        runs = [record for record in records if record['script'] == script and record['shares']]
        if runs:
            found[f'shares-{script}'] = draw_shares, (runs[0],)
    return found


def write_all(records, data_dir):
    """Draws every picture; the one that needs images only where they are at hand."""
    FOLDER.mkdir(exist_ok=True)
    for name, (draw, arguments) in sources(records).items():
        save(name, draw(*arguments), fingerprint(arguments))
    for script in FILTERS:
        file = PRETRAINED / f'{script}.twta'
        save(f'filters-{script}', draw_filters(packed_file.read(file)), fingerprint(file.read_bytes()))
    file = PRETRAINED / f'{MISCLASSIFIED}.twta'
    try:
        dataset = datasets.load('mnist', data_dir, None)
    except TwtaError as error:
        say(f'without the misclassified digits: {error}')
        return
    save('misclassified', draw_misclassified(packed_file.read(file), dataset), fingerprint(file.read_bytes()))


def fingerprint(source):
    data = source if isinstance(source, bytes) else json.dumps(source, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def save(name, figure, source):
    with replacing(FOLDER / f'{name}.png') as part:
        figure.savefig(part, format='png', dpi=100, metadata={'Source': source})
    say(f'{FOLDER / f"{name}.png"}')


def draw_curves(title, records):
    """Accuracy by epoch, a line a protocol of each network, of its first seed: on validation, or in training."""
    figure = Figure(figsize=(10, 4.5), layout='constrained')
    axes = figure.subplots()
    held_out = all(record['data']['validation_images'] for record in records)
    key = 'validation_accuracy' if held_out else 'training_accuracy'
    scripts = list(dict.fromkeys(record['script'] for record in records))
    for runs in by_protocol(records):
        first = runs[0]
        _, epochs, words, _ = protocol(first)
        dashed = 'constant' in words
        axes.plot(first['curve']['epoch'], [100 * value for value in first['curve'][key]],
                  color=f'C{scripts.index(first["script"])}', linestyle='--' if dashed else '-', linewidth=1,
                  label=f'{first["script"]}, {words}, {epochs} epochs')
    kind = 'validation accuracy' if held_out else 'accuracy in training, on augmented images'
    axes.set(xlabel='epoch', ylabel=f'{kind} (%)', xscale='log')
    if held_out:
        axes.set_ylim(98, 99.8)
    axes.grid(alpha=0.3, which='both')
    axes.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
    figure.suptitle(f'{title}: {kind} by epoch, one seed each')
    return figure


def draw_cost(title, records):
    """Test accuracy against bytes of the model and operations an image; of float32 networks, 4 bytes a parameter."""
    figure = Figure(figsize=(10, 4.5), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    operations = {record['script'].split('_', 1)[1]: record['packed']['multiply_adds'] for record in records
                  if 'packed' in record}
    seen = set()
    for runs in by_protocol(records):
        cost = [run['packed'] for run in runs if 'packed' in run]
        script, value = runs[0]['script'], 100 * float(np.mean([run['last']['test_accuracy'] for run in runs]))
        family, architecture = script.split('_', 1)
        label, colour, marker = FAMILIES[family]
        points = [(left, cost[0]['bytes'], right, cost[0]['additions'])] if cost else []
        if family == 'FP':
            points = [(left, 4 * runs[0]['parameters'], right, operations.get(architecture))]
        for bytes_axes, size, operation_axes, count in points:
            for axes, x in ((bytes_axes, size / 1000), (operation_axes, count and count / 1e6)):
                if x:
                    axes.plot(x, value, marker, color=colour, label=None if (label, axes) in seen else label)
                    axes.annotate(script, (x, value), fontsize=7, xytext=(4, 4), textcoords='offset points')
                    seen.add((label, axes))
    left.set(xlabel='model (KB; float32: 4 bytes a parameter)', ylabel='test accuracy (%)', xscale='log')
    right.set(xlabel='operations an image (millions): additions where neither\nweight nor activation is 0; float32: '
                     'multiply-adds', xscale='log')
    for axes in (left, right):
        axes.grid(alpha=0.3, which='both')
        axes.margins(0.25, 0.15)
    left.legend(loc='lower right')
    figure.suptitle(f'{title}: accuracy against size and work')
    return figure


def draw_shares(record):
    """Shares of -1, 0 and +1 in weights and activations, layer by layer, over the epochs."""
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
        row[0].set_ylabel(f'share of {kind}')
    for axes, layer in zip(grid[0], layers, strict=True):
        axes.set_title(layer, fontsize=9)
    for axes in grid[1]:
        axes.set_xlabel('epoch')
    grid[1][0].legend(loc='upper left', fontsize=7)
    figure.suptitle(f'{record["name"]}: values of weights and activations over the epochs')
    return figure


def draw_filters(network):
    """The filters of the first convolution, the encoder: real-valued, each scaled to its own largest weight."""
    weights = network.layers[0].weights.transpose(3, 0, 1, 2)
    columns = 16
    rows = -(-len(weights) // columns)
    figure = Figure(figsize=(8, 0.55 * rows + 0.5), layout='constrained')
    for axes, values in zip(figure.subplots(rows, columns).flat, weights, strict=True):
        scaled = values / np.abs(values).max()
        axes.imshow(scaled[..., 0] if values.shape[2] == 1 else (scaled + 1) / 2, cmap='RdBu_r', vmin=-1, vmax=1)
        axes.set_axis_off()
    figure.suptitle(f'{network.network}: the filters of the encoder', fontsize=10)
    return figure


def draw_misclassified(network, dataset, most=40):
    """Test images that are taken for another digit, with true and predicted class; the first ones."""
    predicted = packed.logits(packed.open_engine(network), dataset.test.images).argmax(1)
    wrong = np.flatnonzero(predicted != dataset.test.labels)
    columns = 10
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
