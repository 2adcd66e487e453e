"""Reading of a QONNX file as one chain: layers, and the pointwise nodes after each, which can be run on any sums.

Operators: github.com/fastmachinelearning/qonnx, version 1.0.0; onnx's reference evaluator runs them.
"""
import math
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from twta import TwtaError
from twta.export.qonnx_format import DOMAIN
from twta.export.spatial import Maximum
from twta.packed.file_format import LARGEST_FILE, Layer, after, geometry

QUANTIZERS = 'Quant', 'IntQuant', 'BipolarQuant', 'MultiThreshold'
POINTWISE = ('Add', 'Sub', 'Mul', 'Div', 'BatchNormalization', 'Relu', 'Clip', 'Identity', 'Dropout', *QUANTIZERS)
MOST_NODES = 10_000
VALID = (*POINTWISE, 'Conv', 'MatMul', 'Gemm', 'MaxPool', 'Reshape', 'Flatten')
CONSTANT = (*POINTWISE, 'Constant', 'Cast', 'Concat', 'Gather', 'Neg', 'Pow', 'Reshape', 'Slice', 'Sqrt', 'Squeeze',
            'Transpose', 'Unsqueeze')  # of constants


ROUNDING = {'ROUND': np.rint, 'HALF_EVEN': np.rint, 'CEIL': np.ceil, 'FLOOR': np.floor, 'ROUND_TO_ZERO': np.trunc,
            'DOWN': np.trunc}


class Quant(OpRun):
    """Quant of QONNX: round and clip to steps of a scale."""
    op_domain = DOMAIN

    def _run(self, x, scale, zero_point, bits, **_):
        signed, narrow = getattr(self, 'signed', 1), getattr(self, 'narrow', 0)
        mode = getattr(self, 'rounding_mode', 'ROUND').upper()
        if mode not in ROUNDING:
            raise TwtaError(f'Quant: its rounding mode {mode} is not known; {", ".join(ROUNDING)} are')
        rounding = ROUNDING[mode]
        if signed and np.all(bits == 1):  # as the package qonnx has it
            return np.where(x >= 0, scale, -scale).astype(np.float32),
        levels = 2.0 ** (bits - signed)
        least, most = (narrow - levels, levels - 1) if signed else (0, levels - 1 - narrow)
        steps = rounding(np.clip(x / scale + zero_point, least, most))
        return np.asarray((steps - zero_point) * scale, np.float32),


class IntQuant(Quant):
    """The newer name of Quant."""


class BipolarQuant(OpRun):
    """BipolarQuant of QONNX: the scale with the sign of the value."""
    op_domain = DOMAIN

    def _run(self, x, scale):
        return np.where(x >= 0, scale, -scale).astype(np.float32),


class MultiThreshold(OpRun):
    """MultiThreshold of QONNX: out_bias plus out_scale times the number of thresholds that a value reaches."""
    op_domain = DOMAIN

    def _run(self, x, thresholds, **_):
        if getattr(self, 'data_layout', '') not in ('', 'NCHW', 'NC'):
            raise TwtaError(f'MultiThreshold: its data_layout is {self.data_layout}; NCHW and NC can be imported')
        thresholds = thresholds.reshape(-1, *[1] * (x.ndim - 2), thresholds.shape[1])
        reached = (x[..., np.newaxis] >= thresholds).sum(-1)
        return np.asarray(getattr(self, 'out_scale', 1) * reached + getattr(self, 'out_bias', 0), np.float32),


class BatchNormalization(OpRun):
    """Batch normalisation with the moving moments; onnx takes those of the batch in older versions of the operator."""
    op_domain = ''

    def _run(self, x, scale, shift, mean, variance, **_):
        scale, shift, mean, variance = (values.reshape(-1, *[1] * (x.ndim - 2)) for values in (
            scale, shift, mean, variance))
        return np.asarray(scale * (x - mean) / np.sqrt(variance + np.float32(self.epsilon)) + shift, np.float32),


OPERATORS = [Quant, IntQuant, BipolarQuant, MultiThreshold, BatchNormalization]


class Step(NamedTuple):
    """A linear layer, a maximum, or the input; and the pointwise nodes after it."""
    layer: object  # Layer without thresholds, its weights real; Maximum; None: the input
    bias: object  # of a linear layer, float32 [filters], or 0
    channels: int  # of the result
    is_flat: bool  # whether the result is [n, channels], else [n, channels, rows, columns]
    nodes: list


class Chain:
    """The steps of a model, the shape of its images [rows, columns, channels], and its constants by name."""

    def __init__(self, model):
        self.constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
        self.opset = max((item.version for item in model.opset_import if not item.domain), default=1)
        inputs = [item for item in model.graph.input if item.name not in self.constants]
        if len(model.graph.node) > MOST_NODES:
            raise TwtaError(f'the file has more than {MOST_NODES:,} nodes')
        if len(inputs) != 1 or len(model.graph.output) != 1:
            raise TwtaError(f'the file has {len(inputs)} inputs and {len(model.graph.output)} outputs; a network has '
                            'one of each')
        sizes = [size.dim_value for size in inputs[0].type.tensor_type.shape.dim]
        if len(sizes) != 4 or min(sizes[1:]) < 1 or sizes[0] > 1:
            raise TwtaError(f'the input {inputs[0].name} has the shape {sizes}, not [1, channels, rows, columns]')
        self.image = self.shape = *sizes[2:], sizes[1]
        self.steps = [Step(None, 0, sizes[1], False, [])]
        self.input = self.tip = inputs[0].name
        self.size = sum(values.nbytes for values in self.constants.values())
        self.is_flat = False
        for node in model.graph.node:
            self.add(node)
        if self.tip != model.graph.output[0].name:
            raise TwtaError(f'the output {model.graph.output[0].name} is not the end of the chain')

    def add(self, node):
        """Add a node: compute it if all that it reads is constant; else it continues the chain."""
        name = f'{node.op_type} {node.output[0]}'
        moving = [item for item in node.input if item and item not in self.constants]
        if moving and node.op_type == 'Shape':
            rows, columns, channels = self.shape
            self.constants[node.output[0]] = np.array([1, channels * rows * columns] if self.is_flat else
                                                      [1, channels, rows, columns])
            return
        if not moving and node.op_type in CONSTANT:
            self.size += 4 * count_values(node, [self.constants[item] for item in node.input if item])
            if self.size > LARGEST_FILE:
                raise TwtaError(f'{name}: the constants need more than {LARGEST_FILE >> 20} MB')
            self.constants.update(zip(node.output, self.run([node], node.output), strict=True))
            return
        if moving != [self.tip] or node.op_type not in VALID:
            reason = 'it reads more than the node before it' if moving and moving != [self.tip] else (
                f'{", ".join(VALID if moving else CONSTANT)} can be')
            raise TwtaError(f'{name} cannot be imported; {reason}')
        if node.op_type in ('Reshape', 'Flatten'):
            self.is_flat = True
            if self.steps[-1].nodes:  # the nodes after it read what those before it give
                self.steps[-1].nodes.append(helper.make_node('Identity', [self.tip], node.output))
            else:
                channels = self.steps[-1].channels if self.steps[-1].layer else 1  # all pixels are treated alike
                self.steps[-1] = self.steps[-1]._replace(is_flat=True, channels=channels)
        elif node.op_type in POINTWISE:
            self.steps[-1].nodes.append(node)
        else:
            self.add_layer(node, name)
        self.tip = node.output[0]

    def add_layer(self, node, name):
        """Add the step of a Conv, MatMul, Gemm or MaxPool."""
        bias, is_dense = 0, node.op_type in ('MatMul', 'Gemm')
        if node.op_type == 'MaxPool':
            rows, columns = attribute(node, 'kernel_shape', (1, 1))
            if rows != columns or not 1 <= rows <= max(self.shape[:2]):
                raise TwtaError(f'{name}: its kernel {rows} * {columns} is not square, or larger than the map')
            layer = Layer('', np.zeros((rows, columns, 1, self.shape[2])), None, None, 1, 'VALID', self.shape[2])
        else:
            if moving_weights := [item for item in node.input[1:] if item and item not in self.constants]:
                raise TwtaError(f'{name}: its weights {moving_weights[0]} are not constant')
            weights = self.constants[node.input[1]].astype(np.float32)
            if len(node.input) > 2 and node.input[2]:
                bias = self.constants[node.input[2]].astype(np.float32) * np.float32(attribute(node, 'beta', 1))
            weights = weights * np.float32(attribute(node, 'alpha', 1))
            if attribute(node, 'transA', 0):
                raise TwtaError(f'{name}: transA cannot be imported')
            weights = self.dense(weights.T if attribute(node, 'transB', 0) else weights) if is_dense else ungroup(
                weights.transpose(2, 3, 1, 0), attribute(node, 'group', 1), self.shape[2])
            layer = Layer('', weights, None, None, 1, 'VALID', self.shape[2] // weights.shape[2])
        if not is_dense:
            layer = self.place(node, name, layer)
        if min(geometry(self.shape, layer)[1]) < 1:
            raise TwtaError(f'{name}: its kernel is larger than the map {list(self.shape)}')
        if self.is_flat != is_dense or layer.weights.shape[2] * layer.groups != self.shape[2]:
            raise TwtaError(f'{name} does not fit its input, {list(self.shape)}')
        self.shape, self.is_flat = geometry(self.shape, layer)[1], is_dense
        if node.op_type == 'MaxPool':
            layer = Maximum('', rows, layer.stride, layer.padding, None)
        self.steps.append(Step(layer, bias, self.shape[2], is_dense, []))

    def dense(self, weights):
        """Return the weights [features, filters] of a dense layer as those of a kernel as large as the map."""
        rows, columns, channels = self.shape
        if weights.ndim != 2 or len(weights) != rows * columns * channels:
            raise TwtaError(f'weights of the shape {list(weights.shape)} do not fit a map {list(self.shape)}')
        return weights.reshape(channels, rows, columns, -1).transpose(1, 2, 0, 3)

    def place(self, node, name, layer):
        """Return the layer with the stride and the padding of a Conv or MaxPool."""
        strides, dilations = attribute(node, 'strides', (1, 1)), attribute(node, 'dilations', (1, 1))
        if min(strides) < 1:
            raise TwtaError(f'{name}: its strides are {list(strides)}')
        pads, auto = list(attribute(node, 'pads', (0,) * 4)), attribute(node, 'auto_pad', b'NOTSET').decode()
        layer = layer._replace(stride=strides[0])
        for padding in ('VALID', 'SAME'):
            placed = layer._replace(padding=padding)
            cells = [*geometry(self.shape, placed)[0], *after(self.shape, placed)]
            if (auto == 'NOTSET' and cells == pads) or auto == {'VALID': 'VALID', 'SAME': 'SAME_UPPER'}[padding]:
                break
        else:
            raise TwtaError(f"{name}: its padding {pads} is neither none nor TensorFlow's SAME, {cells}")
        if len(set(strides)) > 1 or set(dilations) != {1} or attribute(node, 'ceil_mode', 0):
            raise TwtaError(f'{name}: it has two strides, a dilation or ceil_mode, which cannot be imported')
        return placed

    def run(self, nodes, outputs, **inputs):
        """Return the outputs, by name, of nodes with these inputs and the chain's constants."""
        inner = {item for node in nodes for item in node.output}
        names = {item for node in nodes for item in node.input if item} - inner - set(inputs)
        ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in group]
                for group in (inputs, outputs)]  # the evaluator does not look at types
        graph = helper.make_graph([in_our_domain(node) for node in nodes], 'part', *ends,
                                  [numpy_helper.from_array(self.constants[name], name) for name in sorted(names)])
        opsets = [helper.make_opsetid('', self.opset), helper.make_opsetid(DOMAIN, 1)]
        try:
            with np.errstate(all='ignore'):
                return ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets), new_ops=OPERATORS).run(
                    list(outputs), inputs)
        except TwtaError:
            raise
        except Exception as error:  # whatever a node of a stranger's file does to onnx
            which = f'{nodes[0].op_type} {nodes[0].output[0]}' if len(nodes) == 1 else 'a part of the file'
            raise TwtaError(f'{which} cannot be computed: {error}') from None

    def respond(self, step, sums):
        """Return what the pointwise nodes of a step make of sums float32 [count, channels]."""
        sums = (sums + step.bias).astype(np.float32)
        if not step.nodes:
            return sums
        shape = sums.shape if step.is_flat else (*sums.shape, 1, 1)
        found, = self.run(step.nodes, [step.nodes[-1].output[0]], **{self.tip_before(step): sums.reshape(shape)})
        if found.shape != shape:
            raise TwtaError(f'{step.nodes[-1].op_type} {step.nodes[-1].output[0]} is not the same at every place of a '
                            'map, or not for every filter by itself')
        return found.reshape(sums.shape)

    def tip_before(self, step):
        """Return the name of the tensor that the pointwise nodes of a step read."""
        return next(item for item in step.nodes[0].input if item not in self.constants)


def attribute(node, name, default):
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def count_values(node, inputs):
    """Return how many values a node makes of constants, at most."""
    sizes = [np.size(values) for values in inputs]
    if node.op_type == 'Gather':
        return sizes[1] * sizes[0] // max(1, np.shape(inputs[0])[attribute(node, 'axis', 0)])
    if node.op_type in ('Add', 'Sub', 'Mul', 'Div', 'Pow'):
        return math.prod(np.broadcast_shapes(*map(np.shape, inputs)))
    return sum(sizes)


def in_our_domain(node):
    """Return a node with QONNX's present name of its domain; older files have others."""
    if node.op_type in QUANTIZERS:
        node = onnx.NodeProto.FromString(node.SerializeToString())
        node.domain = DOMAIN
    return node


def ungroup(weights, groups, channels):
    """Return weights [rows, columns, channels / groups, filters] as one group, or one group per channel.

    ONNX's groups are blocks of neighbours, those of a Layer are not.
    """
    if groups in (1, channels):
        return weights
    *kernel, share, filters = weights.shape
    found = np.zeros((*kernel, share * groups, filters), weights.dtype)
    for group in range(groups):
        own = slice(group * filters // groups, (group + 1) * filters // groups)
        found[:, :, group * share:(group + 1) * share, own] = weights[..., own]
    return found
