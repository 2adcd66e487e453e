"""The output files of the commands: result.json with versions and machine, CSV tables, pictures."""
import contextlib
import csv
import errno
import functools
import json
import logging
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from twta import describe_fault, processor
from twta.files import make_folder, replacing
from twta.terminal import say

PACKAGES = 'tensorflow', 'tensorflow-cpu', 'tensorlayer', 'numpy', 'numba'


def say_accuracy(loss, confusion):
    """Print mean cross-entropy and accuracy on the test images."""
    say(f'test loss: {loss:.4f}')
    say(f'test acc: {accuracy(confusion):.4f}')


def save(run_dir, dataset, loss, confusion, kind, network):
    """Write result.json and confusion.png into run_dir.

    loss, confusion    mean cross-entropy, and confusion matrix [true class, predicted class]
    kind               'last', 'best', 'weights' or 'packed'; but for 'last', the files are result-KIND.json, ...
    network            of the network: script, choices (its options), weights (as words, or a path), epoch or None,
                       and part_steps of the next epoch, if it has any
    """
    test_accuracy = accuracy(confusion)
    suffix = '' if kind == 'last' else f'-{kind}'
    picture = run_dir / f'confusion{suffix}.png'
    epoch = network['epoch']
    title = (f'{network["script"]} on {dataset.title}\n{test_accuracy:.2%} of {len(dataset.test.labels):,} test images'
             + ', ' + (Path(network['weights']).name if epoch is None else f'after epoch {epoch}')
             + (f' and {network["part_steps"]} steps' if 'part_steps' in network else ''))
    with if_permitted():
        make_folder(run_dir)
        write_json(run_dir / f'result{suffix}.json', {
            **network, 'test_loss': loss, 'test_accuracy': test_accuracy, 'test_images': len(dataset.test.labels),
            'confusion': confusion.tolist(), 'data': describe_data(dataset), **environment()})
        if save_picture(picture, draw_confusion, title, dataset.classes, confusion):
            say(f'confusion matrix: {picture}')


@contextlib.contextmanager
def if_permitted():
    """Write results that have been printed; if that is not permitted, say so and go on.

    The run of a colleague may be evaluated by anybody.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        say(f'not saved: {describe_fault(error)}')


def describe_data(dataset):
    return {'name': dataset.name, 'origin': dataset.origin, 'folder': dataset.folder, 'published': dataset.published,
            'sha256': dataset.sha256, 'training_images': len(dataset.train.labels),
            'validation_images': len(dataset.validation.labels)}


def confusion_matrix(labels, predicted, n_classes):
    """Return the confusion matrix [true class, predicted class]; importing scikit-learn for it would take a second."""
    pairs = labels.astype(np.int64) * n_classes + predicted
    return np.bincount(pairs, minlength=n_classes ** 2).reshape(n_classes, n_classes)


def accuracy(confusion):
    return float(np.trace(confusion) / np.sum(confusion))


def write_json(path, record):
    """Write a record as JSON, with each list of numbers in a line."""
    text = json.dumps(record, indent=2, default=str)
    strings_and_lists = r'"(?:[^"\\]|\\.)*"|\[[^][{}"]+\]'
    text = re.sub(strings_and_lists, lambda found: found[0] if found[0][0] == '"' else ' '.join(found[0].split()), text)
    with replacing(path) as part:
        part.write_text(text + '\n')


def read_object(path):
    """Return a JSON file as a dictionary, empty if the file is absent or no object: a run can do without it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def environment():
    """Return versions, code and machine, for config.json and result.json."""
    return {
        'versions': {'python': platform.python_version(), **dict(installed(PACKAGES))},
        'code': code_version(),
        'machine': {'processor': processor.name(), 'kind': processor.kind(), 'cores': processor.available_cores(),
                    'system': platform.platform()},
        'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
    }


@functools.cache
def code_version():
    """Return the version of the code as git describes it when it is first asked, or 'unknown'."""
    root = Path(__file__).resolve().parent.parent
    try:
        return subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=root, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def installed(packages):
    """Yield name and version of each installed package, importing none."""
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            yield package, version(package)


def write_csv(path, fields, rows):
    with replacing(path) as part, open(part, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def draw_confusion(title, classes, confusion):
    """Return a figure of the confusion matrix [true class, predicted class], with the accuracy of each class."""
    from matplotlib.figure import Figure  # here: only some commands draw

    fractions = confusion / confusion.sum(axis=1, keepdims=True).clip(1)
    figure = Figure(figsize=(8, 7), layout='constrained')
    axes = figure.subplots()
    axes.imshow(fractions, cmap='Blues', vmin=0, vmax=1)
    for (true, predicted), fraction in np.ndenumerate(fractions):
        axes.text(predicted, true, confusion[true, predicted], ha='center', va='center', fontsize=9,
                  color='white' if fraction > 0.5 else 'black')
    axes.set(xlabel='predicted class', ylabel='true class, with its accuracy')
    figure.suptitle(title)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha='right')
    axes.set_yticks(range(len(classes)), [f'{name}  {fraction:.1%}' for name, fraction in
                                          zip(classes, fractions.diagonal(), strict=True)])
    return figure


def save_picture(path, draw, *arguments, tell=say):
    """Write the figure that draw(*arguments) returns as PNG; return False if that failed, which `tell` then says.

    Pictures are optional: if matplotlib is absent, broken or misconfigured, one line names the cause and the command
    goes on. Text is drawn literally: names may hold characters that LaTeX and mathtext would interpret.
    """
    try:
        import matplotlib  # here: only some commands draw

        logging.getLogger('matplotlib').setLevel(logging.ERROR)  # a thousand lines about a font that is absent
        with matplotlib.rc_context({'text.usetex': False, 'text.parse_math': False}), replacing(path) as part:
            figure = draw(*arguments)
            label_plainly(figure)
            figure.savefig(part, format='png', dpi=120)
        return True
    except Exception as error:  # any kind: matplotlib's settings can run foreign code
        tell(f'no picture {path}: {describe_fault(error)[:200]}')
        return False


def label_plainly(figure):
    """Label logarithmic axes 0.01, 0.1, 1, ...: matplotlib's own labels are mathtext, which is not interpreted here."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == 'log':
                axis.set_major_formatter('{x:g}')
                axis.set_minor_formatter('')
