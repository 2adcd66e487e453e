"""A packed network in the formats of other programs: plain arrays (npz), a C header, ONNX, QONNX, NIR.

docs/deployment.md and docs/exchange.md describe each format. Each file but html comes with test vectors: a few images,
and the activations and logits that the numpy engine computes from them.
"""
import importlib.util
import math
import re

import numpy as np

from twta import UsageError
from twta.files import replacing
from twta.packed.file_format import after, filter_major, input_shape, shapes
from twta.packed.numpy_engine import NumpyEngine

VECTORS = 4  # images among the test vectors
PACKAGES = {'onnx': 'onnx', 'qonnx': 'onnx', 'nir': 'h5py'}  # format: the package that writes it


def check_format(name, packed, core=False, dialect=None):
    """Raise UsageError if a format cannot hold the network, or if the package that writes it is not installed.

    core       leave the encoder out, if the format can: qonnx, nir
    dialect    one of DIALECTS[name]; None: the first
    """
    if name == 'c' and packed.stem:
        raise UsageError(f'--format c: {packed.network} has two real-valued convolutions, but the header has room for '
                         'one; use npz or onnx')
    if name in PACKAGES:
        check_package(name, PACKAGES[name])
    if core and name not in CORES:
        raise UsageError(f'--core is for {" and ".join(CORES)}; leave it out with --format {name}')
    valid = DIALECTS.get(name, ())
    if dialect not in (None, *valid):
        choose = f'choose one of {", ".join(valid)}' if valid else 'leave it out'
        raise UsageError(f'--dialect {dialect} is not one of --format {name}; {choose}')
    if name == 'qonnx' and dialect == 'quant' and not core:
        raise UsageError('--dialect quant: the thresholds of the encoder cannot be written so; add --core')
    if dialect == 'int2':
        import onnx

        if not hasattr(onnx.TensorProto, 'INT2'):
            raise UsageError(f'--dialect int2: onnx {onnx.__version__} has no such type; pip install --upgrade onnx')
    if name == 'nir':
        from twta.export import nir_format

        reason = nir_format.check(packed, core)
        if reason:
            raise UsageError(f'--format nir: {reason}')


def check_package(name, package):
    if not importlib.util.find_spec(package):
        raise UsageError(f'--format {name}: the package {package} is not installed; pip install {package}')


def make_vectors(packed, images):
    """Return the test vectors by name: images uint8 NHWC, logits float32 [n, classes], and activations by layer.

    The activations, int8 NHWC, have the name of their layer.
    """
    logits, maps = NumpyEngine(packed).run(images)
    names = [layer.name for layer in packed.layers]
    return {'images': images, **dict(zip(names, maps, strict=True)), 'logits': logits}


def write_npz(path, packed, vectors):
    """Write network and test vectors as plain arrays; return the file's size in bytes.

    `NAME/weights` are in the order of Layer.weights, not in that of a .twta file.
    """
    arrays = {'network': np.array(packed.network), 'dataset': np.array(packed.dataset), 'image': np.array(packed.image),
              'crop': np.array(packed.crop), 'classes': np.array(packed.classes),
              'layers': np.array([layer.name for layer in packed.layers])}
    if packed.stem:
        arrays.update({f'stem/{field}': value for field, value in packed.stem._asdict().items()})
    for layer, shape, before, _ in shapes(packed):
        for field in ('weights', 'upper', 'lower', 'stride', 'groups', 'border'):
            arrays[f'{layer.name}/{field}'] = np.array(getattr(layer, field))
        arrays[f'{layer.name}/padding'] = np.stack([before, after(shape, layer)], 1)
    for field in ('weights', 'scale', 'shift'):
        arrays[f'classifier/{field}'] = getattr(packed, field)
    arrays.update({f'vectors/{name}': array for name, array in vectors.items()})
    with replacing(path) as part, open(part, 'wb') as file:
        np.savez_compressed(file, **arrays)
    return path.stat().st_size


C_TYPES = """\
#ifndef TWTA_TYPES
#define TWTA_TYPES
struct twta_layer {
    const char *name;
    int height, width, channels;              /* of its input */
    int out_height, out_width, filters;       /* of its output */
    int kernel_height, kernel_width, stride, top, left, groups;  /* top, left: cells before the map */
    int border;                               /* the activation in the cells around the map */
    const float *real;                        /* encoder: weights [filter][row][column][channel] */
    const uint32_t *nonzero, *negative;       /* others: bits in that order, a new word per filter */
    const float *real_upper, *real_lower;     /* encoder: thresholds */
    const int32_t *upper, *lower;             /* others: thresholds */
};

struct twta_network {
    const char *name;
    int height, width, channels, crop;        /* of an image */
    int layers, classes, features;            /* features: values that the classifier reads */
    const struct twta_layer *layer;           /* [layers] */
    const char *const *class_names;           /* [classes] */
    const float *weights, *scale, *shift;     /* classifier: [features][classes], [classes], [classes] */
    int vectors;                              /* number of test images */
    const uint8_t *images;                    /* [vectors][height][width][channels] */
    const int8_t *const *activations;         /* [layers], of each [vectors][out_height][out_width][filters] */
    const float *logits;                      /* [vectors][classes] */
};
#endif
"""


def write_c(path, packed, vectors):
    """Write a C header (C99, C++17) of a struct twta_network with the name of the file; return its size in bytes.

    Every name in it begins with that name, so that several headers fit into one program.
    """
    name = c_name(path.name.removesuffix('.h'))
    largest = max(math.prod(out) for _, _, _, out in shapes(packed))
    run = packed.record.get('run')
    trained = f', run {run}, epoch {packed.record.get("epoch")}' if run else ''
    title = c_text(f'{packed.network} on {packed.dataset}{trained}').replace('*/', '*_')
    lines = [f'/* {title}; see docs/deployment.md of TWTA-Net. */',
             f'#ifndef {name}_H', f'#define {name}_H', '#include <math.h>', '#include <stdint.h>', '',
             f'#define {name}_IMAGE {math.prod(input_shape(packed))}', f'#define {name}_LARGEST_MAP {largest}',
             f'#define {name}_CLASSES {len(packed.classes)}', '', C_TYPES]
    rows = []
    for index, (layer, *geometry) in enumerate(shapes(packed)):
        arrays, row = c_layer(f'{name}_{index}', layer, *geometry, is_encoder=not index)
        lines += [*arrays, c_array('int8_t', f'{name}_{index}_activations', vectors[layer.name])]
        rows.append('    {' + ', '.join(map(str, row)) + '},')
    activations = ', '.join(f'{name}_{index}_activations' for index in range(len(rows)))
    lines += [f'static const struct twta_layer {name}_layer[] = {{', *rows, '};', '',
              f'static const char *const {name}_class_names[] = {{{", ".join(map(c_string, packed.classes))}}};',
              f'static const int8_t *const {name}_activations[] = {{{activations}}};',
              *(c_array(kind, f'{name}_{field}', values) for kind, field, values in (
                  ('float', 'weights', packed.weights), ('float', 'scale', packed.scale),
                  ('float', 'shift', packed.shift), ('uint8_t', 'images', vectors['images']),
                  ('float', 'logits', vectors['logits'])))]
    fields = [c_string(packed.network), *packed.image, packed.crop, len(rows), len(packed.classes),
              len(packed.weights),
              *(f'{name}_{field}' for field in ('layer', 'class_names', 'weights', 'scale', 'shift')),
              len(vectors['images']), *(f'{name}_{field}' for field in ('images', 'activations', 'logits'))]
    lines += ['', f'static const struct twta_network {name} = {{', f'    {", ".join(map(str, fields))}', '};', '#endif']
    text = '\n'.join(lines) + '\n'
    with replacing(path) as part:
        part.write_text(text, encoding='ascii')
    return len(text)


def c_layer(name, layer, shape, before, out, is_encoder):
    """Return the C definitions of a layer's arrays, and the fields of its struct twta_layer.

    shape, before, out    of the layer, as file_format.shapes yields them
    """
    weights = filter_major(layer.weights)
    if is_encoder:
        arrays = [c_array('float', f'{name}_{which}', values) for which, values in (
            ('weights', weights), ('upper', layer.upper), ('lower', layer.lower))]
        pointers = f'{name}_weights', 0, 0, f'{name}_upper', f'{name}_lower', 0, 0
    else:
        arrays = [c_array(kind, f'{name}_{which}', values) for kind, which, values in (
            ('uint32_t', 'nonzero', words(weights != 0)), ('uint32_t', 'negative', words(weights < 0)),
            ('int32_t', 'upper', layer.upper), ('int32_t', 'lower', layer.lower))]
        pointers = 0, f'{name}_nonzero', f'{name}_negative', 0, 0, f'{name}_upper', f'{name}_lower'
    return arrays, [c_string(layer.name), *shape, *out, *weights.shape[1:3], layer.stride, *before, layer.groups,
                    layer.border, *pointers]


def words(bits):
    """Return bits [filters, ...] as uint32 [filters, words], the first bit the lowest; each filter begins a word."""
    bits = bits.reshape(len(bits), -1)
    bits = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 32)))
    return np.ascontiguousarray(np.packbits(bits, axis=1, bitorder='little')).view('<u4')


def c_array(kind, name, values):
    """Return the C definition of a constant array of a type."""
    flat = values.ravel()
    if kind == 'float':
        texts = [c_float(value) for value in flat.tolist()]
    else:
        texts = [f'0x{value:x}' for value in flat.tolist()] if kind == 'uint32_t' else list(map(str, flat.tolist()))
    rows = [','.join(texts[start:start + 16]) for start in range(0, len(texts), 16)]
    return f'static const {kind} {name}[{flat.size}] = {{\n' + ',\n'.join(rows) + '};'


def c_float(value):
    """Return a float32 as an exact C literal, in hexadecimal."""
    return value.hex() + 'f' if math.isfinite(value) else 'INFINITY' if value > 0 else '-INFINITY'


def c_text(text):
    """Return a text with _ for each character that a C string in ASCII cannot hold."""
    return re.sub(r'[^ !#->@-\[\]-~]', '_', text)  # ? begins a trigraph


def c_string(text):
    return f'"{c_text(text)}"'


def c_name(text):
    """Return a name in C for a text; with a capital at its beginning it is no keyword and no name of reference.c."""
    name = re.sub(r'\W', '_', text, flags=re.ASCII)
    return name if name[:1].isupper() else f'Network_{name}'


WRITERS = {'npz': write_npz, 'c': write_c}
IMAGES = {'html': 10, 'twta': 20}  # images in a file, or compared at its import, if not VECTORS
BESIDE = 'onnx', 'qonnx', 'nir'  # their test vectors are in a file of their own
CORES = 'qonnx', 'nir'  # can begin with the encoder's activations
DIALECTS = {'onnx': ('int8', 'int2'), 'qonnx': ('thresholds', 'quant'), 'nir': ('thresholds', 'biases')}


def count_images(name):
    """Return how many images a file of a format has, at most."""
    return IMAGES.get(name, VECTORS)


def describe_images(name, path, count, which):
    """Return a line about the images in a file of a format."""
    if name == 'html':
        return f'test images in the page: {count} ({which})'
    beside = vectors_file(name, path)
    return f'test vectors: {count} image{"s" * (count > 1)} ({which})' + (f', in {beside}' if beside else '')


def vectors_file(name, path):
    """Return the file of the test vectors, or None if they are in the file itself."""
    if name not in BESIDE:
        return None
    return path.with_name(f'{path.name}.vectors.npz') if name == 'nir' else path.with_suffix('.vectors.npz')


def write(name, path, packed, images, core=False, dialect=None):
    """Write a packed network in a format, with test vectors of images; return the size in bytes.

    core, dialect    see check_format
    """
    if name in WRITERS:
        return WRITERS[name](path, packed, make_vectors(packed, images))
    if name == 'html':
        from twta.export import html_format

        return html_format.write_html(path, packed, images)
    data, vectors = build(name, packed, images, core, dialect)
    # neither file is in place before both are written
    with replacing(path) as part, replacing(vectors_file(name, path)) as beside:
        part.write_bytes(data)
        with open(beside, 'wb') as file:
            np.savez_compressed(file, **vectors)
    return len(data)


def build(name, packed, images, core, dialect):
    """Return the bytes of a file in a format of BESIDE, and its test vectors."""
    dialect = dialect or DIALECTS[name][0]
    if name == 'onnx':
        from twta.export import onnx_format  # here, and below: the packages are optional

        return onnx_format.build_model(packed, dialect).SerializeToString(), make_vectors(packed, images)
    if name == 'qonnx':
        from twta.export import qonnx_format

        return qonnx_format.build_model(packed, core, dialect).SerializeToString(), make_vectors(packed, images)
    from twta.export import nir_format

    packed = nir_format.neurons(packed)
    return nir_format.build_file(packed, core, dialect), nir_format.make_vectors(packed, core, images)
