"""The picture of how the cost of packed inference grows, from benchmarks/growth.json."""
import json

import numpy as np
from matplotlib.figure import Figure

TITLES = {'width': 'filters of every layer', 'depth': 'layers after the encoder', 'batch': 'images per call'}


def draw(file):
    """Draw microseconds per image against width, depth and batch, a line per number of threads."""
    rows = json.loads(file.read_text())['rows']
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    for axes, (what, title) in zip(figure.subplots(1, 3), TITLES.items(), strict=True):
        for threads in sorted({row['threads'] for row in rows}):
            points = [(row[what], 1e6 * row['seconds'], row['products']) for row in rows
                      if row['grows'] == what and row['threads'] == threads]
            x, microseconds, products = np.array(points).T
            axes.plot(x, microseconds, 'o-', markersize=4, label=f'{threads} thread{"s" * (threads > 1)}')
            if what != 'batch' and threads == 1:
                axes.plot(x, products * microseconds[-1] / products[-1], ':', color='grey',
                          label='in proportion to products')
        axes.set(xlabel=title, xscale='log', yscale='log')
        axes.set_xticks(x, [f'{value:,.0f}' for value in x], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel('µs per image')
    figure.axes[0].legend(fontsize=8)
    kind = rows[0]['processor']
    figure.suptitle(f'Packed inference, {kind}: 3 * 3 convolutions on 24 * 24; 64 filters, 4 layers, '
                    '200 images if not on the axis', fontsize=10)
    return figure
