"""Records say what the trained networks do; tables say what the records say. Pages: tests/documents.py."""
import errno
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, start

from twta import TwtaError, UsageError, scripts
from twta.packed import file_format
from twta.report import __main__, evidence, markdown, pictures, tables
from twta.training.records import name_options

SHARED = ROOT.parent / 'shared' / 'datasets'
RECORDS = evidence.load_records()


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def a_record(seed, accuracy, **changes):
    """Return the parts of a record that the tables read: TWTA_4_4_MNIST, short protocol."""
    stage = {'schedule': 'cosine', 'augmentation': 'geometric', 'learning_rate': 0.002, 'batch_size': 200, 'epochs': 30}
    return {'script': 'TWTA_4_4_MNIST', 'dataset': 'mnist', 'seed': seed, 'epochs': 30, 'choices': {},
            'stages': [{**stage, **changes}], 'wall_seconds': 60 * (seed + 1), 'precision': 'bfloat16',
            'last': {'validation_accuracy': accuracy - 0.001, 'test_accuracy': accuracy}, 'best_validation': None,
            'data': {'validation_images': 10000, 'published': True}, 'flags': {'weights': None},
            'curve': {'training_accuracy': [accuracy]}, 'machine': {'kind': 'AVX-512 with BF16'}}


def test_runs_that_differ_in_their_seed_alone_share_a_row():
    records = [a_record(0, 0.99), a_record(1, 0.992), a_record(2, 0.994), a_record(3, 0.9, batch_size=50),
               {**a_record(0, 0.8, augmentation='published'), 'machine': {'kind': 'AVX2'}},
               {**a_record(5, 0.7, epochs=3), 'gpu': 'NVIDIA H100'},
               {**a_record(6, 0.6, epochs=4), 'devices': ['AVX-512 with BF16, 2 threads']},
               {**a_record(7, 0.5, epochs=5), 'devices': ['AVX-512 with BF16, 1 thread', 'NVIDIA H100']}]
    taught = [{**a_record(seed, 0.9), 'flags': {'weights': None, 'teacher': str(seed)}} for seed in (0, 1)]
    assert len(list(evidence.by_protocol(taught))) == 2  # each has its own
    *rows, empty, absent = tables.accuracies(records, 'TWTA_[45].*MNIST')
    assert rows[2:] == [
        '| TWTA_4_4_MNIST | short 0.002 | 30 | 0, 1, 2 | 99.10 ± 0.20 | **99.20 ± 0.20** |  | 99.38 % | 2 min |',
        '| TWTA_4_4_MNIST | short 0.002, batches of 50 | 30 | 3 | 89.90 | **90.00** |  | 99.38 % | 4 min |',
        '| TWTA_4_4_MNIST | cosine 0.002 | 30 | 0 | 79.90 | **80.00** |  | 99.38 % | 1 min, on AVX2 |',
        '| TWTA_4_4_MNIST | short 0.002 | 3 | 5 | 69.90 | **70.00** |  | 99.38 % | 6 min, on NVIDIA H100 |',
        '| TWTA_4_4_MNIST | short 0.002 | 4 | 6 | 59.90 | **60.00** |  | 99.38 % | 7 min |',
        '| TWTA_4_4_MNIST | short 0.002 | 5 | 7 | 49.90 | **50.00** |  | 99.38 % | 8 min, '
        'on AVX-512 with BF16, 1 thread and NVIDIA H100 |']
    assert (empty, absent) == ('', 'Not run: TWTA_5_5_MNIST (published: 99.32 %).')


@pytest.mark.parametrize('rate, word', [(1.0, '1'), (10.0, '10'), (0.005, '0.005'), (1e-9, '0.000000001')])
def test_learning_rates_in_words(rate, word):
    assert evidence.schedule(a_record(0, 0.9, learning_rate=rate)['stages'][0]) == f'short {word}'


def test_full_precision_is_of_any_script_with_the_architecture():
    full = {'choices': {'quantize': 'nothing'}, 'script': 'TWBA_CIFAR10_Model2'}
    records = [{**a_record(0, accuracy), **words, 'dataset': 'cifar10'} for accuracy, words in (
        (0.7, {'script': 'BWBA_CIFAR10_Model2'}), (0.8, full), (0.9, {'script': 'FP_3_3_CIFAR10_VGG13'}))]
    rows = {line.split(' | ')[0].strip('| '): line.split(' | ')[2:] for line in tables.distances(records)}
    assert rows['BWBA_CIFAR10_Model2'][0].startswith('70.00 (') and rows['BWBA_CIFAR10_Model2'][1].startswith('80.00 (')
    assert rows['TWBA_CIFAR10_Model2'] == ['not run', rows['BWBA_CIFAR10_Model2'][1]]
    assert rows['Quant_CIFAR10'][1].startswith('90.00 (') and rows['Quant_CIFAR10'][0] == 'not run'
    assert rows['TWTA_3_3_CIFAR10_Group_V2'] == ['not run', 'not run |']


def test_other_choices_precision_validation_and_weights_are_words():
    record = a_record(0, 0.99)
    record.update(choices={'pooling': 'max'}, precision='float32', flags={'weights': 'model.npz'},
                  data={'validation_images': 0, 'published': False})
    assert evidence.protocol(record) == ('short 0.002, pooling max, validation 0, NOT the published files, float32, '
                                         'from other weights')
    record['flags'] = {'weights': None, 'workers': 4, 'batch_norm': 'shard'}
    assert evidence.protocol(record).endswith(', float32, 4 workers, batch_norm shard')


def test_choices_are_means_over_seeds_whatever_their_order():
    rows = [{'script': 'A', 'variant': variant, 'epochs': 6, 'seed': seed, 'validation_accuracy': 0.9 + seed / 100,
             'test_accuracy': 0.8} for seed in (0, 1) for variant in ('one', 'two')]
    assert list(tables.ablations(rows))[2:] == ['| A | one | 6 | 0, 1 | 90.50 ± 0.71 | 80.00 ± 0.00 |',
                                              '| A | two | 6 | 0, 1 | 90.50 ± 0.71 | 80.00 ± 0.00 |']


def test_the_protocol_that_stands_for_a_script():
    """Validation images choose it, else training images; the accuracy on the test images chooses nothing."""
    def runs(validation, training, epochs, n, rate=0.002):
        found = []
        for seed in range(n):
            run = a_record(seed, 1 - (validation or training), epochs=epochs)  # the best is worst on the test images
            run.update(epochs=epochs, last={**run['last'], 'validation_accuracy': validation},
                       stages=[{**run['stages'][0], 'learning_rate': rate}], curve={'training_accuracy': [training]})
            found.append(run)
        return found

    def chosen(*groups):
        return tables.best_trained([run for group in groups for run in group], 'TWTA_4_4_MNIST')

    best, other, without = runs(0.9, 0.9, 30, 1), runs(0.8, 0.99, 60, 2), runs(None, 0.999, 150, 1)
    assert chosen(other, best, without) == best
    fitted, long, several = runs(None, 0.9, 30, 1), runs(None, 0.8, 150, 1), runs(None, 0.8, 150, 2, rate=0.5)
    assert chosen(long, fitted, several) == fitted
    assert chosen(runs(None, 0.8, 30, 3), long) == long
    assert chosen(long, several) == several
    assert tables.best_trained(long, 'TWTA_5_5_MNIST') == []
    teacher = [{**run, 'choices': {'quantize': 'nothing'}} for run in runs(0.95, 0.95, 30, 1)]
    assert chosen(teacher, best) == best


@pytest.mark.parametrize('dataset', evidence.TITLES)
def test_every_curve_is_told_from_the_others_by_colour_and_style(dataset):
    figure = pictures.draw_curves('', [record for record in RECORDS if record['dataset'] == dataset])
    seen = [(line.get_color(), str(line._dash_pattern)) for line in figure.axes[0].lines]
    assert len(seen) == len(set(seen)) > 3


def test_docstrings_and_the_first_table_say_that_images_are_recompressed():
    record = {**a_record(0, 0.8), 'script': 'TWTA_4_4_CIFAR10_VGG13', 'dataset': 'cifar10', 'parameters': 7,
              'data': {'validation_images': 0, 'published': False}}
    text = tables.docstrings([record])[scripts.find_scripts()[record['script']]]
    assert 'Accuracy:     80.00 % test on JPEG-recompressed images (30 epochs, 1 seed; published 90.1 %)\nSp' in text
    *_, row = tables.scripts([record])
    assert row.endswith('| 7 | 80.00 (30 epochs, JPEG) | 90.1 |')


def test_the_example_of_deployment_runs(monkeypatch):
    example, = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'deployment.md').read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT / 'pretrained')
    names = {'images': np.zeros((3, 28, 28, 1), np.uint8)}
    exec(example, names)
    assert names['classes'].shape == (3,)


def test_published_figures_are_of_scripts():
    assert tables.PUBLISHED.keys() <= scripts.find_scripts().keys()


# ----------------------------------------------------------------------------------------------------------------------
# Records and networks


@pytest.mark.parametrize('record', RECORDS, ids=lambda record: record['name'])
def test_records_are_whole(record):
    assert (evidence.RESULTS / f'{record["name"]}.json').is_file()
    confusion = np.array(record['confusion'])
    assert confusion.sum() == 10000 and confusion.trace() / 10000 == record['last']['test_accuracy']
    assert record['curve']['epoch'] == list(range(1, record['epochs'] + 1))
    assert record['last']['validation_accuracy'] == record['curve']['validation_accuracy'][-1]
    assert {'flags', 'stages', 'seed', 'versions', 'code', 'machine', 'wall_seconds'} <= record.keys()
    assert 'dirty' not in record['code']
    best, validation = record['best_validation'], record['curve']['validation_accuracy']
    if best:
        assert best['validation_accuracy'] == max(validation) == validation[best['epoch'] - 1]
    assert (record['data']['published'] or record['dataset'] == 'cifar10') and len(record['data']['sha256']) == 64


@pytest.mark.parametrize('file', sorted(evidence.PRETRAINED.glob('*.twta')), ids=lambda file: file.stem)
def test_a_pretrained_network_has_its_record(file):
    network = file_format.read(file)
    record = json.loads((evidence.RESULTS / f'{network.record["run"]}.json').read_text())
    assert (record['script'] + name_options(record['choices'])) == file.stem
    assert (record['script'], record['epochs']) == (network.network, network.record['epoch'])
    assert record['packed']['bytes'] == file.stat().st_size


@pytest.mark.parametrize('file', sorted((evidence.RESULTS / 'spikes').glob('*.json')), ids=lambda file: file.stem)
def test_spikes_are_of_a_run_that_has_its_record(file):
    spikes = json.loads(file.read_text())
    record = json.loads((evidence.RESULTS / f'{spikes["record"]["run"]}.json').read_text())
    assert spikes['images'] == 10000 and spikes['accuracy_without_noise'] == record['last']['test_accuracy']


@pytest.mark.skipif(not (SHARED / 'mnist').exists(), reason=f'needs the real MNIST in {SHARED}')
def test_networks_give_their_figures_again(tmp_path, monkeypatch, capsys):
    """The networks of MNIST; make reproduce-table evaluates all."""
    subprocess.run([sys.executable, SHARED / 'prepare.py', tmp_path], check=True, capture_output=True)
    (tmp_path / 'networks').mkdir()
    files = list(evidence.PRETRAINED.glob('*_MNIST.twta'))
    for file in files:
        shutil.copy(file, tmp_path / 'networks')
    monkeypatch.setattr(evidence, 'PRETRAINED', tmp_path / 'networks')
    evidence.reproduce(tmp_path)
    assert f'{len(files)} networks: {len(files)} the same, 0 not' in capsys.readouterr().out


@pytest.fixture
def repository(finished_run, tmp_path, monkeypatch):
    """Replace results/ and pretrained/ by empty folders; export the finished run on the digits."""
    for name in ('RESULTS', 'PRETRAINED'):
        monkeypatch.setattr(evidence, name, tmp_path / name)
        (tmp_path / name).mkdir()
    monkeypatch.setitem(evidence.TITLES, 'digits', 'digits')
    start(finished_run, '--mode', 'export', '--file', tmp_path / 'TWTA_5_5_MNIST.twta')
    return tmp_path


def test_a_run_is_added_and_reproduced(repository, finished_run, capsys):
    evidence.add(finished_run, repository / 'TWTA_5_5_MNIST.twta', repository)
    path, = (repository / 'RESULTS').glob('*.json')
    record = json.loads(path.read_text())
    assert path.stem == record['name'] == 'TWTA_5_5_MNIST-digits-0-constant4'
    assert record['packed']['images'] == 300
    assert f'{evidence.PRETRAINED / "TWTA_5_5_MNIST.twta"}\n' in capsys.readouterr().out
    assert record['packed']['multiply_adds'] < record['packed']['additions'] < record['packed']['float_multiply_adds']
    evidence.add(finished_run, repository / 'TWTA_5_5_MNIST.twta', repository)
    assert f'TWTA_5_5_MNIST.twta, in place of that of {record["name"]}' in capsys.readouterr().out
    evidence.add(finished_run, None, repository)  # once more, without the network: what it costs stays
    assert json.loads(path.read_text()) == record
    evidence.reproduce(repository)
    assert '1 networks: 1 the same, 0 not compared, 0 DIFFERENT' in capsys.readouterr().out
    record['data']['sha256'] = 'of other images'
    path.write_text(json.dumps(record))
    with pytest.raises(TwtaError, match='nothing was compared'):
        evidence.reproduce(repository)
    assert 'not compared: the record is of other images' in capsys.readouterr().out
    expected = json.loads((finished_run / 'record.json').read_text())
    for changes, why in (({'last': {**expected['last'], 'test_accuracy': 0.5}}, ''),
                         ({'confusion': np.transpose(expected['confusion']).tolist()}, ': other images recognised')):
        path.write_text(json.dumps({**expected, **changes}))
        with pytest.raises(TwtaError, match='not the recorded predictions'):
            evidence.reproduce(repository)
        assert f'DIFFERENT{why}\n' in capsys.readouterr().out
    (repository / 'PRETRAINED' / 'TWTA_5_5_MNIST.twta').unlink()
    with pytest.raises(TwtaError, match='nothing was compared'):
        evidence.reproduce(repository)


def test_no_network_is_taken_without_its_record(repository, finished_run, monkeypatch):
    def full(path, record):
        raise OSError(errno.ENOSPC, 'No space left on device', str(path))

    monkeypatch.setattr(evidence, 'write_json', full)
    with pytest.raises(OSError, match='No space left'):
        evidence.add(finished_run, repository / 'TWTA_5_5_MNIST.twta', repository)
    assert not list((repository / 'RESULTS').iterdir()) and not list((repository / 'PRETRAINED').iterdir())


def test_what_cannot_be_added_is_refused(repository, finished_run, tmp_path, monkeypatch):
    with pytest.raises(TwtaError, match='not a record of a finished run'):
        evidence.add(tmp_path, None, tmp_path)
    other = tmp_path / 'other'
    shutil.copytree(finished_run, other)
    record = json.loads((finished_run / 'record.json').read_text())
    impossible = [json.dumps({**record, key: {**record[key], 'test_accuracy': 1.5}})
                  for key in ('last', 'best_validation')]
    for content in ('[]', '3', '{', '{"name": "x"}', *impossible):
        (other / 'record.json').write_text(content)
        with pytest.raises(TwtaError, match='not a record of a finished run'):
            evidence.add(other, None, tmp_path)
    (other / 'record.json').write_text(json.dumps({**record, 'name': 'TWTA_5_5_MNIST-digits-1-constant4'}))
    with pytest.raises(UsageError, match='of the run TWTA_5_5_MNIST-digits-0-constant4, epoch 4, not of'):
        evidence.add(other, repository / 'TWTA_5_5_MNIST.twta', tmp_path)
    for key in 'name', 'script':
        (other / 'record.json').write_text(json.dumps({**record, key: '../escaped'}))
        with pytest.raises(UsageError, match='is no file name'):
            evidence.add(other, None, tmp_path)
    (other / 'record.json').write_text(json.dumps({**record, 'script': 'TWTA_4_4_MNIST'}))
    with pytest.raises(UsageError, match='of TWTA_5_5_MNIST on digits, not of TWTA_4_4_MNIST on digits'):
        evidence.add(other, repository / 'TWTA_5_5_MNIST.twta', tmp_path)
    confusion = np.roll(record['confusion'], 1, 0).tolist()
    (other / 'record.json').write_text(json.dumps({**record, 'confusion': confusion}))
    with pytest.raises(UsageError, match='does not predict the test images as'):
        evidence.add(other, repository / 'TWTA_5_5_MNIST.twta', tmp_path)
    (other / 'record.json').write_text(json.dumps({**record, 'data': {**record['data'], 'sha256': 'of others'}}))
    with pytest.raises(UsageError, match='not the images of'):
        evidence.add(other, repository / 'TWTA_5_5_MNIST.twta', tmp_path)
    assert not list((repository / 'RESULTS').iterdir()) and not list((repository / 'PRETRAINED').iterdir())
    evidence.add(finished_run, None, tmp_path)
    curve = {**record['curve'], 'loss': [0] * record['epochs']}
    (other / 'record.json').write_text(json.dumps({**record, 'curve': curve}))
    with pytest.raises(UsageError, match=r'holds another run of that name, .*; move that file elsewhere first'):
        evidence.add(other, None, tmp_path)
    monkeypatch.delitem(evidence.TITLES, 'digits')
    with pytest.raises(UsageError, match='a run on digits, valid are mnist, cifar10'):
        evidence.add(finished_run, None, tmp_path)


@pytest.mark.parametrize('flags', [['--packed', 'x.twta'], ['--add', '.', '--reproduce'], ['--bogus'], ['--add', '']])
def test_bad_flags_get_one_line(flags, capsys):
    with pytest.raises(SystemExit) as error:
        __main__.main(flags)
    assert error.value.code == 2 and capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('text', [
    '<!-- table other -->\n<!-- end -->', '', '<!-- table mnist -->\n',
    '<!-- table mnist -->\n<!-- table mnist -->\n<!-- end -->',
    '<!-- table mnist -->\n<!-- table other -->\n<!-- end -->'])
def test_a_table_without_a_place_and_a_place_without_an_end_are_refused(text, tmp_path):
    page = tmp_path / 'README.md'
    page.write_text(text)
    with pytest.raises(TwtaError, match=r'README\.md has places for the tables'):
        markdown.fill(page, {'mnist': []})


def test_the_record_of_a_run(finished_run):
    """It has the columns of log.csv, the best epoch of the curve, one fraction per epoch and layer."""
    record = json.loads((finished_run / 'record.json').read_text())
    assert record['best_validation']['validation_accuracy'] == max(record['curve']['validation_accuracy'])
    assert list(record['shares']['weights']) == ['pool2', 'conv3', 'pool4', 'dense5']
    assert list(record['shares']['activations']) == ['conv1', *record['shares']['weights']]
    with np.load(finished_run / 'model.npz') as file:
        w = file['conv3/W:0']
    d = 0.7 * np.abs(w).mean()
    shares = record['shares']['weights']['conv3']
    assert abs(shares['negative'][-1] - np.mean(w <= -d)) < 1e-4 and len(shares['positive']) == record['epochs']


# ----------------------------------------------------------------------------------------------------------------------
# The tutorial


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(tmp_path):
    """In a copy of the scripts, so that nothing is left in runs/."""
    shutil.copytree(ROOT / 'MNIST', tmp_path / 'MNIST')
    shutil.copytree(ROOT / 'docs', tmp_path / 'docs')
    blocks = re.findall(r'```\n(.*?)```', (ROOT / 'docs' / 'tutorial.md').read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if not line.startswith('. ')]
    assert [command.split()[0] for command in commands] == ['python'] * 9 + ['cc', 'runs/tutorial/reference']
    for command in commands if shutil.which('cc') else commands[:9]:
        command = command.replace('python ', f'{sys.executable} ', 1) if command.startswith('python ') else command
        finished = subprocess.run(command, shell=True, cwd=tmp_path, text=True, capture_output=True, timeout=300)
        assert finished.returncode == 0, f'{command}\n{finished.stderr}'


# ----------------------------------------------------------------------------------------------------------------------
# A new script


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='copies the files that git tracks')
def test_a_new_script_needs_what_the_readme_says(tmp_path):
    """The example of the README, in a copy of the repository: trained, reported, tested."""
    tracked = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split('\0')):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    steps = tables.README.read_text().partition('## Add an architecture')[2]
    path, = re.findall(r'as `(MNIST/\w+\.py)`', steps)
    assert '`make report`' in steps and '`make test`' in steps
    example = re.search(r'```python\n(.*?)```', steps, re.DOTALL)[1]
    script = tmp_path / path
    assert not script.exists()
    script.write_text(example)

    def run(*command):
        finished = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True,
                                  env={**os.environ, 'PYTHONPATH': str(tmp_path)}, timeout=900)
        assert finished.returncode == 0, f'{command}\n{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}'
        return finished.stdout

    assert 'test acc' in run(script, '--dataset', 'digits', '--epochs', 1)
    run('-m', 'twta.report', '--data_dir', tmp_path / 'data')  # make report
    assert f'`{path}` | 32C3-' in (tmp_path / 'results' / 'README.md').read_text()
    before = {file: file.read_bytes() for file in tmp_path.rglob('*') if file.suffix in ('.md', '.py')}
    run('-m', 'twta.report', '--data_dir', tmp_path / 'data')
    assert before == {file: file.read_bytes() for file in before}, 'twice is not once'
    tests = tmp_path / 'tests'
    assert ' passed' in run('-m', 'pytest', tests / 'test_scripts.py', '-k', f'{script.stem} or siblings')
    for file in tests / 'test_report.py', tests / 'documents.py':
        assert ' passed' in run('-m', 'pytest', file)
