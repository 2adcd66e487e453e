"""The switch to TensorFlow 1: `from twta.graph.tf1 import tf, tl` gives graph-mode TensorFlow and TensorLayer 1.8.4.

TensorLayer 1.8.4 runs `import tensorflow` and expects version 1. So while TensorLayer is imported, and only then, this
name means `tf.compat.v1`; all other libraries see the real TensorFlow. Both libraries are quiet unless the environment
sets TF_CPP_MIN_LOG_LEVEL below 3, as `--verbose` does.

oneDNN's kernels are switched on for every x86 processor, unless TF_ENABLE_ONEDNN_OPTS is set. By default, TensorFlow
uses them only on newer processors, for example with AVX-512 VNNI, BF16 or AMX. On two cores with AVX2 (AMD Zen 3),
oneDNN raises the training speed of TWTA_4_4_MNIST from 683 to 1,119 images per second, and of TWTA_3_3_CIFAR10_VGG13
from 83 to 148.
"""
import contextlib
import logging
import os
import platform
import sys
import tempfile
import warnings

from twta import processor

for variable in processor.THREADS:
    processor.threads(variable)  # raises UsageError for values on which TensorFlow aborts or hangs

IS_X86 = platform.machine().lower() in ('x86_64', 'amd64')
if IS_X86:
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')

QUIET = os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3') == '3'


@contextlib.contextmanager
def native_chatter_hidden():
    """Hide what TensorFlow's C++ code writes to stderr (CUDA probing, oneDNN notices).

    TensorFlow 2.21 logs some lines through absl before it reads TF_CPP_MIN_LOG_LEVEL, so the file descriptor is
    redirected. If the block fails, the hidden lines are shown: they may name the cause.
    """
    if not QUIET:
        yield
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except Exception:
            held_back.seek(0)
            os.write(terminal, held_back.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


with native_chatter_hidden(), warnings.catch_warnings():
    if QUIET:
        warnings.simplefilter('ignore')
        logging.getLogger('tensorflow').setLevel(logging.ERROR)
    import tensorflow as tensorflow_2
    from tensorflow.core.protobuf import tensor_bundle_pb2  # has no public name
    from tensorflow.python.util import _pywrap_util_port  # no public function tells whether oneDNN is on

    tf = tensorflow_2.compat.v1
    tf.disable_v2_behavior()
    # TF32 rounds float32 products to 10 bits on GPUs from Ampere on: export and graph would predict differently
    tf.config.experimental.enable_tensor_float_32_execution(False)
    tf.enable_resource_variables()  # TensorFlow 1's reference variables may be read during a write
    sys.modules['tensorflow'] = tf
    try:
        import tensorlayer as tl
    finally:
        sys.modules['tensorflow'] = tensorflow_2

# another library may have imported TensorFlow earlier, without oneDNN; oneDNN's Arm kernels are untested here
ONEDNN = IS_X86 and _pywrap_util_port.IsMklEnabled()

if QUIET:
    logging.getLogger('tensorlayer').setLevel(logging.WARNING)

__all__ = ['ONEDNN', 'native_chatter_hidden', 'tensor_bundle_pb2', 'tf', 'tl']
