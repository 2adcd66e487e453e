#!/usr/bin/env python3
"""Time the inference of each network in the packed engine and in other engines.

    pip install -r requirements.txt ai-edge-litert openvino
    python benchmarks/inference_speed.py

Engines:

    packed             twta.packed with the numba engine. It starts from uint8 images and prepares them; the other
                       engines get images that are prepared.
    TensorFlow         The frozen graph in float32.
    ONNX Runtime       The same network in float32, batch normalisation folded into the convolutions.
    ONNX Runtime int8  The same convolutions with weights and activations in int8 (QDQ, one scale per channel).
    LiteRT int8        The same in LiteRT.
    OpenVINO int8      ONNX Runtime's int8 model in OpenVINO.

The int8 engines clip activations to [-1, 1] and keep 8 bits of them. They do not ternarise, and they do not shuffle
channels between groups: this is slightly less work than the network asks for, and the predictions differ. Engines that
are not installed are left out. Images are random and weights are the initial ones; neither changes the time. The
engines take turns in one process, which each number of threads has of its own: a slow minute slows all of them.

Columns:

    batch, threads       images per call, and threads of the engine
    images/s             images per second, the median of the repetitions
    packed/x             speed of packed divided by the speed of this engine
    file bytes           size of the model file
    peak MiB             peak memory of a process that runs this engine only
    predicts as packed   share of the images on which the engine predicts the same class as packed; TensorFlow fuses
                         batch normalisation, which rounds differently and may change a single image
"""
import argparse
import importlib.util
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
if importlib.util.find_spec('openvino'):  # its TBB would replace numba's usual threads, which start twice as fast
    os.environ.setdefault('NUMBA_THREADING_LAYER', 'omp')

import numpy as np
from speed import add_flags, choose_networks, cropped, image_of, peak_memory, random_images, write_rows

from twta import processor
from twta.packed import engines, file_format, numpy_engine
from twta.packed.file_format import after, fan_in, input_shape
from twta.scripts import find_scripts, load_script
from twta.terminal import positive_integer

SECONDS = 0.05  # least duration of a timing
SCRIPTS = find_scripts('TWTA')


# ----------------------------------------------------------------------------------------------------------------------
# Networks


def build(name):
    """Return a script's network with its initial weights: packed, and its frozen graph in TensorFlow as bytes."""
    from twta.export.pack import pack
    from twta.graph.session import open_session
    from twta.graph.tf1 import tf
    from twta.training.blocks import read_blocks

    image, crop = image_of(SCRIPTS[name])
    with tf.Graph().as_default() as graph:
        tf.set_random_seed(0)
        x = tf.placeholder(tf.float32, [None, *cropped(image, crop)], 'x')
        net = load_script(SCRIPTS[name]).model(x, False)
        tf.identity(net.outputs, 'logits')
        with open_session(graph, 0) as session:
            session.run(tf.global_variables_initializer())
            settle(net, session, {x: numpy_engine.prepare(random_images(image, 100), crop)}, read_blocks(net))
            packed = pack(net, session, {'network': name, 'dataset': 'benchmark', 'image': image, 'crop': crop,
                                         'classes': tuple('0123456789'), 'record': {}})
            frozen = tf.graph_util.extract_sub_graph(tf.graph_util.convert_variables_to_constants(
                session, graph.as_graph_def(), ['logits']), ['logits'])
    return packed, in_float32(frozen).SerializeToString()


def in_float32(frozen):
    """Return the frozen graph with the encoder's float64 sums in float32: no other engine here has float64 sums."""
    from twta.graph.tf1 import tf

    for node in frozen.node:
        for attribute in node.attr.values():
            if attribute.type == tf.float64.as_datatype_enum:
                attribute.type = tf.float32.as_datatype_enum
    return frozen


def settle(net, session, feed, blocks):
    """Set moving moments as a training would: with the initial ones, all activations are +1 or -1."""
    for _, batch_norm, _ in blocks:
        if batch_norm:
            sums = session.run(batch_norm.inputs, feed)
            axes = tuple(range(sums.ndim - 1))
            batch_norm.moving_mean.load(sums.mean(axes), session)
            batch_norm.moving_variance.load(sums.var(axes), session)


def affine(layer):
    """Return scale and shift of a batch normalisation that has the thresholds of the layer."""
    upper, lower = layer.upper.astype(np.float64), layer.lower.astype(np.float64)
    width = upper - lower - (0 if layer.upper.dtype == np.float32 else 0.5)  # integer sums: no rounding tie on them
    return 1 / width, -(upper + lower) / 2 / width


def folded(packed):
    """Yield each layer with its float32 weights [height, width, channels / groups, filters] and bias [filters]."""
    for layer in packed.layers:
        scale, shift = affine(layer)
        yield layer, (layer.weights * scale).astype(np.float32), shift.astype(np.float32)


def onnx_model(packed, is_ternary):
    """Return the network as an ONNX model in float32, from x (NHWC) to logits.

    is_ternary    False: activations are clipped but not ternarised, and channels are not shuffled
    """
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
    """Write the network as an ONNX model in int8, calibrated on random images."""
    import onnx
    from onnxruntime import quantization

    logging.disable(logging.WARNING)  # onnxruntime advises a preprocessing that this model does not need

    class Reader(quantization.CalibrationDataReader):
        batches = iter([{'x': numpy_engine.prepare(random_images(packed.image, 64), packed.crop)}])

        def get_next(self):
            return next(self.batches, None)

    with tempfile.NamedTemporaryFile(suffix='.onnx') as file:
        onnx.save(onnx_model(packed, is_ternary=False), file.name)
        quantization.quantize_static(file.name, str(path), Reader(), per_channel=True,
                                     quant_format=quantization.QuantFormat.QDQ)


def write_tflite(packed, path):
    """Write the network for LiteRT in int8. The converter needs TensorFlow 2, which twta.graph would switch off."""
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
    x = numpy_engine.prepare(random_images(packed.image, 16), packed.crop)
    converter.representative_dataset = lambda: ([image[np.newaxis]] for image in x)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    path.write_bytes(converter.convert())


# ----------------------------------------------------------------------------------------------------------------------
# Engines. Each is a function of (folder, packed, images, threads) that returns the function to time: it gives logits


def run_packed(folder, packed, images, threads):
    engine = engines.open_engine(packed, 'numba', threads)
    return lambda: engines.logits(engine, images)


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


def run_openvino(folder, packed, images, threads):
    import openvino

    core = openvino.Core()
    model = core.read_model(folder / 'openvino.onnx')
    model.reshape([len(images), *input_shape(packed)])
    request = core.compile_model(model, 'CPU', {'INFERENCE_NUM_THREADS': threads, 'NUM_STREAMS': 1}
                                 ).create_infer_request()
    x = numpy_engine.prepare(images, packed.crop)
    return lambda: request.infer({0: x}, share_inputs=True, share_outputs=True)[0]


ENGINES = {'packed': (run_packed, 'network.twta'), 'TensorFlow': (run_tensorflow, 'frozen.pb'),
           'ONNX Runtime': (run_onnx('float32.onnx'), 'float32.onnx'),
           'ONNX Runtime int8': (run_onnx('int8.onnx'), 'int8.onnx'), 'LiteRT int8': (run_litert, 'int8.tflite'),
           'OpenVINO int8': (run_openvino, 'openvino.onnx')}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def write_models(name, folder):
    """Write the model files of a network for every engine that is installed."""
    packed, frozen = build(name)
    file_format.write(folder / 'network.twta', packed)
    (folder / 'frozen.pb').write_bytes(frozen)
    if importlib.util.find_spec('onnxruntime'):
        import onnx

        onnx.save(onnx_model(packed, is_ternary=True), folder / 'float32.onnx')
        write_int8_onnx(packed, folder / 'int8.onnx')
        if importlib.util.find_spec('openvino'):
            shutil.copy(folder / 'int8.onnx', folder / 'openvino.onnx')
    if importlib.util.find_spec('ai_edge_litert'):
        subprocess.run([sys.executable, __file__, '--tflite', folder], check=True, capture_output=True)


def measure(name, batches, threads, repetitions):
    """Print and return one row per engine, batch and number of threads."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_models(name, folder)
        found = [engine for engine, (_, file) in ENGINES.items() if (folder / file).exists()]
        memory = {engine: int(child('--memory', engine, folder)) for engine in found}
        for n_threads in threads:  # one process each: TensorFlow keeps the number of threads of its first session
            for row in json.loads(child('--rows', folder, n_threads, repetitions, *batches)):
                row.update(network=name, processor=processor.kind(), threads=n_threads,
                           peak_memory=memory[row['engine']], bytes=(folder / ENGINES[row['engine']][1]).stat().st_size)
                rows.append(row)
                print(f'{name:26} {row["engine"]:18} {row["batch"]:5} {n_threads:7} {row["images_per_second"]:9,.0f} '
                      f'{row["packed_is_faster"]:7.1f} {row["bytes"]:11,} {row["peak_memory"] / 2 ** 20:8,.0f} '
                      f'{row["agrees"]:7.1%}', flush=True)
    return rows


def interleave(folder, threads, repetitions, batches):
    """Time all engines by turns in this process; return their rows."""
    packed = file_format.read(folder / 'network.twta')
    rows = []
    for batch in batches:
        images = random_images(packed.image, batch)
        runs = {engine: start(folder, packed, images, threads) for engine, (start, file) in ENGINES.items()
                if (folder / file).exists()}
        predicted = {engine: run().argmax(1) for engine, run in runs.items()}
        times = {engine: [] for engine in runs}
        loops = {engine: 1 + int(SECONDS / seconds(run)) for engine, run in runs.items()}
        for _ in range(repetitions):
            for engine, run in runs.items():
                time.sleep(0.1)  # the threads of the engine before may still spin
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
    """Return the seconds of a second run; the first one may compile."""
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def profile(name, repetitions):
    """Print the time per image of each part of the packed engine: batch 200, one thread, best of the repetitions."""
    from twta.packed import encoder_kernels, kernels, passes
    from twta.packed.numba_engine import NumbaEngine

    packed, _ = build(name)
    engine, images = NumbaEngine(packed, threads=1), random_images(packed.image, 200)

    def microseconds(function, *arguments):
        best = float('inf')
        for _ in range(repetitions + 1):  # the first compiles
            start = time.perf_counter()
            function(*arguments)
            best = min(best, time.perf_counter() - start)
        return best / len(images) * 1e6

    engine.logits(images)
    encoder, (images, crop, largest) = engine.encoder, engine.take(images)
    print(f'{name}: microseconds per image, batch 200, one thread\n'
          'layer        sources words positions      us  ternary GMAC/s  bits of words used')
    arguments = images, 0, 200, crop, encoder.x, encoder.before, largest
    print(f'{"preprocess":33} {microseconds(encoder_kernels.prepare, *arguments):7.1f}')
    row = dict(zip(encoder_kernels.COLUMNS, encoder.row, strict=True))
    taken = microseconds(encoder_kernels.encode, encoder.row, encoder_kernels.prepare(*arguments), 0, 200, 0,
                         row['n_groups'], 0, row['positions'])
    print(f'{packed.layers[0].name:12} {"":7} {row["words"]:5} {row["positions"]:9} {taken:7.1f}')
    for index, (layer, _, _, out) in list(enumerate(file_format.shapes(packed)))[1:]:
        row = dict(zip(passes.COLUMNS, engine.table[index], strict=True))
        taken = microseconds(kernels.run_layer, engine.table[index], 0, 200, 0, row['n_blocks'], 0, row['positions'])
        products = fan_in(layer.weights)
        print(f'{layer.name:12} {row["kind"]:7} {row["words"]:5} {row["positions"]:9} {taken:7.1f} '
              f'{np.prod(out) * products / taken / 1000:15,.0f} {products / row["words"] / 64:19.0%}')
    last, logits = engine.planes[-1], np.empty((200, len(packed.classes)), np.float32)
    taken = microseconds(kernels.classify, last.data, last.image, *engine.classifier, 0, 200, logits)
    print(f'{"classifier":33} {taken:7.1f}')
    print(f'{"in all":33} {microseconds(engine.logits, images):7.1f}')
    profile_paired(packed, images, microseconds)
    profile_sliced(packed, images, microseconds)


def profile_paired(packed, images, microseconds):
    """Print the same of the paired engine, if it can run the network here."""
    from twta.packed import paired_engine, paired_kernels, passes

    if not paired_engine.can_run(packed):
        return
    engine = paired_engine.PairedEngine(packed, threads=1)
    engine.logits(images)
    print('\npaired kernels\nlayer        vectors pairs positions      us  ternary GMAC/s')
    for index, (layer, _, _, out) in enumerate(file_format.shapes(packed), 1):
        row = dict(zip(passes.COLUMNS, engine.table[index], strict=True))
        taken = microseconds(paired_kernels.run_layer, engine.table[index], 0, 200, 0, row['n_blocks'], 0,
                             row['positions'])
        is_ternary = row['kind'] != paired_kernels.CODES
        speed = f'{np.prod(out) * fan_in(layer.weights) / taken / 1000:15,.0f}' if is_ternary else ''
        print(f'{layer.name if is_ternary else "codes":12} {row["kind"] if is_ternary else "":7} {row["words"]:5} '
              f'{row["positions"]:9} {taken:7.1f} {speed}')
    print(f'{"in all":35} {microseconds(engine.logits, images):7.1f}')


def profile_sliced(packed, images, microseconds):
    """Print the same of the sliced engine, which computes 256 images in the time of 200."""
    from twta.packed import sliced_kernels
    from twta.packed.sliced_engine import SlicedEngine

    engine, columns = SlicedEngine(packed, threads=1), sliced_kernels.COLUMNS
    engine.logits(images)
    print('\nsliced kernels\nlayer        positions      us  ternary GMAC/s  GMAC/s, weights that are not 0')
    for (layer, _, _, out), table in list(zip(file_format.shapes(packed), engine.table, strict=True))[1:]:
        row = dict(zip(columns, table, strict=True))
        taken = microseconds(sliced_kernels.run_filters, table, 0, row['positions'] * row['n_filters'])
        speed = np.prod(out) * fan_in(layer.weights) / taken / 1000
        print(f'{layer.name:12} {row["positions"]:9} {taken:7.1f} {speed:15,.0f} '
              f'{speed * np.mean(layer.weights != 0):15,.0f}')
    print(f'{"in all":22} {microseconds(engine.logits, images):7.1f}')


def child(*arguments):
    """Run this script with the arguments in a process of its own; return the last line that it prints."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
        sys.exit(f'inference_speed.py: error: {" ".join(map(str, arguments))}: exit code {done.returncode}: {reason}')
    return done.stdout.splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, SCRIPTS, 9, 'time the parts of the packed engine on this network, and nothing else')
    parser.add_argument('--batch', type=positive_integer, nargs='+', default=[1, 200], metavar='N',
                        help='images per call (default: 1 200)')
    for internal, count in (('--tflite', 1), ('--memory', 2), ('--rows', '+')):
        parser.add_argument(internal, nargs=count, help=argparse.SUPPRESS)
    args = parser.parse_args()
    networks = choose_networks(parser, args, SCRIPTS)
    if args.profile:
        return profile(args.profile, args.repetitions)
    if args.tflite:
        folder = Path(args.tflite[0])
        return write_tflite(file_format.read(folder / 'network.twta'), folder / 'int8.tflite')
    if args.memory:
        engine, folder = args.memory[0], Path(args.memory[1])
        packed = file_format.read(folder / 'network.twta')
        run = ENGINES[engine][0](folder, packed, random_images(packed.image, 200), processor.available_cores())
        for _ in range(3):
            run()
        return print(peak_memory())
    if args.rows:
        threads, repetitions, *batches = map(int, args.rows[1:])
        return print(json.dumps(interleave(Path(args.rows[0]), threads, repetitions, batches)))
    print(f'{"network":26} {"engine":18} batch threads  images/s packed/x file bytes peak MiB predicts as packed')
    rows = []
    for name in networks:
        rows += measure(name, args.batch, sorted({1, processor.available_cores()}), args.repetitions)
        if args.json:
            write_rows(args.json, ('onnxruntime', 'ai-edge-litert', 'openvino'), args.repetitions, rows)


if __name__ == '__main__':
    main()
