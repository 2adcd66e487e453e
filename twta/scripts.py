"""Scripts as modules, for code that needs the network of a script and not its command."""
import importlib.util
from pathlib import Path


def load_script(path):
    """Return the script as a new module, which sys.modules does not hold; its command does not run."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
