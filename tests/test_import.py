"""QONNX files of others, in the form that Brevitas writes, as packed networks; their scores are computed by onnx."""
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from twta import TwtaError
from twta.export import __main__, qonnx_import
from twta.packed import file_format
from twta.packed.numpy_engine import NumpyEngine

DOMAIN = 'qonnx.custom_op.general'


class Quant(OpRun):
    """Quant of QONNX, as its specification says, for signed values and rounding to even."""
    op_domain = DOMAIN

    def _run(self, x, scale, zero_point, bits, signed=None, narrow=None, rounding_mode=None):
        if bits == 1:
            return (np.where(x >= 0, 1, -1).astype(np.float32),)
        least = -2 ** (int(bits) - 1) + narrow if signed else 0
        most = 2 ** (int(bits) - signed) - 1
        return (np.float32(scale) * np.rint(x / scale).clip(least, most).astype(np.float32),)


class MultiThreshold(OpRun):
    op_domain = DOMAIN

    def _run(self, x, thresholds, out_bias=None):
        return np.float32(out_bias) + (x[:, :, np.newaxis] >= thresholds.reshape(
            *thresholds.shape, *[1] * (x.ndim - 2))).sum(2).astype(np.float32),


class Builder:
    """A QONNX model that grows node by node; each method adds to the end of its chain."""

    def __init__(self, image, seed=0):
        self.rng, self.image = np.random.default_rng(seed), image
        self.nodes, self.constants, self.tip, self.channels = [], [], 'x', image[0]

    def constant(self, values):
        self.constants.append(numpy_helper.from_array(np.asarray(values), f'c{len(self.constants)}'))
        return self.constants[-1].name

    def node(self, kind, *values, tip=None, **attributes):
        output = f'{kind}{len(self.nodes)}'
        domain = DOMAIN if kind in ('Quant', 'MultiThreshold') else ''
        inputs = [tip or self.tip, *map(self.constant, values)]
        self.nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        if tip is None:
            self.tip = output
        return output

    def quant(self, bits=2, scale=1.0, narrow=1, tip=None):
        values = (np.array(value, np.float32) for value in (scale, 0, bits))
        return self.node('Quant', *values, tip=tip, signed=1, narrow=narrow, rounding_mode='ROUND')

    def normalise(self):
        shape = (self.channels,)
        self.node('BatchNormalization', *(values.astype(np.float32) for values in (
            self.rng.uniform(-1.5, 2, shape), self.rng.normal(size=shape), self.rng.normal(scale=3, size=shape),
            self.rng.uniform(5, 60, shape))), epsilon=1e-5)

    def weights(self, *shape, scale=1.0):
        weights = self.constant((scale * self.rng.integers(-1, 2, shape)).astype(np.float32))
        return self.quant(scale=scale, tip=weights)

    def conv(self, filters, size, group=1, bias=False, **attributes):
        weights = self.weights(filters, self.channels // group, size, size)
        self.node('Conv', *([self.rng.normal(size=filters).astype(np.float32)] * bias), group=group, **attributes)
        self.nodes[-1].input.insert(1, weights)
        self.channels = filters

    def dense(self, features, filters, scale=1.0):
        weights = self.weights(filters, features, scale=scale)
        self.node('Gemm', transB=1)
        self.nodes[-1].input.append(weights)
        self.channels = filters

    def model(self):
        graph = helper.make_graph(
            self.nodes, 'net', [helper.make_tensor_value_info('x', TensorProto.FLOAT, [1, *self.image])],
            [helper.make_tensor_value_info(self.tip, TensorProto.FLOAT, [1, self.channels])], self.constants)
        opsets = [helper.make_opsetid('', 17), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def ternary_input():
    """Like Brevitas' TFC_2W2A: the pixels become ternary; dense layers; one normalisation for all classes."""
    net = Builder((1, 9, 7))
    net.node('Mul', np.float32(2))
    net.node('Sub', np.float32([1]))
    net.quant()
    net.node('Reshape', np.array([1, -1]))
    for features in (63, 20):
        net.dense(features, 20)
        net.normalise()
        net.quant()
    net.dense(20, 5)
    for kind, value in (('Sub', 0.7), ('Div', 3.1), ('Mul', 1.3), ('Add', -0.2)):
        net.node(kind, np.float32([value]))
    return net


def eight_bit_input():
    """Like Brevitas' CNV_2W2A: pixels in 8 bits, convolutions, MaxPool."""
    net = Builder((3, 12, 12), seed=1)
    net.node('Mul', np.float32(2))
    net.node('Sub', np.float32([1]))
    net.quant(8, 2.0 ** -7, narrow=0)
    net.conv(8, 3)
    net.normalise()
    net.quant()
    net.conv(8, 3)
    net.normalise()
    net.quant()
    net.node('MaxPool', kernel_shape=[2, 2], strides=[2, 2])
    net.node('Flatten')
    net.dense(8 * 16, 20)
    net.normalise()
    net.quant()
    net.dense(20, 4)
    return net


def other_forms():
    """SAME padding of pixels that are not 0 there, biases, groups, scales, thresholds, binary activations."""
    net = Builder((2, 8, 8), seed=2)
    net.node('Sub', np.float32([[[0.5]], [[0.25]]]))
    net.quant(4, 0.125)
    net.conv(6, 3, bias=True, pads=[1, 1, 1, 1])
    net.node('Mul', np.float32(0.25))
    net.quant(scale=0.5)
    net.conv(6, 3, group=2, pads=[1, 1, 1, 1])
    net.node('Mul', np.float32(0.7))
    net.quant()
    net.conv(6, 2, group=6, strides=[2, 2])
    net.node('MultiThreshold', np.float32([[-1, 1]] * 3 + [[0, 2]] * 3), out_bias=-1.0)
    net.conv(10, 1)
    net.node('MultiThreshold', np.float32([[1]] * 10), out_bias=0.0)
    net.conv(3, 4)
    net.node('Flatten')
    return net


def flattened_late():
    """Flatten between pointwise nodes, a factor in Gemm, a bipolar Quant of one bit, rounding in small letters."""
    net = Builder((1, 6, 6), seed=4)
    net.quant(8, 2.0 ** -7, narrow=0)
    net.conv(8, 3)
    net.normalise()
    net.node('Flatten')
    net.quant()
    net.dense(8 * 16, 12)
    net.nodes[-1].attribute.append(helper.make_attribute('alpha', 0.25))
    net.node('Quant', *(np.array(value, np.float32) for value in (1, 0, 1)), signed=1, narrow=0, rounding_mode='floor')
    net.dense(12, 4)
    return net


@pytest.mark.parametrize('make', [ternary_input, eight_bit_input, other_forms, flattened_late])
def test_an_imported_network_has_the_scores_of_the_file(tmp_path, monkeypatch, capsys, make):
    model = make().model()
    onnx.save(model, tmp_path / 'net.onnx')
    monkeypatch.chdir(tmp_path)
    __main__.main(['net.onnx', '--format', 'twta'])
    assert capsys.readouterr().out.startswith('the same scores as net.onnx on 20 images (noise)\n')
    packed = file_format.read(tmp_path / 'net.twta')
    x = np.random.default_rng(3).integers(0, 256, (40, *packed.image)).astype(np.uint8)
    session = ReferenceEvaluator(model, new_ops=[Quant, MultiThreshold])
    expected = [session.run(None, {'x': (image / np.float32(255)).transpose(2, 0, 1)[np.newaxis]})[0][0] for image in x]
    np.testing.assert_allclose(NumpyEngine(packed).run(x)[0], expected, rtol=1e-4, atol=1e-4)
    assert len(set(np.argmax(expected, 1))) > 1


def test_the_divisor_of_the_pixels():
    """A network that is told its pixels undivided: pixel - 128 and thresholds on whole sums of pixels."""
    net = Builder((1, 4, 4))
    net.node('Sub', np.float32([128]))
    net.quant(9, 1.0)
    net.conv(6, 2)
    net.node('Mul', np.float32(0.01))
    net.quant()
    net.node('Flatten')
    net.dense(54, 3)
    packed, original = qonnx_import.import_model(net.model(), 'net', 1)
    x = np.random.default_rng(3).integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)
    np.testing.assert_allclose(NumpyEngine(packed).run(x)[0], original(x), rtol=1e-4, atol=1e-4)


def spoiled(change):
    """Return the model of ternary_input, changed before its second layer or, by a list of one, at its end."""
    net = Builder((1, 9, 7))
    net.node('Mul', np.float32(2))
    net.node('Sub', np.float32([1]))
    net.quant()
    net.node('Flatten')
    net.dense(63, 20)
    change(net)
    net.dense(20, 5)
    return net.model()


def add_branch(net):
    net.quant()
    tip = net.tip
    net.normalise()
    net.nodes.append(helper.make_node('Add', [tip, net.tip], ['sum']))
    net.tip = 'sum'


def large_constant(net):
    large = net.node('Mul', np.ones((1, 30_000), np.float32), tip=net.constant(np.ones((30_000, 1), np.float32)))
    net.nodes[-2].input[1] = large
    net.nodes[-2:] = net.nodes[:-3:-1]


@pytest.mark.parametrize('change, words', [
    (lambda net: net.node('Relu'), 'are 0 to 63 times 1; only'),
    (lambda net: net.quant(3, 0.5), 'only -1, 0 and 1'),
    (lambda net: (net.node('Mul', np.float32(0.123)), net.normalise()), 'it lacks a Quant'),
    (lambda net: net.node('Softmax'), 'Softmax .* cannot be imported; Add, Sub'),
    (lambda net: (net.quant(), net.node('MatMul', np.random.default_rng(0).normal(size=(20, 20)).astype(np.float32)),
                  net.quant()), 'weights are not -a, 0 and'),
    (lambda net: (net.node('Mul', np.ones((3, 1, 20), np.float32)), net.quant()), 'not the same at every place'),
    (lambda net: (net.node('Add', np.zeros((1, 7), np.float32)), net.quant()), 'cannot be computed'),
    (add_branch, 'reads more than the node before it'),
    (lambda net: (net.quant(), net.dense(21, 20)), 'do not fit a map'),
    (lambda net: net.node('MultiThreshold', np.float32([[0, 1]] * 20), out_bias=-1.0, data_layout='NHWC'), 'NHWC'),
    (lambda net: (net.node('Mul', np.ones((30_000, 1), np.float32)), large_constant(net)), 'constants need more')])
def test_other_forms_are_refused_by_name(change, words):
    with pytest.raises(TwtaError, match=words):
        qonnx_import.import_model(spoiled(change), 'net', 255)


def test_damaged_files_are_refused_in_a_line(tmp_path, monkeypatch, capsys):
    """Single bytes changed at random: each file is imported or ends in one line; nothing is written then."""
    monkeypatch.chdir(tmp_path)
    data, rng = other_forms().model().SerializeToString(), np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 4):
            damaged[at] = rng.integers(256)
        (tmp_path / 'net.onnx').write_bytes(damaged)
        try:
            __main__.main(['net.onnx', '--format', 'twta'])
            (tmp_path / 'net.twta').unlink()
        except SystemExit as stopped:
            said = capsys.readouterr().err
            assert stopped.code in (1, 2) and said.count('\n') == 1, said
            assert [path.name for path in tmp_path.iterdir()] == ['net.onnx']


def test_a_file_that_is_not_of_the_form_is_refused_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    padded = Builder((1, 8, 8))
    padded.quant(8, 2.0 ** -7)
    padded.conv(4, 3, strides=[2, 2], pads=[1, 1, 1, 1])
    padded.quant()
    padded.node('Flatten')
    padded.dense(64, 3)
    onnx.save(padded.model(), 'padded.onnx')
    ends = eight_bit_input()
    ends.node('Relu')
    onnx.save(ends.model(), 'ends.onnx')
    flat = ternary_input().model()
    flat.graph.input[0].type.tensor_type.shape.dim.pop()
    onnx.save(flat, 'flat.onnx')
    (tmp_path / 'text.onnx').write_text('no network')
    before = set(tmp_path.iterdir())
    for name, words in (('padded', "is neither none nor TensorFlow's SAME"), ('ends', 'are not linear'),
                        ('flat', 'not [1, channels, rows, columns]'), ('text', 'not an ONNX file')):
        with pytest.raises(SystemExit) as stopped:
            __main__.main([f'{name}.onnx', '--format', 'twta'])
        said = capsys.readouterr().err
        assert stopped.value.code == 1 and words in said and said.count('\n') == 1, said
    assert set(tmp_path.iterdir()) == before
