"""Packed networks: python -m twta.packed FILE.twta IMAGES.npy prints a class an image. No TensorFlow.

Two engines have the same activations, and the same logits but for roundings. `numba`: bit planes, compiled
(twta.bitplanes). `numpy`: the same integers as arrays, slower: the fall-back, and the plain statement of what a packed
network computes.
"""
import os
import sys
import time

import numpy as np

from twta import TwtaError, UsageError, arrays, packed_file
from twta.command_line import Parser, errors_in_a_line, input_file, positive_integer


def prepare(images, crop):
    """uint8 [n, height, width, channels] as the float32 that the encoder sees: twta.preprocessing.for_evaluation."""
    if not crop:
        return images / np.float32(256)
    top, left = ((side - crop) // 2 for side in images.shape[1:3])
    x = images[:, top:top + crop, left:left + crop].astype(np.float64)
    values = x[0].size
    mean = x.sum((1, 2, 3), keepdims=True) / values
    variance = (x * x).sum((1, 2, 3), keepdims=True) / values - mean * mean
    return ((x - mean) / np.maximum(np.sqrt(variance), values ** -0.5)).astype(np.float32)


def see(images, packed):
    """What the encoder reads of uint8 images, float64: the images, prepared, or what the stem makes of them."""
    x = prepare(images, packed.crop).astype(np.float64)
    if not packed.stem:
        return x
    weights, scale, shift = packed.stem
    layer = packed_file.Layer('stem', weights, None, None, 1, 'SAME', 1)
    return np.maximum(convolve(x, layer) * scale + shift, 0)


def convolve(x, layer):
    """Sums [n, height', width', filters] of a layer on maps [n, height, width, channels], in the type of x."""
    n, channels = len(x), x.shape[3]
    (top, left), (rows, columns, filters) = packed_file.geometry(x.shape[1:], layer)
    height, width = layer.weights.shape[:2]
    whole = packed_file.border(x.shape[1:], layer)[1]
    x = np.pad(x, ((0, 0), (top, whole[0] - top - x.shape[1]), (left, whole[1] - left - x.shape[2]), (0, 0)))
    x = x.reshape(*x.shape[:3], channels // layer.groups, layer.groups)
    weights = layer.weights.reshape(height, width, channels // layer.groups, layer.groups, -1).astype(x.dtype)
    y = np.zeros((n, rows, columns, layer.groups, filters // layer.groups), x.dtype)
    for i in range(height):
        for j in range(width):
            part = x[:, i::layer.stride, j::layer.stride][:, :rows, :columns]
            for group in range(layer.groups):
                y[..., group, :] += part[..., group] @ weights[i, j, :, group]
    return y.reshape(n, rows, columns, filters)


def fire(sums, layer):
    """Activations int8: +1 where a sum >= upper, -1 where <= lower, else 0."""
    return (sums >= layer.upper).astype(np.int8) - (sums <= layer.lower)


class NumpyEngine:
    """Runs a packed network with numpy: ternary sums in float32, exact up to 2 ** 24.

    neuron     from sums to activations, with the layer's thresholds
    between    what happens to the encoder's activations before the next layer
    """

    name, batch = 'numpy', 64

    def __init__(self, packed, neuron=fire, between=None):
        self.packed, self.neuron, self.between = packed, neuron, between

    def run(self, images):
        """Logits float32 [n, classes] of at most `batch` images, and the activations of each layer, int8 NHWC."""
        encoder, *layers = self.packed.layers
        maps = [self.neuron(convolve(see(images, self.packed), encoder).astype(np.float32), encoder)]
        if self.between:
            maps[0] = self.between(maps[0])
        for layer in layers:
            maps.append(self.neuron(convolve(maps[-1].astype(np.float32), layer), layer))
        return classify(maps[-1], self.packed), maps

    def logits(self, images):
        return self.run(images)[0]

    def activations(self, images):
        return self.run(images)[1]


def classify(activations, packed):
    """Logits from the last layer's activations [n, height, width, channels]."""
    return finish(activations.reshape(len(activations), -1).astype(np.float64) @ packed.weights, packed)


def finish(sums, packed):
    """Logits from the classifier's float64 sums."""
    return sums.astype(np.float32) * packed.scale + packed.shift


def open_engine(packed, engine='auto', threads=None):
    """The engine of that name for a packed network; 'auto' is numba where it is installed, else numpy.

    It has name, batch (the most images that logits and activations take at once), logits(images) and
    activations(images). UsageError where numba is asked for and cannot be had.
    """
    if engine != 'numpy':
        try:
            from twta.bitplanes import NumbaEngine  # here: it compiles

            return NumbaEngine(packed, threads)
        except ImportError as error:
            if engine == 'numba':
                raise UsageError(f'--engine numba: {error}; use --engine numpy') from None
            print(f'without numba, which is much faster: {error}', file=sys.stderr)
    return NumpyEngine(packed)


def logits(engine, images):
    """Logits float32 [n, classes] of any number of images, uint8 [n, height, width, channels]."""
    parts = [engine.logits(images[start:start + engine.batch]) for start in range(0, len(images), engine.batch)]
    return np.concatenate(parts)


# ----------------------------------------------------------------------------------------------------------------------
# From the shell


def infer(script, args):
    """--mode inference --engine packed: evaluates the network of --file on the test images of its data set."""
    from twta import datasets, packed_report, records  # here: the stand-alone command needs none of them

    packed = packed_file.read(args.file)
    if (packed.network, packed.dataset) != (script, args.dataset):
        raise TwtaError(f'{args.file}: {packed.network} on {packed.dataset}, not {script} on {args.dataset}; choose '
                        'another --file, perhaps of those in pretrained/')
    dataset = datasets.load(args.dataset, args.data_dir, None)
    check_images(packed, dataset, args)
    records.say(f'data: {dataset}')
    engine = started(packed, 'auto', args.threads)
    epoch = packed.record.get('epoch') if isinstance(packed.record.get('epoch'), int) else None
    records.say(f'network: {script}, {args.file}' + ('' if epoch is None else f', epoch {epoch}'))
    images, labels = dataset.test.images, dataset.test.labels
    start = time.perf_counter()
    values = logits(engine, images)
    records.say(f'{len(images) / (time.perf_counter() - start):,.0f} images/s')
    values -= values.max(1, keepdims=True)
    loss = np.log(np.exp(values).sum(1)) - values[np.arange(len(labels)), labels]
    confusion = records.confuse(labels, values.argmax(1), len(packed.classes))
    records.report(script, args, packed.record.get('choices'), dataset, 'packed', args.file, epoch, float(loss.mean()),
                   confusion)
    if args.report:
        packed_report.report(engine, dataset, args.run_dir)


def is_expanded(packed):
    """Whether its layers are not those that were trained: one neuron a level, pooling as neurons (twta.packing)."""
    choices = packed.record.get('choices') or {}
    return (choices.get('k', 0), choices.get('B', 1), choices.get('levels', 2), choices.get('pooling', 'conv')) != (
        0, 1, 2, 'conv')


def check_images(packed, dataset, args):
    """Raises TwtaError where a network of --file is for other images than those of --dataset."""
    shape = dataset.test.images.shape[1:]
    if packed.image != shape:
        raise TwtaError(f'{args.file}: for images {list(packed.image)}, but those of {args.dataset} are {list(shape)}; '
                        'choose another --file')
    if packed.classes != tuple(dataset.classes):
        raise TwtaError(f'{args.file}: its classes are {", ".join(packed.classes)[:80]}, those of {args.dataset} '
                        f'{", ".join(dataset.classes)}; choose another --file')


def started(packed, engine, threads):
    """open_engine's, warmed up; a line tells how long that took."""
    start = time.perf_counter()
    try:
        engine = open_engine(packed, engine, threads)
        engine.logits(np.zeros((1, *packed.image), np.uint8))
    except MemoryError:
        raise TwtaError(f'{packed.network}: too little memory for its maps') from None
    threads = f', {engine.threads} threads' if engine.name == 'numba' else ''
    taken = time.perf_counter() - start
    print(f'engine: {engine.name}{threads}, ready after {taken:.1f} s', file=sys.stderr, flush=True)
    return engine


def main(argv=None):
    parser = Parser(prog='python -m twta.packed', description=__doc__.partition('\n')[0], allow_abbrev=False)
    parser.add_argument('file', type=input_file, help='a packed network, from --mode export')
    parser.add_argument('images', type=input_file, help='uint8 [n, height, width, channels] as numpy.save writes '
                        'them; of images with one channel, [n, height, width] does as well')
    parser.add_argument('--engine', choices=('auto', 'numba', 'numpy'), default='auto',
                        help='auto, the default: numba where it is installed, else numpy, slower; the same classes')
    parser.add_argument('--threads', type=positive_integer, metavar='N', help='default: one a core')
    parser.add_argument('--names', action='store_true', help="print the classes' names, not their numbers")
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error, not only its line')
    with errors_in_a_line('twta.packed'):
        args = parser.parse_args(argv)
        packed = packed_file.read(args.file)
        images = read_images(args.images, packed.image)
        predicted = logits(started(packed, args.engine, args.threads), images).argmax(1)
        try:
            print('\n'.join(packed.classes[k] if args.names else str(k) for k in predicted), flush=True)
        except BrokenPipeError:  # a reader such as head has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_images(path, shape):
    try:
        images = arrays.read_npy(path)
    except arrays.UNREADABLE as error:
        reason = getattr(error, 'strerror', None) or 'not numbers that numpy.save wrote, or damaged'
        raise TwtaError(f'{path}: {reason}; give images as numpy.save writes them') from None
    wanted = f'uint8 [n, {", ".join(map(str, shape))}]'
    if images.dtype != np.uint8:
        raise TwtaError(f'{path}: {images.dtype}, but the network takes {wanted}')
    if images.ndim == 3 and shape[2] == 1:
        images = images[..., np.newaxis]
    if not len(images):
        raise TwtaError(f'{path}: {list(images.shape)} has no images in it; the network takes {wanted}')
    if images.shape[1:] != tuple(shape):
        raise TwtaError(f'{path}: {list(images.shape)}, but the network takes {wanted}')
    return images


if __name__ == '__main__':
    main()
