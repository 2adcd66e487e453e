"""The .twta file: a trained network as integers, ternary weights at 1.6 bits, read and written without TensorFlow.

    bytes      holds
    0..3       b'TWTA'
    4..7       version of the format, 1, or 2 where there is a stem
    8..11      length of the header in bytes, n
    12..       the header, n bytes of JSON in UTF-8, see KEYS and LAYER_KEYS
    then       the arrays, one after the other: of the stem weights, scale, shift; of each layer weights, upper, lower;
               of the classifier weights, scale, shift
    last 32    SHA-256 of everything before

Numbers are little-endian. A header of version 2 has an entry `stem`. The first layer, the encoder, has float32 weights
and thresholds; the stem float32 weights, float64 scale and shift. The others have ternary weights, five to a byte: t0 +
3 t1 + 9 t2 + 27 t3 + 81 t4 with t = w + 1, filter by filter, in a filter row by row, from left to right, channel by
channel, the last byte filled up with 0; and int16 thresholds (int32 where a sum may pass 32,766). docs/deployment.md
has it field by field.
"""
import hashlib
import json
import math
import struct
from typing import NamedTuple

import numpy as np

from twta import TwtaError
from twta.files import replacing

MAGIC = b'TWTA'
VERSION = 2
KEYS = {'network': str, 'dataset': str, 'image': list, 'crop': int, 'classes': list, 'layers': list, 'record': dict}
LAYER_KEYS = {'name': str, 'kernel': list, 'filters': int, 'stride': int, 'padding': str, 'groups': int}
LARGEST_FILE = 1 << 28  # bytes, two hundred times the largest of these scripts' networks
LARGEST = 1 << 16  # of any size in the header
LARGEST_MAPS = 1 << 22  # values in an image, and in the inputs of all layers with their borders
POWERS = 3 ** np.arange(5)


class Layer(NamedTuple):
    """A convolution and the two thresholds of each filter: +1 where the sum >= upper, -1 where <= lower, else 0.

    A dense layer is a convolution whose kernel is the whole map. Filters with a negative gamma in the batch
    normalisation have their weights negated, so that one rule does for all.
    """
    name: str
    weights: np.ndarray  # [height, width, channels / groups, filters], int8 in {-1, 0, +1}; of the encoder float32
    upper: np.ndarray  # [filters], int32; of the encoder float32
    lower: np.ndarray
    stride: int
    padding: str  # 'SAME' or 'VALID', as in TensorFlow
    groups: int  # group g of G reads the channels g, g + G, g + 2G, ...; the filters stand group by group


class Stem(NamedTuple):
    """A convolution before the encoder, real-valued: max(0, sums * scale + shift) in float64, SAME, stride 1."""
    weights: np.ndarray  # float32 [height, width, channels, filters]
    scale: np.ndarray  # float64 [filters]
    shift: np.ndarray


class PackedNetwork(NamedTuple):
    network: str  # the name of its script
    dataset: str
    image: tuple  # height, width, channels of the uint8 images
    crop: int  # 0: pixels / 256; else the central crop, standardised
    classes: tuple
    layers: tuple  # of Layer, the encoder first
    weights: np.ndarray  # float32 [features, classes]; logits = (activations @ weights) * scale + shift
    scale: np.ndarray  # float32 [classes]
    shift: np.ndarray
    record: dict  # of the training: name of its record, epoch, choices, SHA-256 of its files
    stem: Stem | None = None


def input_shape(packed):
    """Height, width, channels of what the encoder sees."""
    shape = (packed.crop, packed.crop, packed.image[2]) if packed.crop else packed.image
    return (*shape[:2], packed.stem.weights.shape[3]) if packed.stem else shape


def geometry(shape, layer):
    """Of a layer on a map (height, width, channels): rows and columns of padding before it, and its output's shape."""
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
    """Rows and columns of padding before a map for the layer that reads it, and the map's size with its border."""
    before, out = geometry(shape, layer)
    return before, tuple(max(before[axis] + shape[axis], (out[axis] - 1) * layer.stride + layer.weights.shape[axis])
                         for axis in (0, 1))


def after(shape, layer):
    """Rows and columns of padding after a map."""
    before, whole = border(shape, layer)
    return [whole[axis] - shape[axis] - before[axis] for axis in (0, 1)]


def shapes(packed):
    """Each layer with the shape of its input, rows and columns of padding before it, and the shape of its output."""
    shape = input_shape(packed)
    for layer in packed.layers:
        before, out = geometry(shape, layer)
        yield layer, shape, before, out
        shape = out


def fan_in(weights):
    """The most that a sum of ternary products can come to."""
    return math.prod(weights.shape[:3])


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def pack_trits(weights):
    """Values in {-1, 0, +1}, in C order, five to a byte."""
    trits = np.append(weights.ravel() + 1, np.zeros(-weights.size % 5, np.int8))
    return (trits.reshape(-1, 5) @ POWERS).astype(np.uint8)


def unpack_trits(data, count):
    """The first count values of pack_trits as int8; ValueError where a byte or the filling is none."""
    trits = data[:, np.newaxis] // POWERS.astype(np.uint8) % 3
    if (data.size and data.max() >= 3 ** 5) or trits.ravel()[count:].any():
        raise ValueError
    return trits.ravel()[:count].astype(np.int8) - 1


def threshold_type(weights):
    return np.dtype('<i2' if fan_in(weights) < 32767 else '<i4')


def layer_bytes(layer):
    """Bytes that the weights and thresholds of a layer take in the file."""
    if layer.weights.dtype == np.float32:
        return 4 * (layer.weights.size + 2 * len(layer.upper))
    return -(-layer.weights.size // 5) + 2 * len(layer.upper) * threshold_type(layer.weights).itemsize


def filter_major(weights):
    return np.moveaxis(weights, 3, 0)


def write(path, packed):
    """Writes the file whole, or not at all; returns its size in bytes."""
    header = {'network': packed.network, 'dataset': packed.dataset, 'image': packed.image, 'crop': packed.crop,
              'classes': packed.classes, 'record': packed.record, 'layers': [
                  {'name': layer.name, 'kernel': layer.weights.shape[:2], 'filters': layer.weights.shape[3],
                   'stride': layer.stride, 'padding': layer.padding, 'groups': layer.groups}
                  for layer in packed.layers]}
    if packed.stem:
        header['stem'] = {'kernel': packed.stem.weights.shape[:2], 'filters': packed.stem.weights.shape[3]}
    header = json.dumps(header, separators=(',', ':')).encode()
    parts = [MAGIC, struct.pack('<II', VERSION if packed.stem else 1, len(header)), header]
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
    with replacing(path) as part:
        part.write_bytes(data + hashlib.sha256(data).digest())
    return len(data) + 32


# ----------------------------------------------------------------------------------------------------------------------
# Reading


class InvalidFile(Exception):
    """What is wrong with a file."""


def read(path):
    """A .twta file as a PackedNetwork; TwtaError where it is none, damaged, of a newer version, or contradicts itself."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise InvalidFile(f'larger than {LARGEST_FILE:,} bytes')
        with path.open('rb') as file:
            data = file.read(len(MAGIC))
            return parse(data + file.read() if data == MAGIC else data)  # what is none may have no end
    except OSError as error:
        raise TwtaError(f'{path}: {error.strerror}; --mode export writes such a file') from None
    except InvalidFile as error:
        raise TwtaError(f'{path}: {error}; give a file that --mode export has written') from None


def parse(data):
    """PackedNetwork from the bytes of a file; raises InvalidFile."""
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
        raise InvalidFile('choices of its record are no JSON object of names')
    take = ArrayReader(body[length:])
    *image, channels = sizes('image', header['image'], 3)
    crop, classes = size('crop', header['crop'], least=0), header['classes']
    if math.prod(image) * channels > LARGEST_MAPS:
        raise InvalidFile(f'its images are too large, {[*image, channels]}')
    if crop > min(image):
        raise InvalidFile(f'crop {crop} of images {[*image, channels]}')
    if not classes or len(classes) > LARGEST or not all(map(is_name, classes)):
        raise InvalidFile('its classes are not names')
    if not header['layers']:
        raise InvalidFile('it has no layers')
    shape, layers, values = (*((crop, crop) if crop else image), channels), [], 0
    stem = read_stem(header.get('stem'), channels, take) if version > 1 else None
    if stem:
        shape = (*shape[:2], stem.weights.shape[3])
    for index, entry in enumerate(header['layers']):
        layers.append(read_layer(entry, shape, take, is_encoder=not index))
        values += math.prod(border(shape, layers[-1])[1]) * shape[2]
        shape = geometry(shape, layers[-1])[1]
        if max(values, math.prod(shape)) > LARGEST_MAPS:
            raise InvalidFile(f'its maps are too large, at {layers[-1].name[:80]}')
    n_classes = len(classes)
    weights = take('<f4', math.prod(shape) * n_classes).reshape(-1, n_classes)
    scale, shift = take('<f4', n_classes), take('<f4', n_classes)
    if not all(np.isfinite(array).all() for array in (weights, scale, shift)):
        raise InvalidFile('its classifier holds NaN or infinity')
    if len(take.rest):
        raise InvalidFile(f'{len(take.rest)} bytes too many')
    return PackedNetwork(header['network'], header['dataset'], (*image, channels), crop, tuple(classes), tuple(layers),
                         weights, scale, shift, header['record'], stem)


def read_stem(entry, channels, take):
    """The stem on a map of so many channels; raises InvalidFile."""
    check_keys('stem', entry, {'kernel': list, 'filters': int})
    kernel, filters = sizes('kernel of the stem', entry['kernel'], 2), size('filters of the stem', entry['filters'])
    weights = take('<f4', math.prod(kernel) * channels * filters).reshape(filters, *kernel, channels)
    scale, shift = take('<f8', filters), take('<f8', filters)
    if not all(np.isfinite(array).all() for array in (weights, scale, shift)):
        raise InvalidFile('its stem holds NaN or infinity')
    return Stem(np.ascontiguousarray(np.moveaxis(weights, 0, 3)), scale, shift)


def read_layer(entry, shape, take, is_encoder):
    """A layer on a map of that shape; raises InvalidFile."""
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
    packed_shape = filters, *kernel, shape[2] // groups
    if is_encoder:
        weights = take('<f4', count).reshape(packed_shape)
        kind, is_good = '<f4', np.isfinite(weights).all()
    else:
        try:
            weights = unpack_trits(take('u1', -(-count // 5)), count).reshape(packed_shape)
        except ValueError:
            raise InvalidFile(f'the weights of {name} are not ternary') from None
        kind, is_good = threshold_type(np.moveaxis(weights, 0, 3)), True
    upper, lower = take(kind, filters), take(kind, filters)
    if is_encoder:
        is_constant = np.isinf(upper) & (lower == upper)
        is_good = is_good and ((lower < upper) | is_constant).all()
    else:
        most = count // filters
        upper, lower = upper.astype(np.int32), lower.astype(np.int32)
        is_good = (lower < upper).all() and upper.max() <= most + 1 and upper.min() >= -most \
            and lower.max() <= most and lower.min() >= -most - 1
    if not is_good:
        raise InvalidFile(f'weights or thresholds of {name} are out of range')
    return Layer(entry['name'], np.ascontiguousarray(np.moveaxis(weights, 0, 3)), upper, lower, stride,
                 entry['padding'], groups)


class ArrayReader:
    """Takes arrays off the front of some bytes."""

    def __init__(self, rest):
        self.rest = rest

    def __call__(self, kind, count):
        n_bytes = count * np.dtype(kind).itemsize
        if n_bytes > len(self.rest):
            raise InvalidFile('its arrays are shorter than its header says')
        array = np.frombuffer(self.rest[:n_bytes], kind)
        self.rest = self.rest[n_bytes:]
        return array


def check_keys(what, entry, keys):
    if not isinstance(entry, dict):
        raise InvalidFile(f'its {what} is no JSON object')
    for key, kind in keys.items():
        if type(entry.get(key)) is not kind or (kind is str and not is_name(entry[key])):
            printable = ' that can be printed in a line' if kind is str else ''
            raise InvalidFile(f'{key} of its {what} is missing or no {kind.__name__}{printable}')


def is_name(text):
    """Whether it can be printed in a line."""
    return isinstance(text, str) and text.isprintable() and len(text) <= LARGEST


def sizes(what, values, count):
    if len(values) != count:
        raise InvalidFile(f'{what} is not {count} sizes')
    return [size(what, value) for value in values]


def size(what, value, least=1):
    if type(value) is not int or not least <= value <= LARGEST:
        raise InvalidFile(f'{what}: {str(value)[:80]} is not a whole number from {least} to {LARGEST}')
    return value


def is_expanded(packed):
    """Whether its layers are not those that were trained: one neuron per level, pooling as neurons."""
    choices = packed.record.get('choices') or {}
    return (choices.get('k', 0), choices.get('B', 1), choices.get('levels', 2), choices.get('pooling', 'conv')) != (
        0, 1, 2, 'conv')


