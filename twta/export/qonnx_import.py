"""Import of a QONNX file: a ternary network of Brevitas, or of another program, becomes a packed network.

The form: one chain of nodes from an image [1, channels, rows, columns] to the scores; weights are constants.

    input         pixels / divisor; pointwise nodes; a Quant of any width
    layers        Conv, MatMul or Gemm with weights -a, 0, +a (one a per filter); pointwise nodes such as
                  BatchNormalization; a Quant or MultiThreshold to values -b, 0, +b (one b per layer); perhaps a MaxPool
    classifier    MatMul or Gemm with any weights; pointwise nodes, linear in all

As in twta.export.folding, thresholds are not derived by formula: the file's own pointwise nodes run on every sum that
a filter can produce. If a and b are powers of two, as Brevitas chooses them, float32 sums are exact in any order. Else
the import takes each sum rounded once.
"""
import numpy as np
import onnx

from twta import TwtaError
from twta.export.qonnx_chain import Chain
from twta.export.rewrite import without_groups
from twta.export.spatial import Maximum, spatial
from twta.packed import file_format
from twta.packed.file_format import LARGEST_FILE, Layer, PackedNetwork, Stem, fan_in
from twta.packed.numpy_engine import NumpyEngine

LARGEST_SUM = 1 << 22  # of the encoder, in steps of the input; float32 holds four times as much exactly
LARGEST_STEM = 256  # filters
MOST_SUMS = 1 << 28  # of all filters of a layer; each is tried
BLOCK = 1 << 12  # sums at a time


def in_steps(values, name):
    """Return values as whole numbers of a step, int32, and the step.

    Raises TwtaError if there is no such step.
    """
    different = np.unique(np.append(values, values.dtype.type(0)))
    span, step = different[-1] - different[0], 1.0
    if span > 0:
        step = span / np.rint(span / np.diff(different).min())
    found = np.rint(values / step)
    if not np.isfinite(found).all() or np.abs(found).max() > LARGEST_SUM or (abs(values / step - found) > 1e-3).any():
        raise TwtaError(f'{name}: its values are not whole numbers of one step; it lacks a Quant')
    return found.astype(np.int32), np.float32(step)


def ternary_weights(layer, name):
    """Return the weights of a layer as int8 in -1, 0, +1, and the unit per filter, float32 [filters]."""
    unit = np.abs(layer.weights).max((0, 1, 2))
    unit[unit == 0] = 1
    weights = np.rint(layer.weights / unit)
    if not np.allclose(layer.weights, weights * unit, rtol=1e-5, atol=0):
        raise TwtaError(f'{name}: its weights are not -a, 0 and +a, but {len(np.unique(layer.weights)):,} values from '
                        f'{layer.weights.min():g} to {layer.weights.max():g}; only the classifier may have such')
    return weights.astype(np.int8), unit


def find_thresholds(chain, step, name, most, unit):
    """Return thresholds of whole sums from -most to most: sign, upper, lower, [filters] each, and the result's unit.

    unit    a sum in the file is a whole sum times this, float32 [filters]

    As in folding.integer_thresholds, the thresholds are for sums * sign. Raises TwtaError if the activation has other
    values than -b, 0 and b, or does not rise or fall with the sum.
    """
    if (2 * most + 1) * step.channels > MOST_SUMS:
        raise TwtaError(f'{name}: {step.channels:,} filters with sums up to {most:,} are too many to import')
    values = np.arange(-most, most + 1, dtype=np.float32)[:, np.newaxis]
    found, unit = in_steps(np.concatenate([chain.respond(step, values[begin:begin + BLOCK] * unit)
                                           for begin in range(0, len(values), BLOCK)]), name)
    if np.abs(found).max() > 1:
        raise TwtaError(f'{name}: its activations, before a MaxPool or the next layer, are {found.min()} to '
                        f'{found.max()} times {unit:g}; only -1, 0 and 1 can be imported')
    sign = np.where(found[-1] < found[0], -1, 1)
    risen = np.where(sign > 0, found, found[::-1])
    if (np.diff(risen, axis=0) < 0).any():
        raise TwtaError(f'{name}: its activations neither rise nor fall with the sum')
    return sign, (risen < 1).sum(0) - most, (risen < 0).sum(0) - most - 1, unit


def read_input(chain, divisor):
    """Return what the input makes of each pixel: whole numbers [256, channels], and their unit."""
    pixels = np.arange(256, dtype=np.float32)[:, np.newaxis] / np.float32(divisor)
    step = chain.steps[0]
    found, unit = in_steps(chain.respond(step, np.repeat(pixels, step.channels, 1)), 'the input')
    return np.broadcast_to(found, (256, chain.image[2])), unit


def ternary_encoder(numbers):
    """Return the encoder of an input that is ternary: each pixel by itself, with the thresholds of its channel."""
    sign = np.where(numbers[-1] < numbers[0], -1, 1)
    pixels = np.arange(256, dtype=np.float32)[:, np.newaxis] / 256 * sign
    upper = np.where(numbers > 0, pixels, np.inf).min(0).astype(np.float32)
    lower = np.where(numbers < 0, pixels, -np.inf).max(0).astype(np.float32)
    if (lower >= upper).any() or ((numbers == 0) & ((pixels >= upper) | (pixels <= lower))).any():
        raise TwtaError('the input neither rises nor falls with the pixel')
    weights = np.diag(sign).astype(np.float32)[np.newaxis, np.newaxis]
    return Layer('encoder', weights, upper[np.newaxis], lower, 1, 'VALID', 1)


def bent_lines(numbers):
    """Return a Stem whose filters add up to whole numbers [256, channels] of a pixel, and their factors.

    One filter is 1 everywhere but in the padding; the others are max(0, pixel - k), for each k at which a channel's
    numbers change their slope. factors: float32 [filters, channels].
    """
    bends = np.diff(np.diff(numbers, axis=0), axis=0, prepend=0)
    places, channels = np.nonzero(bends)
    count = len(places) + 1
    if count > LARGEST_STEM:
        raise TwtaError(f'the input bends {count - 1:,} times between the pixels 0 and 255, as its Quant has another '
                        f'step than the pixels; at most {LARGEST_STEM - 1} can be imported')
    weights, factors = (np.zeros((count, numbers.shape[1]), np.float32) for _ in range(2))
    weights[np.arange(1, count), channels] = 256  # a network's pixels are divided by 256
    factors[0], factors[np.arange(1, count), channels] = numbers[0], bends[places, channels]
    shift = np.append(1.0, -places)
    return Stem(np.ascontiguousarray(weights.T)[np.newaxis, np.newaxis], np.ones(count), shift), factors


def fold(chain, divisor):
    """Return stem, layers, and the classifier's weights, scale and shift, as folding.fold does."""
    numbers, unit = read_input(chain, divisor)
    stem, layers = None, [ternary_encoder(numbers)] if np.abs(numbers).max() <= 1 else []
    *inner, last = chain.steps
    if not isinstance(last.layer, Layer):
        raise TwtaError('the file does not end in a classifier: MatMul or Gemm, and what is linear after it')
    for index, step in enumerate(inner[1:], 1):
        if isinstance(step.layer, Maximum):
            layer, unit = fold_maximum(chain, step, f'pool{index}', unit)
        elif layers:
            layer, unit = fold_layer(chain, step, f'{"dense" if step.is_flat else "conv"}{index}', unit)
        else:
            stem, layer, unit = fold_encoder(chain, step, numbers, unit)
        layers.append(layer)
    if not layers or isinstance(layers[0], Maximum):
        raise TwtaError('no layer with ternary activations is before the first MaxPool, or before the classifier')
    return stem, layers, *fold_classifier(chain, last, unit)


def fold_layer(chain, step, name, unit):
    """Return the Layer of a linear step that reads activations of -unit, 0, +unit, and the unit of its own."""
    weights, own = ternary_weights(step.layer, name)
    sign, upper, lower, unit = find_thresholds(chain, step, name, fan_in(weights), own * unit)
    upper, lower = upper[np.newaxis].astype(np.int32), lower.astype(np.int32)
    return step.layer._replace(name=name, weights=weights * sign.astype(np.int8), upper=upper, lower=lower), unit


def fold_encoder(chain, step, numbers, unit):
    """Return stem, Layer and unit of the first step, which reads the whole numbers of the pixels times unit."""
    name = 'encoder'
    weights, own = ternary_weights(step.layer, name)
    most = int(np.abs(numbers).max()) * fan_in(weights)
    if most > LARGEST_SUM:
        raise TwtaError(f'{name}: its sums reach {most:,}; at most {LARGEST_SUM:,} can be imported')
    sign, upper, lower, unit = find_thresholds(chain, step, name, most, own * unit)
    stem, factors = bent_lines(numbers)
    layer = without_groups(step.layer._replace(name=name, weights=weights * sign))
    weights = np.einsum('hwcf,sc->hwsf', layer.weights, factors).astype(np.float32)
    upper, lower = np.where(upper > most, np.inf, upper), np.where(lower < -most, -np.inf, lower)
    return stem, layer._replace(weights=weights, upper=upper[np.newaxis].astype(np.float32),
                                lower=lower.astype(np.float32)), unit


def fold_maximum(chain, step, name, unit):
    """Return the Maximum of activations -unit, 0, +unit, and the unit of what it gives."""
    values = np.repeat(np.float32([[-1], [0], [1]]) * unit, step.channels, 1)
    response, unit = in_steps(chain.respond(step, values), name)
    if np.abs(response).max() > 1:
        raise TwtaError(f'{name}: the values after it are not -1, 0 and 1')
    return step.layer._replace(name=name, response=response.astype(np.int8)), unit


def fold_classifier(chain, step, unit):
    """Return weights [features, classes], scale and shift [classes] of the classifier, float32."""
    weights = (step.layer.weights * unit).reshape(-1, step.channels)
    most = max(float(np.abs(weights).sum(0).max()), 1.0)
    below, zero, half, above = chain.respond(step, np.float32([[-most], [0], [most / 2], [most]])
                                             + np.zeros(step.channels, np.float32))
    scale = (above - below) / np.float32(2 * most)
    if not np.allclose(half, zero + scale * np.float32(most / 2), rtol=1e-5, atol=1e-5 * float(np.abs(above).max())):
        raise TwtaError('the nodes after the classifier are not linear; its scores cannot be imported')
    return weights, scale, zero


def import_model(model, name, divisor):
    """Return the PackedNetwork of a ModelProto, and the model as a function of images.

    name       of the network
    divisor    a pixel enters the file's network as pixel / divisor; 255 for torchvision's ToTensor

    The function takes uint8 [n, rows, columns, channels] and returns scores [n, classes].

    Raises TwtaError if the network is not of the form.
    """
    chain = Chain(model)
    stem, layers, weights, scale, shift = fold(chain, divisor)
    physical, weights = spatial(layers, weights)
    properties = {item.key: item.value for item in model.metadata_props}
    classes = properties.get('classes', '').split(',')
    if len(classes) != len(scale):
        classes = map(str, range(len(scale)))
    has_maximum = any(isinstance(layer, Maximum) for layer in layers)
    record = {'choices': {'pooling': 'max'}} if has_maximum else {}
    packed = PackedNetwork(name, properties.get('dataset', 'unknown'), chain.image, 0, tuple(classes), tuple(physical),
                           weights, scale, shift, record, stem)

    def original(images):
        pixels = (images / np.float32(divisor)).transpose(0, 3, 1, 2)
        last = model.graph.output[0].name
        return np.concatenate([chain.run(model.graph.node, [last], **{chain.input: pixels[k:k + 1]})[0]
                               for k in range(len(images))])

    return packed, original


def read_model(path):
    """Return the ModelProto of a file, with the data that it keeps in files beside it."""
    if not path.is_file():
        raise TwtaError(f'{path}: not a file')
    if path.stat().st_size > LARGEST_FILE:
        raise TwtaError(f'{path}: larger than {LARGEST_FILE >> 20} MB; that is no network of this kind')
    try:
        model = onnx.load(path, load_external_data=False)
        entries = [entry for item in model.graph.initializer for entry in item.external_data if entry.key == 'length']
        if sum(int(entry.value) for entry in entries) > LARGEST_FILE:
            raise TwtaError(f'{path}: the data beside it are larger than {LARGEST_FILE >> 20} MB')
        onnx.load_external_data_for_model(model, str(path.parent))
        return model
    except TwtaError:
        raise
    except Exception as error:  # whatever onnx makes of a stranger's file
        raise TwtaError(f'{path}: not an ONNX file, or the data beside it are missing: {error}') from None


def import_file(path, name, divisor):
    """Return what import_model returns, of a file; errors give its path."""
    model = read_model(path)
    try:
        with np.errstate(all='ignore'):
            packed, original = import_model(model, name, divisor)
        return file_format.parse(file_format.serialize(packed)), original  # its limits hold here, too
    except (TwtaError, file_format.InvalidFile) as error:
        raise TwtaError(f'{path}: {error}') from None
    except Exception as error:  # a damaged file has attributes and shapes of any kind
        raise TwtaError(f'{path}: not a network of the form in docs/exchange.md: {error!r}') from None


def compare(packed, original, images):
    """Raise TwtaError if the packed network has other scores on the images than the file."""
    expected, found = original(images), NumpyEngine(packed).run(images)[0]
    if not np.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max())):
        raise TwtaError(f'the packed network has other scores on {len(images)} images than the file; it is not '
                        'written. A sum may lie on a threshold, with units that are no powers of two: float32 then '
                        'rounds it one way or the other')
