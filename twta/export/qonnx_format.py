"""Export of a packed network as QONNX, the dialect of ONNX that FINN, hls4ml and Brevitas use.

Operators: github.com/fastmachinelearning/qonnx, version 1.0.0. docs/exchange.md tells what reads the files.

thresholds    Weights are Quant (2 bits, signed, narrow: -1, 0, +1), activations MultiThreshold with the thresholds
              [lower + 1, upper] and out_bias -1: -1 plus the number of thresholds that the sum reaches
quant         Activations are Mul, Add and Quant, for readers without MultiThreshold (hls4ml)

A core is the ternary layers alone, from the encoder's activations on, without groups: FINN has neither real-valued
convolutions nor groups. The files are for one image at a time: the package qonnx needs a number.
"""
import numpy as np
import onnx
from onnx import TensorProto, helper

from twta.export.onnx_format import OnnxBuilder, add_ternary, classify, encode, ends, finish
from twta.export.rewrite import without_groups
from twta.export.spatial import above_lower
from twta.packed.file_format import shapes

DOMAIN = 'qonnx.custom_op.general'
ONE, ZERO, TWO_BITS = (np.array(value, np.float32) for value in (1, 0, 2))  # scale, zero point, width


class QonnxBuilder(OnnxBuilder):
    """An OnnxBuilder with the operators of QONNX for weights and activations."""

    def quantize(self, x, output=None):
        """Add a Quant to {-1, 0, +1}, rounding half to even."""
        return self.node('Quant', x, ONE, ZERO, TWO_BITS, output=output, domain=DOMAIN, signed=1, narrow=1,
                         rounding_mode='ROUND')

    def weights(self, layer):
        return self.quantize(layer.weights.transpose(3, 2, 0, 1).astype(np.float32))

    def fire(self, sums, layer, output=None):
        if self.dialect == 'thresholds':
            return self.node('MultiThreshold', sums, thresholds(layer), output=output, domain=DOMAIN, out_dtype='INT2',
                             out_scale=1.0, out_bias=-1.0, data_layout='NCHW')
        slope, offset = (values.astype(np.float32).reshape(-1, 1, 1) for values in line(layer))
        return self.quantize(self.node('Add', self.node('Mul', sums, slope), offset), output)


def thresholds(layer):
    """Return the least sums with activations 0 and +1, float32 [filters, 2]."""
    return np.stack([above_lower(layer), layer.upper], axis=1).astype(np.float32)


def line(layer):
    """Return slope and offset per filter, so that slope * sum + offset rounds to the activation, clipped to -1..+1.

    With D sums of activation 0, the slope is 1 / D: the sums on both sides of a threshold are half a slope from the
    halves. Without any, the slope is 4: with 2 or less, the highest sum of -1 would round to 0.
    """
    zeros = layer.upper.astype(np.float64) - layer.lower - 1
    slope = np.where(zeros > 0, 1 / np.maximum(zeros, 1), 4)
    return slope, 0.5 - slope * (layer.upper - 0.5)


def build_model(packed, core, dialect):
    """Return the checked ModelProto of the whole network, as onnx_format has it, or of its core."""
    builder = QonnxBuilder(dialect)
    if not core:
        classify(builder, add_ternary(builder, encode(builder, packed), packed), packed)
        first, last = ends(packed, 1)
    else:
        packed = packed._replace(layers=(packed.layers[0], *map(without_groups, packed.layers[1:])))
        shapes_out = [out for *_, out in shapes(packed)]
        first, last = (helper.make_tensor_value_info(layer.name, TensorProto.FLOAT, [1, out[2], *out[:2]])
                       for layer, out in ((packed.layers[0], shapes_out[0]), (packed.layers[-1], shapes_out[-1])))
        add_ternary(builder, packed.layers[0].name, packed)
    model = finish(builder, packed, first, last, [helper.make_opsetid(DOMAIN, 1)])
    if core:
        kind = onnx.StringStringEntryProto(key='finn_datatype', value='INT2')
        model.graph.quantization_annotation.add(tensor_name=first.name, quant_parameter_tensor_names=[kind])
    return model
