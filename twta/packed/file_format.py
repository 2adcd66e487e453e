"""The .twta file: a trained network as integers, ternary weights at 1.6 bits, read and written without TensorFlow.

    bytes        content
    0 .. 3       b'TWTA'
    4 .. 7       version of the format: 1; 2 if the network has a stem; 3 if a layer has a border that is not 0
    8 .. 11      n, length of the header in bytes
    12 .. 11+n   the header: JSON in UTF-8, with KEYS and, per layer, LAYER_KEYS; from version 2 on it may
                 have `stem`, from version 3 on a layer may have `border`
    then         the arrays, without gaps: weights, scale, shift of the stem; weights, upper, lower of each layer;
                 weights, scale, shift of the classifier
    last 32      SHA-256 of all bytes before

Numbers are little-endian. Weights of the stem and the layers are stored by filter, then row, column and channel.

    stem            float32 weights, float64 scale and shift
    first layer     float32 weights and thresholds; this is the encoder
    other layers    ternary weights, five per byte: t0 + 3 t1 + 9 t2 + 27 t3 + 81 t4 with t = w + 1; the last byte is
                    filled up with t = 0; int16 thresholds, or int32 if a sum can exceed 32,766
    classifier      float32; its weights are stored by feature, then class

docs/deployment.md describes each field.
"""
import hashlib
import json
import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from twta import TwtaError
from twta.files import replacing

MAGIC = b'TWTA'
VERSION = 3
KEYS = {'network': str, 'dataset': str, 'image': list, 'crop': int, 'classes': list, 'layers': list, 'record': dict}
LAYER_KEYS = {'name': str, 'kernel': list, 'filters': int, 'stride': int, 'padding': str, 'groups': int}
KINDS = {str: 'a string that prints in one line', int: 'a whole number', list: 'a list', dict: 'a JSON object'}
LARGEST_FILE = 1 << 28  # bytes; the largest in pretrained/ has 1 MB, Quant_CIFAR10 with 8 steps 65 MB
LARGEST_SIZE = 1 << 16  # limit of every size in the header
LARGEST_MAPS = 1 << 22  # values; limit of an image, and of the bordered inputs of all layers together
RESERVED = '', 'input', 'output', 'images', 'logits', 'stem', 'layers', 'classifier', \
    'file', 'allow_pickle'  # no names of layers: of formats, and of arguments of numpy.savez
POWERS = 3 ** np.arange(5)


class Layer(NamedTuple):
    """A convolution with two thresholds per filter; in the file an entry of `layers` and three arrays.

    An activation is +1 if sum >= upper, -1 if sum <= lower, else 0. This rule holds for all filters, because export
    negates the weights of filters with a negative gamma in batch normalisation. A dense layer is a convolution whose
    kernel is the whole map.
    """
    name: str
    weights: np.ndarray  # [height, width, channels / groups, filters], int8 in {-1, 0, +1}; in the encoder float32
    upper: np.ndarray  # [filters], int32; in the encoder float32
    lower: np.ndarray
    stride: int
    padding: str  # 'SAME' or 'VALID', as in TensorFlow
    groups: int  # group g of G reads the channels g, g + G, g + 2G, ...; filters are ordered by group
    border: int = 0  # activation in the cells that SAME padding adds: -1, 0 or +1


class Stem(NamedTuple):
    """A real-valued convolution before the encoder; in the file the entry `stem` and three arrays.

    Its output is max(0, sums * scale + shift) in float64. Padding is SAME, the stride is 1.
    """
    weights: np.ndarray  # float32 [height, width, channels, filters]
    scale: np.ndarray  # float64 [filters]
    shift: np.ndarray


class PackedNetwork(NamedTuple):
    """A network as integers, as a .twta file holds it.

    Logits are (activations @ weights) * scale + shift, with the activations of the last layer as one row of features.
    """
    network: str  # name of its script
    dataset: str
    image: tuple  # height, width, channels of the uint8 images
    crop: int  # 0: pixels / 256; else side of the central crop, in pixels, which is standardised
    classes: tuple  # names
    layers: tuple  # of Layer, the encoder first
    weights: np.ndarray  # of the classifier: float32 [features, classes], features by row, column, channel
    scale: np.ndarray  # float32 [classes]
    shift: np.ndarray
    record: dict  # of the training: run, epoch, choices (its options), sha256 of its files
    stem: Stem | None = None


def input_shape(packed):
    """Return height, width and channels of what the encoder reads."""
    shape = (packed.crop, packed.crop, packed.image[2]) if packed.crop else packed.image
    return (*shape[:2], packed.stem.weights.shape[3]) if packed.stem else shape


def geometry(shape, layer):
    """Return a layer's padding before a map, (rows, columns), and the shape of its output.

    shape    height, width, channels of the map
    """
    before, out = [], []
    for size, kernel in zip(shape, layer.weights.shape[:2], strict=False):
        if layer.padding == 'SAME':
            out.append(-(-size // layer.stride))
            before.append(max((out[-1] - 1) * layer.stride + kernel - size, 0) // 2)
        else:
            out.append((size - kernel) // layer.stride + 1)
            before.append(0)
    return tuple(before), (*out, layer.weights.shape[3])


def border(shape, layer):
    """Return a layer's padding before a map, (rows, columns), and (height, width) of the padded map."""
    before, out = geometry(shape, layer)
    return before, tuple(max(before[axis] + shape[axis], (out[axis] - 1) * layer.stride + layer.weights.shape[axis])
                         for axis in (0, 1))


def after(shape, layer):
    """Return a layer's padding after a map, [rows, columns]."""
    before, padded = border(shape, layer)
    return [padded[axis] - shape[axis] - before[axis] for axis in (0, 1)]


def shapes(packed):
    """Yield each layer, the shape of its input, its padding before the map, (rows, columns), and its output's shape."""
    shape = input_shape(packed)
    for layer in packed.layers:
        before, out = geometry(shape, layer)
        yield layer, shape, before, out
        shape = out


def fan_in(weights):
    """Return the number of weights per filter, which is the largest sum of a ternary filter."""
    return math.prod(weights.shape[:3])


def is_expanded(packed):
    """Return whether neurons stand for activations of several levels or for max-pooling."""
    choices = packed.record.get('choices') or {}
    levels = choices.get('k', 0), choices.get('B', 1), choices.get('levels', 2)
    return levels != (0, 1, 2) or choices.get('pooling') == 'max'


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def pack_trits(weights):
    """Return values in {-1, 0, +1} as bytes, five values per byte, in C order; the last byte is filled up with -1."""
    trits = np.append(weights.ravel() + 1, np.zeros(-weights.size % 5, np.int8))
    return (trits.reshape(-1, 5) @ POWERS).astype(np.uint8)


def unpack_trits(data, count):
    """Return the first count values of pack_trits as int8.

    Raises ValueError if a byte is above 242 or the last one is not filled up with -1.
    """
    trits = data[:, np.newaxis] // POWERS.astype(np.uint8) % 3
    if (data.size and data.max() >= 3 ** 5) or trits.ravel()[count:].any():
        raise ValueError
    return trits.ravel()[:count].astype(np.int8) - 1


def threshold_type(weights):
    """Return the type of a ternary layer's thresholds in the file, which go up to fan_in + 1."""
    return np.dtype('<i2' if fan_in(weights) < 32767 else '<i4')


def layer_bytes(layer):
    """Return how many bytes the weights and thresholds of a layer take in the file."""
    if layer.weights.dtype == np.float32:
        return 4 * (layer.weights.size + 2 * len(layer.upper))
    return -(-layer.weights.size // 5) + 2 * len(layer.upper) * threshold_type(layer.weights).itemsize


def filter_major(weights):
    return np.moveaxis(weights, 3, 0)


def serialize(packed):
    """Return the bytes of a .twta file."""
    header = {'network': packed.network, 'dataset': packed.dataset, 'image': packed.image, 'crop': packed.crop,
              'classes': packed.classes, 'record': packed.record, 'layers': [
                  {'name': layer.name, 'kernel': layer.weights.shape[:2], 'filters': layer.weights.shape[3],
                   'stride': layer.stride, 'padding': layer.padding, 'groups': layer.groups,
                   **({'border': layer.border} if layer.border else {})} for layer in packed.layers]}
    if packed.stem:
        header['stem'] = {'kernel': packed.stem.weights.shape[:2], 'filters': packed.stem.weights.shape[3]}
    header = json.dumps(header, separators=(',', ':')).encode()
    version = 3 if any(layer.border for layer in packed.layers) else 2 if packed.stem else 1
    parts = [MAGIC, struct.pack('<II', version, len(header)), header]
    if packed.stem:
        parts += [filter_major(packed.stem.weights).tobytes(), *(array.astype('<f8').tobytes()
                                                                 for array in packed.stem[1:])]
    for index, layer in enumerate(packed.layers):
        weights, kind = filter_major(layer.weights), np.dtype('<f4')
        if index:
            weights, kind = pack_trits(weights), threshold_type(layer.weights)
        parts += [weights.tobytes(), layer.upper.astype(kind).tobytes(), layer.lower.astype(kind).tobytes()]
    parts += [array.astype('<f4').tobytes() for array in (packed.weights, packed.scale, packed.shift)]
    data = b''.join(parts)
    return data + hashlib.sha256(data).digest()


def write(path, packed):
    """Write a .twta file, whole or not at all; return its size in bytes."""
    data = serialize(packed)
    with replacing(path) as part:
        part.write_bytes(data)
    return len(data)


# ----------------------------------------------------------------------------------------------------------------------
# Reading. A file may come from a stranger: every field is checked before it is used. Functions raise InvalidFile.


class InvalidFile(Exception):
    """What is wrong with a file, in one line."""


class ArrayReader:
    """A reader of arrays, from the front of some bytes to the end."""

    def __init__(self, rest):
        self.rest = rest

    def read(self, kind, count):
        """Return the next count numbers of a NumPy type; raises InvalidFile if fewer are left."""
        n_bytes = count * np.dtype(kind).itemsize
        if n_bytes > len(self.rest):
            raise InvalidFile('its arrays are shorter than its header says')
        array = np.frombuffer(self.rest[:n_bytes], kind)
        self.rest = self.rest[n_bytes:]
        return array


def read(path):
    """Return the PackedNetwork of a .twta file.

    Raises TwtaError if it cannot be read, is no .twta file, is damaged, is of a newer version or contradicts itself.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise InvalidFile(f'larger than {LARGEST_FILE:,} bytes')
        with path.open('rb') as file:
            data = file.read(len(MAGIC))
            return parse(data + file.read() if data == MAGIC else data)  # any other file may have no end
    except OSError as error:
        raise TwtaError(f'{path}: {error.strerror}; --mode export writes such a file') from None
    except InvalidFile as error:
        raise TwtaError(f'{path}: {error}; give a file that --mode export has written') from None


def parse(data):
    """Return the PackedNetwork that the bytes of a file hold."""
    version, header, arrays = read_header(data)
    *image, channels = sizes('image', header['image'], 3)
    crop, classes = size('crop', header['crop'], least=0), header['classes']
    if math.prod(image) * channels > LARGEST_MAPS:
        raise InvalidFile(f'its images are too large, {[*image, channels]}')
    if crop > min(image):
        raise InvalidFile(f'crop {crop} is larger than its images, {[*image, channels]}')
    if not classes or len(classes) > LARGEST_SIZE or not all(map(is_name, classes)):
        raise InvalidFile('its classes are not names')
    if not header['layers']:
        raise InvalidFile('it has no layers')
    has_stem = version == 2 or (version > 2 and 'stem' in header)
    stem = read_stem(header.get('stem'), channels, arrays) if has_stem else None
    shape = (*((crop, crop) if crop else image), stem.weights.shape[3] if stem else channels)
    layers, shape = read_layers(header['layers'], shape, arrays)
    if version < 3 and any(layer.border for layer in layers):
        raise InvalidFile(f'a layer has a border, which format {version} has not')
    weights = arrays.read('<f4', math.prod(shape) * len(classes)).reshape(-1, len(classes))
    scale, shift = arrays.read('<f4', len(classes)), arrays.read('<f4', len(classes))
    if not all(np.isfinite(array).all() for array in (weights, scale, shift)):
        raise InvalidFile('its classifier holds NaN or infinity')
    if len(arrays.rest):
        raise InvalidFile(f'{len(arrays.rest)} bytes too many')
    return PackedNetwork(header['network'], header['dataset'], (*image, channels), crop, tuple(classes), tuple(layers),
                         weights, scale, shift, header['record'], stem)


def read_header(data):
    """Return the version, the header as a dictionary and an ArrayReader on the arrays; checks the SHA-256 first."""
    if data[:4] != MAGIC or len(data) < 44:
        raise InvalidFile('not a .twta file')
    version, length = struct.unpack('<II', data[4:12])
    if hashlib.sha256(memoryview(data)[:-32]).digest() != data[-32:]:
        raise InvalidFile('damaged (its checksum is wrong)')
    if not 1 <= version <= VERSION:
        age = 'a newer' if version > VERSION else 'an unknown'
        raise InvalidFile(f'written by {age} version of these scripts (format {version}, this one reads up to '
                          f'{VERSION})')
    body = memoryview(data)[12:-32]
    try:
        header = json.loads(bytes(body[:length]).decode())
    except (ValueError, RecursionError):
        raise InvalidFile('its header is not JSON') from None
    check_keys('header', header, KEYS)
    choices = header['record'].get('choices') or {}  # older files have none
    if not isinstance(choices, dict) or not all(is_name(str(value)) for item in choices.items() for value in item):
        raise InvalidFile('choices of its record are not a JSON object of names')
    return version, header, ArrayReader(body[length:])


def read_stem(entry, channels, arrays):
    """Return the Stem of a header's entry, for images of so many channels."""
    check_keys('stem', entry, {'kernel': list, 'filters': int})
    kernel, filters = sizes('kernel of the stem', entry['kernel'], 2), size('filters of the stem', entry['filters'])
    weights = arrays.read('<f4', math.prod(kernel) * channels * filters).reshape(filters, *kernel, channels)
    scale, shift = arrays.read('<f8', filters), arrays.read('<f8', filters)
    if not all(np.isfinite(array).all() for array in (weights, scale, shift)):
        raise InvalidFile('its stem holds NaN or infinity')
    return Stem(np.ascontiguousarray(np.moveaxis(weights, 0, 3)), scale, shift)


def read_layers(entries, shape, arrays):
    """Return the Layers of a header's entries, and the shape of the last one's output."""
    layers, values, names = [], 0, set(RESERVED)
    for index, entry in enumerate(entries):
        layers.append(read_layer(entry, shape, arrays, is_encoder=not index))
        if layers[-1].name in names or '/' in layers[-1].name:
            raise InvalidFile(f'the name {layers[-1].name[:80]!r} of a layer is taken, empty, or has a /')
        names.add(layers[-1].name)
        values += math.prod(border(shape, layers[-1])[1]) * shape[2]
        shape = geometry(shape, layers[-1])[1]
        if max(values, math.prod(shape)) > LARGEST_MAPS:
            raise InvalidFile(f'its maps are too large, at {layers[-1].name[:80]}')
    return layers, shape


def read_layer(entry, shape, arrays, is_encoder):
    """Return the Layer of a header's entry that reads maps of a shape."""
    check_keys('layer', entry, LAYER_KEYS)
    name = entry['name'][:80]
    kernel = sizes(f'kernel of {name}', entry['kernel'], 2)
    filters, stride, groups = (size(f'{key} of {name}', entry[key]) for key in ('filters', 'stride', 'groups'))
    does_not_fit = entry['padding'] == 'VALID' and (kernel[0] > shape[0] or kernel[1] > shape[1])
    if entry['padding'] not in ('SAME', 'VALID') or does_not_fit:
        raise InvalidFile(f'padding of {name} is {entry["padding"][:80]!r}, on a map {list(shape)}')
    if shape[2] % groups or filters % groups or (is_encoder and groups > 1):
        raise InvalidFile(f'{shape[2]} channels and {filters} filters of {name} do not divide into {groups} groups')
    count = math.prod(kernel) * (shape[2] // groups) * filters
    stored_shape = filters, *kernel, shape[2] // groups
    if is_encoder:
        weights = np.moveaxis(arrays.read('<f4', count).reshape(stored_shape), 0, 3)
        upper, lower = arrays.read('<f4', filters), arrays.read('<f4', filters)
        is_constant = np.isinf(upper) & (lower == upper)  # always -1 or, if negative, always +1
        is_valid = np.isfinite(weights).all() and ((lower < upper) | is_constant).all()
    else:
        try:
            weights = unpack_trits(arrays.read('u1', -(-count // 5)), count)
        except ValueError:
            raise InvalidFile(f'the weights of {name} are not ternary') from None
        weights = np.moveaxis(weights.reshape(stored_shape), 0, 3)
        upper, lower = (arrays.read(threshold_type(weights), filters).astype(np.int32) for _ in range(2))
        most = fan_in(weights)
        is_valid = (lower < upper).all() and upper.max() <= most + 1 and upper.min() >= -most \
            and lower.max() <= most and lower.min() >= -most - 1
    if not is_valid:
        raise InvalidFile(f'weights or thresholds of {name} are out of range')
    border = entry.get('border', 0)
    if type(border) is not int or border not in ((0,) if is_encoder else (-1, 0, 1)):
        raise InvalidFile(f'border of {name} is {str(border)[:80]!r}')
    return Layer(entry['name'], np.ascontiguousarray(weights), upper, lower, stride, entry['padding'], groups, border)


def check_keys(what, entry, keys):
    if not isinstance(entry, dict):
        raise InvalidFile(f'its {what} is not a JSON object')
    for key, kind in keys.items():
        if type(entry.get(key)) is not kind or (kind is str and not is_name(entry[key])):
            raise InvalidFile(f'{key} of its {what} is missing or not {KINDS[kind]}')


def is_name(text):
    """Return whether a value is a string that prints in one line."""
    return isinstance(text, str) and text.isprintable() and len(text) <= LARGEST_SIZE


def sizes(what, values, count):
    """Return a list of so many sizes."""
    if len(values) != count:
        raise InvalidFile(f'{what} is not {count} sizes')
    return [size(what, value) for value in values]


def size(what, value, least=1):
    """Return a size; bool is no whole number here."""
    if type(value) is not int or not least <= value <= LARGEST_SIZE:
        raise InvalidFile(f'{what}: {str(value)[:80]} is not a whole number from {least} to {LARGEST_SIZE}')
    return value
