"""Each benchmark on one small network: it runs, and its rows name the kind of processor."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT, load_script

from twta import processor
from twta.report import growth, scaling

BENCHMARKS = ROOT / 'benchmarks'


def run(benchmark, *flags):
    """Run a benchmark as a user does; return what it prints."""
    command = [sys.executable, BENCHMARKS / f'{benchmark}.py', *flags]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def rows_of(tmp_path, benchmark, *flags):
    """Return the rows that a benchmark writes."""
    file = tmp_path / 'rows.json'
    run(benchmark, *flags, '--json', file)
    return json.loads(file.read_text())['rows']


def test_training_speed(tmp_path):
    rows = rows_of(tmp_path, 'training_speed', 'FP_5_5_MNIST', '--repetitions', 1)
    assert [row['way'] for row in rows] == ['project', 'project float32', 'published']
    for row in rows:
        assert row['network'] == 'FP_5_5_MNIST' and row['processor'] == processor.kind()
        assert row['training_images_per_second'] > 1 and row['inference_images_per_second'] > 1


def test_inference_speed(tmp_path):
    rows = rows_of(tmp_path, 'inference_speed', 'TWTA_5_5_MNIST', '--repetitions', 1)
    assert {'packed', 'TensorFlow'} <= {row['engine'] for row in rows}
    assert {row['batch'] for row in rows} == {1, 200}
    for row in rows:
        assert row['network'] == 'TWTA_5_5_MNIST' and row['processor'] == processor.kind()
        assert row['agrees'] == 1 or 'int8' in row['engine']


def test_scaling(tmp_path):
    rows = rows_of(tmp_path, 'scaling', 'TWTA_5_5_MNIST', '--repetitions', 1)
    assert [(row['workers'], row['batch_norm'], row['batch']) for row in rows if 'batch' in row][-4:] == [
        (1, '', 100), (1, '', 50), (2, 'shard', 200), (2, 'global', 200)]
    assert all(row['processor'] == processor.kind() and row['network'] == 'TWTA_5_5_MNIST' for row in rows)
    assert set(scaling.tables(rows)) == {'measured', 'modelled'}
    counts = scaling.np.arange(1, 65)
    assert (scaling.model(rows, counts, 1e9) >= scaling.model(rows, counts, 1e10)).all()


def test_growth(tmp_path):
    file = tmp_path / 'rows.json'
    run('growth', '--repetitions', 1, '--most', 32, '--json', file)
    assert {row['grows'] for row in json.loads(file.read_text())['rows']} == {'width', 'depth', 'batch'}
    assert growth.draw(file)


@pytest.mark.parametrize('benchmark, network, part', [('training_speed', 'FP_5_5_MNIST', 'convolution forward'),
                                                      ('inference_speed', 'TWTA_5_5_MNIST', 'classifier')])
def test_profile(benchmark, network, part):
    lines = run(benchmark, '--profile', network, '--repetitions', 1).splitlines()
    assert lines[0].startswith(f'{network}: ') and any(line.startswith(part) for line in lines)
    assert lines[-1].startswith('in all ')


@pytest.mark.parametrize('benchmark', ['training_speed', 'inference_speed'])
@pytest.mark.parametrize('flags, words', [(['LeNet'], 'LeNet: unknown network; valid are '),
                                          (['--all', 'TWTA_5_5_MNIST'], '--all with TWTA_5_5_MNIST'),
                                          (['--all', '--profile', 'TWTA_5_5_MNIST'], '--profile: goes with')])
def test_flags_that_contradict_each_other(benchmark, flags, words):
    finished = subprocess.run([sys.executable, BENCHMARKS / f'{benchmark}.py', *flags], capture_output=True, text=True)
    assert finished.returncode == 2 and words in finished.stderr


def test_choices(tmp_path, capfd):
    choices = load_script(BENCHMARKS / 'choices.py')
    tiny = choices.Study('MNIST/TWTA_5_5_MNIST.py', ('--dataset', 'digits'), epochs=1, seeds=(0,),
                         variants={'average': ('--pooling', 'average')})
    choices.main(['--runs', str(tmp_path), '--json', str(tmp_path / 'rows.json')], {'tiny': tiny})
    row, = json.loads((tmp_path / 'rows.json').read_text())
    assert (row['study'], row['script'], row['variant'], row['epochs']) == ('tiny', 'TWTA_5_5_MNIST', 'average', 1)
    assert row['machine']['kind'] == processor.kind()
    assert 'average' in capfd.readouterr().out


def test_the_yardsticks_have_the_layers_of_the_script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import yardsticks

    assert yardsticks.layers_of('TWTA_4_4_MNIST') == ([
        ('conv', 32, 4, 1, 'SAME', 1, False, True), ('conv', 32, 2, 2, 'VALID', 1, True, True),
        ('conv', 64, 4, 1, 'SAME', 1, True, True), ('conv', 64, 2, 2, 'VALID', 1, True, True),
        ('conv', 64, 4, 1, 'VALID', 1, True, True), ('dense', 512, None, None, None, 1, True, True),
        ('classify', 10, None, None, None, 1, False, True)], True)
    layers, is_ternary = yardsticks.layers_of('FP_5_5_MNIST')
    assert not is_ternary and not any(layer.is_quantized for layer in layers)
    layers, _ = yardsticks.layers_of('TWTA_3_3_CIFAR10_Group_V2')
    assert [layer.groups for layer in layers] == [1, 1, 4, 16, 8, 32, 8, 16, 16, 1, 1]
