"""The networks that training_speed.py compares with: the same ones the published way, and in PyTorch.

Each way is a function of a network's name, its layers and whether it is ternary (see layers_of). It returns
train(steps), infer() for INFERRED images, and epoch_end() or None.
"""
import os
import tempfile
from collections import namedtuple

import numpy as np
from speed import cropped, image_of, random_images

from twta.processor import available_cores
from twta.scripts import find_scripts, load_script

SCRIPTS = find_scripts('FP', 'TWTA')
BATCH = 200
INFERRED = 1000  # images per call of infer
Layer = namedtuple('Layer', 'kind filters size stride padding groups is_quantized is_normalized')


def random_examples(name):
    """Return INFERRED random images as the files have them, their labels, and the side of their crop, or 0."""
    shape, crop = image_of(SCRIPTS[name])
    return random_images(shape, INFERRED), np.random.default_rng(1).integers(0, 10, INFERRED), crop


def layers_of(name):
    """Return the layers of the network that a script builds, and whether the network is ternary."""
    from twta.graph.tf1 import tf
    from twta.training.blocks import read_blocks

    with tf.Graph().as_default():
        images = tf.zeros([BATCH, *cropped(*image_of(SCRIPTS[name]))])
        net = load_script(SCRIPTS[name]).model(images, True)
        blocks = read_blocks(net)
    is_ternary = bool(blocks[0].levels)
    layers = []
    for index, (layer, batch_norm, _) in enumerate(blocks):
        *kernel, _, filters = layer.all_params[-1].shape.as_list()
        is_last = index + 1 == len(blocks)
        kind = 'conv' if kernel else 'classify' if is_last else 'dense'
        geometry = (kernel[0], layer.stride, layer.padding, layer.groups) if kernel else (None, None, None, 1)
        layers.append(Layer(kind, filters, *geometry, is_ternary and index > 0 and not is_last, bool(batch_norm)))
    return layers, is_ternary


def published(name, layers, is_ternary):
    """Return the published way: the same network from stock parts of TensorFlow 1 and TensorLayer."""
    from twta.graph.tf1 import tf, tl

    tf.RegisterGradient('Through')(lambda operation, gradient: gradient)
    images, labels, crop = random_examples(name)

    def ternary(x, threshold):
        with tf.get_default_graph().gradient_override_map({'Sign': 'Through'}):
            return tf.sign(tf.sign(x + threshold) + tf.sign(x - threshold))

    class Products(tl.layers.Layer):
        """A convolution without a bias, or a dense layer if the layer has no size."""

        def __init__(self, prev_layer, layer, name):
            super().__init__(prev_layer=prev_layer, name=name)
            x, size = prev_layer.outputs, layer.size
            shape = ([size, size] if size else []) + [int(x.shape[-1]), layer.filters // layer.groups]
            with tf.variable_scope(name):
                initial = tf.truncated_normal_initializer(stddev=0.02 if size else 0.1)
                w = tf.get_variable('W', shape, initializer=initial)
                w = ternary(w, 0.7 * tf.reduce_mean(tf.abs(w))) if layer.is_quantized else w
                self.outputs = (tf.nn.conv2d(x, w, [1, layer.stride, layer.stride, 1], layer.padding) if size
                                else tf.matmul(x, w))

    def activation(x):
        return ternary(tf.clip_by_value(x, -1, 1), 0.5) if is_ternary else tf.nn.relu(x)

    def network(x, y, is_train):
        """Return loss and accuracy; each group is a slice of channels with its own convolution and normalisation."""
        with tf.variable_scope('net', reuse=not is_train):
            net = tl.layers.InputLayer(x, name='input')
            for index, layer in enumerate(layers):
                if layer.kind != 'conv' and net.outputs.shape.rank == 4:
                    net = tl.layers.FlattenLayer(net, name='flatten')
                parts = []
                for group in range(layer.groups):
                    name = f'{layer.kind}{index}_{group}'
                    part = net[:, :, :, group::layer.groups] if layer.groups > 1 else net
                    part = Products(part, layer, name)
                    if layer.is_normalized:
                        act = tf.identity if layer.kind == 'classify' else activation
                        part = tl.layers.BatchNormLayer(part, act=act, is_train=is_train, name=f'{name}_bn')
                    parts.append(part)
                net = tl.layers.ConcatLayer(parts, name=f'concat{index}') if len(parts) > 1 else parts[0]
        accuracy = tf.reduce_mean(tf.cast(tf.equal(tf.argmax(net.outputs, 1), y), tf.float32))
        return tl.cost.cross_entropy(net.outputs, y, f'cost{is_train}'), accuracy

    def augmented(image):
        image = tf.random_crop(tf.cast(image, tf.float32), [crop, crop, 3])
        image = tf.image.random_contrast(tf.image.random_brightness(tf.image.random_flip_left_right(image), 63),
                                         0.2, 1.8)
        return tf.image.per_image_standardization(image)

    x = tf.placeholder(tf.float32, [BATCH, *([crop, crop, 3] if crop else images.shape[1:])])
    y = tf.placeholder(tf.int64, [BATCH])
    x_train, y_train = x, y
    if crop:
        image, label = tf.train.slice_input_producer([tf.constant(images), tf.constant(labels)])
        x_train, y_train = tf.train.shuffle_batch([augmented(image), label], BATCH, BATCH + 32, 1, num_threads=32)
    trained = network(x_train, y_train, True)
    step = tf.train.AdamOptimizer(1e-4).minimize(trained[0])
    inferred = network(x, y, False)
    saver = tf.train.Saver()
    cores = available_cores()
    session = tf.Session(config=tf.ConfigProto(intra_op_parallelism_threads=cores,
                                               inter_op_parallelism_threads=cores))
    session.run(tf.global_variables_initializer())
    if crop:
        tf.train.start_queue_runners(session)
        images = images[:, 4:4 + crop, 4:4 + crop]
    images = images.astype(np.float32) / 256

    def feeds(steps):
        for _ in range(steps):
            part = np.random.permutation(INFERRED)[:BATCH]
            yield {x: images[part], y: labels[part]}

    def train(steps):
        for feed in [None] * steps if crop else feeds(steps):
            session.run([trained, step] if crop else step, feed)

    def infer():
        for feed in feeds(INFERRED // BATCH):
            session.run(inferred, feed)

    def epoch_end():
        if not crop:
            saver.save(session, tempfile.mkdtemp(dir=os.getcwd()) + '/model')

    return train, infer, epoch_end


def pytorch(name, precision, is_compiled, layers, is_ternary):
    """Return a way in PyTorch: precision is 'float32' or 'bfloat16'."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(0)
    torch.set_num_threads(available_cores())
    images, labels, crop = random_examples(name)
    x = torch.randn(BATCH, images.shape[-1], *[crop or 28] * 2).to(memory_format=torch.channels_last)
    y = torch.tensor(labels[:BATCH])

    class Through(torch.autograd.Function):
        """Ternary x; the gradient passes where |x| is at most the limit."""

        @staticmethod
        def forward(context, x, threshold, limit):
            context.save_for_backward(x.abs() <= limit if limit else None)
            return (x >= threshold).to(x.dtype) - (x <= -threshold).to(x.dtype)

        @staticmethod
        def backward(context, gradient):
            mask, = context.saved_tensors
            return gradient if mask is None else gradient * mask, None, None

    class Products(nn.Module):
        """A layer with its batch normalisation and activation."""

        def __init__(self, layer, channels):
            super().__init__()
            self.layer = layer
            size = (layer.size, layer.size) if layer.size else ()
            self.weight = nn.Parameter(torch.randn(layer.filters, channels // layer.groups, *size)
                                       * (0.02 if size else 0.1))
            normalize = nn.BatchNorm2d if size else nn.BatchNorm1d
            self.normalize = normalize(layer.filters) if layer.is_normalized else nn.Identity()

        def forward(self, x):
            layer, w = self.layer, self.weight
            if layer.is_quantized:
                by_group = w.unflatten(0, (layer.groups, -1))
                mean = by_group.abs().mean(tuple(range(1, by_group.ndim)), keepdim=True)
                w = Through.apply(by_group, 0.7 * mean, None).flatten(0, 1)
            if layer.size:
                if layer.groups > 1:
                    x = x.permute(0, 2, 3, 1).unflatten(-1, (-1, layer.groups)).transpose(-1, -2).flatten(-2)
                    x = x.permute(0, 3, 1, 2)
                total = layer.size - layer.stride if layer.padding == 'SAME' else 0
                if total % 2:
                    x = functional.pad(x, [0, 1] * 2)
                x = functional.conv2d(x, w, stride=layer.stride, padding=total // 2, groups=layer.groups)
            else:
                x = functional.linear(x.flatten(1), w)
            x = self.normalize(x)
            if layer.kind == 'classify':
                return x
            return Through.apply(x, 0.5, 1) if is_ternary else torch.relu(x)

    modules, probe = [], x
    for layer in layers:
        channels = probe.shape[1] if layer.size else probe[0].numel()
        modules.append(Products(layer, channels))
        with torch.no_grad():
            probe = modules[-1].eval()(probe)
    net = nn.Sequential(*modules).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)

    def loss():
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
            logits = net(x)
        return functional.cross_entropy(logits.float(), y)

    compiled = torch.compile(loss, fullgraph=True) if is_compiled else loss

    def train(steps):
        net.train()
        for _ in range(steps):
            optimizer.zero_grad()
            compiled().backward()
            optimizer.step()

    def infer():
        net.eval()
        with torch.no_grad():
            for _ in range(INFERRED // BATCH):
                compiled()

    return train, infer, None
