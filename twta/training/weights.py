"""The weights of a network as arrays: model.npz written and read, its shapes and its training checked."""
import numpy as np

from twta import TwtaError, UsageError, files
from twta.files import replacing
from twta.graph.tf1 import tl
from twta.options import OF_ACTIVATIONS, is_fp, is_full_precision, with_defaults
from twta.terminal import say
from twta.training import run_directory
from twta.training.blocks import read_blocks


def save_weights(path, net, session):
    """Write model.npz: every parameter of the network by variable name, in TensorLayer's own form."""
    with replacing(path) as part:
        tl.files.save_npz_dict(net.all_params, str(part), session)


def read_weights(path, net, flag='--weights', scope='', is_twin=False):
    """Return the arrays of a model.npz by the name that their variable has in the network.

    flag       that names the file
    scope      of the network's variables, 'teacher/' for example; the file is without it
    is_twin    whether the file is of the network's twin in full precision, which has no thresholds

    Raises TwtaError if an array is not finite, not float32, or not of the shape that the network has.
    """
    names = [variable.name for variable in net.all_params]
    added = {name: [] for name in names if name.endswith('activation/d:0')} if is_twin else {}

    def check(headers):
        found = {scope + name: list(shape) for name, (shape, _) in headers.items()}
        check_shapes(f'{flag} {path}', net, {**added, **found})
        for name, (_, kind) in headers.items():
            if kind != np.float32:
                raise TwtaError(f'{flag} {path}: {name} is {kind}, weights are float32')

    try:
        weights = files.read_npz(path, check)
    except PermissionError:
        raise
    except files.UNREADABLE:
        raise TwtaError(f'{flag} {path}: not an npz file of weights, or damaged; a training writes model.npz into '
                        'its --run_dir') from None
    wrong = [name for name, value in weights.items() if not is_sound(name, value)]
    if wrong:
        raise TwtaError(f'{flag} {path}: {wrong[0]} holds NaN, infinity or a negative variance')
    return {scope + name: value for name, value in weights.items()}


def first_weights(path, net):
    """Return the parameters of --weights as the network begins with them, by variable name."""
    config = run_directory.read_config(path.parent)
    is_twin = is_full_precision(run_directory.read_options(config))
    weights = read_weights(path, net, is_twin=is_twin)
    # The betas of a twin began at 0. Those of the network are as far from beta_init as the twin's are from 0: with
    # --rest -1, -1 stands for ReLU's 0.
    offsets = {block.batch_norm.beta.name: block.batch_norm.beta_init for block in read_blocks(net) if block.batch_norm}
    if any(offsets.values()) and not config['flags']:
        say(f'WARNING: --weights {path}: no config.json beside it tells how it was trained, so its betas stay as they '
            'are; if it was trained with --quantize nothing, give it in its run directory')
    return {name: value + offsets.get(name, 0) for name, value in weights.items()} if is_twin else weights


def check_weights(weights, script, dataset, options, mode):
    """Raise UsageError if the config.json beside the weights tells of another network; other weights have none there.

    A training may begin with weights of another script or data set, or with those of the network in full precision.
    """
    config = run_directory.read_config(weights.parent)
    trained_by, trained_with = config['script'], run_directory.read_options(config)
    is_twin = is_full_precision(trained_with)
    can_be_the_same = is_twin and ('quantize' in options or is_fp(script))
    if mode != 'training' and trained_by not in ('', script) and not can_be_the_same:
        raise UsageError(f'--weights {weights}: trained by {trained_by[:40]}; use that script')
    other = run_directory.other_dataset(config, dataset)
    if mode != 'training' and other:
        raise UsageError(f'--weights {weights}: trained on --dataset {other}; give that')
    if mode == 'export' and is_twin:
        raise UsageError(f'--weights {weights}: of a network in full precision, which cannot be packed; give others')
    free = ('quantize', *OF_ACTIVATIONS) if mode == 'training' and is_twin else ()
    # a run older than an option has its default
    usual = with_defaults(dict.fromkeys(options)) if trained_by == script and trained_with else options
    for flag, value in options.items():
        before = trained_with.get(flag, usual[flag])
        if flag not in free and before != value:
            raise UsageError(f'--{flag} {value}: the weights in {weights} were trained with --{flag} {before}; give '
                             'that')


def warn_of_validation(sources, dataset):
    """Print a warning if weights have been trained on images that this run, on a Dataset, holds out.

    sources    {flag: path of its weights, or None}
    """
    held_out = len(dataset.validation.labels)
    for flag, path in sources.items():
        data = run_directory.read_config(path.parent).get('data') if path else None
        is_same = isinstance(data, dict) and data.get('name') == dataset.name
        before = data.get('validation_images') if is_same else None
        if isinstance(before, int) and before < held_out:
            say(f'WARNING: {flag} {path} was trained with --validation {before}, this run holds out {held_out} images: '
                'those weights have seen some of them')


def is_sound(name, value):
    """Return whether a parameter can come from a training: finite, and not negative if it is a variance."""
    return np.isfinite(value).all() and not ('moving_variance' in name and (value < 0).any())


def check_shapes(source, net, found):
    """Raise TwtaError if the shapes found in a source, by variable name, are not those of the network."""
    shapes = {variable.name: variable.shape.as_list() for variable in net.all_params}
    for name in sorted(shapes.keys() | found.keys()):
        if found.get(name) != shapes.get(name):
            raise TwtaError(f'{source} is of another network: {name} is {found.get(name, "absent")} there and '
                            f'{shapes.get(name, "absent")} here')


def set_weights(net, weights, session):
    """Set those parameters of the network that weights has, by variable name."""
    for variable in net.all_params:
        if variable.name in weights:
            variable.load(weights[variable.name], session)
