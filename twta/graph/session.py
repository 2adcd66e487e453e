"""The device, its native precision, and sessions on it."""
import os

from twta import UsageError, processor
from twta.graph.tf1 import ONEDNN, native_chatter_hidden, tf

# with these values of ONEDNN_MAX_CPU_ISA, oneDNN may not use bfloat16 instructions
WITHOUT_BFLOAT16 = ('SSE41', 'AVX', 'AVX2', 'AVX2_VNNI', 'AVX2_VNNI_2', 'AVX512_CORE', 'AVX512_CORE_VNNI')


def find_gpus():
    """Return the GPUs that TensorFlow sees, as its physical devices."""
    with native_chatter_hidden():
        return tf.config.experimental.list_physical_devices('GPU')


def find_gpu(index):
    """Return the GPU `index` as a TensorFlow device; None without a GPU. Raises UsageError if the index is too high."""
    gpus = find_gpus()
    if gpus and index >= len(gpus):
        raise UsageError(f'--gpu {index}: this machine has {len(gpus)}, valid are 0 to {len(gpus) - 1}')
    return gpus[index] if gpus else None


def choose_precision(flag, gpu):
    """Return the type for training, tf.float32 or tf.bfloat16; 'auto' is bfloat16 if the device multiplies it."""
    if flag != 'auto':
        return tf.as_dtype(flag)
    return tf.bfloat16 if multiplies_bfloat16(gpu) else tf.float32


def multiplies_bfloat16(gpu):
    """Return whether the device has instructions that multiply bfloat16, and TensorFlow uses them.

    GPUs have them from compute capability 8 on. Without a GPU (None), the processor must be an x86 with AVX512-BF16 or
    AMX, on Linux, and oneDNN must be on: only oneDNN uses these instructions.
    """
    if gpu:
        return tf.config.experimental.get_device_details(gpu).get('compute_capability', (0, 0)) >= (8, 0)
    limits = (os.environ.get(f'{name}_MAX_CPU_ISA', '').upper() for name in ('ONEDNN', 'DNNL'))  # new and old name
    if not ONEDNN or any(limit in WITHOUT_BFLOAT16 for limit in limits):
        return False
    return bool({'avx512_bf16', 'amx_bf16'} & processor.flags())


def describe(gpu):
    """Return the device in words."""
    if gpu:
        return tf.config.experimental.get_device_details(gpu).get('device_name', gpu.name)
    cores = processor.available_cores()
    return f'no GPU found, using the CPU ({cores} core{"s" if cores > 1 else ""})'


def describe_device(gpu, workers):
    """Return what a training runs on in words: the GPU, or the kind of processor and the threads; times the workers."""
    intra, _ = threads()
    name = describe(gpu) if gpu else f'{processor.kind()}, {intra} thread{"s" if intra > 1 else ""}'
    return name if workers == 1 else f'{workers} workers of {name}'


def configuration(**options):
    """Return a tf.ConfigProto with these options that does not fuse convolution and batch normalisation.

    TensorFlow's remapper would fuse them: 5 % faster, but with other rounding. twta.export.folding reads thresholds off
    the batch normalisation alone; after fusion they would not match the whole graph.
    """
    config = tf.ConfigProto(**options)
    rewrite = config.graph_options.rewrite_options
    rewrite.remapping = rewrite.OFF
    return config


def make_deterministic():
    """Use one thread, so that the order of sums does not depend on the cores, and deterministic GPU kernels.

    Call this before building a graph: TensorFlow creates its thread pool with the first device. open_session reads the
    numbers of threads too.
    """
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    os.environ['TF_DETERMINISTIC_OPS'] = '1'  # compat.v1 has no function for it


def open_session(graph, gpu_index):
    """Return a session on the graph, see session_config."""
    with native_chatter_hidden():
        return tf.Session(graph=graph, config=session_config(gpu_index))


def threads():
    """Return the numbers of threads of a session: intra_op and inter_op."""
    threading = tf.config.threading
    chosen = threading.get_intra_op_parallelism_threads(), threading.get_inter_op_parallelism_threads()
    return [count or processor.threads(variable) for count, variable in zip(chosen, processor.THREADS, strict=True)]


def session_config(gpu_index):
    """Return the configuration of a session that sees only the GPU `gpu_index`, if any, and takes its memory as needed.

    The session has one thread per available core: TensorFlow alone ignores a container's CPU quota.
    make_deterministic, TF_NUM_INTRAOP_THREADS and TF_NUM_INTEROP_THREADS take precedence.
    """
    gpu_options = tf.GPUOptions(allow_growth=True, visible_device_list=str(gpu_index))
    intra, inter = threads()
    return configuration(gpu_options=gpu_options, intra_op_parallelism_threads=intra,
                         inter_op_parallelism_threads=inter)
