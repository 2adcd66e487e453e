"""From a trained graph to a packed network: batch normalisation and ternarisation folded into integer thresholds.

The thresholds are not computed from gamma, beta and the moments: they are read off the graph. Its own float32 batch
normalisation and quantiser are run on every sum that a filter can reach, so that they agree with it on each, ties and
rounding included. Equations and edge cases: the README's section on deployment.
"""
import hashlib

import numpy as np

from twta import TwtaError, interchange, packed_file, ternary_layers
from twta import packed as engines
from twta.packed_file import Layer, Packed, fan_in
from twta.records import say

LARGEST_FLOAT = 2.0 ** 64  # beyond any real sum of the encoder
COMPARED = 200  # test images whose activations export compares with the graph's, as it does all predictions


def pack(network, session, script, name, dataset, record):
    """The network in the session, trained on the data set of that name, as Packed.

    TwtaError where its activations are not ternary or a parameter is no number.
    """
    *blocks, (classifier, classifier_bn, _) = read_blocks(network.net)
    ternary = ternary_layers.ternarize_activations
    if any(activation.activation is not ternary for _, _, activation in blocks):
        raise TwtaError(f'--mode export: {script} has full-precision activations, there is nothing to pack; export one '
                        'of the TWTA networks')
    check_finite(network.net, session)
    layers = tuple(pack_layer(session, *block, is_encoder=not index) for index, block in enumerate(blocks))
    weights = session.run(classifier.quantized)
    scale, shift = np.ones(weights.shape[1], np.float32), np.zeros(weights.shape[1], np.float32)
    if classifier_bn:
        beta, gamma, mean, variance = session.run(classifier_bn.all_params[-4:])
        scale = gamma / np.sqrt(variance + np.float64(ternary_layers.EPSILON))
        shift = (beta - mean * scale).astype(np.float32)
        scale = scale.astype(np.float32)
    return Packed(script, name, dataset.test.images.shape[1:], dataset.crop, tuple(dataset.classes), layers,
                  weights, scale, shift, record)


def read_blocks(layer):
    """Each layer with its batch normalisation and activation, or None, from the first to the last."""
    blocks, batch_norm, activation = [], None, None
    while hasattr(layer, 'prev_layer'):
        if isinstance(layer, ternary_layers.ActivationLayer):
            activation = layer
        elif isinstance(layer, ternary_layers.BatchNormLayer):
            batch_norm = layer
        elif hasattr(layer, 'quantized'):
            blocks.append((layer, batch_norm, activation))
            batch_norm = activation = None
        layer = layer.prev_layer
    return blocks[::-1]


def check_finite(net, session):
    for variable, value in zip(net.all_params, session.run(net.all_params), strict=True):
        if not np.isfinite(value).all() or ('moving_variance' in variable.name and (value < 0).any()):
            raise TwtaError(f'{variable.name} holds NaN, infinity or a negative variance: the training has failed; '
                            'export another checkpoint')


def pack_layer(session, layer, batch_norm, activation, is_encoder):
    gamma = session.run(batch_norm.all_params[-3])
    sign = np.where(gamma < 0, -1, 1).astype(np.int8)
    weights = session.run(layer.quantized)
    if weights.ndim == 2:  # dense on a flattened map: a kernel as large as the map
        before = layer.prev_layer.inputs.shape[1:] if hasattr(layer.prev_layer, 'inputs') else ()
        shape = before.as_list() if len(before) == 3 else [1, 1, weights.shape[0]]
        weights = weights.reshape(*shape, -1)
    if is_encoder:
        upper, lower = real_thresholds(session, batch_norm.inputs, activation.outputs, sign)
    else:
        weights = weights.astype(np.int8)
        upper, lower = integer_thresholds(session, batch_norm.inputs, activation.outputs, sign, fan_in(weights))
    return Layer(layer.name, weights * sign, upper, lower, getattr(layer, 'stride', 1),
                 getattr(layer, 'padding', 'VALID'), getattr(layer, 'groups', 1))


def respond(session, sums, activations, values):
    """Activations of each filter, int8 [count, filters], to its values float32 [count, filters], from the graph."""
    shape = sums.shape[1:].as_list()
    per_image = int(np.prod(shape[:-1]))
    padded = np.pad(values, ((0, -len(values) % per_image), (0, 0)))
    return session.run(activations, {sums: padded.reshape(-1, *shape)}).reshape(-1, shape[-1])[:len(values)]


def integer_thresholds(session, sums, activations, sign, most):
    """For sums times sign from -most to most: the least that gives +1 (most + 1: none), the greatest that gives -1."""
    values = np.arange(-most, most + 1)[:, np.newaxis]
    response = respond(session, sums, activations, (values * sign).astype(np.float32))
    upper = np.where((response > 0).any(0), (response > 0).argmax(0) - most, most + 1)
    lower = np.where((response < 0).any(0), most - (response < 0)[::-1].argmax(0), -most - 1)
    if not np.array_equal(response, (values >= upper).astype(int) - (values <= lower)):
        raise TwtaError(f'{sums.name}: the activation does not rise with the sum; this is a fault of the scripts')
    return upper.astype(np.int32), lower.astype(np.int32)


def real_thresholds(session, sums, activations, sign):
    """For float32 sums times sign: the least that gives +1 (infinity: none), the greatest that gives -1."""
    upper = bisect(lambda values: respond(session, sums, activations, values * sign) > 0, len(sign))
    lower = -bisect(lambda values: respond(session, sums, activations, -values * sign) < 0, len(sign))
    return upper, lower


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


# ----------------------------------------------------------------------------------------------------------------------
# The mode


def describe_run(args, state):
    """What the file tells of the training that it comes from."""
    files = [args.weights] if args.weights else [args.run_dir / name for name in ('config.json', 'log.csv')]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    return {'epoch': state['epoch'] if state else None, 'sha256': hashes}


def compare(packed, network, session, dataset):
    """Runs both networks on test images; TwtaError where a prediction or, on some of them, an activation differs."""
    engine = engines.open_engine(packed)
    images = dataset.test.images[:COMPARED]
    outputs = [activation.outputs for _, _, activation in read_blocks(network.net)[:-1]]
    found, expected = engine.activations(images), session.run(outputs, {network.images: images})
    for layer, of_engine, of_graph in zip(packed.layers, found, expected, strict=True):
        if not np.array_equal(of_engine.reshape(of_graph.shape), of_graph):
            raise TwtaError(f'{layer.name}: the packed network computes other activations than the graph; nothing was '
                            'written. This is a fault of the scripts')
    differ = 0
    for start in range(0, len(dataset.test.images), COMPARED):
        batch = dataset.test.images[start:start + COMPARED]
        predicted = session.run(network.evaluation.predicted, {network.images: batch})
        differ += np.sum(engines.logits(engine, batch).argmax(1) != predicted)
    if differ:
        raise TwtaError(f'the packed network predicts {differ} test images otherwise than the graph; nothing was '
                        'written. This is a fault of the scripts')
    say(f'checked: the same predictions as the graph on all {len(dataset.test.images):,} test images, the same '
        f'activations on {len(images)} ({engine.name} engine)')


def write(packed, dataset, args):
    """Writes the file that --format and --file say, and tells its size."""
    if args.format == 'twta':
        size = packed_file.write(args.file, packed)
        ternary = packed.layers[1:]
        parameters = sum(layer.weights.size for layer in ternary)
        integers = sum(map(packed_file.layer_bytes, ternary))
        say(f'ternary layers: {parameters:,} weights and their thresholds in {integers:,} bytes, '
            f'{4 * parameters / integers:.1f} times less than float32 weights')
    else:
        size = interchange.WRITERS[args.format](args.file, packed, dataset.test.images[:interchange.VECTORS])
        beside = f', in {args.file.with_suffix(".vectors.npz")}' if args.format == 'onnx' else ''
        say(f'test vectors: {interchange.VECTORS} images{beside}')
    say(f'{args.file}: {size:,} bytes')
