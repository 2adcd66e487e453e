"""The command line: --help and mistakes answer without TensorFlow, in one line, with exit code 2, nothing on disk."""
import math

import pytest
from conftest import ROOT, SCRIPTS, run_script

from twta import UsageError, command_line

SCRIPT = ROOT / 'MNIST' / 'TWTA_4_4_MNIST.py'
DEFAULTS = command_line.protocol(1e-4, 150, 200)


def parse(*flags):
    return command_line.parse(SCRIPT, 'description', ('mnist', 'digits'), DEFAULTS, list(flags))


def test_defaults_do_not_depend_on_the_folder(monkeypatch, tmp_path):
    for folder in (ROOT, ROOT / 'MNIST', tmp_path):
        monkeypatch.chdir(folder)
        args = parse()
        assert (args.mode, args.resume, args.precision, args.gpu) == ('training', False, 'auto', 0)
        assert args.data_dir == ROOT / 'data' and args.run_dir == ROOT / 'runs' / 'TWTA_4_4_MNIST-mnist'
    assert parse('--run_dir', 'here').run_dir == tmp_path / 'here'


@pytest.mark.parametrize('text, value', [('True', True), ('yes', True), ('1', True), ('False', False), ('no', False),
                                         ('0', False), ('TRUE', True)])
def test_resume_is_read_by_a_parser(text, value):
    assert command_line.truth(text) is value


@pytest.mark.parametrize('flags, words', [
    (['--mode', 'trainin'], ['--mode', "'trainin'", 'training', 'inference']),
    (['--mode'], ['--mode', 'expected one argument']),
    (['--resume', 'maybe'], ['--resume', "'maybe'", 'True', 'False']),
    (['--resume', '__import__("os")'], ['--resume', 'True']),
    (['--learning_rate', '-1'], ['--learning_rate', "'-1'", 'above 0']),
    (['--learning_rate', '0'], ['--learning_rate', "'0'", 'above 0']),
    (['--learning_rate', 'nan'], ['--learning_rate', "'nan'", 'above 0']),
    (['--learning_rate', 'inf'], ['--learning_rate', "'inf'", 'above 0']),
    (['--learning_rate', 'fast'], ['--learning_rate', "'fast'", 'above 0']),
    (['--epochs', '0'], ['--epochs', "'0'", 'from 1']),
    (['--epochs', '1.5'], ['--epochs', "'1.5'", 'whole number']),
    (['--epochs', '9' * 30], ['--epochs', 'to 2147483647']),
    (['--batch_size', '-3'], ['--batch_size', "'-3'", 'from 1']),
    (['--batch_size', ''], ['--batch_size', "''"]),
    (['--seed', '-1'], ['--seed', "'-1'", 'from 0']),
    (['--gpu', 'a'], ['--gpu', "'a'", 'from 0']),
    (['--dataset', 'cifar10'], ['--dataset', "'cifar10'", 'mnist', 'digits']),
    (['--schedule', 'step'], ['--schedule', "'step'", 'constant', 'cosine']),
    (['--validation', '-1'], ['--validation', "'-1'", 'from 0']),
    (['--validation', '10%'], ['--validation', "'10%'", 'whole number']),
    (['--mode', 'inference', '--schedule', 'cosine'], ['--schedule cosine', '--mode inference']),
    (['--mode', 'inference', '--validation', '0'], ['--validation 0', '--mode inference']),
    (['--precision', 'float16'], ['--precision', "'float16'", 'bfloat16']),
    (['--learning', '1'], ['--learning']),
    (['extra'], ['extra']),
    (['--mode', 'inference', '--resume', 'False'], ['--resume False', '--mode inference']),
    (['--mode', 'inference', '--epochs', '3'], ['--epochs 3', '--mode inference']),
    (['--weights', '/absent.npz'], ['--weights', '/absent.npz', 'model.npz']),
    (['--resume', 'True', '--weights', __file__], ['--weights', '--resume True']),
    (['--checkpoint', 'best'], ['--checkpoint best', '--mode inference']),
    (['--run_dir', ''], ['--run_dir', "''"]),
    (['--data_dir', __file__], ['--data_dir', __file__, 'not a directory']),
    (['--run_dir', __file__], ['--run_dir', __file__, 'not a directory']),
    (['--resume', 'True', '--run_dir', '/absent/run'], ['/absent/run', '--resume False --mode training']),
])
def test_a_mistake_is_one_line_with_the_flag_the_value_and_what_is_valid(flags, words):
    with pytest.raises(UsageError) as error:
        parse(*flags)
    assert '\n' not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_learning_rates():
    assert command_line.positive_number('1e-5') == 1e-5 and math.isclose(command_line.positive_number('.01'), 0.01)


def test_inference_without_a_checkpoint_says_where_and_how(tmp_path):
    finished = run_script(SCRIPT, '--mode', 'inference', '--dataset', 'digits', '--run_dir', tmp_path / 'none')
    assert finished.returncode == 2 and finished.stdout == ''
    assert finished.stderr.count('\n') == 1 and str(tmp_path / 'none') in finished.stderr
    command = finished.stderr.split('make one with: ')[1]
    assert command.startswith(f'python {SCRIPT.relative_to(ROOT)} --resume False --mode training --dataset digits')
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_without_tensorflow(name, tmp_path):
    (tmp_path / 'tensorflow.py').write_text('raise SystemExit("TensorFlow was imported")')
    for flag, code in (('--help', 0), ('--no_such_flag', 2)):
        finished = run_script(SCRIPTS[name], flag, cwd=tmp_path, PYTHONPATH=str(tmp_path))
        assert finished.returncode == code
    finished = run_script(SCRIPTS[name], '--help', PYTHONPATH=str(tmp_path))
    for flag in ('--resume', '--learning_rate', '--mode', '--epochs', '--batch_size', '--seed', '--gpu', '--dataset',
                 '--data_dir', '--run_dir', '--schedule', '--validation', '--precision', '--verbose', name):
        assert flag in finished.stdout
