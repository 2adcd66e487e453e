"""Each script builds what its architecture string says; siblings differ in docstring, constants and model() only."""
import ast
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, chosen, image_shape, load_script, start


def size_comments(name):
    """Return the size that each layer's line in a script gives in its comment, from the first layer to the logits."""
    comments = re.findall(r'^ +(?:return )?net\.\w+\([^#\n]*(?:# ([0-9 *]+))?.*$', SCRIPTS[name].read_text(), re.M)
    return [[int(side) for side in comment.split('*')] if comment else None for comment in comments]


def recorded_parameters(name, script):
    """Return the numbers of parameters in the records of a script with its default options: at most one number."""
    records = [json.loads(path.read_text()) for path in (ROOT / 'results').glob(f'{name}-*.json')]
    return {record['parameters'] for record in records if chosen(script, **record['choices']) == chosen(script)}


@pytest.mark.parametrize('name', SCRIPTS)
def test_sizes_in_comments_and_parameters_in_records(session, name):
    from twta.graph.tf1 import ONEDNN, tf
    from twta.training.blocks import read_blocks

    script = load_script(name)
    for is_train in (True, False):
        with tf.variable_scope(tf.get_variable_scope(), reuse=not is_train):
            net = script.model(tf.zeros([2, *image_shape(name)]), is_train, **chosen(script))
        assert net.outputs.shape.as_list() == [2, 10]
        assert recorded_parameters(name, script) <= {net.count_params()}
        layers = [layer for layer, *_ in read_blocks(net)]
        assert size_comments(name) == [layer.outputs.shape.as_list()[1:] for layer in layers]
    operations = [op.type for op in tf.get_default_graph().get_operations()]
    products = operations.count('Conv2D') + operations.count('BatchMatMulV2')
    if ONEDNN:  # one per layer, however many groups it has; without oneDNN one per group: see twta.graph.fast
        assert products == 2 * sum(hasattr(layer, 'groups') for layer in layers)
    trained = [variable for variable in net.all_params if '/moving_' not in variable.name]
    assert tf.trainable_variables() == trained


@pytest.mark.parametrize('name', SCRIPTS)
def test_the_architecture_string_says_what_is_built(session, name):
    from twta.graph.tf1 import tf
    from twta.training.blocks import read_blocks

    script = load_script(name)
    net = script.model(tf.zeros([2, *image_shape(name)]), True, **chosen(script))
    built, channels = [], None
    for layer, _, _ in read_blocks(net):
        *kernel, n_in, n_out = layer.all_params[-1].shape.as_list()
        if not kernel:
            token = str(n_out)
        elif 'pool' in layer.name:
            token = f'{"" if n_out == channels else f"{n_out} "}{kernel[0]}P{layer.stride}'
        else:
            token = f'{n_out}{"N" if kernel == [1, 1] else "C"}{kernel[0]}' + ('s2' if layer.stride == 2 else '')
        groups = 1 if channels is None or not kernel else channels // n_in
        built.append(token if groups == 1 else f'{token}/{groups}')
        channels = n_out
    string = re.search(r'Architecture: *(.+)\n', script.__doc__).group(1)
    assert '-'.join(built) == string + '-10'  # ten classes


@pytest.mark.parametrize('name', SCRIPTS)
def test_scripts_quantize_all_but_the_first_and_the_last_layer(session, name):
    from twta.graph.tf1 import tf
    from twta.training.blocks import read_blocks

    script = load_script(name)
    net = script.model(tf.zeros([2, *image_shape(name)]), True, **chosen(script))
    weights = [layer.quantized for layer, _, _ in read_blocks(net)]
    session.run(tf.global_variables_initializer())
    levels = [len(np.unique(value)) for value in session.run(weights)]
    real = 2 if 'Model2' in name else 1  # a stem and the encoder
    assert min(*levels[:real], levels[-1]) > 3
    expected = {'TW': {3}, 'Qu': {3}, 'BW': {2}}.get(name[:2])
    assert set(levels[real:-1]) == expected if expected else min(levels) > 3


def test_siblings_differ_in_docstring_constants_and_model_only():
    skeletons = set()
    for name in SCRIPTS:
        tree = ast.parse(SCRIPTS[name].read_text())
        assert isinstance(tree.body[0].value.value, str), 'the docstring comes first'
        rest = []
        for node in tree.body[1:]:
            if isinstance(node, ast.Assign):
                rest.append(node.targets[0].id)
            elif isinstance(node, ast.FunctionDef):
                rest.append(node.name)
            else:
                rest.append(ast.unparse(node))
        skeletons.add('\n'.join(rest))
    assert len(skeletons) == 1


@pytest.mark.parametrize('name', SCRIPTS)
def test_the_docstring_names_the_script_and_its_commands(name):
    doc = load_script(name).__doc__
    assert doc.startswith(f'{name}: ')
    assert doc.count(f'python {SCRIPTS[name].relative_to(ROOT)} --resume') == 3
    for label in ('Architecture:', 'Source:', 'Accuracy:', 'Speed:'):
        assert label in doc


@pytest.mark.parametrize('kernel', [2, 3, 5])
def test_another_kernel_size_takes_the_three_lines_of_the_readme(tmp_path, kernel, capsys):
    text = SCRIPTS['TWTA_4_4_MNIST'].read_text()
    for line in ('net.encode(32, {})', 'net.conv(64, {})', "net.conv(64, {}, padding='VALID')"):
        assert text.count(line.format(4)) == 1
        assert kernel != 3 or line.format(3) in (ROOT / 'README.md').read_text()
        text = text.replace(line.format(4), line.format(kernel))
    script = tmp_path / 'MNIST' / f'TWTA_{kernel}_{kernel}_again.py'
    script.parent.mkdir()
    script.write_text(text)
    start(tmp_path / 'run', '--epochs', 1, script=script)
    assert 'test acc' in capsys.readouterr().out
    start(tmp_path / 'run', '--mode', 'export', '--file', tmp_path / 'network.twta', script=script)
    assert 'checked: the same predictions' in capsys.readouterr().out


def test_importing_a_script_has_no_side_effect():
    code = (f'import sys; from twta.scripts import load_script; '
            f'[load_script(path) for path in {list(map(str, SCRIPTS.values()))}]; '
            'assert not {"tensorflow", "numpy", "tensorlayer"} & set(sys.modules)')
    finished = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, '', '')


def test_only_tensorlayer_sees_the_alias():
    code = ('import sys; from twta.graph.tf1 import tf, tl; import tensorflow; '
            'assert tensorflow.__version__.startswith("2.") and tensorflow is not tf; '
            'assert tl.__version__ == "1.8.4" and not tf.executing_eagerly()')
    finished = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, '', '')


def imports(path):
    """Return the modules of twta that a module imports, at its top or inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'twta':
            names = {f'{node.module}.{alias.name}' for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return found - {'twta'}


MODULES = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path
           for path in sorted((ROOT / 'twta').rglob('*.py')) if path.stem != '__init__'}
RANKS = {rank: parts.split() for rank, parts in enumerate((
    'files terminal processor scripts workers', 'options results data graph', 'quantizers', 'ternary_layers packed',
    'training', 'export', 'command_line', 'spikes sweep', 'report'))}


def test_imports_run_downward():
    """No part imports from a part of a higher rank; within a rank, see test_imports_run_in_no_circle."""
    rank = {part: rank for rank, parts in RANKS.items() for part in parts}
    assert {name.split('.')[1] for name in MODULES} == rank.keys()
    upward = {(name, needed) for name, path in MODULES.items() for needed in imports(path)
              if rank[needed.split('.')[1]] > rank[name.split('.')[1]]}
    assert not upward


def test_packages_import_nothing():
    for path in (ROOT / 'twta').glob('*/__init__.py'):
        assert len(ast.parse(path.read_text()).body) == 1, path  # the docstring


def test_imports_run_in_no_circle():
    rest = {name: imports(path) for name, path in MODULES.items()}
    while free := {name for name, needed in rest.items() if not needed & rest.keys()}:
        rest = {name: needed for name, needed in rest.items() if name not in free}
    assert not rest, f'in a circle, or importing from one: {sorted(rest)}'


def test_packed_networks_run_without_tensorflow():
    reached, ahead = set(), {name for name in MODULES if name.startswith('twta.packed.')}
    while ahead:
        reached |= ahead
        ahead = {name for module in ahead for name in imports(MODULES[module])} - reached
    library = re.compile(r'(import|from) (tensorflow|tensorlayer)\b')
    users = {name for name, path in MODULES.items() if library.search(path.read_text())}
    assert users == {'twta.graph.tf1'} and 'twta.graph.tf1' not in reached
