"""--mode export: turn a trained network into integers, compare them with the graph, write them."""
import numpy as np

from twta import TwtaError
from twta.export import formats
from twta.export.folding import fold
from twta.export.formats import check_format
from twta.export.spatial import add_lanes, spatial
from twta.files import digest
from twta.packed import engines, file_format
from twta.packed.file_format import Layer, PackedNetwork
from twta.terminal import say
from twta.training.blocks import read_blocks
from twta.training.evaluation import trained
from twta.training.records import name_run

COMPARED = 200  # test images whose activations are compared; predictions are compared on all of them


def export(experiment, file, form):
    """Write the network of a checkpoint, or of --weights, as integers, after a comparison with its graph.

    form    format of the file, a key of options.SUFFIXES

    Raises TwtaError if the network cannot be exported in this format or differs from its graph.
    """
    with trained(experiment) as (network, session, experiment):
        packed = pack(network.net, session, header_of(experiment))
        check_format(form, packed)
        compare(packed, network, session, experiment.dataset)
    write(packed, experiment.dataset, file, form)


def pack(net, session, header, temporal=False):
    """Return the network in the session as a PackedNetwork.

    net         its last TensorLayer layer
    header      the other fields of PackedNetwork, from make_header
    temporal    keep layers of several levels as `fold` returns them, for twta.spikes

    Raises TwtaError if an activation is not quantised, a parameter is not finite or a variance is negative.
    """
    stem, layers, weights, scale, shift = fold(net, session, header['network'])
    if not temporal or max(len(layer.upper) for layer in layers if isinstance(layer, Layer)) == 1:
        layers, weights = spatial(layers, weights)
    return PackedNetwork(layers=tuple(layers), weights=weights, scale=scale, shift=shift, stem=stem, **header)


def make_header(script, dataset_name, dataset, record):
    """Return the fields `network` (a script's name), `dataset`, `image`, `crop`, `classes` and `record`.

    record    dictionary that describes the training, see describe_run
    """
    return {'network': script, 'dataset': dataset_name, 'image': dataset.test.images.shape[1:], 'crop': dataset.crop,
            'classes': tuple(dataset.classes), 'record': record}


def header_of(experiment):
    """Return make_header's fields for the network of an experiment, with the record of its training."""
    files = [experiment.weights] if experiment.weights else [
        experiment.run_dir / name for name in ('config.json', 'log.csv')]
    hashes = {path.name: digest(path) for path in files if path.is_file()}
    state = experiment.state
    end = {'run': name_run(state), **state.end()} if state else {'run': None, 'epoch': None}
    return make_header(experiment.script, experiment.dataset_name, experiment.dataset,
                       {**end, 'choices': experiment.options, 'sha256': hashes})


def compare(packed, network, session, dataset):
    """Run the packed network and the graph on all test images.

    Raises TwtaError if a prediction differs, or an activation on the first COMPARED images.
    """
    engine = engines.open_engine(packed)
    images = dataset.test.images[:COMPARED]
    found = zip(packed.layers, engine.activations(images), read_out(network.net), strict=True)
    found = [(layer, of_engine, *lanes) for layer, of_engine, lanes in found if lanes]
    expected = session.run([outputs for _, _, outputs, _, _ in found], {network.images: images})
    for (layer, of_engine, _, groups, worth), of_graph in zip(found, expected, strict=True):
        if not np.array_equal(add_lanes(of_engine, groups, worth).reshape(of_graph.shape), of_graph):
            raise TwtaError(f'{layer.name}: the packed network computes other activations than the graph; nothing was '
                            'written; this is a fault of the scripts')
    predicted = predict(network, session, dataset.test.images)
    differ = np.sum(engines.logits(engine, dataset.test.images).argmax(1) != predicted)
    if differ:
        raise TwtaError(f'the packed network predicts {differ} test images otherwise than the graph; nothing was '
                        'written; this is a fault of the scripts')
    say(f'checked: the same predictions as the graph on all {len(dataset.test.images):,} test images, the same '
        f'activations on {len(images)} ({engine.name} engine)')


def read_out(net):
    """Yield, per layer of the spatial network, its activations in the graph, and groups and worth of its lanes.

    The activations are a tensor. Yield None if the lanes feed a maximum: the graph has no such activations.
    """
    blocks = [block for block in read_blocks(net)[:-1] if block.levels]
    for index, block in enumerate(blocks):
        positive = [level for level in block.levels if level > 0]
        worth, groups = np.full(len(positive), positive[0]), block.groups
        if block.pooling == 'average':
            groups = int(block.layer.inputs.shape[-1])
        elif block.pooling == 'max':
            groups = blocks[index - 1].groups
            worth = np.array([1, -1] if block.levels[0] < 0 else [1])
        feeds_maximum = index + 1 < len(blocks) and blocks[index + 1].pooling == 'max'
        yield None if feeds_maximum else (block.activation.outputs, groups, worth)


def predict(network, session, images):
    """Return the classes [n] that the graph predicts for any number of images."""
    return np.concatenate([session.run(network.evaluation.predicted, {network.images: images[start:start + COMPARED]})
                           for start in range(0, len(images), COMPARED)])


def write(packed, dataset, file, form):
    """Write the file in a format and print its size."""
    if form == 'twta':
        size = file_format.write(file, packed)
        parameters = sum(layer.weights.size for layer in packed.layers[1:])
        integers = sum(map(file_format.layer_bytes, packed.layers[1:]))
        if parameters:
            say(f'quantised layers: {parameters:,} weights and their thresholds in {integers:,} bytes, '
                + ('as neurons with one or two thresholds each' if file_format.is_expanded(packed) else
                   f'{4 * parameters / integers:.1f} times less than float32 weights'))
    else:
        images = dataset.test.images[:formats.count_images(form)]
        size = formats.write(form, file, packed, images)
        say(formats.describe_images(form, file, len(images), 'of the test set'))
    say(f'{file}: {size:,} bytes')
