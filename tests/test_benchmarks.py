"""Each benchmark on one small network: they run, and say of which kind of processor a row is."""
import json
import runpy
import subprocess
import sys

from conftest import ROOT

from twta import processor

BENCHMARKS = ROOT / 'benchmarks'


def run(tmp_path, benchmark, *flags):
    """Return the rows that the benchmark writes."""
    file = tmp_path / 'rows.json'
    command = [sys.executable, BENCHMARKS / f'{benchmark}.py', *flags, '--json', file]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return json.loads(file.read_text())['rows']


def test_training_speed(tmp_path):
    rows = run(tmp_path, 'training_speed', 'FP_5_5_MNIST', '--repetitions', 1)
    assert [row['way'] for row in rows] == ['project', 'project float32', 'published']
    for row in rows:
        assert row['network'] == 'FP_5_5_MNIST' and row['processor'] == processor.kind()
        assert row['training_images_per_second'] > 1 and row['inference_images_per_second'] > 1


def test_inference_speed(tmp_path):
    rows = run(tmp_path, 'inference_speed', 'TWTA_5_5_MNIST', '--repetitions', 1)
    assert {'packed', 'TensorFlow'} <= {row['engine'] for row in rows}
    assert {row['batch'] for row in rows} == {1, 200}
    for row in rows:
        assert row['network'] == 'TWTA_5_5_MNIST' and row['processor'] == processor.kind()
        assert row['agrees'] == 1 or 'int8' in row['engine']


def test_choices(tmp_path, monkeypatch, capfd):
    choices = runpy.run_path(str(BENCHMARKS / 'choices.py'))
    variants = {'average': ('--pooling', 'average')}
    study = {'tiny': ('MNIST/TWTA_5_5_MNIST.py', ('--dataset', 'digits'), 1, (0,), variants)}
    main = choices['main']
    monkeypatch.setitem(main.__globals__, 'STUDIES', study)
    monkeypatch.setattr(sys, 'argv', ['choices.py', '--runs', str(tmp_path), '--json', str(tmp_path / 'rows.json')])
    main()
    row, = json.loads((tmp_path / 'rows.json').read_text())
    assert (row['script'], row['variant'], row['epochs']) == ('TWTA_5_5_MNIST', 'average', 1)
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
