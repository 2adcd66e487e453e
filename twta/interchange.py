"""A packed network for other programs: plain arrays (npz), a C header, ONNX; docs/deployment.md has them by field.

Each comes with test vectors: a few images, every layer's activations and the logits as the numpy engine has them.
"""
import importlib.util
import math
import re

import numpy as np

from twta import UsageError, replacing
from twta.numpy_engine import NumpyEngine
from twta.packed_file import Layer, border, filter_major, geometry, input_shape, shapes

VECTORS = 4  # images
OPSET, IR_VERSION = 17, 8  # of ONNX; old enough for the runtimes in use


def check_format(name, packed):
    """UsageError where a format has no room for the network, or the package that writes it is not installed."""
    if name == 'c' and packed.stem:
        raise UsageError(f'--format c: {packed.network} has two real-valued convolutions, the header has room for one; '
                         'use npz or onnx')
    if name == 'onnx' and not importlib.util.find_spec('onnx'):
        raise UsageError('--format onnx: the package onnx is not installed; pip install onnx')


def vectors(packed, images):
    """The test vectors by name: images, logits, and the activations of each layer under its name."""
    logits, maps = NumpyEngine(packed).run(images)
    names = [layer.name for layer in packed.layers]
    return {'images': images, **dict(zip(names, maps, strict=True)), 'logits': logits}


def after(shape, layer):
    """Rows and columns of padding after a map."""
    before, whole = border(shape, layer)
    return [whole[axis] - shape[axis] - before[axis] for axis in (0, 1)]


# ----------------------------------------------------------------------------------------------------------------------
# npz


def write_npz(path, packed, images):
    """Everything as plain arrays; returns the file's size in bytes."""
    arrays = {'network': np.array(packed.network), 'dataset': np.array(packed.dataset), 'image': np.array(packed.image),
              'crop': np.array(packed.crop), 'classes': np.array(packed.classes),
              'layers': np.array([layer.name for layer in packed.layers])}
    if packed.stem:
        arrays.update({f'stem/{field}': value for field, value in packed.stem._asdict().items()})
    for layer, shape, before, _ in shapes(packed):
        for field in ('weights', 'upper', 'lower', 'stride', 'groups'):
            arrays[f'{layer.name}/{field}'] = np.array(getattr(layer, field))
        arrays[f'{layer.name}/padding'] = np.stack([before, after(shape, layer)], 1)
    for field in ('weights', 'scale', 'shift'):
        arrays[f'classifier/{field}'] = getattr(packed, field)
    arrays.update({f'vectors/{name}': array for name, array in vectors(packed, images).items()})
    with replacing(path) as part, open(part, 'wb') as file:
        np.savez_compressed(file, **arrays)
    return path.stat().st_size


# ----------------------------------------------------------------------------------------------------------------------
# C


def write_c(path, packed, images):
    """One C99 header: struct twta_layer, the layers, the classifier and the vectors; returns its size in bytes."""
    found = vectors(packed, images)
    lines = [
        f'/* {packed.network} on {packed.dataset}, written by --mode export --format c; see docs/deployment.md. */',
        f'#ifndef {guard(packed)}', f'#define {guard(packed)}', '#include <math.h>', '#include <stdint.h>', '',
        f'#define TWTA_NETWORK "{c_text(packed.network)}"',
        *(f'#define TWTA_{name} {value}' for name, value in zip(
            ('HEIGHT', 'WIDTH', 'CHANNELS', 'CROP', 'LAYERS', 'CLASSES', 'FEATURES', 'VECTORS', 'LARGEST_MAP'),
            (*packed.image, packed.crop, len(packed.layers), len(packed.classes), len(packed.weights), len(images),
             max(math.prod(input_shape(packed)), *(math.prod(out) for _, _, _, out in shapes(packed)))),
            strict=True)),
        '', 'struct twta_layer {',
        '    const char *name;',
        '    int height, width, channels;              /* of its input */',
        '    int out_height, out_width, filters;       /* of its output */',
        '    int kernel_height, kernel_width, stride, top, left, groups;  /* top, left: zeros before the map */',
        '    const float *real;                        /* the encoder: weights [filter][row][column][channel] */',
        '    const uint32_t *nonzero, *negative;       /* the others: bits in that order, a new word a filter */',
        '    const float *real_upper, *real_lower;     /* thresholds of the encoder */',
        '    const int32_t *upper, *lower;             /* and of the others */', '};', '']
    rows = []
    for index, (layer, shape, before, out) in enumerate(shapes(packed)):
        name, weights = f'twta_{index}', filter_major(layer.weights)
        row = [c_string(layer.name), *shape, *out, *weights.shape[1:3], layer.stride, *before, layer.groups]
        if not index:
            lines += [c_array('float', f'{name}_weights', weights), c_array('float', f'{name}_upper', layer.upper),
                      c_array('float', f'{name}_lower', layer.lower)]
            row += [f'{name}_weights', 0, 0, f'{name}_upper', f'{name}_lower', 0, 0]
        else:
            for plane, bits in (('nonzero', weights != 0), ('negative', weights < 0)):
                lines.append(c_array('uint32_t', f'{name}_{plane}', words(bits)))
            for which in ('upper', 'lower'):
                lines.append(c_array('int32_t', f'{name}_{which}', getattr(layer, which)))
            row += [0, f'{name}_nonzero', f'{name}_negative', 0, 0, f'{name}_upper', f'{name}_lower']
        rows.append('    {' + ', '.join(map(str, row)) + '},')
    lines += ['static const struct twta_layer twta_layers[TWTA_LAYERS] = {', *rows, '};', '',
              f'static const char *const twta_classes[] = {{{", ".join(map(c_string, packed.classes))}}};',
              c_array('float', 'twta_weights', packed.weights),  # [feature][class]
              c_array('float', 'twta_scale', packed.scale), c_array('float', 'twta_shift', packed.shift),
              c_array('uint8_t', 'twta_images', found['images']), c_array('float', 'twta_logits', found['logits'])]
    for index, layer in enumerate(packed.layers):
        lines.append(c_array('int8_t', f'twta_{index}_vectors', found[layer.name]))
    pointers = ', '.join(f'twta_{index}_vectors' for index in range(len(packed.layers)))
    lines += [f'static const int8_t *const twta_vectors[TWTA_LAYERS] = {{{pointers}}};', '', '#endif']
    text = '\n'.join(lines) + '\n'
    with replacing(path) as part:
        part.write_text(text, encoding='ascii')
    return len(text)


def words(bits):
    """Bits [filters, ...] as 32 to a word, the first the lowest; each filter begins a word."""
    bits = bits.reshape(len(bits), -1)
    bits = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 32)))
    return np.ascontiguousarray(np.packbits(bits, axis=1, bitorder='little')).view('<u4')


def c_array(kind, name, values):
    flat = values.ravel()
    if kind == 'float':
        texts = [c_float(value) for value in flat.tolist()]
    else:
        texts = [f'0x{value:x}' for value in flat.tolist()] if kind == 'uint32_t' else list(map(str, flat.tolist()))
    rows = [','.join(texts[start:start + 16]) for start in range(0, len(texts), 16)]
    return f'static const {kind} {name}[{flat.size}] = {{\n' + ',\n'.join(rows) + '};'


def c_float(value):
    return value.hex() + 'f' if math.isfinite(value) else 'INFINITY' if value > 0 else '-INFINITY'


def c_text(text):
    return re.sub(r'[^ !#-\[\]-~]', '_', text)


def c_string(text):
    return f'"{c_text(text)}"'


def guard(packed):
    return re.sub(r'\W', '_', packed.network, flags=re.ASCII).upper() + '_H'


# ----------------------------------------------------------------------------------------------------------------------
# ONNX


def write_onnx(path, packed, images):
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
            np.savez_compressed(file, **vectors(packed, images))
    return len(data)


WRITERS = {'npz': write_npz, 'c': write_c, 'onnx': write_onnx}
