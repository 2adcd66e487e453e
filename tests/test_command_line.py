"""The command line: --help needs no TensorFlow; a mistake gives one line, exit code 2 and no file."""
import math
import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, run_script

from twta import UsageError, command_line, options, terminal

SCRIPT = ROOT / 'MNIST' / 'TWTA_4_4_MNIST.py'
NPZ = str(ROOT / 'results' / 'TWTA_4_4_MNIST-mnist-0-constant150.npz')
DEFAULTS = command_line.protocol(1e-4, 150, 200)


def parse(*flags):
    return command_line.parse(SCRIPT, 'description', ('mnist', 'digits'), DEFAULTS, tuple(options.OPTIONS),
                              list(flags))


def test_defaults_do_not_depend_on_the_folder(monkeypatch, tmp_path):
    for folder in (ROOT, ROOT / 'MNIST', tmp_path):
        monkeypatch.chdir(folder)
        args = parse()
        assert (args.mode, args.resume, args.precision, args.gpu) == ('training', False, 'auto', 0)
        assert args.data_dir == ROOT / 'data' and args.run_dir == ROOT / 'runs' / 'TWTA_4_4_MNIST-mnist'
    assert parse('--run_dir', 'here').run_dir == tmp_path / 'here'


@pytest.mark.parametrize('text, value', [('True', True), ('yes', True), ('1', True), ('False', False), ('no', False),
                                         ('0', False), ('TRUE', True), ('auto', 'auto')])
def test_resume_is_read_by_a_parser(text, value):
    assert terminal.truth_or_auto(text) == value


LONG = 'x' * 5000
BAD_VALUES = {
    '--mode': ['trainin', 'TRAINING', 'test', '', '1'],
    '--resume': ['maybe', '2', '', 'None', '-1', '__import__("os")', 'True False'],
    '--learning_rate': ['-1', '0', '-0.0', 'nan', 'inf', '-inf', 'fast', '', '0,1', '0x1', '1e400', '1e-400', '[1]'],
    '--epochs': ['0', '-1', '1.5', 'abc', '', '1e3', '9' * 30, '2147483648', '+5', ' 5', '٣', '1_000', 'None'],
    '--batch_size': ['0', '-3', '2.0', 'all', '', '9' * 30, '²'],
    '--schedule': ['step', 'COSINE', 'cos', '', '0.1'],
    '--augmentation': ['none', 'Geometric', '', 'flip'],
    '--protocol': ['ours', 'SHORT', '', '30'],
    '--seed': ['-1', '1.5', 'x', '', '2147483648', 'nan'],
    '--gpu': ['-1', 'a', '0,1', '', 'cpu', '1.0'],
    '--dataset': ['cifar10', 'MNIST', 'mnist ', '', '/etc/passwd'],
    '--validation': ['-1', '10%', '0.1', '', '9' * 30],
    '--precision': ['float16', 'bf16', '32', '', 'FLOAT32'],
    '--checkpoint': ['first', 'BEST', '', '3'],
    '--threshold': ['0.5', 'Fixed', 'learned', '', 'none'],
    '--threshold_value': ['0', '1', '-0.5', '1.5', 'nan', 'half', '', '0,5', 'inf'],
    '--pooling': ['avg', 'MAX', '2', '', 'none'],
    '--levels': ['1', '4', '2.0', 'two', ''],
    '--beta_init': ['-2.1', '2.1', 'nan', 'inf', '-0,5', 'x', ''],
    '--k': ['-1', '4', '1.5', 'x', ''],
    '--B': ['0', '9', '1.0', '-1', ''],
    '--run_dir': ['', ' ', LONG, __file__, f'{os.path.realpath(sys.executable)}/x'],
    '--data_dir': ['', ' ', LONG, __file__],
    '--weights': ['', ' ', LONG, '/absent.npz', '/', 'model .npz'],
    '--workers': ['', 'a', 'a:0', 'a:1,', 'a:1,a:1', 'a:1 b:1', LONG],
    '--task': ['-1', 'x', '', '1.0'],
    '--batch_norm': ['local', 'GLOBAL', ''],
    '--patience': ['0', '-1', '1.5', 'inf', ''],
}
VALID = {
    '--mode': 'training', '--resume': 'True', '--learning_rate': 'a number above 0', '--epochs': 'from 1 to 2147483647',
    '--batch_size': 'from 1 to 2147483647', '--schedule': 'cosine', '--augmentation': 'geometric',
    '--protocol': 'short', '--seed': 'from 0 to 2147483647',
    '--gpu': 'from 0 to 2147483647', '--dataset': 'digits', '--validation': 'from 0 to 2147483647',
    '--threshold': 'trainable', '--threshold_value': 'from 0.01 to 0.99', '--pooling': 'average',
    '--levels': 'from 2 to 3', '--beta_init': 'from -2 to 2', '--k': 'from 0 to 3', '--B': 'from 1 to 8',
    '--workers': 'HOST:PORT', '--task': 'from 0 to', '--batch_norm': 'global', '--patience': 'from 1 to 2147483647',
    '--precision': 'bfloat16', '--checkpoint': 'best', '--run_dir': '', '--data_dir': '', '--weights': '',
}


def mistake(*flags):
    """Return the error message for these flags: one line."""
    with pytest.raises(UsageError) as error:
        parse(*flags)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('flag, value', [(flag, value) for flag, values in BAD_VALUES.items() for value in values])
def test_a_bad_value_is_answered_with_the_flag_the_value_and_what_is_valid(flag, value):
    line = mistake(f'{flag}={value}')
    assert flag in line and value[:80] in line and any(words in line for words in VALID[flag].split('|'))


@pytest.mark.parametrize('flag', BAD_VALUES)
def test_a_flag_without_its_value(flag):
    line = mistake(flag)
    assert flag in line and 'expected one argument' in line


@pytest.mark.parametrize('flags, words', [
    (['--learning', '1'], ['--learning']),
    (['--lr', '1'], ['--lr']),
    (['--Resume', 'True'], ['--Resume']),
    (['-e', '3'], ['-e']),
    (['extra'], ['extra']),
    (['--verbose=1'], ['--verbose', "'1'"]),
    (['--debug=yes'], ['--debug', "'yes'"]),
    (['--deterministic=yes'], ['--deterministic', "'yes'"]),
    (['--mode', 'inference', '--deterministic'], ['--deterministic', '--mode inference']),
    (['--mode', 'export', '--deterministic'], ['--deterministic', '--mode export']),
    (['--mode', 'inference', '--precision', 'float32'], ['--precision float32', '--mode inference']),
    (['--mode', 'export', '--weights', __file__, '--format', 'npz', '--file', 'model.npz'], ['model.npz', 'weights']),
    (['--mode', 'export', '--weights', NPZ, '--format', 'npz', '--file', NPZ], [f'--file {NPZ}', '--weights']),
    (['--mode', 'inference', '--resume', 'False'], ['--resume False', '--mode inference']),
    (['--mode', 'inference', '--epochs', '3'], ['--epochs 3', '--mode inference']),
    (['--mode', 'inference', '--learning_rate', '0.1'], ['--learning_rate 0.1', '--mode inference']),
    (['--mode', 'inference', '--batch_size', '9'], ['--batch_size 9', '--mode inference']),
    (['--mode', 'inference', '--workers', 'a:1,b:1'], ['--workers a:1,b:1', '--mode inference']),
    (['--mode', 'inference', '--seed', '0'], ['--seed 0', '--mode inference']),
    (['--mode', 'inference', '--schedule', 'cosine'], ['--schedule cosine', '--mode inference']),
    (['--mode', 'inference', '--validation', '0'], ['--validation 0', '--mode inference']),
    (['--mode', 'inference', '--checkpoint', 'best', '--weights', __file__], ['--checkpoint best', '--weights']),
    (['--resume', 'True', '--weights', __file__], ['--weights', '--resume True']),
    (['--levels', '3', '--pooling', 'max'], ['--levels 3', '--pooling max', 'average or conv']),
    (['--rest', '-1', '--pooling', 'max'], ['--rest -1', '--pooling max', 'average']),
    (['--rest', '1'], ['--rest', '1']),
    (['--beta_init', '-0.5', '--quantize', 'nothing'], ['--beta_init -0.5', '--quantize nothing', 'leave one out']),
    (['--workers', 'a:1,b:1'], ['--workers and --task', 'give both']),
    (['--workers', 'a:1,b:1', '--task', '2'], ['--task 2', 'valid are 0 to 1']),
    (['--k', '2', '--B', '3'], ['--k 2 --B 3', '12 steps', 'up to 8']),
    (['--B', '8'], ['--k 1 --B 8', '16 steps', 'up to 8']),
    (['--B', '8', '--resume', 'auto'], ['--k 1 --B 8', '16 steps']),
    (['--B', '8', '--resume', 'True', '--run_dir', '/absent/run'], ['no checkpoint in /absent/run']),  # k is the run's
    (['--batch_norm', 'global'], ['--batch_norm global', 'without several --workers']),
    (['--batch_norm', 'global', '--workers', 'a:1', '--task', '0'], ['--batch_norm global', 'without several']),
    (['--patience', '7'], ['--patience 7', 'without several --workers']),
    (['--mode', 'inference', '--engine', 'packed', '--gpu', '1'], ['--gpu 1', '--engine packed']),
    (['--mode', 'inference', '--engine', 'packed', '--verbose'], ['--verbose', '--engine packed']),
    (['--weights', NPZ, '--run_dir', str(Path(NPZ).parent), '--resume', 'auto'], [f'--weights {NPZ}', '--resume auto']),
    (['--data_dir', f'{__file__}/data'], [f'--data_dir {__file__}/data', f'{__file__} is not a directory']),
    (['--mode', 'inference', '--engine', 'packed', '--pooling', 'max'], ['--pooling', '--engine packed']),
    (['--checkpoint', 'best'], ['--checkpoint best', '--mode inference']),
    (['--resume', 'True', '--run_dir', '/absent/run'], ['/absent/run', '--resume False --mode training']),
])
def test_flags_that_are_unknown_or_contradict_each_other(flags, words):
    line = mistake(*flags)
    for word in words:
        assert word in line


@pytest.mark.parametrize('flag', ['--run_dir', '--data_dir', '--weights', '--file'])
def test_a_path_that_is_not_utf8(flag):
    line = mistake(f'{flag}=/tmp/x\udcff')  # as Python decodes an invalid byte in the command line
    assert flag in line and '/tmp/x' in line and 'not UTF-8' in line and line.isprintable()


def test_help_lines_of_options_give_the_defaults():
    for name, (default, arguments) in options.OPTIONS.items():
        defaults = ('0.5', '0.7') if name == 'threshold_value' else (default,)
        assert all(f'(default: {value}' in arguments['help'] for value in defaults), name


def test_debug_shows_the_traceback():
    finished = run_script(SCRIPT, '--epochs', '0', '--debug')
    assert finished.returncode != 0 and 'Traceback' in finished.stderr and "--epochs: '0'" in finished.stderr


def test_learning_rates():
    assert terminal.positive_number('1e-5') == 1e-5 and math.isclose(terminal.positive_number('.01'), 0.01)


def test_inference_without_a_checkpoint_says_where_and_how(tmp_path):
    finished = run_script(SCRIPT, '--mode', 'inference', '--dataset', 'digits', '--run_dir', tmp_path / 'none')
    assert finished.returncode == 2 and finished.stdout == ''
    assert finished.stderr.count('\n') == 1 and str(tmp_path / 'none') in finished.stderr
    command = finished.stderr.split('make one with: ')[1]
    assert command.startswith(f'python {SCRIPT.relative_to(ROOT)} --resume False --mode training --dataset digits')
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('file, is_named', [('net.twta', True), ('net.bin', False)])
def test_the_command_that_makes_a_packed_file_is_one_that_can(tmp_path, file, is_named):
    finished = run_script(SCRIPT, '--mode', 'inference', '--engine', 'packed', '--file', tmp_path / file)
    assert finished.returncode == 2 and finished.stderr.count('\n') == 1
    assert (f'--mode export --file {tmp_path}' in finished.stderr) == is_named and '--mode export' in finished.stderr


def test_a_package_that_is_not_installed_is_named_in_a_line(capsys):
    with pytest.raises(SystemExit) as stopped, terminal.errors_in_a_line('command'):
        import no_such_package.part  # noqa: F401
    assert stopped.value.code == 1
    assert capsys.readouterr().err == ('command: error: the package no_such_package is not installed: pip install -r '
                                       'requirements.txt\n')
    with pytest.raises(ModuleNotFoundError), terminal.errors_in_a_line('command'):
        import twta.no_such_module  # noqa: F401


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_without_tensorflow(name, tmp_path):
    (tmp_path / 'tensorflow.py').write_text('raise SystemExit("TensorFlow was imported")')
    for flag, code in (('--help', 0), ('--no_such_flag', 2)):
        finished = run_script(SCRIPTS[name], flag, cwd=tmp_path, PYTHONPATH=str(tmp_path))
        assert finished.returncode == code
    finished = run_script(SCRIPTS[name], '--help', PYTHONPATH=str(tmp_path))
    for flag in ('--resume', '--learning_rate', '--mode', '--epochs', '--batch_size', '--seed', '--gpu', '--dataset',
                 '--data_dir', '--run_dir', '--schedule', '--augmentation', '--protocol', '--validation', '--precision',
                 '--deterministic', '--verbose', name):
        assert flag in finished.stdout
