"""Formats of other programs: QONNX and NIR files against plain interpreters and, if installed, their real readers."""
import subprocess
import sys

import h5py
import numpy as np
import onnx
import pytest
from conftest import NETWORKS, ROOT, random_images, random_packed
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from twta import TwtaError, UsageError
from twta.export import __main__, formats, nir_format, qonnx_format
from twta.export.rewrite import count_from_rest, is_from_rest, without_groups
from twta.export.spatial import add_lanes
from twta.packed import file_format
from twta.packed.numpy_engine import NumpyEngine

PRETRAINED = ROOT / 'pretrained'


@pytest.fixture(params=NETWORKS)
def packed(request):
    return random_packed(*NETWORKS[request.param])


def test_without_groups_a_network_is_the_same(packed):
    x = random_images(packed, 3)
    dense = packed._replace(layers=tuple(map(without_groups, packed.layers)))
    assert {layer.groups for layer in dense.layers} == {1}
    for found, expected in zip(NumpyEngine(dense).run(x)[1], NumpyEngine(packed).run(x)[1], strict=True):
        np.testing.assert_array_equal(found, expected)


def with_border(packed, border=-1):
    """Return a network of --rest `border`, as export makes it: dense layers, as large as their map, have no border."""
    return packed._replace(layers=tuple(
        layer._replace(border=0 if not index or layer.weights.shape[:2] == shape[:2] else border)
        for index, (layer, shape, _, _) in enumerate(file_format.shapes(packed))))


def test_events_from_the_state_of_rest(packed, tmp_path):
    """Two unsigned neurons per activation count a + 1, at the border too; the form is a valid packed network."""
    with pytest.raises(TwtaError, match='was not trained with --rest -1'):
        count_from_rest(with_border(packed, 0))
    packed = with_border(packed)
    if not is_from_rest(packed):  # all its layers are dense
        return
    x = random_images(packed, 4)
    try:
        events = count_from_rest(packed)
    except TwtaError:  # groups that read other groups
        packed = packed._replace(layers=tuple(map(without_groups, packed.layers)))
        events = count_from_rest(packed)
    logits, maps = NumpyEngine(packed).run(x)
    found_logits, found = NumpyEngine(events).run(x)
    for layer, fired, spikes in zip(packed.layers, maps, found, strict=True):
        assert spikes.min() >= 0
        np.testing.assert_array_equal(add_lanes(spikes, layer.groups, np.ones(2, int)), fired + 1)
    np.testing.assert_allclose(found_logits, logits, rtol=1e-4, atol=1e-3)
    file_format.write(tmp_path / 'n.twta', events)
    file_format.read(tmp_path / 'n.twta')


# ----------------------------------------------------------------------------------------------------------------------
# QONNX


class Quant(OpRun):
    """Quant of QONNX, as its specification says."""
    op_domain = qonnx_format.DOMAIN

    def _run(self, x, scale, zero_point, bits, signed=None, narrow=None, rounding_mode=None):
        assert (scale, zero_point, bits, signed, narrow, rounding_mode) == (1, 0, 2, 1, 1, 'ROUND')
        return (np.rint(x).clip(-1, 1),)


class MultiThreshold(OpRun):
    """MultiThreshold of QONNX: out_bias plus the number of thresholds that a value reaches."""
    op_domain = qonnx_format.DOMAIN

    def _run(self, x, thresholds, out_dtype=None, out_scale=None, out_bias=None, data_layout=None):
        assert (out_dtype, out_scale, data_layout) == ('INT2', 1, 'NCHW')
        assert (thresholds[:, 0] <= thresholds[:, 1]).all()
        reached = x[:, :, np.newaxis] >= thresholds[:, :, np.newaxis, np.newaxis]
        return ((out_bias + reached.sum(2)).astype(np.float32),)


@pytest.mark.parametrize('core, dialect', [(False, 'thresholds'), (True, 'thresholds'), (True, 'quant')])
def test_qonnx(packed, tmp_path, core, dialect):
    images = random_images(packed, 3)
    path = tmp_path / 'n.qonnx.onnx'
    formats.write('qonnx', path, packed, images, core, dialect)
    model = onnx.load(path)
    names = [layer.name for layer in packed.layers]
    for value in names[core:-1] if core else names:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
    session = ReferenceEvaluator(model, new_ops=[Quant, MultiThreshold])
    with np.load(tmp_path / 'n.qonnx.vectors.npz') as vectors:
        for i in range(len(images)):
            first = {names[0]: vectors[names[0]][i:i + 1].transpose(0, 3, 1, 2).astype(np.float32)} if core else {
                'images': images[i:i + 1]}
            found = dict(zip([value.name for value in model.graph.output], session.run(None, first), strict=True))
            for name in names[core:]:
                expected = vectors[name][i:i + 1].transpose(0, 3, 1, 2)
                np.testing.assert_array_equal(found[name], expected, err_msg=name)
            if not core:
                np.testing.assert_allclose(found['logits'], vectors['logits'][i:i + 1], rtol=1e-5, atol=1e-5)
    if core:
        assert model.graph.quantization_annotation[0].tensor_name == names[0]


def test_onnx_with_weights_of_two_bits(packed, tmp_path):
    if not hasattr(onnx.TensorProto, 'INT2'):
        pytest.skip('needs an onnx with INT2')
    images = random_images(packed, 3)
    for dialect in ('int8', 'int2'):
        formats.write('onnx', tmp_path / f'{dialect}.onnx', packed, images, dialect=dialect)
    model = onnx.load(tmp_path / 'int2.onnx')
    count = sum(layer.weights.size for layer in packed.layers[1:])
    stored = [item for item in model.graph.initializer if item.data_type == onnx.TensorProto.INT2]
    assert sum(int(np.prod(item.dims)) for item in stored) == count
    found, = ReferenceEvaluator(model).run(None, {'images': images})
    np.testing.assert_allclose(found, NumpyEngine(packed).run(images)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['TWTA_4_4_MNIST', 'TWTA_2_2_MNIST'])
def test_qonnx_in_its_own_executor(name, tmp_path):
    pytest.importorskip('qonnx', reason='needs qonnx 1.0.0: pip install qonnx')
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    packed = file_format.read(PRETRAINED / f'{name}.twta')
    formats.write('qonnx', tmp_path / 'n.qonnx.onnx', packed, random_images(packed, 2))
    model = ModelWrapper(str(tmp_path / 'n.qonnx.onnx')).transform(InferShapes())
    with np.load(tmp_path / 'n.qonnx.vectors.npz') as vectors:
        for i in range(2):
            found = execute_onnx(model, {'images': vectors['images'][i:i + 1]}, return_full_exec_context=True)
            for layer in packed.layers:
                np.testing.assert_array_equal(found[layer.name], vectors[layer.name][i:i + 1].transpose(0, 3, 1, 2))


# ----------------------------------------------------------------------------------------------------------------------
# NIR


def read_nir(path):
    """Return the nodes of a file in the order of its chain, as dictionaries of arrays by name."""
    with h5py.File(path) as file:
        edges = {a.decode(): b.decode() for a, b in file['node/edges'][()]}
        nodes = {name: {key: value[()] for key, value in node.items()} for name, node in file['node/nodes'].items()}
        assert file['node/type'][()] == b'NIRGraph' and file['version'][()]
    chain = ['input']
    while chain[-1] != 'output':
        chain.append(edges[chain[-1]])
    assert set(chain) == set(nodes)
    return {name: nodes[name] for name in chain}


def interpret(nodes, x):
    """Return the value of every node, for inputs x [n, channels, rows, columns] and one time step."""
    values = {}
    for name, node in nodes.items():
        kind = node['type'].decode()
        if kind == 'Conv2d':
            (up, left), weight = node['padding'], node['weight']
            assert node['groups'] == 1 and (node['dilation'] == 1).all() and (node['input_shape'] == x.shape[2:]).all()
            x = np.pad(x, ((0, 0), (0, 0), (up, up), (left, left))).astype(np.float32)
            windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))
            windows = windows[:, :, ::node['stride'][0], ::node['stride'][1]]
            x = np.einsum('nchwij,fcij->nfhw', windows, weight, optimize=True) + node['bias'][:, np.newaxis, np.newaxis]
        elif kind == 'IF':
            assert x.shape[1:] == node['v_threshold'].shape == node['r'].shape and (node['r'] == 1).all()
            x = (x > node['v_threshold']).astype(np.float32)
        else:
            assert (node['shape'] == x.shape[1:]).all()
        values[name] = x
    return values


@pytest.mark.parametrize('dialect', ['thresholds', 'biases'])
def test_nir_of_an_encoder_with_filters_that_never_change(tmp_path, dialect):
    """Infinite thresholds: one filter never fires, one is always +1, one always -1; the others are as before."""
    packed = random_packed(*NETWORKS['odd'])
    encoder = packed.layers[0]
    encoder.upper[:3], encoder.lower[:3] = (np.inf, -np.inf, np.inf), (-np.inf, -np.inf, np.inf)
    formats.write('nir', tmp_path / 'n.nir', packed, random_images(packed, 4), False, dialect)
    with np.load(tmp_path / 'n.nir.vectors.npz') as vectors:
        values = interpret(read_nir(tmp_path / 'n.nir'), vectors['input'])
        found = values[encoder.name]
        if dialect == 'biases':
            assert values[f'{encoder.name}_sums'].max() < 2
        assert (found == vectors[encoder.name]).mean() > 0.999
        filters = len(encoder.upper)
        for channel in (0, 1, 2, filters, filters + 1, filters + 2):
            np.testing.assert_array_equal(found[:, channel], vectors[encoder.name][:, channel])


@pytest.mark.parametrize('dialect', ['thresholds', 'biases'])
@pytest.mark.parametrize('core', [False, True])
@pytest.mark.parametrize('border', [0, -1])
def test_nir(packed, tmp_path, dialect, core, border):
    """Every spike of the ternary layers is ours; without --core the encoder may differ on ties of its real sums."""
    packed = with_border(packed, border)
    if packed.stem and not core:
        with pytest.raises(UsageError, match='ReLU before the encoder, which NIR has not'):
            formats.check_format('nir', packed)
        return
    formats.write('nir', tmp_path / 'n.nir', packed, random_images(packed, 5), core, dialect)
    nodes = read_nir(tmp_path / 'n.nir')
    with np.load(tmp_path / 'n.nir.vectors.npz') as vectors:
        found = interpret(nodes, vectors['input'])
        same = found[packed.layers[1].name] == vectors[packed.layers[1].name]
        assert same.all() if core else same.mean() > 0.99
        for name in [layer.name for layer in packed.layers[1:]] if core else []:
            np.testing.assert_array_equal(found[name], vectors[name], err_msg=name)
            if dialect == 'biases':
                membranes = found[f'{name}_sums']
                assert (nodes[name]['v_threshold'] == 1).all() and membranes.min() > 0 and membranes.max() < 2
        if core:
            np.testing.assert_allclose(found['output'][..., 0, 0], vectors['logits'], rtol=1e-4, atol=1e-3)


def norse(path):
    import nir
    import norse.torch

    return norse.torch.from_nir(nir.read(path))


def snntorch(path):
    import nir
    from snntorch.import_nir import import_from_nir

    return import_from_nir(nir.read(path))


@pytest.mark.parametrize('reader, dialect', [(norse, 'thresholds'), (norse, 'biases'), (snntorch, 'biases')])
def test_nir_in_its_readers(tmp_path, reader, dialect):
    """Call snnTorch's layers one by one: those of 1.0.0 return tuples, which its convolutions refuse."""
    torch = pytest.importorskip('torch', reason='needs torch, nir and the reader: pip install norse snntorch nir')
    pytest.importorskip(reader.__name__, reason=f'needs {reader.__name__}')
    packed = file_format.read(PRETRAINED / 'TWTA_4_4_MNIST.twta')
    formats.write('nir', tmp_path / 'n.nir', packed, random_images(packed, 200), True, dialect)
    with np.load(tmp_path / 'n.nir.vectors.npz') as vectors:
        x, network = torch.from_numpy(vectors['input'].astype(np.float32)), reader(tmp_path / 'n.nir')
        for module in [network] if reader is norse else [module for _, module in network.named_children()]:
            x = module(x)
            x = x[0] if isinstance(x, tuple) else x
        np.testing.assert_array_equal(x.detach().numpy().reshape(200, -1).argmax(1), vectors['logits'].argmax(1))


# ----------------------------------------------------------------------------------------------------------------------
# The command


def export(*arguments):
    __main__.main(list(map(str, arguments)))


@pytest.mark.parametrize('form', ['npz', 'c', 'onnx', 'qonnx', 'nir'])
def test_every_format_from_a_packed_file(tmp_path, monkeypatch, capsys, form):
    packed = random_packed(*NETWORKS['dense'])
    file_format.write(tmp_path / 'net.twta', packed)
    np.save(tmp_path / 'x.npy', random_images(packed, 6))
    monkeypatch.chdir(tmp_path)
    export('net.twta', '--format', form, '--images', 'x.npy')
    name = 'net' + __main__.SUFFIXES[form]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith('test vectors: 4 images (') and said[1] == f'{tmp_path / name}: ' + (
        f'{(tmp_path / name).stat().st_size:,} bytes')
    before = (tmp_path / name).read_bytes()
    export('net.twta', '--format', form, '--output', tmp_path / f'other{__main__.SUFFIXES[form]}')  # vectors of noise
    assert (tmp_path / f'other{__main__.SUFFIXES[form]}').exists() and (tmp_path / name).read_bytes() == before


def test_the_formats_of_one_network_lie_beside_each_other(tmp_path, monkeypatch):
    """No file of one format replaces one of another; a folder of that name is refused before anything is written."""
    file_format.write(tmp_path / 'net.twta', random_packed(*NETWORKS['dense']))
    monkeypatch.chdir(tmp_path)
    names = set()
    for form in ('npz', 'c', 'onnx', 'qonnx', 'nir', 'html'):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        export('net.twta', '--format', form)
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
        names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 10
    (tmp_path / 'b.onnx').mkdir()
    (tmp_path / 'c.nir.vectors.npz').mkdir()
    for form, out in (('onnx', 'b.onnx'), ('nir', 'c.nir')):
        with pytest.raises(SystemExit):
            export('net.twta', '--format', form, '--output', out)
    assert {path.name for path in tmp_path.iterdir()} == names | {'b.onnx', 'c.nir.vectors.npz'}


def test_the_command_needs_no_tensorflow(tmp_path):
    file_format.write(tmp_path / 'net.twta', random_packed(*NETWORKS['odd']))
    for package in ('tensorflow', 'tensorlayer'):
        (tmp_path / f'{package}.py').write_text(f'raise SystemExit("{package} was imported")')
    for form in ('npz', 'c', 'onnx', 'qonnx', 'nir'):
        finished = subprocess.run([sys.executable, '-m', 'twta.export', 'net.twta', '--format', form], cwd=tmp_path,
                                  capture_output=True, text=True, env={'PYTHONPATH': f'{tmp_path}:{ROOT}', 'PATH': ''})
        assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize('flags, words', [
    (('--format', 'nir', '--dialect', 'quant'), 'is not one of --format nir; choose one of thresholds, biases'),
    (('--format', 'npz', '--core'), '--core is for qonnx and nir'),
    (('--format', 'c', '--dialect', 'biases'), 'is not one of --format c; leave it out'),
    (('--format', 'qonnx', '--dialect', 'quant'), 'add --core'),
    (('--format', 'onnx', '--output', 'x.nir'), 'its name ends in .onnx'),
    (('--format', 'onnx', '--divisor', '1'), '--divisor is for --format twta'),
    (('--format', 'twta', '--core', '--output', 'x.twta'), '--core is for'),
    (('--format', 'twta'), 'net.twta is read'), ((), '--format'),
    (('--format', 'twta', '--output', 'x.twta'), 'a packed network already; give a QONNX file')])
def test_flags_that_contradict_each_other(tmp_path, monkeypatch, capsys, flags, words):
    file_format.write(tmp_path / 'net.twta', random_packed(*NETWORKS['dense']))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        export('net.twta', *flags)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said and said.count('\n') == 1
    assert [path.name for path in tmp_path.iterdir()] == ['net.twta']


def test_networks_that_nir_cannot_hold():
    with pytest.raises(TwtaError, match=r'pads with \[1\], but NIR pads with 0'):
        formats.check_format('nir', with_border(random_packed(*NETWORKS['odd']), 1))
    assert nir_format.check(random_packed(*NETWORKS['odd']), core=False) is None


def test_other_forms_have_other_names(tmp_path, monkeypatch):
    file_format.write(tmp_path / 'net.twta', random_packed(*NETWORKS['odd']))
    monkeypatch.chdir(tmp_path)
    for dialect in (), ('--dialect', 'thresholds'), ('--dialect', 'biases'):
        for core in (), ('--core',):
            export('net.twta', '--format', 'nir', *core, *dialect)
    names = {path.name for path in tmp_path.iterdir()}
    expected = {f'net{form}.nir' for form in ('', '.core', '.biases', '.core.biases')}
    assert names == {'net.twta', *expected, *(f'{name}.vectors.npz' for name in expected)}
