"""Conversion to spikes: neurons against the network, counts against a slow loop, the command and its files."""
import csv
import json
import re
import shutil

import numpy as np
import pytest
from conftest import (
    NETWORKS,
    QUICK,
    ROOT,
    graph_of,
    hostile,
    random_images,
    random_packed,
    run_script,
    sample_of,
    start,
)

from twta import TwtaError, UsageError
from twta.export import folding, spatial
from twta.export import pack as pack_module
from twta.export.pack import make_header, pack
from twta.packed import file_format, numpy_engine
from twta.spikes import command, conversion, simulation
from twta.training import records, run_directory

SCRIPT = ROOT / 'MNIST' / 'Spiking_MNIST.py'
PACKED = ROOT / 'pretrained'


# ----------------------------------------------------------------------------------------------------------------------
# Neurons


@pytest.mark.parametrize('levels', [1, 2, 4, 8])
@pytest.mark.parametrize('kind', [np.int32, np.float32])
def test_store_and_release_fires_once_for_each_threshold(levels, kind):
    rng = np.random.default_rng(levels)
    upper = np.sort(rng.integers(-30, 30, (levels, 40)), axis=0).astype(kind)
    if kind is np.float32:
        upper = np.sort(upper + rng.random(upper.shape).astype(np.float32), axis=0)
        upper[:, 0], upper[:, 1], upper[-1, 2] = np.inf, -np.inf, np.inf
    layer = file_format.Layer('layer', None, upper, None, 1, 'SAME', 1)
    membrane = rng.integers(-40, 40, (50, 3, 3, 40)).astype(np.float32)
    membrane[0] = upper[levels // 2].clip(-99, 99)  # on a threshold
    expected = (membrane[..., np.newaxis, :] >= upper).sum(-2)
    np.testing.assert_array_equal(simulation.store_and_release(membrane, layer), expected)


def saturated(name, value):
    """Return parameters with sums far beyond the fan-in: equal weights, activations at B, thresholds in that range."""
    if '/W' in name:
        return np.full_like(value, 0.02) + np.sign(value) * (0.01 if name.startswith('conv1/') else 0)
    if 'beta' in name:
        return np.full_like(value, 2.0 if name.startswith('conv1/') else 0)
    if 'moving_mean' in name and not name.startswith('conv1/'):
        return np.linspace(0, 800, value.size, dtype=np.float32)
    if 'moving_variance' in name and not name.startswith('conv1/'):
        return np.full_like(value, 4e4)
    return value


def test_options_of_a_network_from_elsewhere_are_words():
    assert records.list_options({'unknown': None, 'levels': 3, 'rest': 0}) == ['unknown None', 'levels 3']


@pytest.mark.parametrize('parameters', [hostile, saturated])
@pytest.mark.parametrize('name, choices', [('Quant_MNIST', {'k': 0, 'B': 1}), ('Quant_MNIST', {'k': 1, 'B': 2}),
                                           ('Quant_MNIST', {'k': 0, 'B': 8}), ('TWBA_5_5_MNIST', {'levels': 3}),
                                           ('BWBA_CIFAR10_Model2', {'levels': 3})])
def test_temporal_and_spatial_conversion_of_hostile_networks(name, choices, parameters):
    """Compare the activations of every layer and the logits with the graph."""
    dataset = sample_of(name)
    few = dataset.test.images[:6]
    with graph_of(name, dataset, parameters, **choices) as (network, session):
        packed = pack(network.net, session, make_header(name, 'data', dataset, {}))
        _, layers, weights, _, _ = folding.fold(network.net, session, name)
        lanes = list(pack_module.read_out(network.net))
        maps, logits = session.run([[outputs for outputs, _, _ in lanes], network.net.outputs], {network.images: few})
    unpacked = packed._replace(layers=tuple(layers), weights=weights)
    temporal = numpy_engine.NumpyEngine(unpacked, simulation.store_and_release)
    for engine, is_temporal in ((temporal, True), (numpy_engine.NumpyEngine(packed), False)):
        found, fired = engine.run(few)
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
        for spike_map, expected, (_, groups, worth) in zip(fired, maps, lanes, strict=True):
            activations = spike_map * worth[0] if is_temporal else spatial.add_lanes(spike_map, groups, worth)
            np.testing.assert_array_equal(activations.reshape(expected.shape), expected)


def test_noise_deletes_spikes_of_the_encoder_only_and_is_seeded():
    x = np.random.default_rng(0).integers(-1, 4, (40, 10, 10, 8)).astype(np.int8)
    once, again = (simulation.deletion(0.25, seed=3)(x) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert (simulation.deletion(0.25, seed=4)(x) != once).any()
    assert (np.abs(once) <= np.abs(x)).all() and (once * x >= 0).all()
    assert np.abs(once).sum() / np.abs(x).sum() == pytest.approx(0.75, abs=0.01)
    packed = random_packed(*NETWORKS['odd'])
    few = random_images(packed, 4)
    _, plain = numpy_engine.NumpyEngine(packed).run(few)
    _, noisy = numpy_engine.NumpyEngine(packed, between=simulation.deletion(0.5, 0)).run(few)
    assert (noisy[0] != plain[0]).any() and (np.abs(noisy[0]) <= np.abs(plain[0])).all()


# ----------------------------------------------------------------------------------------------------------------------
# Counts


def slow_counts(packed, maps):
    """Return the counts of each layer: spikes, negative spikes, synaptic operations, operations over nonzero weights.

    The loop visits one connection at a time. A spike at (y, x, c) reaches the neuron (r, q, f) if the kernel of filter
    f, placed at (r, q), covers (y, x), and the group of f reads channel c.
    """
    counts = []
    for index, (layer, shape, (top, left), (rows, columns, filters)) in enumerate(file_format.shapes(packed)):
        operations = nonzero = 0
        if index:
            height, width, per_group, _ = layer.weights.shape
            for image, y, x, c in zip(*np.nonzero(maps[index - 1]), strict=True):
                count = abs(int(maps[index - 1][image, y, x, c]))
                for f in range(filters):
                    group = f * layer.groups // filters
                    if c % layer.groups != group:
                        continue
                    for r in range(rows):
                        for q in range(columns):
                            i, j = y + top - r * layer.stride, x + left - q * layer.stride
                            if 0 <= i < height and 0 <= j < width:
                                operations += count
                                nonzero += count * int(layer.weights[i, j, c // layer.groups, f] != 0)
            assert per_group * layer.groups == shape[2]
        counts.append((int(np.abs(maps[index]).sum(dtype=int)), int((maps[index] < 0).sum()), operations, nonzero))
    return counts


SMALL = {
    'odd': ((7, 6, 2), 0, [(8, 3, 1, 'SAME', 1), (6, 2, 1, 'SAME', 2), (9, 3, 2, 'SAME', 3), (6, 2, 1, 'VALID', 3)]),
    'strides': ((9, 9, 1), 0, [(4, 2, 2, 'VALID', 1), (4, 1, 3, 'SAME', 1), (8, 2, 1, 'SAME', 4)]),
    'dense': ((4, 4, 1), 0, [(4, 3, 1, 'SAME', 1), (9, 0, 1, 'VALID', 1), (5, 0, 1, 'VALID', 1)]),
}


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('simulator', [simulation.PackedSimulator, numpy_engine.NumpyEngine])
def test_counts_against_a_slow_loop(name, simulator, monkeypatch):
    monkeypatch.setattr(simulation, 'BATCH', 3)
    packed = random_packed(*SMALL[name])
    x = random_images(packed, 5)
    logits, maps = numpy_engine.NumpyEngine(packed).run(x)
    predicted, spike_numbers, operations, rows = simulation.simulate(simulator(packed), x, steps=1)
    np.testing.assert_array_equal(predicted, logits.argmax(1))
    batches = [slow_counts(packed, [values[part] for values in maps]) for part in (slice(0, 3), slice(3, 5))]
    assert spike_numbers == [sum(row[0] for row in counts) for counts in batches]
    assert operations == [sum(row[2] for row in counts) for counts in batches]
    together = np.sum(batches, axis=0)
    for row, counts in zip(rows, together, strict=False):
        assert [5 * row[field] for field in ('spikes', 'negative', 'operations', 'nonzero_operations')] == \
            pytest.approx(list(counts))
        assert row['rate'] == pytest.approx(counts[0] / 5 / row['neurons'])
    assert (together[1:, 3] < together[1:, 2]).all() and (together[1:, 3] > 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# The command


def convert(output, *flags):
    """Run Spiking_MNIST.py on the digits in this process."""
    command.start(SCRIPT, '', ('mnist', 'digits'), 'TWTA_5_5_MNIST', ['--dataset', 'digits', '--output', str(output),
                                                                     *map(str, flags)])


def read_numbers(path):
    return [int(line) for line in path.read_text().split()]


def test_a_trained_network(finished_run, tmp_path, capsys):
    convert(tmp_path, '--run_dir', finished_run)
    assert 'checked: the predictions of the graph on each of the 300 images' in capsys.readouterr().out
    accuracy = json.loads((finished_run / 'result.json').read_text())['test_accuracy']
    record = json.loads((tmp_path / 'spikes.json').read_text())
    assert sum(read_numbers(tmp_path / 'accuracy.txt')) / 300 == accuracy == record['accuracy']
    with open(tmp_path / 'spikes.csv', newline='') as file:
        *rows, total = csv.DictReader(file)
    assert [row['layer'] for row in rows] == ['conv1', 'pool2', 'conv3', 'pool4', 'dense5']
    for name, field in (('spike_num', 'spikes'), ('sop_num', 'operations')):
        numbers = read_numbers(tmp_path / f'{name}.txt')
        assert len(numbers) == 2  # 200 images and 100
        assert sum(numbers) / 300 == pytest.approx(float(total[field]))
    assert int(total['neurons']) == 24 * 24 * 32 + 12 * 12 * 32 + 8 * 8 * 64 + 4 * 4 * 64 + 512
    assert (tmp_path / 'spikes.png').stat().st_size > 10000


def test_noise_and_the_temporal_conversion_of_one_level(finished_run, tmp_path, capsys):
    convert(tmp_path / 'plain', '--run_dir', finished_run, '--conversion', 'temporal', '--images', 100)
    convert(tmp_path / 'noisy', '--run_dir', finished_run, '--noise_ratio', '0.5', '--images', 100)
    lines = capsys.readouterr().out
    assert 'one level is one step' in lines and "50% of the encoder's spikes deleted" in lines
    plain, noisy = (json.loads((tmp_path / which / 'spikes.json').read_text()) for which in ('plain', 'noisy'))
    assert plain['accuracy'] == noisy['accuracy_without_noise']
    first = [record['layers'][0]['spikes'] for record in (plain, noisy)]
    assert first[1] / first[0] == pytest.approx(0.5, abs=0.02)


@pytest.fixture(scope='module')
def several_levels(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp('levels')
    start(run_dir, *QUICK[2:], '--epochs', 2, '--k', 1, '--B', 2, script='Quant_MNIST')
    return run_dir


def test_several_levels_spatially_and_temporally(several_levels, tmp_path):
    for kind in ('spatial', 'temporal'):
        convert(tmp_path / kind, '--network', 'Quant_MNIST', '--run_dir', several_levels, '--conversion', kind)
    spatial, temporal = (json.loads((tmp_path / which / 'spikes.json').read_text())
                         for which in ('spatial', 'temporal'))
    assert (spatial['steps'], temporal['steps']) == (1, 4)
    assert spatial['accuracy'] == temporal['accuracy']
    for place, time in zip(spatial['layers'], temporal['layers'], strict=True):  # 4 times the neurons, the same spikes
        assert place['spikes'] == time['spikes'] and place['neurons'] == 4 * time['neurons']
        assert place['operations'] == pytest.approx(4 * time['operations'])
        assert place['rate'] == pytest.approx(time['rate'])


def test_a_run_keeps_its_choices(several_levels, tmp_path):
    with pytest.raises(UsageError, match=r'--k 2: the network in .* has --k 1'):
        start(several_levels, '--k', 2, '--resume', 'True', script='Quant_MNIST')


@pytest.mark.parametrize('name', ['dense', 'odd', 'strides'])
def test_spikes_from_the_state_of_rest(name):
    """Count a + 1 spikes per activation a, two steps, and the same classes; refuse other networks."""
    packed = random_packed(*NETWORKS[name], border=-1)
    x = random_images(packed, 7)
    plain, steps = conversion.open_simulator(packed, 'rest', None)
    predicted, spikes, _, rows = simulation.simulate(plain, x, steps)
    logits, maps = numpy_engine.NumpyEngine(packed).run(x)
    np.testing.assert_array_equal(predicted, logits.argmax(1))
    assert steps == 2 and sum(spikes) == sum(int((fired + 1).sum()) for fired in maps)
    assert rows[-1]['negative'] == 0 and rows[-1]['neurons'] == sum(fired[0].size for fired in maps)
    with pytest.raises(TwtaError, match='was not trained with --rest -1'):
        conversion.open_simulator(random_packed(*NETWORKS[name]), 'rest', None)


def test_a_packed_file_without_tensorflow(finished_run, tmp_path):
    start(finished_run, '--mode', 'export', '--file', tmp_path / 'net.twta')
    (tmp_path / 'tensorflow.py').write_text('raise SystemExit("TensorFlow was imported")')
    finished = run_script(SCRIPT, '--dataset', 'digits', '--file', tmp_path / 'net.twta', '--output', tmp_path / 'out',
                          PYTHONPATH=str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert 'checked: the predictions of the packed engine (numba) on each of the 300 images' in finished.stdout
    accuracy = json.loads((finished_run / 'result.json').read_text())['test_accuracy']
    assert f'accuracy: {accuracy:.4f}' in finished.stdout


def test_other_predictions_are_an_error_and_write_nothing(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(numpy_engine, 'scale_logits', lambda sums, packed: -sums)
    monkeypatch.setattr(conversion, 'PackedSimulator', numpy_engine.NumpyEngine)
    monkeypatch.setattr(pack_module, 'compare', None)
    with pytest.raises(TwtaError, match=r'predict .* images otherwise than the graph; nothing was written'):
        convert(tmp_path / 'out', '--run_dir', finished_run, '--images', 50)
    assert not (tmp_path / 'out').exists()


def test_more_images_than_there_are(finished_run, tmp_path):
    with pytest.raises(UsageError, match=r'--images 9999: digits has \d+ test images; give fewer'):
        convert(tmp_path / 'out', '--run_dir', finished_run, '--images', 9999)
    assert not (tmp_path / 'out').exists()


def test_a_folder_in_place_of_a_file_is_refused_before_the_simulation(tmp_path):
    (tmp_path / 'spikes.json').mkdir()
    with pytest.raises(UsageError, match=r'--output .*: spikes\.json in it is a folder; choose another'):
        command.start(SCRIPT, '', ('mnist', 'digits'), 'TWTA_5_5_MNIST', ['--output', str(tmp_path)])


@pytest.mark.parametrize('flags, words', [
    (['--network', 'FP_5_5_MNIST'], ['--network', 'FP_5_5_MNIST', 'TWTA_4_4_MNIST']),
    (['--conversion', 'both'], ['--conversion', 'both', 'temporal']),
    (['--noise_ratio', '1'], ['--noise_ratio', "'1'", 'from 0 to 0.99']),
    (['--noise_ratio', '-0.1'], ['--noise_ratio', "'-0.1'"]),
    (['--noise_ratio', 'nan'], ['--noise_ratio', "'nan'"]),
    (['--images', '0'], ['--images', "'0'"]),
    (['--seed', '7'], ['--seed 7', 'without --noise_ratio']),
    (['--output', __file__], ['--output', __file__, 'not a directory', 'choose another']),
    (['--file', '/absent.twta', '--conversion', 'temporal'], ['--file', '--conversion']),
    (['--file', '/absent.twta', '--network', 'Quant_MNIST'], ['--network', '--file']),
    (['--file', '/absent.twta', '--checkpoint', 'best'], ['--checkpoint', '--file']),
    (['--file', PACKED / 'TWTA_4_4_MNIST.twta', '--dataset', 'digits'],
     ['for mnist, not digits', '--dataset mnist']),
    (['--file', PACKED / 'TWTA_3_3_CIFAR10_Group_V2.twta'],
     ['for cifar10, not for mnist or digits', 'Spiking script of its data set']),
    (['--file', '/absent.twta'], ['/absent.twta', '--mode export']),
    (['--run_dir', '/absent'], ['/absent', 'TWTA_5_5_MNIST.py --resume False --mode training']),
])
def test_mistakes(flags, words):
    with pytest.raises(TwtaError) as error:
        command.start(SCRIPT, '', ('mnist', 'digits'), 'TWTA_5_5_MNIST', list(map(str, flags)))
    assert '\n' not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize('code, words', [('import no_such_module', 'cannot be imported (ModuleNotFoundError'),
                                         ('', 'has no model(x, is_train)'),
                                         ('model = print', 'has no DATASETS')])
def test_a_script_of_a_user_without_a_network(tmp_path, code, words):
    (tmp_path / 'Mine.py').write_text(code)
    with pytest.raises(UsageError, match=re.escape(f'{tmp_path / "Mine.py"}: {words}')):
        command.start(tmp_path / 'Spiking_MNIST.py', '', ('mnist', 'digits'), 'TWTA_5_5_MNIST', ['--network', 'Mine'])


def test_the_results_of_the_best_checkpoint_have_their_own_folder():
    flags = command.make_parser(SCRIPT, '', ('mnist', 'digits'), 'TWTA_5_5_MNIST').parse_args(
        ['--checkpoint', 'best', '--images', '20'])
    name = command.resolve(flags, ROOT, 'TWTA_5_5_MNIST').output.name
    assert name == 'spikes-spatial-best-images-20' and run_directory.OURS.fullmatch(name)


def test_outputs_do_not_overwrite_each_other(finished_run, tmp_path, monkeypatch):
    run_dir = tmp_path / 'run'
    shutil.copytree(finished_run, run_dir)
    common = ['--dataset', 'digits', '--run_dir', str(run_dir)]
    for flags in ([], ['--conversion', 'temporal', '--images', '20'],
                  ['--noise_ratio', '0.25', '--seed', '3', '--images', '20']):
        command.start(SCRIPT, '', ('mnist', 'digits'), 'TWTA_5_5_MNIST', common + flags)
    folders = ['spikes-spatial', 'spikes-spatial-noise-0.25-seed-3-images-20', 'spikes-temporal-images-20']
    assert sorted(path.name for path in run_dir.glob('spikes*')) == folders
    start(run_dir, *QUICK[2:], '--resume', 'False', '--epochs', 1)  # another network: the old one's files move with it
    assert sorted(path.name for path in run_dir.glob('earlier-1/spikes*')) == folders
    assert not list(run_dir.glob('spikes*'))
