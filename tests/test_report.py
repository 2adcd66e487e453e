"""README.md, docstrings, pictures and PDF say what the records say; records say what the trained networks do."""
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, start
from PIL import Image

from twta import TwtaError, UsageError, packed_file, pictures, report

SHARED = ROOT.parent / 'shared' / 'datasets'
RECORDS = report.load_records()


# ----------------------------------------------------------------------------------------------------------------------
# Nothing is stale


def test_the_readme_has_the_tables_of_the_records():
    text = report.README.read_text()
    assert report.fill(text, report.tables(RECORDS)) == text, 'run make report'


def test_docstrings_have_the_figures_of_the_records():
    for file, text in report.docstrings(RECORDS).items():
        assert file.read_text() == text, f'{file}: run make report'


def test_another_record_makes_another_table():
    changed = json.loads(json.dumps(RECORDS))
    changed[0]['last']['test_accuracy'] += 0.0001
    text = report.README.read_text()
    assert report.fill(text, report.tables(changed)) != text


@pytest.mark.parametrize('name', pictures.sources(RECORDS))
def test_pictures_are_of_the_records(name):
    with Image.open(pictures.FOLDER / f'{name}.png') as image:
        assert image.info['Source'] == pictures.fingerprint(pictures.sources(RECORDS)[name][1]), 'run make report'


def test_every_picture_of_the_readme_is_there_and_opaque():
    names = re.findall(r'!\[[^]]+\]\(([^)]+)\)', report.README.read_text())
    assert names
    for name in names:
        assert (ROOT / name).stat().st_size < 200_000
        with Image.open(ROOT / name) as image:
            assert image.convert('RGBA').getextrema()[3] == (255, 255)


def test_the_pdf_is_of_this_readme():
    spec = importlib.util.spec_from_file_location('make_pdf', ROOT / 'PDF' / 'make.py')
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    pdf = (ROOT / 'PDF' / 'README.pdf').read_bytes()
    assert make.fingerprint().encode() in pdf, 'run make pdf'


def test_links_of_the_pages_lead_to_files():
    for page in ('README.md', 'docs/tutorial.md', 'docs/deployment.md', 'results/README.md'):
        for link in re.findall(r'\]\((?!http|#)([^)#]+)', (ROOT / page).read_text()):
            assert ((ROOT / page).parent / link).exists(), f'{page}: {link}'


# ----------------------------------------------------------------------------------------------------------------------
# Records and networks


@pytest.mark.parametrize('record', RECORDS, ids=lambda record: record['name'])
def test_records_are_whole(record):
    assert (report.RESULTS / f'{record["name"]}.json').is_file()
    confusion = np.array(record['confusion'])
    assert confusion.sum() == 10000 and confusion.trace() / 10000 == record['last']['test_accuracy']
    assert record['curve']['epoch'] == list(range(1, record['epochs'] + 1))
    assert record['last']['validation_accuracy'] == record['curve']['validation_accuracy'][-1]
    assert {'flags', 'stages', 'seed', 'versions', 'code', 'machine', 'wall_seconds'} <= record.keys()
    assert 'dirty' not in record['code']
    best, validation = record['best_validation'], record['curve']['validation_accuracy']
    if best:
        assert best['validation_accuracy'] == max(validation) == validation[best['epoch'] - 1]
    assert record['data']['published'] is (record['dataset'] == 'mnist') and len(record['data']['sha256']) == 64


@pytest.mark.parametrize('file', sorted(report.PRETRAINED.glob('*.twta')), ids=lambda file: file.stem)
def test_a_pretrained_network_has_its_record(file):
    network = packed_file.read(file)
    record = json.loads((report.RESULTS / f'{network.record["run"]}.json').read_text())
    assert (record['script'], record['epochs']) == (file.stem, network.record['epoch'])
    assert record['packed']['bytes'] == file.stat().st_size


@pytest.mark.skipif(not (SHARED / 'mnist').exists(), reason=f'needs the real MNIST in {SHARED}')
def test_networks_give_their_figures_again(tmp_path, monkeypatch, capsys):
    """Those of MNIST; make reproduce-table does all of them."""
    subprocess.run([sys.executable, SHARED / 'prepare.py', tmp_path], check=True, capture_output=True)
    (tmp_path / 'networks').mkdir()
    files = list(report.PRETRAINED.glob('*_MNIST.twta'))
    for file in files:
        shutil.copy(file, tmp_path / 'networks')
    monkeypatch.setattr(report, 'PRETRAINED', tmp_path / 'networks')
    report.reproduce(tmp_path)
    assert capsys.readouterr().out.count('the same') == len(files) > 0


@pytest.fixture
def repository(finished_run, tmp_path, monkeypatch):
    """Empty folders in place of results/ and pretrained/, and the packed network of the finished run on the digits."""
    for name in ('RESULTS', 'PRETRAINED'):
        monkeypatch.setattr(report, name, tmp_path / name)
        (tmp_path / name).mkdir()
    start(finished_run, '--mode', 'export', '--file', tmp_path / 'TWTA_5_5_MNIST.twta')
    return tmp_path


def test_a_run_is_added_and_reproduced(repository, finished_run, capsys):
    report.add(finished_run, repository / 'TWTA_5_5_MNIST.twta', repository)
    path, = (repository / 'RESULTS').glob('*.json')
    record = json.loads(path.read_text())
    assert path.stem == record['name'] == 'TWTA_5_5_MNIST-digits-0-constant4'
    assert record['packed']['images'] == 300 and (
        record['packed']['multiply_adds'] < record['packed']['additions'] < record['packed']['float_multiply_adds'])
    report.reproduce(repository)
    assert 'the same' in capsys.readouterr().out
    record['last']['test_accuracy'] += 0.01
    path.write_text(json.dumps(record))
    with pytest.raises(TwtaError, match='TWTA_5_5_MNIST: not the recorded accuracy'):
        report.reproduce(repository)
    record['data']['sha256'] = 'of other images'
    path.write_text(json.dumps(record))
    report.reproduce(repository)
    assert 'on other images' in capsys.readouterr().out


def test_what_cannot_be_added_is_refused(repository, finished_run, tmp_path):
    with pytest.raises(UsageError, match=r'no record\.json there'):
        report.add(tmp_path, None, tmp_path)
    shutil.copytree(finished_run, tmp_path / 'other')
    record = json.loads((finished_run / 'record.json').read_text())
    (tmp_path / 'other' / 'record.json').write_text(json.dumps({**record, 'name': 'TWTA_5_5_MNIST-digits-1-constant4'}))
    with pytest.raises(UsageError, match='of the run TWTA_5_5_MNIST-digits-0-constant4, epoch 4, not of'):
        report.add(tmp_path / 'other', repository / 'TWTA_5_5_MNIST.twta', tmp_path)
    assert not list((repository / 'RESULTS').iterdir()) and not list((repository / 'PRETRAINED').iterdir())
    with pytest.raises(SystemExit) as error:
        report.main(['--packed', 'x.twta'])
    assert error.value.code == 2


def test_a_table_without_a_place_is_refused():
    with pytest.raises(TwtaError, match=r'README\.md has places for the tables'):
        report.fill('<!-- table other -->\n<!-- end -->', {'mnist': []})


def test_the_record_of_a_run(finished_run):
    """Its columns are those of log.csv, its best epoch that of the curve, its shares one an epoch and layer."""
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


def test_every_command_of_the_tutorial_runs(tmp_path):
    """In a copy of the scripts, so that nothing is left in runs/."""
    shutil.copytree(ROOT / 'MNIST', tmp_path / 'MNIST')
    blocks = re.findall(r'```\n(.*?)```', (ROOT / 'docs' / 'tutorial.md').read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if not line.startswith('. ')]
    assert len(commands) == 9
    for command in commands:
        assert command.startswith('python ')
        finished = subprocess.run(command.replace('python', sys.executable, 1), shell=True, cwd=tmp_path, text=True,
                                  capture_output=True, timeout=300)
        assert finished.returncode == 0, f'{command}\n{finished.stderr}'
