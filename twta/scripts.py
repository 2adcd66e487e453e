"""The scripts: which there are, and a script as a module for code that needs its network and not its command."""
import importlib.util
from pathlib import Path

from twta import UsageError

ROOT = Path(__file__).resolve().parent.parent
NEEDED = 'model(x, is_train)', 'DATASETS', 'LEARNING_RATE', 'EPOCHS', 'BATCH_SIZE'  # what a script defines


def find_scripts(*kinds):
    """Return {name: path} of the scripts that train a network, MNIST first; with kinds, whose names begin with one."""
    return {path.stem: path for folder in ('MNIST', 'CIFAR10') for path in sorted((ROOT / folder).glob('*.py'))
            if path.stem.startswith(kinds or '') and not path.stem.startswith('Spiking')}


def load_script(path):
    """Return the script as a new module, which sys.modules does not hold; its command does not run."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_network(path):
    """Return a script that trains a network, of this repository or of a user, as a module.

    Raises UsageError if it cannot be imported, or lacks one of NEEDED.
    """
    try:
        module = load_script(path)
    except Exception as error:  # any kind: it is the code of a user
        raise UsageError(f'{path}: cannot be imported ({type(error).__name__}: {error})') from error
    for name in NEEDED:
        if not hasattr(module, name.partition('(')[0]):
            raise UsageError(f'{path}: has no {name}; add it, or choose a script that trains a network')
    return module
