import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / 'MNIST').glob('*.py'))


def load_script(name):
    """A script as a module, from its path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'MNIST' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(script, *flags, cwd=ROOT, **environment):
    """Runs a script as a user does; returns the finished process with its stdout and stderr."""
    return subprocess.run([sys.executable, str(script), *map(str, flags)], cwd=cwd, env={**os.environ, **environment},
                          capture_output=True, text=True, timeout=300)


@pytest.fixture
def session():
    """A session on a fresh graph, which is the default one."""
    from twta.tf1 import tf

    with tf.Graph().as_default(), tf.Session() as session:
        yield session
