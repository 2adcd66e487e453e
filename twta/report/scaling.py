"""The cost of several workers: a table and a picture from benchmarks/scaling.json, measured and modelled.

The model of a step with N workers, for a global batch of B images and V bytes to sum:

    seconds = fixed + image * B / N  +  2 * (N - 1) * hop  +  2 * (N - 1) / N * V * (1 / loopback + 1 / wire)

Measured, on one machine: fixed and image, by a line through the steps with B, B / 2 and B / 4 images on all cores; hop,
half of the sum of 4 bytes over two workers; loopback, the bytes per second of the largest sum, which is the time of the
processors. Assumed: the bandwidth of the wire, no overlap of sums and gradients, hops that take as long as here.
"""
import json

import numpy as np
from matplotlib.figure import Figure

from twta.report.markdown import table

WIRES = 1, 10, 25, 100  # Gbit/s
MOST = 64  # workers


def by_network(rows):
    """Return {network: its rows} in the order of the rows."""
    networks = {}
    for row in rows:
        networks.setdefault(row['network'], []).append(row)
    return networks


def steps(rows, workers, is_one_core, batch_norm=''):
    """Return {images: the row} of the steps in a setting, the largest batch first."""
    return {row['batch']: row for row in rows if 'batch' in row and row['workers'] == workers
            and (row['cores'] == 1) == is_one_core and row['batch_norm'] == batch_norm}


def of_two(rows, batch_norm):
    """Return the row of two workers with a core each."""
    return next(iter(steps(rows, 2, False, batch_norm).values()))


def model(rows, n_workers, wire):
    """Return the seconds of a step: an array, for an array of numbers of workers; wire in bytes per second."""
    alone = steps(rows, 1, False)
    batch, volume = max(alone), of_two(rows, 'shard')['bytes']
    image, fixed = np.polyfit(list(alone), [row['seconds_per_step'] for row in alone.values()], 1)
    sums = {row['sum_bytes']: row['seconds'] for row in rows if 'sum_bytes' in row}
    hop, loopback = min(sums.items())[1] / 2, max(sums) / max(sums.items())[1]
    travels = 2 * (n_workers - 1) / n_workers * volume * (1 / loopback + 1 / wire)
    return max(fixed, 0) + image * batch / n_workers + 2 * (n_workers - 1) * hop + travels


def best(rows, gigabits):
    """Return the number of workers, up to MOST, at which a step is shortest in the model, and the gain over one."""
    counts = np.arange(1, MOST + 1)
    seconds = model(rows, counts, gigabits * 1e9 / 8)
    fastest = int(seconds.argmin())
    return int(counts[fastest]), seconds[0] / seconds[fastest]


def tables(rows):
    """Return {name of a table in docs/scale.md: its lines in Markdown}."""
    measured, modelled = [], []
    for network, found in by_network(rows).items():
        both, one = (next(iter(steps(found, 1, is_one).values())) for is_one in (False, True))
        shard, across = of_two(found, 'shard'), of_two(found, 'global')
        speeds = [row['images_per_second'] for row in (both, one, shard, across)]
        measured.append((network, f'{both["parameters"]:,}', f'{shard["bytes"]:,}',
                         *(f'{speed:,.0f}' for speed in speeds), f'{speeds[2] / speeds[1]:.2f}'))
        modelled.append((network, *('{} ({:.1f})'.format(*best(found, wire)) for wire in WIRES)))
    return {'measured': table(('images/s', 'parameters', 'bytes per step', 'one worker, two cores',
                               'one worker, one core', 'two workers, one core each', 'the same, global',
                               'gain over one core'), measured),
            'modelled': table(('workers at which a step is shortest (gain over one)',
                               *(f'{wire} Gbit/s' for wire in WIRES)), modelled)}


def draw(file):
    """Draw the gain of N workers over one in the model, a line per bandwidth, and the gain of two as measured."""
    networks = by_network(json.loads(file.read_text())['rows'])
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    counts = np.arange(1, MOST + 1)
    grid = figure.subplots(1, len(networks), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (network, rows) in zip(grid, networks.items(), strict=True):
        for index, wire in enumerate(WIRES):
            seconds = model(rows, counts, wire * 1e9 / 8)
            axes.plot(counts, seconds[0] / seconds, f'C{index}', label=f'{wire} Gbit/s (model)')
        axes.plot(counts[:8], counts[:8], ':', color='grey', linewidth=1, label='as many times as workers')
        one = next(iter(steps(rows, 1, True).values()))
        axes.plot(2, of_two(rows, 'shard')['images_per_second'] / one['images_per_second'], 'ko', markersize=5,
                  label='two processes on this machine (measured)')
        axes.set_title(network, fontsize=9)
        axes.set(xlabel='workers', xscale='log')
        axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ['1', '2', '4', '8', '16', '32', '64'], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    grid[0].set_ylabel('speed, over one worker')
    figure.legend(*grid[0].get_legend_handles_labels(), fontsize=8, loc='outside lower center', ncols=3)
    figure.suptitle('Training with a global batch of 200 on several machines like this one', fontsize=10)
    return figure
