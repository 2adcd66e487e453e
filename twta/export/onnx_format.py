"""Export of a packed network as an ONNX model; docs/deployment.md, section ONNX, describes it.

Real-valued sums are in float64, as in the evaluation graph. Ternary sums are whole numbers, exact in float32.
"""
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from twta.packed.file_format import Layer, after, geometry, input_shape, shapes

VERSIONS = {'int8': (17, 8), 'int2': (25, 13)}  # opset and IR by type of the weights; int8 is for the runtimes in use


class OnnxBuilder:
    """The nodes and constants of an ONNX graph. Each method adds to them and returns the name of a tensor.

    Names that it makes have a /, which no name of a layer has.

    dialect    of the file; here the type of ternary weights, a key of VERSIONS
    """

    def __init__(self, dialect):
        self.dialect = dialect
        self.nodes = []
        self.constants = {}  # initializers by type, shape and bytes

    def constant(self, array):
        """Add an initializer; equal arrays share one."""
        array = np.asarray(array, order='C')
        key = array.dtype.str, array.shape, array.tobytes()
        return self.constants.setdefault(key, numpy_helper.from_array(array, f'constant/{len(self.constants)}')).name

    def node(self, kind, *inputs, output=None, **attributes):
        """Add a node of a kind of ONNX operator.

        inputs    names of tensors, or arrays, which become constants
        output    name of the result (default: made from kind)
        """
        inputs = [self.constant(item) if isinstance(item, np.ndarray) else item for item in inputs]
        output = output or f'{kind}/{len(self.nodes)}'
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def cast(self, x, kind):
        return self.node('Cast', x, to=kind)

    def weights(self, layer):
        """Add the weights of a ternary layer, float32 [filter, channel, row, column]."""
        weights = layer.weights.transpose(3, 2, 0, 1)
        if self.dialect == 'int8':
            return self.cast(self.constant(weights), TensorProto.FLOAT)
        name = f'constant/{len(self.constants)}'
        self.constants[name] = helper.make_tensor(name, TensorProto.INT2, weights.shape, weights.ravel())
        return self.cast(name, TensorProto.FLOAT)

    def fire(self, sums, layer, output=None):
        """Add a layer's thresholds: from sums float32 NCHW to activations float32.

        Thresholds of whole sums are half a step away from them: a runtime that rounds (Winograd, bfloat16) then gives
        the same activations.
        """
        half = 0.5 if layer.upper.dtype == np.int32 else 0
        upper, lower = ((thresholds + offset).astype(np.float32).reshape(-1, 1, 1)
                        for thresholds, offset in ((layer.upper, -half), (layer.lower, half)))
        positive = self.cast(self.node('GreaterOrEqual', sums, upper), TensorProto.FLOAT)
        negative = self.cast(self.node('LessOrEqual', sums, lower), TensorProto.FLOAT)
        return self.node('Sub', positive, negative, output=output)


def prepare(builder, packed):
    """Add what numpy_engine.prepare does to the input `images`; the result is float64 NHWC."""
    if not packed.crop:
        pixels = builder.cast('images', TensorProto.FLOAT)
        return builder.cast(builder.node('Div', pixels, np.float32([256])), TensorProto.DOUBLE)
    top, left = ((side - packed.crop) // 2 for side in packed.image[:2])
    x = builder.node('Slice', 'images', np.array([top, left]), np.array([top + packed.crop, left + packed.crop]),
                     np.array([1, 2]))
    x = builder.cast(x, TensorProto.DOUBLE)
    count, axes = np.float64([packed.crop ** 2 * packed.image[2]]), np.array([1, 2, 3])
    mean = builder.node('Div', builder.node('ReduceSum', x, axes), count)
    square = builder.node('Div', builder.node('ReduceSum', builder.node('Mul', x, x), axes), count)
    deviation = builder.node('Sqrt', builder.node('Sub', square, builder.node('Mul', mean, mean)))
    centred = builder.node('Sub', x, mean)
    x = builder.node('Div', centred, builder.node('Max', deviation, count ** -0.5))
    return builder.cast(builder.cast(x, TensorProto.FLOAT), TensorProto.DOUBLE)


def convolve_real(builder, x, shape, layer):
    """Add a convolution in float64 NHWC of maps [n, *shape].

    Runtimes have no such convolution, so the values under the kernel are put side by side and times a matrix.
    """
    before, out = geometry(shape, layer)
    x = builder.node('Pad', x, np.array([0, *before, 0, 0, *after(shape, layer), 0]), np.array(0.0))
    under = []
    for i, j in np.ndindex(layer.weights.shape[:2]):
        ends = [i + (out[0] - 1) * layer.stride + 1, j + (out[1] - 1) * layer.stride + 1]
        under.append(builder.node('Slice', x, np.array([i, j]), np.array(ends), np.array([1, 2]),
                                  np.array([layer.stride] * 2)))
    weights = layer.weights.reshape(-1, out[2]).astype(np.float64)
    return builder.node('MatMul', builder.node('Concat', *under, axis=3), weights)


def encoder_input(builder, packed):
    """Add what numpy_engine.encoder_input does: the prepared images, or the stem's maps of them."""
    x = prepare(builder, packed)
    if not packed.stem:
        return x
    weights, scale, shift = packed.stem
    shape = (*input_shape(packed)[:2], packed.image[2])
    sums = convolve_real(builder, x, shape, Layer('stem', weights, None, None, 1, 'SAME', 1))
    shifted = builder.node('Add', builder.node('Mul', sums, scale), shift)
    return builder.node('Max', shifted, np.zeros(1))


def convolve_ternary(builder, x, shape, before, layer):
    """Add a ternary convolution in float32 NCHW; before: rows and columns of padding before the map."""
    if layer.groups > 1:  # ONNX's groups are blocks of neighbours
        x = builder.node('Gather', x, np.arange(shape[2]).reshape(-1, layer.groups).T.ravel(), axis=1)
    pads = [*before, *after(shape, layer)]
    if layer.border:
        x = builder.node('Pad', x, np.array([0, 0, *pads[:2], 0, 0, *pads[2:]]), np.array(layer.border, np.float32))
        pads = [0] * 4
    return builder.node('Conv', x, builder.weights(layer), kernel_shape=layer.weights.shape[:2],
                        strides=[layer.stride] * 2, dilations=[1, 1], group=layer.groups, pads=pads)


def classify(builder, x, packed):
    """Add the classifier, from the last layer's activations NCHW to `logits`."""
    features = builder.node('Reshape', builder.node('Transpose', x, perm=[0, 2, 3, 1]),
                            np.array([-1, len(packed.weights)]))
    sums = builder.node('MatMul', builder.cast(features, TensorProto.DOUBLE), packed.weights.astype(np.float64))
    scaled = builder.node('Mul', builder.cast(sums, TensorProto.FLOAT), packed.scale)
    return builder.node('Add', scaled, packed.shift, output='logits')


def build_model(packed, dialect):
    """Return the checked ModelProto, from `images` uint8 NHWC to `logits` float32 [n, classes].

    Each layer's activations, float32 NCHW, have the layer's name. dialect: a key of VERSIONS.
    """
    builder = OnnxBuilder(dialect)
    classify(builder, add_ternary(builder, encode(builder, packed), packed), packed)
    return finish(builder, packed, *ends(packed), versions=VERSIONS[dialect])


def encode(builder, packed):
    """Add the encoder, from `images` to its activations NCHW, which have its name."""
    encoder, shape, _, _ = next(iter(shapes(packed)))
    sums = builder.cast(convolve_real(builder, encoder_input(builder, packed), shape, encoder), TensorProto.FLOAT)
    return builder.fire(builder.node('Transpose', sums, perm=[0, 3, 1, 2]), encoder, output=encoder.name)


def add_ternary(builder, x, packed):
    """Add the ternary layers, from the encoder's activations NCHW to those of the last layer."""
    for layer, shape, before, _ in list(shapes(packed))[1:]:
        x = builder.fire(convolve_ternary(builder, x, shape, before, layer), layer, output=layer.name)
    return x


def ends(packed, n='n'):
    """Return input and output of a whole model, for n images."""
    return (helper.make_tensor_value_info('images', TensorProto.UINT8, [n, *packed.image]),
            helper.make_tensor_value_info('logits', TensorProto.FLOAT, [n, len(packed.classes)]))


def finish(builder, packed, first, last, opsets=(), versions=VERSIONS['int8']):
    """Return the checked model of a builder's nodes.

    first, last    input and output
    opsets         besides that of ONNX
    versions       opset of ONNX, version of its IR
    """
    opset, ir_version = versions
    graph = helper.make_graph(builder.nodes, packed.network, [first], [last], builder.constants.values())
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', opset), *opsets], ir_version=ir_version,
                              producer_name='TWTA-Net')
    helper.set_model_props(model, {'dataset': packed.dataset, 'classes': ','.join(packed.classes)})
    onnx.checker.check_model(model)
    return model
