"""Export: the packed network and the other formats compute what the graph computes, on every sum a filter can reach."""
import errno
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, graph_of, hostile, random_packed, run_script, sample_of, start

from twta import TwtaError, command_line, files
from twta.data import datasets
from twta.export import __main__, folding, formats, nir_format, spatial
from twta.export.pack import make_header, pack, read_out
from twta.export.rewrite import fires_negatively, is_from_rest
from twta.graph.tf1 import tf
from twta.options import SUFFIXES
from twta.packed import cost, engines, file_format, inference, numba_engine, numpy_engine, paired_engine, sliced_engine
from twta.spikes import conversion, simulation
from twta.training.blocks import Block

TERNARY = [name for name in SCRIPTS if name.startswith('TWTA')]
OTHERS = [
    *(('TWTA_4_4_MNIST', {'rest': -1, 'pooling': pooling}) for pooling in ('conv', 'average')),
    *((name, {'rest': -1}) for name in ('TWTA_3_3_CIFAR10_Group_V2', 'TWTA_4_4_CIFAR10_VGG13')),
    ('TWTA_5_5_MNIST', {'threshold': 'trainable', 'threshold_value': 0.3}),
    ('TWTA_2_2_MNIST', {'threshold': 'runtime'}),
    ('TWTA_2_2_MNIST', {'pooling': 'max'}),
    ('TWTA_4_4_MNIST', {'pooling': 'average'}),
    ('TWTA_3_3_CIFAR10_Group_V2', {'pooling': 'max'}),
    ('TWTA_4_4_CIFAR10_VGG13', {'pooling': 'average'}),
    ('BWBA_5_5_MNIST', {'pooling': 'max'}),
    ('TWBA_5_5_MNIST', {'levels': 3, 'pooling': 'average'}),
    ('BWBA_CIFAR10_Model2', {'beta_init': -0.5}),
    ('TWBA_CIFAR10_Model2', {'levels': 3}),
    ('Quant_MNIST', {'k': 1, 'B': 2}),
    ('Quant_MNIST', {'k': 0, 'B': 1}),
    ('Quant_CIFAR10', {'k': 0, 'B': 2}),
]  # each option and each kind of network; TERNARY has the default options
TRAINED = ROOT / 'results' / 'TWTA_4_4_MNIST-mnist-0-constant150.npz'
SHARED = ROOT.parent / 'shared' / 'datasets'


def packed_and_graph(name, dataset, parameters, n_images, **choices):
    """Return the packed network of a script with these parameters, and what the graph computes from test images.

    The graph gives the logits, and for each layer its activations, with groups and worth of the lanes that add up to
    them. A layer that a maximum follows has None instead.
    """
    with graph_of(name, dataset, parameters, **choices) as (network, session):
        packed = pack(network.net, session, make_header(name, 'data', dataset, {}))
        images = {network.images: dataset.test.images[:n_images]}
        maps = [lanes and (session.run(lanes[0], images), *lanes[1:]) for lanes in read_out(network.net)]
        return packed, maps, session.run(network.net.outputs, images)


def assert_same_maps(packed, engine, images, maps):
    """Check that an engine computes the activations that packed_and_graph returned."""
    for layer, found, lanes in zip(packed.layers, engine.activations(images), maps, strict=True):
        if lanes:
            expected = lanes[0][:len(images)]
            found = spatial.add_lanes(found, *lanes[1:]).reshape(expected.shape)
            np.testing.assert_array_equal(found, expected, err_msg=layer.name)


# ----------------------------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.processor
@pytest.mark.parametrize('name, choices', [(name, {}) for name in TERNARY] + OTHERS)
def test_hostile_parameters_on_200_images(name, choices):
    """Compare each hidden activation of each script, in all engines, and the predictions."""
    dataset = sample_of(name)
    images = dataset.test.images[:200 if name in TERNARY else 50]
    packed, maps, logits = packed_and_graph(name, dataset, hostile, len(images), **choices)
    paired = [paired_engine.PairedEngine(packed)] if paired_engine.can_run(packed) else []
    for fast in (numba_engine.NumbaEngine(packed), sliced_engine.SlicedEngine(packed), *paired):
        assert_same_maps(packed, fast, images, maps)
        np.testing.assert_allclose(fast.logits(images), logits, rtol=1e-4, atol=1e-4)
    assert_same_maps(packed, numpy_engine.NumpyEngine(packed), images[:8], maps)
    assert all(len(np.unique(lanes[0])) > 1 for lanes in maps if lanes)
    if choices or name not in TERNARY:
        return
    assert all(len(np.unique(lanes[0])) == 3 for lanes in maps[:2])
    integers = sum(-(-layer.weights.size // 5) + 2 * 2 * layer.weights.shape[3] for layer in packed.layers[1:])
    assert 4 * sum(layer.weights.size for layer in packed.layers[1:]) > 18 * integers  # weights in float32


def trained(name, value):
    with np.load(TRAINED) as file:
        return file[name]


def test_a_trained_network_on_every_reachable_sum():
    """Compare the thresholds with batch normalisation written out, for every channel and every sum it can reach.

    numpy and TensorFlow round (u - mean) * (gamma / sigma) + beta differently. Sums that near a break point may
    differ; this network has none.
    """
    dataset = sample_of('TWTA_4_4_MNIST')
    packed, _, _ = packed_and_graph('TWTA_4_4_MNIST', dataset, trained, 1)
    with np.load(TRAINED) as file:
        for layer in packed.layers[1:]:
            beta, gamma, mean, variance = (file[f'{layer.name}/bn/{name}:0'].astype(np.float64) for name in (
                'beta', 'gamma', 'moving_mean', 'moving_variance'))
            v = np.arange(-file_format.fan_in(layer.weights), file_format.fan_in(layer.weights) + 1)[:, np.newaxis]
            x = (np.where(gamma < 0, -v, v) - mean) * gamma / np.sqrt(variance + 1e-5) + beta
            expected = (x >= 0.5).astype(int) - (x <= -0.5)
            np.testing.assert_array_equal((v >= layer.upper).astype(int) - (v <= layer.lower), expected)


@pytest.mark.parametrize('gamma, upper, lower, sign', [  # by hand: mean 2.3, variance 25, beta 0.1
    (1, 5, -1, 1), (-1, 0, -6, -1), (0, 19, -19, 1)])
def test_the_worked_example(session, gamma, upper, lower, sign):
    from twta.graph.tf1 import tl
    from twta.ternary_layers import ActivationLayer, BatchNormLayer, Conv2dLayer

    layer = Conv2dLayer(tl.layers.InputLayer(tf.placeholder(tf.float32, [None, 4, 4, 2]), name='x'), 1, 3)
    batch_norm = BatchNormLayer(layer, is_train=False)
    activation = ActivationLayer(batch_norm)
    session.run(tf.global_variables_initializer())
    for variable, value in zip((batch_norm.beta, batch_norm.gamma, batch_norm.moving_mean, batch_norm.moving_variance),
                               (0.1, gamma, 2.3, 25), strict=True):
        variable.load(np.float32([value]), session)
    block = Block(layer, batch_norm, activation)
    probe = folding.ActivationProbe.of(block, session)
    packed = folding.fold_layer(session, block, probe, input_probe=probe)
    assert (packed.upper, packed.lower) == (upper, lower)
    np.testing.assert_array_equal(packed.weights, sign * session.run(layer.quantized))


def test_thresholds_of_the_encoder_are_the_very_floats(session):
    """Check that the graph fires at the threshold, and does not fire one float below it."""
    sums = tf.placeholder(tf.float32, [None, 1, 1, 4])
    scale, shift = np.float32([3, 0.1, 0, 1e-3]), np.float32([0.2, -0.3, 0.7, 0])
    from twta.ternary_layers import ternarize_activations

    activations = ternarize_activations(sums * scale + shift)
    probe = folding.ActivationProbe(session, sums, activations, np.ones(4, np.int8), 1, 1)
    (upper,), lower = folding.real_thresholds(probe)
    assert upper.dtype == np.float32 and upper[2] == -np.inf and lower[2] == -np.inf  # a constant +1
    for thresholds, value, inwards in ((upper, 1, -np.inf), (lower, -1, np.inf)):
        on = probe(thresholds[np.newaxis])[0]
        within = np.nextafter(thresholds, np.float32(inwards))
        beside = probe(within[np.newaxis])[0]
        assert (on[[0, 1, 3]] == value).all() and (beside[[0, 1, 3]] == 0).all()


def test_standardised_images_are_the_same_bits():
    from twta.graph import preprocessing

    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3)).astype(np.uint8)
    images[0], images[1], images[2, 5, 5] = 7, 0, 255
    images[3] = 100
    images[3, 16, 16] = 101
    for crop in (0, 24, 31):
        with tf.Graph().as_default(), tf.Session() as session:
            expected = session.run(preprocessing.for_evaluation(tf.constant(images), crop))
        found = numpy_engine.prepare(images, crop)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(not (SHARED / 'mnist').exists(), reason=f'needs the real MNIST in {SHARED}')
def test_the_whole_test_set_of_mnist(tmp_path):
    """Compare every prediction on 10,000 images with the graph, and the accuracy with the record in results/."""
    subprocess.run([sys.executable, SHARED / 'prepare.py', tmp_path], check=True, capture_output=True)
    dataset = datasets.load('mnist', tmp_path, None)
    with graph_of('TWTA_4_4_MNIST', dataset, trained) as (network, session):
        packed = pack(network.net, session, make_header('TWTA_4_4_MNIST', 'mnist', dataset, {}))
        predicted = np.concatenate([session.run(network.evaluation.predicted, {network.images: batch})
                                    for batch in np.split(dataset.test.images, 20)])
    found = engines.logits(engines.open_engine(packed), dataset.test.images).argmax(1)
    np.testing.assert_array_equal(found, predicted)
    assert np.mean(found == dataset.test.labels) == 0.993


# ----------------------------------------------------------------------------------------------------------------------
# --mode export


@pytest.fixture(scope='module')
def exported(finished_run, tmp_path_factory):
    """The packed file of the finished run of TWTA_5_5_MNIST on the digits."""
    path = tmp_path_factory.mktemp('exported') / 'TWTA_5_5_MNIST.twta'
    start(finished_run, '--mode', 'export', '--file', path)
    return path


def test_export_then_inference_without_tensorflow(exported, finished_run, tmp_path, capsys):
    """Compare loss and accuracy with --engine tensorflow; the packed engine does not import TensorFlow."""
    start(tmp_path / 'run', '--mode', 'inference', '--weights', finished_run / 'model.npz')
    expected = [line for line in capsys.readouterr().out.splitlines() if line.startswith('test ')]
    for package in ('tensorflow', 'tensorlayer'):
        (tmp_path / f'{package}.py').write_text(f'raise SystemExit("{package} was imported")')
    (tmp_path / 'tqdm.py').write_text('raise ModuleNotFoundError("as if it were not installed", name="tqdm")')
    finished = run_script(SCRIPTS['TWTA_5_5_MNIST'], '--mode', 'inference', '--engine', 'packed', '--dataset', 'digits',
                          '--file', exported, '--run_dir', tmp_path / 'run', '--report', PYTHONPATH=str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert [line for line in finished.stdout.splitlines() if line.startswith('test ')] == expected
    assert (tmp_path / 'run' / 'result-packed.json').exists() and (tmp_path / 'run' / 'confusion-packed.png').exists()
    assert (tmp_path / 'run' / 'cost.png').stat().st_size > 10_000
    assert 'in all' in finished.stdout and 'images/s' in finished.stdout


def test_packed_inference_warns_if_the_network_is_of_another_run(exported, finished_run, tmp_path):
    warning = f'WARNING: this network is not that of the run in {tmp_path}'
    for config, is_warned in (((finished_run / 'config.json').read_text(), False), ('{}', True)):
        (tmp_path / 'config.json').write_text(config)
        finished = run_script(SCRIPTS['TWTA_5_5_MNIST'], '--mode', 'inference', '--engine', 'packed', '--dataset',
                              'digits', '--file', exported, '--run_dir', tmp_path)
        assert finished.returncode == 0 and (warning in finished.stdout) == is_warned


def test_a_network_of_model_npz_is_of_its_run(finished_run):
    """Exported with --weights model.npz; a config.json that was rewritten since does not matter then."""
    def is_of_run(**hashes):
        return inference.is_of_run(SimpleNamespace(record={'sha256': hashes}), finished_run)

    found = {name: files.digest(finished_run / name) for name in ('config.json', 'model.npz')}
    assert is_of_run(**found) and is_of_run(**{'model.npz': found['model.npz']})
    assert not is_of_run(**{'model.npz': found['config.json']}) and not is_of_run()


def test_the_default_file_is_in_the_current_folder(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(finished_run, '--mode', 'export')
    assert [path.name for path in tmp_path.iterdir()] == ['TWTA_5_5_MNIST.twta']
    packed = file_format.read(tmp_path / 'TWTA_5_5_MNIST.twta')
    assert (packed.network, packed.dataset, packed.record['epoch']) == ('TWTA_5_5_MNIST', 'digits', 4)
    assert set(packed.record['sha256']) == {'config.json', 'log.csv'}


@pytest.mark.parametrize('flags, words', [
    (['--engine', 'packed'], ['--engine packed', '--mode training']),
    (['--engine', 'packed', '--mode', 'export'], ['--engine packed', '--mode export']),
    (['--mode', 'inference', '--engine', 'packed', '--file', '/absent.twta'], ['/absent.twta', '--mode export']),
    (['--mode', 'inference', '--engine', 'packed', '--file', '/'], ['--file /', 'not a file']),
    (['--mode', 'inference', '--engine', 'packed', '--resume', 'True'], ['--resume', '--engine packed']),
    (['--mode', 'inference', '--engine', 'packed', '--weights', __file__], ['--weights', '--engine packed']),
    (['--mode', 'inference', '--engine', 'packed', '--checkpoint', 'best'], ['--checkpoint best', '--engine packed']),
    (['--mode', 'inference', '--engine', 'numpy'], ['--engine', "'numpy'", 'packed']),
    (['--mode', 'inference', '--threads', '2'], ['--threads', '--engine packed']),
    (['--mode', 'inference', '--report'], ['--report', '--engine packed']),
    (['--mode', 'inference', '--file', 'x'], ['--file', '--mode export']),
    (['--mode', 'inference', '--format', 'c'], ['--format c', '--mode export']),
    (['--mode', 'export', '--format', 'hex'], ['--format', "'hex'", 'onnx']),
    (['--mode', 'export', '--format', 'onnx', '--file', 'x.twta'], ['--file', 'x.twta', '--format onnx', '.onnx']),
    (['--mode', 'export', '--file', '/dev/full'], ['--file /dev/full', '.twta']),
    (['--mode', 'export', '--file', '/absent/x.twta'], ['/absent', 'no such folder']),
    (['--mode', 'export', '--epochs', '3'], ['--epochs 3', '--mode export']),
    (['--mode', 'export', '--resume', 'False'], ['--resume False', '--mode export']),
    (['--mode', 'inference', '--engine', 'packed', '--threads', '0'], ['--threads', "'0'"]),
])
def test_flags_of_deployment_that_contradict_each_other(flags, words):
    with pytest.raises(TwtaError) as error:
        command_line.parse(SCRIPTS['TWTA_4_4_MNIST'], '', ('mnist', 'digits'), command_line.protocol(1, 1, 1),
                           argv=flags)
    assert error.value.exit_code == 2
    for word in words:
        assert word in str(error.value)


def test_a_file_of_another_network_is_refused(exported):
    finished = run_script(SCRIPTS['TWTA_4_4_MNIST'], '--mode', 'inference', '--engine', 'packed', '--dataset', 'digits',
                          '--file', exported)
    assert finished.returncode == 1 and finished.stderr.count('\n') == 1
    assert 'TWTA_5_5_MNIST on digits, not TWTA_4_4_MNIST on digits' in finished.stderr


def test_a_full_precision_network_has_nothing_to_pack(tmp_path):
    """Check the refusal by the name of the script, before a training, and by the graph if the name does not tell."""
    for flags in (['--mode', 'export'], ['--mode', 'inference', '--engine', 'packed']):
        finished = run_script(SCRIPTS['FP_5_5_MNIST'], *flags, '--file', tmp_path / 'x.twta')
        assert finished.returncode == 2 and finished.stderr.count('\n') == 1 and 'nothing to pack' in finished.stderr
        assert not (tmp_path / 'x.twta').exists()
    with pytest.raises(TwtaError, match='nothing to pack'):
        packed_and_graph('FP_5_5_MNIST', sample_of('FP_5_5_MNIST'), hostile, 0)


@pytest.mark.parametrize('name, value', [('gamma', np.nan), ('moving_variance', -1), ('beta', np.inf)])
def test_parameters_that_are_no_numbers(name, value):
    def spoil(variable, old):
        return np.full_like(old, value) if variable == f'conv3/bn/{name}:0' else old

    with pytest.raises(TwtaError, match=f'conv3/bn/{name}:0'):
        packed_and_graph('TWTA_5_5_MNIST', sample_of('TWTA_5_5_MNIST'), spoil, 1)


def test_an_engine_that_differs_from_the_graph_is_noticed(finished_run, tmp_path, monkeypatch):
    """Check that export writes no file if the thresholds are one too high."""
    right = folding.integer_thresholds
    monkeypatch.setattr(folding, 'integer_thresholds', lambda *arguments: [t + 1 for t in right(*arguments)])
    with pytest.raises(TwtaError, match='other activations than the graph; nothing was written'):
        start(finished_run, '--mode', 'export', '--file', tmp_path / 'x.twta')
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Other formats


@pytest.fixture(params=[('TWTA_4_4_MNIST', 0), ('TWTA_3_3_CIFAR10_Group_V2', 0), ('TWTA_3_3_CIFAR10_Group_V2', -1)],
                ids=lambda param: f'{param[0]} rest {param[1]}')
def deployed(request):
    """A packed network with hostile parameters, and images."""
    name, rest = request.param
    dataset = sample_of(name)
    return packed_and_graph(name, dataset, hostile, 1, rest=rest)[0], dataset.test.images[:40]


@pytest.mark.parametrize('name, pooling', [
    ('TWTA_4_4_MNIST', 'conv'), ('TWTA_4_4_MNIST', 'average'), ('TWTA_5_5_MNIST', 'conv'),
    ('TWTA_3_3_CIFAR10_Group_V2', 'conv')])
def test_networks_of_rest_count_from_rest(name, pooling):
    """Layers that do not pad (dense layers, averages; all of 5*5) do not forbid it; the activations stay the same."""
    dataset = sample_of(name)
    packed = packed_and_graph(name, dataset, hostile, 1, rest=-1, pooling=pooling)[0]
    assert is_from_rest(packed) and nir_format.check(packed, core=True) is None
    assert not any(map(fires_negatively, nir_format.neurons(packed).layers))
    images = dataset.test.images[:3]
    logits, maps = numpy_engine.NumpyEngine(packed).run(images)
    plain, steps = conversion.open_simulator(packed, 'rest', None)
    predicted, spikes, _, _ = simulation.simulate(plain, images, steps)
    np.testing.assert_array_equal(predicted, logits.argmax(1))
    assert sum(spikes) == sum(int((fired + 1).sum()) for fired in maps)


def test_npz_holds_what_a_loop_needs(deployed, tmp_path):
    """Compute the test vectors of the file from its arrays alone."""
    packed, images = deployed
    assert formats.write('npz', tmp_path / 'n.npz', packed, images[:2]) == (tmp_path / 'n.npz').stat().st_size
    with np.load(tmp_path / 'n.npz', allow_pickle=False) as file:
        x = numpy_engine.prepare(file['vectors/images'], int(file['crop'])).astype(np.float64)
        for index, name in enumerate(file['layers']):
            weights, stride, groups, border = (file[f'{name}/{field}'] for field in (
                'weights', 'stride', 'groups', 'border'))
            expected = file[f'vectors/{name}']
            height, width, _, filters = weights.shape
            padded = np.pad(x, [(0, 0), *file[f'{name}/padding'], (0, 0)], constant_values=int(border))
            out = [(padded.shape[axis + 1] - weights.shape[axis]) // stride + 1 for axis in (0, 1)]
            sums = np.zeros((len(x), *out, filters))
            for f in range(filters):
                group = padded[..., f // (filters // groups)::groups]
                for y in range(out[0]):
                    rows = group[:, y * stride:y * stride + height]
                    for column in range(out[1]):
                        under = rows[:, :, column * stride:column * stride + width]
                        sums[:, y, column, f] = (under * weights[..., f]).sum((1, 2, 3))
            if not index:
                sums = sums.astype(np.float32)
            x = (sums >= file[f'{name}/upper']).astype(float) - (sums <= file[f'{name}/lower'])
            np.testing.assert_array_equal(x, expected, err_msg=str(name))
            if index == 2:
                break  # the loop is slow
        assert [str(text) for text in file['classes']] == list(packed.classes)
        np.testing.assert_array_equal(file['vectors/logits'], numpy_engine.NumpyEngine(packed).logits(images[:2]))


@pytest.mark.skipif(not shutil.which('cc'), reason='needs a C compiler')
def test_c_header(deployed, tmp_path):
    """Check that docs/reference.c compiles without warnings, computes every vector, and notices a changed threshold."""
    packed, images = deployed
    formats.write('c', tmp_path / 'network.h', packed, images[:3])
    assert run_c(tmp_path, 'network.h').returncode == 0
    changed = packed.layers[1]._replace(upper=packed.layers[1].upper + 1)
    text = (tmp_path / 'network.h').read_text()
    name = 'Network_network_1_upper'
    spoilt = text.replace(formats.c_array('int32_t', name, packed.layers[1].upper),
                          formats.c_array('int32_t', name, changed.upper))
    assert spoilt != text
    (tmp_path / 'network.h').write_text(spoilt)
    assert run_c(tmp_path, 'network.h').returncode == 1


@pytest.mark.skipif(not shutil.which('cc'), reason='needs a C compiler')
@pytest.mark.parametrize('name', ['int', 'net', 'maps', 'what??', '2 nets'])
def test_c_header_of_a_file_network_or_class_with_an_awkward_name(tmp_path, name):
    packed = random_packed((5, 5, 1), 0, [(3, 3, 1, 'SAME', 1), (6, 2, 2, 'VALID', 3)])
    packed = packed._replace(network=name, classes=(f'{name}/', 'b', 'c'), dataset='*/ data ??/')
    formats.write('c', tmp_path / f'{name}.h', packed, np.zeros((1, 5, 5, 1), np.uint8))
    assert run_c(tmp_path, f'{name}.h').returncode == 0


STRICT = '-Wall', '-Wextra', '-pedantic', '-Werror', '-O1'


def run_c(folder, header):
    """Compile docs/reference.c with a header in the folder and run it; return the finished process."""
    name = formats.c_name(header.removesuffix('.h'))
    subprocess.run(['cc', '-std=c99', *STRICT, f'-DNETWORK={name}', f'-DHEADER="{header}"', f'-I{folder}',
                    ROOT / 'docs' / 'reference.c', '-lm', '-o', folder / 'reference'], check=True)
    return subprocess.run([folder / 'reference'], capture_output=True)


# A program for a Cortex-M3 with 4 MB of flash and of RAM, as QEMU's mps2-an385 has them.
LINKER = '''
MEMORY { FLASH (rx) : ORIGIN = 0, LENGTH = 4M  RAM (rwx) : ORIGIN = 0x20000000, LENGTH = 4M }
ENTRY(_start)
SECTIONS {
  .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) KEEP(*(.init)) KEEP(*(.fini)) . = ALIGN(4);
    __preinit_array_start = .; KEEP(*(.preinit_array)) __preinit_array_end = .;
    __init_array_start = .; KEEP(*(SORT(.init_array.*))) KEEP(*(.init_array)) __init_array_end = .;
    __fini_array_start = .; KEEP(*(.fini_array)) __fini_array_end = .; } > FLASH
  .ARM.exidx : { __exidx_start = .; *(.ARM.exidx*) __exidx_end = .; } > FLASH
  .data : { *(.data*) } > RAM
  .bss (NOLOAD) : { __bss_start__ = .; *(.bss*) *(COMMON) __bss_end__ = .; end = .; __end__ = .; } > RAM
  __stack = 0x20400000;
}
'''
VECTORS = """extern void _start(void);
__attribute__((section(".vectors"), used)) static void *const vectors[] = {(void *)0x20400000, (void *)_start};
"""


@pytest.mark.skipif(not (shutil.which('arm-none-eabi-gcc') and shutil.which('qemu-system-arm')),
                    reason='needs arm-none-eabi-gcc and qemu-system-arm')
def test_c_header_on_a_microcontroller(tmp_path):
    packed = file_format.read(ROOT / 'pretrained' / 'TWTA_2_2_MNIST.twta')
    formats.write('c', tmp_path / 'TWTA_2_2_MNIST.h', packed, np.zeros((1, 28, 28, 1), np.uint8))
    (tmp_path / 'm3.ld').write_text(LINKER)
    (tmp_path / 'vectors.c').write_text(VECTORS)
    for_cortex = '-mcpu=cortex-m3', '-mthumb', '-O2', '-ffp-contract=off', '--specs=rdimon.specs', '-T', 'm3.ld'
    of_network = '-DNETWORK=TWTA_2_2_MNIST', '-DHEADER="TWTA_2_2_MNIST.h"', f'-I{tmp_path}'
    subprocess.run(['arm-none-eabi-gcc', *for_cortex, *of_network, ROOT / 'docs' / 'reference.c', 'vectors.c', '-lm',
                    '-o', 'program'], check=True, cwd=tmp_path)
    finished = subprocess.run(['qemu-system-arm', '-M', 'mps2-an385', '-nographic', '-monitor', 'none', '-kernel',
                               tmp_path / 'program', '-semihosting-config', 'enable=on,target=native'],
                              capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert 'TWTA_2_2_MNIST: 0 activations or predictions differ' in finished.stdout


TWO = '''
#include <stdio.h>
#include "Net-rest_-1.h"
#include "2 Net.h"
int main(void)
{
    printf("%s %d %s %d", Net_rest__1.name, Net_rest__1.layers, Network_2_Net.name, Network_2_Net.layers);
    return 0;
}
'''


@pytest.mark.skipif(not shutil.which('c++'), reason='needs a C++ compiler')
@pytest.mark.parametrize('compiler', [('cc', '-std=c99', '-xc'), ('c++', '-std=c++17', '-xc++')])
def test_two_networks_in_one_program(tmp_path, compiler):
    """Two files of one script, with names that C cannot hold: nothing collides, in C and in C++."""
    layers = [(3, 3, 1, 'SAME', 1), (6, 2, 2, 'VALID', 3)]
    for file, count in (('Net-rest_-1', 1), ('2 Net', 2)):
        packed = random_packed((5, 5, 1), 0, layers[:count])._replace(network='Net')
        formats.write('c', tmp_path / f'{file}.h', packed, np.zeros((1, 5, 5, 1), np.uint8))
    (tmp_path / 'two.c').write_text(TWO)
    subprocess.run([*compiler, *STRICT, tmp_path / 'two.c', '-o', tmp_path / 'two'], check=True)
    assert subprocess.run([tmp_path / 'two'], capture_output=True, text=True).stdout == 'Net 1 Net 2'


def test_onnx(deployed, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    packed, images = deployed
    formats.write('onnx', tmp_path / 'n.onnx', packed, images[:2])
    found = onnxruntime.InferenceSession(tmp_path / 'n.onnx').run(None, {'images': images})[0]
    expected = numpy_engine.NumpyEngine(packed).logits(images)
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with np.load(tmp_path / 'n.vectors.npz') as vectors:
        assert set(vectors.files) == {'images', 'logits', *(layer.name for layer in packed.layers)}


@pytest.mark.parametrize('full', ['n.onnx', 'n.vectors.npz'])
def test_an_onnx_model_never_lies_beside_vectors_of_another(deployed, tmp_path, monkeypatch, full):
    pytest.importorskip('onnx')
    packed, images = deployed
    for name in ('n.onnx', 'n.vectors.npz'):
        (tmp_path / name).write_text('before')

    def refuse(*arguments, **arrays):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(*((Path, 'write_bytes') if full == 'n.onnx' else (np, 'savez_compressed')), refuse)
    with pytest.raises(OSError, match='No space left'):
        formats.write('onnx', tmp_path / 'n.onnx', packed, images[:2])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(('n.onnx', 'n.vectors.npz'),
                                                                                         'before')


def test_a_stem_in_the_other_formats(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    dataset = sample_of('TWBA_CIFAR10_Model2')
    packed, images = packed_and_graph('TWBA_CIFAR10_Model2', dataset, hostile, 1)[0], dataset.test.images[:20]
    formats.write('onnx', tmp_path / 'n.onnx', packed, images[:2])
    found = onnxruntime.InferenceSession(tmp_path / 'n.onnx').run(None, {'images': images})[0]
    np.testing.assert_allclose(found, numpy_engine.NumpyEngine(packed).logits(images), rtol=1e-5, atol=1e-5)
    formats.write('npz', tmp_path / 'n.npz', packed, images[:2])
    with np.load(tmp_path / 'n.npz', allow_pickle=False) as file:
        for field, value in packed.stem._asdict().items():
            np.testing.assert_array_equal(file[f'stem/{field}'], value)
    with pytest.raises(TwtaError, match=r'--format c: .*npz or onnx'):
        formats.check_format('c', packed)


def test_only_some_formats_need_a_package(monkeypatch):
    packed = file_format.read(ROOT / 'pretrained' / 'TWTA_4_4_MNIST.twta')
    monkeypatch.setattr(formats.importlib.util, 'find_spec', lambda name: None)
    for name in SUFFIXES:
        if name not in ('onnx', 'qonnx', 'nir'):
            formats.check_format(name, packed)
            continue
        with pytest.raises(TwtaError, match=f'--format {name}: the package .* is not installed; pip install'):
            formats.check_format(name, packed)
    with pytest.raises(TwtaError, match='--format twta: the package onnx is not installed'):
        __main__.import_network(SimpleNamespace(core=False, dialect=None), None)


def test_the_cost_of_a_stem():
    dataset = sample_of('BWBA_CIFAR10_Model2')
    packed = packed_and_graph('BWBA_CIFAR10_Model2', dataset, hostile, 1)[0]
    stem, *_, total = cost.measure(numpy_engine.NumpyEngine(packed), dataset.test.images[:2])
    assert (stem['layer'], stem['multiply_adds'], stem['additions']) == ('stem', 24 * 24 * 32 * 27, None)
    assert total['weights'] == 3252064


def test_names_that_a_c_header_cannot_hold():
    assert formats.c_string('cat "*/\\') == '"cat _*/_"' and formats.c_text('a\n') == 'a_'
    assert formats.c_float(-np.inf) == '-INFINITY' and float.fromhex(formats.c_float(0.1)[:-1]) == 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Cost


@pytest.mark.parametrize('border', [0, -1])
def test_additions_are_counted_as_a_slow_loop_does(border):
    packed = random_packed((7, 6, 2), 0, [(12, 3, 1, 'SAME', 1), (10, 2, 2, 'SAME', 2), (15, 3, 1, 'SAME', 5)],
                           border=border)
    images = np.random.default_rng(0).integers(0, 256, (3, 7, 6, 2)).astype(np.uint8)
    maps = numpy_engine.NumpyEngine(packed).activations(images)
    rows = cost.measure(numpy_engine.NumpyEngine(packed), images)
    shape = file_format.input_shape(packed)
    for index, layer in enumerate(packed.layers):
        (top, left), out = file_format.geometry(shape, layer)
        if index:
            x, count = maps[index - 1], 0
            height, width, channels, filters = layer.weights.shape
            for y, column, f, i, j, c in np.ndindex(*out[:2], filters, height, width, channels):
                row, place = y * layer.stride + i - top, column * layer.stride + j - left
                if not layer.weights[i, j, c, f]:
                    continue
                if 0 <= row < shape[0] and 0 <= place < shape[1]:
                    count += np.count_nonzero(x[:, row, place, c * layer.groups + f // (filters // layer.groups)])
                else:
                    count += len(x) * abs(border)
            assert rows[index]['additions'] == pytest.approx(count / 3)
            assert rows[index]['zero_inputs'] == pytest.approx(np.mean(x == 0))
        assert rows[index]['multiply_adds'] == np.prod(out) * file_format.fan_in(layer.weights)
        shape = out
    total = rows[-1]
    assert total['additions'] == pytest.approx(sum(row['additions'] for row in rows[1:-2]))
    assert total['float_nJ'] == pytest.approx(total['multiply_adds'] * 4.6e-3)
