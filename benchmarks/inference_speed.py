#!/usr/bin/env python3
"""Images per second of the packed engine and of others, on the same networks, interleaved in one run.

    pip install -r requirements.txt ai-edge-litert
    python benchmarks/inference_speed.py

    packed             twta.packed, the numba engine; from uint8 images, preprocessing included
    TensorFlow         the float32 graph, frozen; from preprocessed float32 images, as all that follow
    ONNX Runtime       the same network in float32: batch normalisation folded into the convolutions
    ONNX Runtime int8  the same convolutions, weights and activations in int8 (QDQ, a scale a channel)
    LiteRT int8        the same

The int8 engines have no ternary activations: theirs are the 8-bit values of the clip to [-1, 1], so they do a little
less than the network asks for (no ternarisation, no shuffling of channels between groups) and predict otherwise. An
engine that is not installed is left out. Weights are the scripts' initial ones; the time does not depend on them.
"""
import argparse
import importlib.util
import json
import logging
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np

from twta import processor
from twta.packed import engines, file_format, numpy_engine
from twta.packed.file_format import after, fan_in, input_shape
from twta.results import environment, installed
from twta.terminal import output_file, positive_integer

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 0.05  # that a timing lasts, at least
SHORT = ('TWTA_4_4_MNIST', 'TWTA_3_3_CIFAR10_VGG13', 'TWTA_3_3_CIFAR10_Group_V2')
SCRIPTS = {path.stem: path for folder in ('MNIST', 'CIFAR10') for path in sorted((ROOT / folder).glob('TWTA*.py'))}
IMAGE = {'MNIST': ((28, 28, 1), 0), 'CIFAR10': ((32, 32, 3), 24)}


# ----------------------------------------------------------------------------------------------------------------------
# Networks


def build(name):
    """The network of a script with its initial weights: PackedNetwork, and its frozen graph in TensorFlow as bytes."""
    from twta import ternary_layers
    from twta.export.pack import pack
    from twta.graph import preprocessing
    from twta.graph.blocks import read_blocks
    from twta.graph.session import open_session
    from twta.graph.tf1 import tf

    class Conv2dLayer(ternary_layers.Conv2dLayer):
        """Without the float64 sums of the encoder, which no other float32 engine has either."""

        def __init__(self, *arguments):
            super().__init__(*arguments[:7], False, *arguments[8:])

    image, crop = IMAGE[SCRIPTS[name].parent.name]
    model = runpy.run_path(str(SCRIPTS[name]))['model']
    usual = ternary_layers.Conv2dLayer
    ternary_layers.Conv2dLayer = Conv2dLayer
    try:
        with tf.Graph().as_default() as graph:
            tf.set_random_seed(0)
            images = tf.placeholder(tf.uint8, [None, *image])
            prepared = tf.identity(preprocessing.for_evaluation(images, crop), 'x')
            net = model(prepared, False)
            tf.identity(net.outputs, 'logits')
            with open_session(graph, 0) as session:
                session.run(tf.global_variables_initializer())
                settle(net, session, {images: sample(image, 100)}, read_blocks(net))
                packed = pack(net, session, {'network': name, 'dataset': 'benchmark', 'image': image, 'crop': crop,
                                             'classes': tuple('0123456789'), 'record': {}})
                frozen = tf.graph_util.extract_sub_graph(tf.graph_util.convert_variables_to_constants(
                    session, graph.as_graph_def(), ['logits']), ['logits'])
    finally:
        ternary_layers.Conv2dLayer = usual
    return packed, frozen.SerializeToString()


def settle(net, session, feed, blocks):
    """Moving moments as after some training, so that activations are not all +1 or -1."""
    for _, batch_norm, _ in blocks:
        if batch_norm:
            sums = session.run(batch_norm.inputs, feed)
            axes = tuple(range(sums.ndim - 1))
            batch_norm.moving_mean.load(sums.mean(axes), session)
            batch_norm.moving_variance.load(sums.var(axes), session)


def sample(image, count):
    return np.random.default_rng(0).integers(0, 256, (count, *image)).astype(np.uint8)


def affine(layer):
    """Scale and shift of a layer's batch normalisation, that is of one with the same thresholds."""
    upper, lower = layer.upper.astype(np.float64), layer.lower.astype(np.float64)
    width = upper - lower - (0 if layer.upper.dtype == np.float32 else 0.5)  # beside the whole numbers
    return 1 / width, -(upper + lower) / 2 / width


def folded(packed):
    """Each layer with float32 weights [height, width, channels / groups, filters] and bias [filters]."""
    for layer in packed.layers:
        scale, shift = affine(layer)
        yield layer, (layer.weights * scale).astype(np.float32), shift.astype(np.float32)


def onnx_model(packed, is_ternary):
    """The network in float32, x NHWC to logits; is_ternary False: activations clipped, not ternarised, not shuffled."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []

    def constant(array):
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), f'c{len(constants)}'))
        return constants[-1].name

    def node(kind, *inputs, **attributes):
        nodes.append(helper.make_node(kind, inputs, [f'n{len(nodes)}'], **attributes))
        return nodes[-1].output[0]

    limits = constant(np.array(-1, np.float32)), constant(np.array(1, np.float32))
    x = node('Transpose', 'x', perm=[0, 3, 1, 2])
    for (layer, shape, before, _), (_, weights, bias) in zip(file_format.shapes(packed), folded(packed), strict=True):
        if layer.groups > 1 and is_ternary:
            x = node('Gather', x, constant(np.arange(shape[2]).reshape(-1, layer.groups).T.ravel()), axis=1)
        x = node('Conv', x, constant(weights.transpose(3, 2, 0, 1)), constant(bias), group=layer.groups,
                 kernel_shape=weights.shape[:2], strides=[layer.stride] * 2, pads=[*before, *after(shape, layer)])
        x = node('Clip', node('Round', x) if is_ternary else x, *limits)
    x = node('Reshape', node('Transpose', x, perm=[0, 2, 3, 1]), constant(np.array([-1, len(packed.weights)])))
    x = node('Gemm', x, constant(packed.weights * packed.scale), constant(packed.shift))
    graph = helper.make_graph(
        nodes, packed.network, [helper.make_tensor_value_info('x', TensorProto.FLOAT, ['n', *input_shape(packed)])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ['n', len(packed.classes)])], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)


def write_int8_onnx(packed, path):
    import onnx
    from onnxruntime import quantization

    logging.disable(logging.WARNING)  # advice on preprocessing, which the model does not need

    class Reader(quantization.CalibrationDataReader):
        batches = iter([{'x': numpy_engine.prepare(sample(packed.image, 64), packed.crop)}])

        def get_next(self):
            return next(self.batches, None)

    with tempfile.NamedTemporaryFile(suffix='.onnx') as file:
        onnx.save(onnx_model(packed, is_ternary=False), file.name)
        quantization.quantize_static(file.name, str(path), Reader(), per_channel=True,
                                     quant_format=quantization.QuantFormat.QDQ)


def write_tflite(packed, path):
    """In a process of its own: the converter wants TensorFlow 2."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([1, *input_shape(packed)], tf.float32)])
    def network(x):
        for layer, weights, bias in folded(packed):
            x = tf.nn.conv2d(x, tf.constant(weights), layer.stride, layer.padding) + tf.constant(bias)
            x = tf.clip_by_value(x, -1.0, 1.0)
        x = tf.reshape(x, [1, len(packed.weights)])
        return tf.matmul(x, tf.constant(packed.weights * packed.scale)) + tf.constant(packed.shift)

    converter = tf.lite.TFLiteConverter.from_concrete_functions([network.get_concrete_function()])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    x = numpy_engine.prepare(sample(packed.image, 16), packed.crop)
    converter.representative_dataset = lambda: ([image[np.newaxis]] for image in x)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    path.write_bytes(converter.convert())


# ----------------------------------------------------------------------------------------------------------------------
# Engines: each a function of (folder, packed, images, threads) that returns a function to time, which returns logits


def run_packed(folder, packed, images, threads):
    engine = engines.open_engine(packed, 'numba', threads)
    return lambda: engine.logits(images)


def run_tensorflow(folder, packed, images, threads):
    from twta.graph.tf1 import native_chatter_hidden, tf

    with native_chatter_hidden(), tf.Graph().as_default() as graph:
        definition = tf.GraphDef.FromString((folder / 'frozen.pb').read_bytes())
        tf.import_graph_def(definition, name='')
        session = tf.Session(graph=graph, config=tf.ConfigProto(intra_op_parallelism_threads=threads,
                                                                inter_op_parallelism_threads=threads))
    run = session.make_callable('logits:0', ['x:0'])
    x = numpy_engine.prepare(images, packed.crop)
    return lambda: run(x)


def run_onnx(file):
    def start(folder, packed, images, threads):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(folder / file), options, ['CPUExecutionProvider'])
        x = numpy_engine.prepare(images, packed.crop)
        return lambda: session.run(None, {'x': x})[0]

    return start


def run_litert(folder, packed, images, threads):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(folder / 'int8.tflite'), num_threads=threads)
    entry = interpreter.get_input_details()[0]
    interpreter.resize_tensor_input(entry['index'], [len(images), *input_shape(packed)])
    interpreter.allocate_tensors()
    scale, zero = entry['quantization']
    x = np.clip(np.round(numpy_engine.prepare(images, packed.crop) / scale + zero), -128, 127).astype(np.int8)
    output = interpreter.get_output_details()[0]['index']

    def run():
        interpreter.set_tensor(entry['index'], x)
        interpreter.invoke()
        return interpreter.get_tensor(output)

    return run


ENGINES = {'packed': (run_packed, 'network.twta'), 'TensorFlow': (run_tensorflow, 'frozen.pb'),
           'ONNX Runtime': (run_onnx('float32.onnx'), 'float32.onnx'),
           'ONNX Runtime int8': (run_onnx('int8.onnx'), 'int8.onnx'), 'LiteRT int8': (run_litert, 'int8.tflite')}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def write_models(name, folder):
    """The files of every engine for a network; those of engines that are not installed are left out."""
    packed, frozen = build(name)
    file_format.write(folder / 'network.twta', packed)
    (folder / 'frozen.pb').write_bytes(frozen)
    if importlib.util.find_spec('onnxruntime'):
        import onnx

        onnx.save(onnx_model(packed, is_ternary=True), folder / 'float32.onnx')
        write_int8_onnx(packed, folder / 'int8.onnx')
    if importlib.util.find_spec('ai_edge_litert'):
        subprocess.run([sys.executable, __file__, '--tflite', folder], check=True, capture_output=True)


def measure(name, batches, threads, repetitions):
    """Prints and returns a row for each engine, batch and number of threads."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_models(name, folder)
        found = [engine for engine, (_, file) in ENGINES.items() if (folder / file).exists()]
        memory = {engine: int(child('--memory', engine, folder)) for engine in found}
        for n_threads in threads:  # a process each: TensorFlow keeps the number of threads of its first session
            for row in json.loads(child('--rows', folder, n_threads, repetitions, *batches)):
                row.update(network=name, processor=processor.kind(), threads=n_threads,
                           peak_memory=memory[row['engine']], bytes=(folder / ENGINES[row['engine']][1]).stat().st_size)
                rows.append(row)
                print(f'{name:26} {row["engine"]:18} {row["batch"]:5} {n_threads:7} {row["images_per_second"]:9,.0f} '
                      f'{row["packed_is_faster"]:7.1f} {row["bytes"]:11,} {row["peak_memory"] / 2 ** 20:8,.0f} '
                      f'{row["agrees"]:7.1%}', flush=True)
    return rows


def interleave(folder, threads, repetitions, batches):
    """Rows of all engines, in turn, in this process."""
    packed = file_format.read(folder / 'network.twta')
    rows = []
    for batch in batches:
        images = sample(packed.image, batch)
        runs = {engine: start(folder, packed, images, threads) for engine, (start, file) in ENGINES.items()
                if (folder / file).exists()}
        predicted = {engine: run().argmax(1) for engine, run in runs.items()}
        times = {engine: [] for engine in runs}
        loops = {engine: 1 + int(SECONDS / seconds(run)) for engine, run in runs.items()}
        for _ in range(repetitions):
            for engine, run in runs.items():
                time.sleep(0.1)  # until the threads of the one before have stopped spinning
                run()
                start = time.perf_counter()
                for _ in range(loops[engine]):
                    run()
                times[engine].append((time.perf_counter() - start) / loops[engine])
        medians = {engine: statistics.median(values) for engine, values in times.items()}
        rows += [{'engine': engine, 'batch': batch, 'images_per_second': batch / medians[engine],
                  'packed_is_faster': medians[engine] / medians['packed'],
                  'agrees': float(np.mean(predicted[engine] == predicted['packed']))} for engine in runs]
    return rows


def seconds(run):
    """Of the second of two runs."""
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def profile(name, repetitions):
    """Prints where an image's time goes in the packed engine, batch 200, one thread: the best of the repetitions."""
    from twta.packed import kernels
    from twta.packed.numba_engine import NumbaEngine

    packed, _ = build(name)
    engine, images = NumbaEngine(packed, threads=1), sample(packed.image, 200)

    def microseconds(function, *arguments):
        best = float('inf')
        for _ in range(repetitions + 1):  # the first compiles
            start = time.perf_counter()
            function(*arguments)
            best = min(best, time.perf_counter() - start)
        return best / len(images) * 1e6

    engine.logits(images)
    print(f'{name}: microseconds an image, batch 200, one thread\n'
          'layer        sources words positions      us  ternary GMAC/s  bits of words used')
    print(f'{"preprocess":33} '
          f'{microseconds(kernels.prepare, images, 0, 200, packed.crop, engine.x, engine.before):7.1f}')
    for index, (layer, _, _, out) in enumerate(file_format.shapes(packed)):
        row = dict(zip(kernels.COLUMNS, engine.table[index], strict=True))
        taken = microseconds(kernels.run_layer, engine.table[index], 0, 200, 0, row['n_blocks'])
        products = fan_in(layer.weights)
        print(f'{layer.name:12} {row["kind"]:7} {row["words"]:5} {row["positions"]:9} {taken:7.1f}'
              + (f' {np.prod(out) * products / taken / 1000:15,.0f} {products / row["words"] / 64:19.0%}' if index
                 else ''))
    last, sums = engine.planes[-1], np.empty((200, len(packed.classes)))
    print(f'{"classifier":33} '
          f'{microseconds(kernels.classify, last.data, last.image, engine.weights, 0, 200, sums):7.1f}')
    print(f'{"in all":33} {microseconds(engine.logits, images):7.1f}')


def child(*arguments):
    """The last line that this script prints with those arguments, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ['nothing said'])[-1]
        sys.exit(f'inference_speed.py: error: {" ".join(map(str, arguments))} has ended with {done.returncode}: '
                 f'{reason}')
    return done.stdout.splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('networks', nargs='*', metavar='NETWORK',
                        help=f'of {", ".join(SCRIPTS)}; default: {", ".join(SHORT)}')
    parser.add_argument('--all', action='store_true', help='every network')
    parser.add_argument('--repetitions', type=positive_integer, default=9, metavar='N',
                        help='of which the median is taken; default: 9')
    parser.add_argument('--json', type=output_file, metavar='FILE', help='write the rows there as well')
    parser.add_argument('--profile', choices=SCRIPTS, metavar='NETWORK',
                        help='only where the packed engine spends its time')
    for internal, count in (('--tflite', 1), ('--memory', 2), ('--rows', '+')):
        parser.add_argument(internal, nargs=count, help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.networks) - SCRIPTS.keys()
    if unknown:
        parser.error(f'{min(unknown)}: unknown; valid are {", ".join(SCRIPTS)}')
    if args.all and args.networks:
        parser.error('--all: goes without names of networks')
    if args.profile:
        return profile(args.profile, args.repetitions)
    if args.tflite:
        folder = Path(args.tflite[0])
        return write_tflite(file_format.read(folder / 'network.twta'), folder / 'int8.tflite')
    if args.memory:
        engine, folder = args.memory[0], Path(args.memory[1])
        packed = file_format.read(folder / 'network.twta')
        run = ENGINES[engine][0](folder, packed, sample(packed.image, 200), processor.available_cores())
        for _ in range(3):
            run()
        status = Path('/proc/self/status').read_text()  # getrusage would count the process that started this one
        return print(1024 * int(status.split('VmHWM:')[1].split()[0]))
    if args.rows:
        threads, repetitions, *batches = map(int, args.rows[1:])
        return print(json.dumps(interleave(Path(args.rows[0]), threads, repetitions, batches)))
    print(f'{"network":26} {"engine":18} batch threads  images/s packed/x  file bytes mem MiB predicts as packed')
    rows = []
    for name in SCRIPTS if args.all else args.networks or SHORT:
        rows += measure(name, (1, 200), sorted({1, processor.available_cores()}), args.repetitions)
        if args.json:
            versions = dict(installed(('onnxruntime', 'ai-edge-litert')))
            args.json.write_text(json.dumps({'environment': environment(), 'others': versions,
                                             'repetitions': args.repetitions, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
