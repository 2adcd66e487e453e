"""From a trained graph to a packed network: batch normalisation and activation folded into integer thresholds.

The thresholds are not computed from gamma, beta and the moments: they are read off the graph. Its own float32 batch
normalisation and quantiser are run on every sum that a filter can reach, so that they agree with it on each, ties and
rounding included. Equations and edge cases: docs/deployment.md.

It goes in two steps. `fold`: each activation becomes a whole number, how many thresholds the sum reaches; multi-level
ones have several, and a maximum has a table. `spatial`: each neuron becomes as many as it has thresholds, with the same
weights, and the next layer adds them up (github.com/edwardzcl/Spatio_temporal_SNNs); what is left is a network of
convolutions and of neurons that fire once at most, positively or negatively.
"""
import hashlib
from typing import NamedTuple

import numpy as np

from twta import TwtaError, interchange, packed_file, ternary_layers
from twta import packed as engines
from twta.options import NOTHING_TO_PACK
from twta.packed_file import Layer, Packed, Stem, fan_in
from twta.records import is_sound, name_run
from twta.terminal import say
from twta.tf1 import tf

LARGEST_FLOAT = 2.0 ** 64  # beyond any real sum of the encoder
COMPARED = 200  # test images whose activations export compares with the graph's, as it does all predictions


class Maximum(NamedTuple):
    """Max-pooling with the batch normalisation and the ternary or binary activation after it."""
    name: str
    filter_size: int
    stride: int
    padding: str
    response: np.ndarray  # int8 [3, channels]: the activation where the maximum is -1, 0, +1


def pack(network, session, script, name, dataset, record, temporal=False):
    """The network in the session, trained on the data set of that name, as Packed.

    temporal: layers of several levels stay as `fold` gives them, for twta.spikes. TwtaError where its activations are
    not quantised or a parameter is no number.
    """
    stem, layers, weights, scale, shift = fold(network.net, session, script)
    if not temporal or max(len(layer.upper) for layer in layers if isinstance(layer, Layer)) == 1:
        layers, weights = spatial(layers, weights)
    return Packed(script, name, dataset.test.images.shape[1:], dataset.crop, tuple(dataset.classes), tuple(layers),
                  weights, scale, shift, record, stem)


def read_blocks(layer):
    """Each layer with its batch normalisation and activation, or None, from the first to the last."""
    blocks, batch_norm, activation = [], None, None
    while hasattr(layer, 'prev_layer'):
        if isinstance(layer, ternary_layers.ActivationLayer):
            activation = layer
        elif isinstance(layer, ternary_layers.BatchNormLayer):
            batch_norm = layer
        elif hasattr(layer, 'quantized') or pooling(layer):
            blocks.append((layer, batch_norm, activation))
            batch_norm = activation = None
        layer = layer.prev_layer
    return blocks[::-1]


def pooling(layer):
    """'max' or 'average', '' where a layer has weights."""
    return layer.kind if isinstance(layer, ternary_layers.PoolLayer) else ''


def shares(net):
    """Shares [negative, positive] of the quantised weights and of the activations of each layer, by its name."""
    blocks = [block for block in read_blocks(net) if block[2] and hasattr(block[2].activation, 'levels')]
    found = {'weights': {layer.name: layer.quantized for layer, *_ in blocks[1:] if not pooling(layer)},
             'activations': {layer.name: activation.outputs for layer, _, activation in blocks}}
    return {kind: {name: tf.stack([tf.reduce_mean(tf.cast(values < 0, tf.float32)),
                                   tf.reduce_mean(tf.cast(values > 0, tf.float32))])
                   for name, values in layers.items()} for kind, layers in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Folding: from real activations to thresholds


def fold(net, session, script):
    """Stem or None, layers, and the classifier's weights, scale and shift, of the network in the session.

    The layers are Layers whose `upper` is [levels, filters], the sum that is needed for each, or Maximums. Activations
    are whole numbers: how many of the thresholds are reached, -1 where the sum is <= lower.
    """
    *blocks, (classifier, classifier_bn, _) = read_blocks(net)
    has_stem = len(blocks) > 1 and not hasattr(blocks[0][2].activation, 'levels')
    if any(not hasattr(activation.activation, 'levels') for _, _, activation in blocks[has_stem:]):
        raise TwtaError(f'{script} {NOTHING_TO_PACK}')
    check_finite(net, session)
    stem = fold_stem(session, *blocks.pop(0)[:2]) if has_stem else None
    layers, before = [], None  # before: the Reader of the layer before
    for layer, batch_norm, activation in blocks:
        levels = np.array(activation.activation.levels)
        steps = np.count_nonzero(levels > 0)
        read = Reader(session, batch_norm.inputs, activation.outputs, sign_of_gamma(session, batch_norm), steps,
                      round(steps / levels[-1]))
        layers.append(fold_maximum(layer, read, before) if pooling(layer) == 'max' else
                      fold_layer(session, layer, read, before))
        before = read
    weights = session.run(classifier.quantized) / np.float32(before.unit)
    scale, shift = np.ones(weights.shape[1], np.float32), np.zeros(weights.shape[1], np.float32)
    if classifier_bn:
        beta, gamma, mean, variance = session.run(classifier_bn.all_params[-4:])
        scale = gamma / np.sqrt(variance + np.float64(ternary_layers.EPSILON))
        shift = (beta - mean * scale).astype(np.float32)
        scale = scale.astype(np.float32)
    return stem, layers, weights, scale, shift


def check_finite(net, session):
    for variable, value in zip(net.all_params, session.run(net.all_params), strict=True):
        if not is_sound(variable.name, value):
            raise TwtaError(f'{variable.name} holds NaN, infinity or a negative variance: the training has failed; '
                            'export another checkpoint')


def fold_stem(session, layer, batch_norm):
    beta, gamma, mean, variance = (values.astype(np.float64) for values in session.run(batch_norm.all_params[-4:]))
    scale = gamma * (1 / np.sqrt(variance + ternary_layers.EPSILON))
    return Stem(session.run(layer.quantized), scale, beta - mean * scale)


def sign_of_gamma(session, batch_norm):
    return np.where(session.run(batch_norm.all_params[-3]) < 0, -1, 1).astype(np.int8)


class Reader(NamedTuple):
    """Reads off the graph what batch normalisation and activation of a layer do to its sums."""
    session: object
    sums: object  # the tensor [batch, ..., filters] that batch normalisation reads
    activations: object  # the tensor that the activation gives
    sign: np.ndarray  # int8 [filters], of gamma: sums are taken times it, so that activations rise with them
    steps: int  # thresholds of the activation above 0
    unit: int  # thresholds that an activation of 1.0 has reached

    def __call__(self, values):
        """Activations as whole numbers [count, filters] of values float32 [count, filters], a column a filter."""
        shape = self.sums.shape[1:].as_list()
        per_image = int(np.prod(shape[:-1]))
        padded = np.pad(values, ((0, -len(values) % per_image), (0, 0)))
        found = self.session.run(self.activations, {self.sums: padded.reshape(-1, *shape)}).reshape(-1, shape[-1])
        return np.rint(found[:len(values)] * self.unit).astype(np.int32)


def fold_layer(session, layer, read, before):
    """A convolution, dense layer or average-pooling as a Layer; before: the Reader of its inputs, None: the encoder."""
    if pooling(layer):  # an average: each channel is a group of its own
        channels = int(layer.inputs.shape[-1])
        area = layer.filter_size ** 2
        weights, groups = np.ones((layer.filter_size, layer.filter_size, 1, channels), np.int8), channels
    else:
        weights, groups, area = session.run(layer.quantized), getattr(layer, 'groups', 1), 1
    if weights.ndim == 2:  # dense on a flattened map: a kernel as large as the map
        flat = layer.prev_layer.inputs.shape[1:] if hasattr(layer.prev_layer, 'inputs') else ()
        shape = flat.as_list() if len(flat) == 3 else [1, 1, weights.shape[0]]
        weights = weights.reshape(*shape, -1)
    if before is None:
        upper, lower = real_thresholds(read)
    else:
        weights = weights.astype(np.int8)
        upper, lower = integer_thresholds(read, before.steps * fan_in(weights), before.unit * area)
    return Layer(layer.name, weights * read.sign, upper, lower, getattr(layer, 'stride', 1),
                 getattr(layer, 'padding', 'VALID'), groups)


def integer_thresholds(read, most, divisor):
    """For sums times sign from -most to most: the least that reaches each step, the greatest that gives -1.

    In the graph they are divided by the divisor. Returns upper [steps, filters], most + 1 where none does, and lower
    [filters], -most - 1 where none does.
    """
    values = np.arange(-most, most + 1)[:, np.newaxis]
    response = read((values * read.sign / divisor).astype(np.float32))
    reached = [response > step for step in range(read.steps)]
    upper = np.stack([np.where(any_of.any(0), any_of.argmax(0) - most, most + 1) for any_of in reached])
    lower = np.where((response < 0).any(0), most - (response < 0)[::-1].argmax(0), -most - 1)
    if not np.array_equal(response, sum((values >= step).astype(int) for step in upper) - (values <= lower)):
        raise TwtaError(f'{read.sums.name}: the activation does not rise with the sum; this is a fault of the scripts')
    return upper.astype(np.int32), lower.astype(np.int32)


def real_thresholds(read):
    """For float32 sums times sign: the least that reaches each step (infinity: none), the greatest that gives -1."""
    n_filters = len(read.sign)
    upper = [bisect(lambda values, step=step: read(values * read.sign) > step, n_filters)
             for step in range(read.steps)]
    return np.stack(upper), -bisect(lambda values: read(-values * read.sign) < 0, n_filters)


def bisect(is_reached, n_filters):
    """The least float32 of each filter that reaches; infinity where none does, -infinity where all do."""
    largest = int(np.float32(LARGEST_FLOAT).view(np.int32))
    below, above = np.full(n_filters, -largest), np.full(n_filters, largest)
    never = ~is_reached(to_float(above)[np.newaxis])[0]
    always = is_reached(to_float(below)[np.newaxis])[0]
    while (above - below > 1).any():
        middle = (below + above) // 2
        reached = is_reached(to_float(middle)[np.newaxis])[0]
        below, above = np.where(reached, below, middle), np.where(reached, middle, above)
    return np.where(never, np.inf, np.where(always, -np.inf, to_float(above))).astype(np.float32)


def to_float(order):
    """The float32 that comes at that place, counted from 0.0 = 0."""
    return np.copysign(np.abs(order).astype(np.int32).view(np.float32), order).astype(np.float32)


def fold_maximum(layer, read, before):
    if before.unit != 1 or read.steps != 1:
        raise TwtaError(f'{layer.name}: max-pooling is exported of ternary and of binary activations only; train with '
                        '--pooling conv or average')
    values = np.repeat(np.float32([[-1], [0], [1]]), len(read.sign), axis=1)
    return Maximum(layer.name, layer.filter_size, layer.stride, layer.padding, read(values).astype(np.int8))


# ----------------------------------------------------------------------------------------------------------------------
# Spatial conversion: one neuron a threshold


def spatial(layers, weights):
    """Folded layers and the classifier's weights as Layers of neurons that have one threshold or, ternary, two.

    The neurons that stand for one are `lanes`: filters stand by group, within a group by lane. Of each lane `worth`
    tells what a spike counts in the next layer, +1 or -1.
    """
    physical, groups, worth = [], 1, np.ones(1, np.int8)  # of the map before: groups of its writer, its lanes
    for index, layer in enumerate(layers):
        if isinstance(layer, Maximum):  # built with the layer before it
            if isinstance(layers[index - 1], Maximum):
                raise TwtaError(f'{layer.name}: a maximum of maxima is not exported')
            continue
        layer = layer._replace(weights=gather(layer.weights, layer.groups, groups, worth) if index else layer.weights)
        groups, maximum = layer.groups, layers[index + 1] if index + 1 < len(layers) else None
        if not isinstance(maximum, Maximum):
            worth = np.ones(len(layer.upper), np.int8)
            physical.append(split(layer, layer.upper) if len(worth) > 1 else layer._replace(upper=layer.upper[0]))
        else:
            upper, signs, worth = any_or_none(layer, maximum)
            physical.append(split(layer, upper))
            signs = by_lane(signs, groups)
            size, channels = maximum.filter_size, len(signs)
            weights_of_maximum = np.broadcast_to(signs, (size, size, 1, channels)).astype(np.int8)
            physical.append(Layer(maximum.name, weights_of_maximum, (signs > 0).astype(np.int32),
                                  np.full(channels, -size * size - 1, np.int32), maximum.stride, maximum.padding,
                                  channels))
    if len(worth) > 1:
        channels = physical[-1].weights.shape[3] // len(worth)
        maps = weights.reshape(-1, 1, channels, weights.shape[1])
        weights = gather(maps, 1, groups, worth).reshape(-1, weights.shape[1])
    return physical, weights


def gather(weights, groups, writer_groups, worth):
    """Weights [height, width, channels / groups, filters] for a map of lanes that was written in writer_groups."""
    if len(worth) == 1:
        return weights * worth
    height, width, channels, filters = weights.shape
    if channels % writer_groups:
        raise TwtaError(f'{len(worth)} neurons for one and {writer_groups} groups that {groups} groups read: the '
                        'channels do not divide; this network cannot be exported')
    by_group = weights.reshape(height, width, writer_groups, 1, -1, filters)
    return (by_group * worth[:, np.newaxis, np.newaxis]).reshape(height, width, -1, filters)


def by_lane(values, groups):
    """Values [lanes, filters] in the order of the lanes' filters: by group, within a group by lane."""
    return values.reshape(len(values), groups, -1).swapaxes(0, 1).ravel()


def split(layer, upper):
    """A layer with a filter for each threshold in upper [lanes, filters]."""
    lanes, filters = upper.shape
    order = by_lane(np.broadcast_to(np.arange(filters), (lanes, filters)), layer.groups)
    never = -np.inf if upper.dtype == np.float32 else -fan_in(layer.weights) - 1
    return layer._replace(weights=layer.weights[..., order], upper=by_lane(upper, layer.groups),
                          lower=np.full(lanes * filters, never, upper.dtype))


def any_or_none(layer, maximum):
    """Thresholds [lanes, filters] of a layer, and signs [lanes, filters], from which a maximum's activations come.

    It is +1 where any neuron of the first lane fires, or where none does (sign -1); and -1, likewise, by the second
    lane, which binary activations need not. So it takes no more than neurons that count spikes. worth: of the lanes.
    """
    is_real = layer.upper.dtype == np.float32
    never, always = (np.inf, -np.inf) if is_real else (fan_in(layer.weights) + 1, -fan_in(layer.weights))
    above = np.nextafter(layer.lower, np.float32(np.inf)) if is_real else layer.lower + 1
    at_least = np.stack([np.full_like(above, always), above, layer.upper[0], np.full_like(above, never)])  # -1, 0, 1, 2
    upper, signs, worth = [], [], []
    for value in (1, -1) if (maximum.response < 0).any() else (1,):
        gives = maximum.response == value  # [3, filters], monotonous: from some place on, or up to it
        rises = gives[2] & ~gives[0] | gives.all(0) | ~gives.any(0)
        place = np.where(rises, (~gives).sum(0), gives.sum(0))
        upper.append(np.take_along_axis(at_least, place[np.newaxis], 0)[0])
        signs.append(np.where(rises, 1, -1))
        worth.append(value)
    return np.stack(upper), np.stack(signs), np.array(worth, np.int8)


def read_out(net):
    """Of each layer of the spatial network, the activations in the graph, and groups and worth of the lanes that they
    are the sum of; None where the lanes feed a maximum."""
    blocks = [block for block in read_blocks(net)[:-1] if hasattr(block[2].activation, 'levels')]
    kinds = [pooling(layer) for layer, _, _ in blocks]
    for index, (layer, _, activation) in enumerate(blocks):
        positive = [level for level in activation.activation.levels if level > 0]
        worth, groups = np.full(len(positive), positive[0]), getattr(layer, 'groups', 1)
        if kinds[index] == 'average':
            groups = int(layer.inputs.shape[-1])
        elif kinds[index] == 'max':
            groups = getattr(blocks[index - 1][0], 'groups', 1)
            worth = np.array([1, -1] if activation.activation.levels[0] < 0 else [1])
        yield None if kinds[index + 1:index + 2] == ['max'] else (activation.outputs, groups, worth)


def add_lanes(spikes, groups, worth):
    """Activations [n, height, width, channels] of the spikes [n, height, width, lanes * channels] of a layer."""
    lanes = spikes.reshape(*spikes.shape[:3], groups, len(worth), -1)
    return np.tensordot(lanes, worth, (4, 0)).reshape(*spikes.shape[:3], -1)


# ----------------------------------------------------------------------------------------------------------------------
# The mode


def describe_run(args, state):
    """What the file tells of the training that it comes from."""
    files = [args.weights] if args.weights else [args.run_dir / name for name in ('config.json', 'log.csv')]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    run, epoch = (name_run(state), state['epoch']) if state else (None, None)
    return {'run': run, 'epoch': epoch, 'choices': args.choices, 'sha256': hashes}


def compare(packed, network, session, dataset):
    """Runs both networks on test images; TwtaError where a prediction or, on some of them, an activation differs."""
    engine = engines.open_engine(packed)
    images = dataset.test.images[:COMPARED]
    found = zip(packed.layers, engine.activations(images), read_out(network.net), strict=True)
    found = [(layer, of_engine, *lanes) for layer, of_engine, lanes in found if lanes]
    expected = session.run([outputs for _, _, outputs, _, _ in found], {network.images: images})
    for (layer, of_engine, _, groups, worth), of_graph in zip(found, expected, strict=True):
        if not np.array_equal(add_lanes(of_engine, groups, worth).reshape(of_graph.shape), of_graph):
            raise TwtaError(f'{layer.name}: the packed network computes other activations than the graph; nothing was '
                            'written. This is a fault of the scripts')
    predicted = predict(network, session, dataset.test.images)
    differ = np.sum(engines.logits(engine, dataset.test.images).argmax(1) != predicted)
    if differ:
        raise TwtaError(f'the packed network predicts {differ} test images otherwise than the graph; nothing was '
                        'written. This is a fault of the scripts')
    say(f'checked: the same predictions as the graph on all {len(dataset.test.images):,} test images, the same '
        f'activations on {len(images)} ({engine.name} engine)')


def predict(network, session, images):
    """The classes that the graph gives to any number of images."""
    return np.concatenate([session.run(network.evaluation.predicted, {network.images: images[start:start + COMPARED]})
                           for start in range(0, len(images), COMPARED)])


def write(packed, dataset, args):
    """Writes the file that --format and --file say, and tells its size."""
    if args.format == 'twta':
        size = packed_file.write(args.file, packed)
        ternary = packed.layers[1:]
        parameters = sum(layer.weights.size for layer in ternary)
        integers = sum(map(packed_file.layer_bytes, ternary))
        say(f'quantised layers: {parameters:,} weights and their thresholds in {integers:,} bytes, '
            + ('as neurons of one or two thresholds each' if packed_file.is_expanded(packed) else
               f'{4 * parameters / integers:.1f} times less than float32 weights'))
    else:
        size = interchange.WRITERS[args.format](args.file, packed, dataset.test.images[:interchange.VECTORS])
        beside = f', in {args.file.with_suffix(".vectors.npz")}' if args.format == 'onnx' else ''
        say(f'test vectors: {interchange.VECTORS} images{beside}')
    say(f'{args.file}: {size:,} bytes')
