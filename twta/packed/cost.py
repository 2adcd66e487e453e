"""What a packed network costs: bits, sparsity, additions and energy, layer by layer.

Energy is an estimate of the arithmetic alone, in 45 nm, without memory. Its source is M. Horowitz, "Computing's energy
problem (and what we can do about it)", ISSCC 2014, figure 1.1.9: a float32 multiplication takes 3.7 pJ, a float32
addition 0.9 pJ, an int32 addition 0.1 pJ.

The float network multiplies and adds everywhere, even on the zeros of the border. The packed network adds only if
weight and activation are both non-zero. Hardware that skips zeros does so; the bit planes of the engines here do not.
Stem, encoder and classifier stay real-valued and are counted as float32, although the engines sum in float64.
Comparisons with thresholds are not counted.
"""
import math

import numpy as np

from twta import results
from twta.files import make_folder
from twta.packed import file_format
from twta.packed.file_format import is_expanded
from twta.packed.numpy_engine import convolve
from twta.terminal import say

PICOJOULES_MULTIPLY_ADD = 3.7 + 0.9  # float32
PICOJOULES_ADD = 0.1  # int32
IMAGES = 1000  # the activations of at most so many images are counted
FIELDS = ('layer', 'weights', 'bits', 'zero_weights', 'zero_inputs', 'multiply_adds', 'additions', 'float_nJ',
          'packed_nJ')


def report(engine, dataset, run_dir):
    """Print the costs of an engine's network on test images of a data set; write cost.csv and cost.png to run_dir."""
    rows = measure(engine, dataset.test.images[:IMAGES])
    for line in table(rows):
        say(line)
    if is_expanded(engine.packed):
        say('levels and pooling have become neurons: the float32 network of this table has as many neurons, more than '
            'the trained network')
    say('zero w, zero x: fraction of weights and inputs that are 0; nJ: estimate of the arithmetic alone, 45 nm '
        '(Horowitz, ISSCC 2014)')
    with results.if_permitted():
        make_folder(run_dir)
        results.write_csv(run_dir / 'cost.csv', FIELDS, rows)
        say(f'table: {run_dir / "cost.csv"}')
        if results.save_picture(run_dir / 'cost.png', draw, engine.packed, dataset, rows):
            say(f'picture: {run_dir / "cost.png"}')


def measure(engine, images):
    """Return one row per layer and one in all, each a dictionary of FIELDS: means per image over the images.

    images    uint8 [n, height, width, channels]
    """
    packed = engine.packed
    inputs = np.zeros(len(packed.layers) + 1)  # fractions of zeros, by layer and classifier, summed over images
    additions = np.zeros(len(packed.layers))
    for start in range(0, len(images), engine.batch):
        batch = images[start:start + engine.batch]
        maps = engine.activations(batch)
        inputs[1:] += [np.sum(values == 0) / values[0].size for values in maps]
        for index, layer in enumerate(packed.layers[1:], 1):
            additions[index] += count_additions(maps[index - 1], layer)
    rows = []
    if packed.stem:
        weights = packed.stem.weights
        size = math.prod(file_format.input_shape(packed)[:2]) * weights.size
        rows.append(row('stem', weights, 32 * weights.size + 128 * weights.shape[3], None, size, None))
    for index, (layer, _, _, out) in enumerate(file_format.shapes(packed)):
        multiply_adds = math.prod(out) * file_format.fan_in(layer.weights)
        rows.append(row(layer.name, layer.weights, 8 * file_format.layer_bytes(layer),
                        inputs[index] / len(images) if index else None, multiply_adds,
                        additions[index] / len(images) if index else None))
    rows.append(row('classifier', packed.weights, 32 * (packed.weights.size + 2 * len(packed.classes)),
                    inputs[-1] / len(images), packed.weights.size, None))
    total = {field: sum(entry[field] or 0 for entry in rows) for field in FIELDS[1:] if not field.startswith('zero')}
    zeros = sum(entry['zero_weights'] * entry['weights'] for entry in rows) / total['weights']
    return rows + [{'layer': 'in all', **total, 'zero_weights': zeros, 'zero_inputs': None}]


def row(name, weights, bits, zero_inputs, multiply_adds, additions):
    """Return a row of FIELDS; additions are None if the layer is real-valued and multiplies."""
    real = multiply_adds * PICOJOULES_MULTIPLY_ADD / 1000
    return dict(zip(FIELDS, (
        name, weights.size, bits, float(np.mean(weights == 0)), zero_inputs, multiply_adds, additions, real,
        real if additions is None else additions * PICOJOULES_ADD / 1000), strict=True))


def remaining_multiply_adds(rows):
    """Return the multiply-adds per image of the real-valued layers."""
    return sum(entry['multiply_adds'] for entry in rows if entry['additions'] is None)


def count_additions(x, layer):
    """Return how many products of non-zero weight and non-zero activation maps x [n, height, width, channels] take."""
    height, width, channels, _ = layer.weights.shape
    counts = np.count_nonzero(layer.weights.reshape(height, width, channels, layer.groups, -1), axis=4)
    return convolve((x != 0).astype(np.float64), layer._replace(weights=counts, border=abs(layer.border))).sum()


def table(rows):
    """Yield the lines of the table for the terminal."""
    yield 'per image       weights   kbit  zero w  zero x  multiply-adds     additions  float32 nJ  packed nJ'
    for entry in rows:
        zero_inputs, additions = entry['zero_inputs'], entry['additions']
        yield (f'{entry["layer"][:12]:12} {entry["weights"]:10,} {entry["bits"] / 1000:6,.0f} '
               f'{entry["zero_weights"]:7.1%} ' + ('      -' if zero_inputs is None else f'{zero_inputs:7.1%}')
               + f' {entry["multiply_adds"]:14,} '
               + (f'{"-":>13}' if additions is None else f'{additions:13,.0f}')
               + f' {entry["float_nJ"]:11,.1f} {entry["packed_nJ"]:10,.1f}')


def draw(packed, dataset, rows):
    """Return the picture: operations and energy of the float network and of the packed network, by layer.

    The packed network adds, but its real-valued layers, whose additions are None, multiply and add as before.
    """
    from matplotlib.figure import Figure  # here: few commands draw

    total = rows[-1]
    names = [entry['layer'] for entry in rows[:-1]]
    figure = Figure(figsize=(10, 0.6 + 0.32 * len(names) + 1), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(names))
    multiply_adds, additions, float_nj, packed_nj = (
        [entry[field] for entry in rows[:-1]] for field in ('multiply_adds', 'additions', 'float_nJ', 'packed_nJ'))
    operations = [multiplied if added is None else added
                  for multiplied, added in zip(multiply_adds, additions, strict=True)]
    for axes, scale, of_float, of_packed, labels in (
            (left, 1e6, multiply_adds, operations,
             ('float32: multiply-adds', 'packed: additions, real-valued\nlayers: multiply-adds')),
            (right, 1e3, float_nj, packed_nj, ('float32', 'packed'))):
        axes.barh(places - 0.2, np.divide(of_float, scale), 0.4, label=labels[0], color='tab:grey')
        axes.barh(places + 0.2, np.divide(of_packed, scale), 0.4, label=labels[1], color='tab:blue')
        axes.grid(alpha=0.3, axis='x')
        axes.legend()
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.set(xlabel='operations per image (millions)')
    right.set(xlabel='energy per image (µJ): arithmetic only, 45 nm, Horowitz 2014', xscale='log')
    less = total['float_nJ'] / total['packed_nJ']
    neurons = ', levels and pooling as neurons' if is_expanded(packed) else ''
    figure.suptitle(f'{packed.network} on {dataset.title}{neurons}, {total["bits"] / 8000:,.0f} KB\n'
                    f'{total["additions"] / 1e6:,.1f} M additions and {remaining_multiply_adds(rows) / 1e6:,.1f} M '
                    f'multiply-adds instead of {total["multiply_adds"] / 1e6:,.1f} M, {less:.0f} times less energy for '
                    'the arithmetic (estimate)')
    return figure
