"""A packed network for other programs: plain arrays (npz), a C header, ONNX; docs/deployment.md has them by field.

Each comes with test vectors: a few images, every layer's activations and the logits as the numpy engine has them.
"""
import importlib.util
import math
import re

import numpy as np

from twta import UsageError
from twta.files import replacing
from twta.packed.file_format import after, filter_major, input_shape, shapes
from twta.packed.numpy_engine import NumpyEngine

VECTORS = 4  # images


def check_format(name, packed):
    """UsageError where a format has no room for the network, or the package that writes it is not installed."""
    if name == 'c' and packed.stem:
        raise UsageError(f'--format c: {packed.network} has two real-valued convolutions, the header has room for one; '
                         'use npz or onnx')
    if name == 'onnx' and not importlib.util.find_spec('onnx'):
        raise UsageError('--format onnx: the package onnx is not installed; pip install onnx')


def make_vectors(packed, images):
    """The test vectors by name: images, logits, and the activations of each layer under its name."""
    logits, maps = NumpyEngine(packed).run(images)
    names = [layer.name for layer in packed.layers]
    return {'images': images, **dict(zip(names, maps, strict=True)), 'logits': logits}


def write_npz(path, packed, vectors):
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
    arrays.update({f'vectors/{name}': array for name, array in vectors.items()})
    with replacing(path) as part, open(part, 'wb') as file:
        np.savez_compressed(file, **arrays)
    return path.stat().st_size


def write_c(path, packed, vectors):
    """One C99 header: struct twta_layer, the layers, the classifier and the vectors; returns its size in bytes."""
    lines = [
        f'/* {packed.network} on {packed.dataset}, written by --mode export --format c; see docs/deployment.md. */',
        f'#ifndef {guard(packed)}', f'#define {guard(packed)}', '#include <math.h>', '#include <stdint.h>', '',
        f'#define TWTA_NETWORK "{c_text(packed.network)}"',
        *(f'#define TWTA_{name} {value}' for name, value in zip(
            ('HEIGHT', 'WIDTH', 'CHANNELS', 'CROP', 'LAYERS', 'CLASSES', 'FEATURES', 'VECTORS', 'LARGEST_MAP'),
            (*packed.image, packed.crop, len(packed.layers), len(packed.classes), len(packed.weights),
             len(vectors['images']),
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
              c_array('uint8_t', 'twta_images', vectors['images']), c_array('float', 'twta_logits', vectors['logits'])]
    for index, layer in enumerate(packed.layers):
        lines.append(c_array('int8_t', f'twta_{index}_vectors', vectors[layer.name]))
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


def write_onnx(path, packed, vectors):
    """Write an ONNX model and its test vectors; return the model's size in bytes."""
    from twta.export import onnx_format  # here: the package onnx is optional

    return onnx_format.write_onnx(path, packed, vectors)


WRITERS = {'npz': write_npz, 'c': write_c, 'onnx': write_onnx}


def write(name, path, packed, images):
    """Write the network in the format of that name, with test vectors of the images; return the size in bytes."""
    return WRITERS[name](path, packed, make_vectors(packed, images))
