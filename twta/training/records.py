"""record.json: everything that a finished run is judged by, in one file; and the name of a run."""
from pathlib import Path

from twta.options import OPTIONS, with_defaults
from twta.results import accuracy, write_json
from twta.training.state import FIELDS

SIGNS = 'negative', 'positive'
PLACES = 'data_dir', 'run_dir', 'file'  # flags that name a place on the machine, which is nobody else's


def write_record(run_dir, config, state, parameters, loss, confusion, best):
    """Write record.json, from which twta.report makes tables and pictures. It holds no path of the machine.

    config, state      config.json and state of the run
    parameters         their number
    loss, confusion    on the test images after the last epoch
    best               of the epoch that is best on validation: see experiment.evaluate_best
    """
    columns = {field: [row[field] for row in state.history] for field in FIELDS}
    write_json(run_dir / 'record.json', {
        'name': name_run(state), 'dataset': state.dataset, 'choices': state.options,
        'parameters': parameters, 'epochs': state.epoch, 'wall_seconds': sum(columns['seconds']),
        'last': {'epoch': state.epoch, 'validation_accuracy': columns['validation_accuracy'][-1],
                 'test_accuracy': accuracy(confusion), 'test_loss': loss},
        'best_validation': best, 'confusion': confusion.tolist(), **without_places(config),
        'precision': ' and '.join(state.precision) or config['precision'], 'devices': state.devices,
        'code': ' and '.join(state.code) or config['code'],
        'curve': columns, 'shares': by_sign(state.history)})


def without_places(config):
    """Return config.json, or a record, without the command and every path but the name of the weights."""
    flags = {name: value for name, value in config['flags'].items() if name not in PLACES}
    flags['weights'] = Path(flags['weights']).name if flags['weights'] else None
    if isinstance(flags.get('teacher'), dict):  # in a record it is the SHA-256 already
        flags['teacher'] = flags['teacher']['sha256']
    data = {name: value for name, value in config['data'].items() if name != 'folder'}
    return {**{name: value for name, value in config.items() if name != 'command'}, 'flags': flags, 'data': data}


def by_sign(history):
    """Return the shares of the history as columns: by kind, layer and sign, a list with a number per epoch."""
    rows = [row['shares'] for row in history if 'shares' in row]  # epochs of older versions have none
    return {kind: {layer: {sign: [row[kind][layer][i] for row in rows] for i, sign in enumerate(SIGNS)}
                   for layer in layers} for kind, layers in (rows[0] if rows else {}).items()}


def name_run(state):
    """Return SCRIPT-DATASET-SEED-PROTOCOL and the options that are not default, e.g. TWTA_4_4_MNIST-mnist-0-short30.

    PROTOCOL has '-begun' if the run began with --weights, '-taught' if it had a teacher.
    """
    stages = '+'.join(f'{name_schedule(stage.schedule, stage.augmentation)}{stage.epochs}' for stage in state.stages)
    begun, taught = '-begun' if state.weights else '', '-taught' if state.teacher else ''
    return f'{state.script}-{state.dataset}-{state.seed}-{stages}{begun}{taught}{name_options(state.options)}'


def name_options(options):
    """Return the options of a network that are not the default, as the end of a file name, e.g. -rest_-1."""
    return ''.join(f'-{option.replace(" ", "_")}' for option in list_options(options))


def name_schedule(schedule, augmentation):
    """Return constant, cosine, short (cosine with geometric augmentation), constant-geometric, cosine-cutout, ..."""
    if augmentation == 'published':
        return schedule
    return 'short' if (schedule, augmentation) == ('cosine', 'geometric') else f'{schedule}-{augmentation}'


def list_options(options):
    """Return the options of a network that are not the default, or that this version does not know, as words."""
    known = {name: value for name, value in options.items() if name in OPTIONS}
    return [f'{name} {value}' for name, value in options.items()
            if name not in known or value != with_defaults({**known, name: None})[name]]
