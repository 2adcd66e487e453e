"""A packed network as an ONNX model."""
import numpy as np

from twta.files import replacing
from twta.packed.file_format import Layer, after, geometry, input_shape, shapes

OPSET, IR_VERSION = 17, 8  # of ONNX; old enough for the runtimes in use


def write_onnx(path, packed, vectors):
    """An ONNX model from uint8 images NHWC to logits, and its vectors beside it; returns the model's size in bytes.

    A layer's activations, float32 NCHW, go by its name. Real-valued sums are in float64, as in the evaluation graph.
    """
    import onnx  # here: only this needs it
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], {}

    def constant(array):
        """The name of an initializer, one for equal arrays."""
        array = np.ascontiguousarray(array)
        key = array.dtype.str, array.shape, array.tobytes()
        return constants.setdefault(key, numpy_helper.from_array(array, f'constant_{len(constants)}')).name

    def node(kind, *inputs, output=None, **attributes):
        inputs = [constant(item) if isinstance(item, np.ndarray) else item for item in inputs]
        output = output or f'{kind}_{len(nodes)}'
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def cast(x, kind):
        return node('Cast', x, to=kind)

    def fire(sums, layer, output=None):
        """Activations of sums, float32, whose filters are on the axis 1 or, of the encoder, on the last one."""
        shape = (-1, 1, 1) if layer.upper.dtype == np.int32 else (-1,)
        upper, lower = (thresholds.astype(np.float32).reshape(shape) for thresholds in (layer.upper, layer.lower))
        positive = cast(node('GreaterOrEqual', sums, upper), TensorProto.FLOAT)
        return node('Sub', positive, cast(node('LessOrEqual', sums, lower), TensorProto.FLOAT), output=output)

    def prepare(x):
        if not packed.crop:
            return cast(node('Div', cast(x, TensorProto.FLOAT), np.float32([256])), TensorProto.DOUBLE)
        top, left = ((side - packed.crop) // 2 for side in packed.image[:2])
        x = node('Slice', x, np.array([top, left]), np.array([top + packed.crop, left + packed.crop]), np.array([1, 2]))
        x = cast(x, TensorProto.DOUBLE)
        count, axes = np.float64([packed.crop ** 2 * packed.image[2]]), np.array([1, 2, 3])
        mean = node('Div', node('ReduceSum', x, axes), count)
        square = node('Div', node('ReduceSum', node('Mul', x, x), axes), count)
        deviation = node('Sqrt', node('Sub', square, node('Mul', mean, mean)))
        x = node('Div', node('Sub', x, mean), node('Max', deviation, count ** -0.5))
        return cast(cast(x, TensorProto.FLOAT), TensorProto.DOUBLE)

    def convolve_real(x, shape, layer):
        """Sums in float64 NHWC. Runtimes have no such convolution: the values under the kernel, times a matrix."""
        before, out = geometry(shape, layer)
        x = node('Pad', x, np.array([0, *before, 0, 0, *after(shape, layer), 0]), np.array(0.0))
        under = []
        for i, j in np.ndindex(layer.weights.shape[:2]):
            ends = [i + (out[0] - 1) * layer.stride + 1, j + (out[1] - 1) * layer.stride + 1]
            under.append(node('Slice', x, np.array([i, j]), np.array(ends), np.array([1, 2]),
                              np.array([layer.stride] * 2)))
        return node('MatMul', node('Concat', *under, axis=3), layer.weights.reshape(-1, out[2]).astype(np.float64))

    def see(x):
        if not packed.stem:
            return x
        weights, scale, shift = packed.stem
        shape = (*input_shape(packed)[:2], packed.image[2])
        sums = convolve_real(x, shape, Layer('stem', weights, None, None, 1, 'SAME', 1))
        return node('Max', node('Add', node('Mul', sums, scale), shift), np.zeros(1))

    for index, (layer, shape, before, _) in enumerate(shapes(packed)):
        kernel = layer.weights.shape[:2]
        if not index:
            sums = convolve_real(see(prepare('images')), shape, layer)
            activations = fire(cast(sums, TensorProto.FLOAT), layer)
            x = node('Transpose', activations, perm=[0, 3, 1, 2], output=layer.name)
            continue
        if layer.groups > 1:  # ONNX's groups are blocks of neighbours
            x = node('Gather', x, np.arange(shape[2]).reshape(-1, layer.groups).T.ravel(), axis=1)
        weights = cast(constant(layer.weights.transpose(3, 2, 0, 1)), TensorProto.FLOAT)
        sums = node('Conv', x, weights, kernel_shape=kernel, strides=[layer.stride] * 2, group=layer.groups,
                    pads=[*before, *after(shape, layer)])
        x = fire(sums, layer, output=layer.name)
    features = node('Reshape', node('Transpose', x, perm=[0, 2, 3, 1]), np.array([-1, len(packed.weights)]))
    sums = node('MatMul', cast(features, TensorProto.DOUBLE), packed.weights.astype(np.float64))
    scaled = node('Mul', cast(sums, TensorProto.FLOAT), packed.scale)
    node('Add', scaled, packed.shift, output='logits')
    graph = helper.make_graph(
        nodes, packed.network, [helper.make_tensor_value_info('images', TensorProto.UINT8, ['n', *packed.image])],
        [helper.make_tensor_value_info('logits', TensorProto.FLOAT, ['n', len(packed.classes)])], constants.values())
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION,
                              producer_name='TWTA-Net')
    helper.set_model_props(model, {'dataset': packed.dataset, 'classes': ','.join(packed.classes)})
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    with replacing(path) as part, replacing(path.with_suffix('.vectors.npz')) as beside:  # both or neither
        part.write_bytes(data)
        with open(beside, 'wb') as file:
            np.savez_compressed(file, **vectors)
    return len(data)
