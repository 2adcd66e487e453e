"""The weights of a network as arrays: model.npz written and read, and its shapes checked."""
import numpy as np

from twta import TwtaError, files
from twta.files import replacing
from twta.graph.tf1 import tl
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


def quantized(weights, net):
    """Return the parameters that a network begins with if its weights come from its twin in full precision.

    weights    of the twin, by variable name. Its betas began at 0: those of the network are as far from beta_init as
               they are from 0. So with --rest -1, -1 stands for ReLU's 0
    """
    offsets = {block.batch_norm.beta.name: block.batch_norm.beta_init for block in read_blocks(net) if block.batch_norm}
    return {name: value + offsets.get(name, 0) for name, value in weights.items()}


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
