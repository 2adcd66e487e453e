"""record.json: everything that a finished run is judged by, in one file; and the name of a run."""
from twta.options import with_defaults
from twta.results import accuracy, write_json
from twta.training.state import FIELDS

SIGNS = 'negative', 'positive'


def write_record(run_dir, config, state, parameters, loss, confusion, best):
    """record.json: all that a finished run is judged by, in one file; twta.report reads it.

    config, state    the run's config.json and checkpointed state
    loss, confusion  on the test images after the last epoch
    best             of the epoch that is best on validation: see experiment.test_best
    """
    history = state['history']
    columns = {field: [row[field] for row in history] for field in FIELDS}
    shares = [row['shares'] for row in history if 'shares' in row]  # absent from epochs of older versions
    shares = {kind: {layer: {sign: [row[kind][layer][i] for row in shares] for i, sign in enumerate(SIGNS)}
                     for layer in layers} for kind, layers in (shares[0] if shares else {}).items()}
    write_json(run_dir / 'record.json', {
        'name': name_run(state), 'dataset': state['dataset'], 'choices': state['choices'],
        'parameters': parameters, 'epochs': state['epoch'], 'wall_seconds': sum(columns['seconds']),
        'last': {'epoch': state['epoch'], 'validation_accuracy': columns['validation_accuracy'][-1],
                 'test_accuracy': accuracy(confusion), 'test_loss': loss},
        'best_validation': best, 'confusion': confusion.tolist(), **config,
        'precision': ' and '.join(state['precision']) or config['precision'],
        'curve': columns, 'shares': shares})


def name_run(state):
    """SCRIPT-DATASET-SEED-PROTOCOL, e.g. TWTA_4_4_MNIST-mnist-0-constant150, and the choices that are not default."""
    stages = '+'.join(f'{name_stage(stage)}{stage["epochs"]}' for stage in state['stages'])
    choices = ''.join(f'-{choice.replace(" ", "_")}' for choice in list_choices(state['choices']))
    return f'{state["script"]}-{state["dataset"]}-{state["seed"]}-{stages}{choices}'


def name_stage(stage):
    """constant, cosine, short for cosine with geometric augmentation, or constant-geometric."""
    if stage['augmentation'] == 'published':
        return stage['schedule']
    return 'short' if stage['schedule'] == 'cosine' else f'{stage["schedule"]}-{stage["augmentation"]}'


def list_choices(choices):
    """Those that are not the default, as words."""
    usual = with_defaults(dict.fromkeys(choices))
    return [f'{name} {value}' for name, value in choices.items() if value != usual[name]]
