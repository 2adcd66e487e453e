"""Packed networks without TensorFlow: the engines, the file format, the stand-alone command."""
import copy
import hashlib
import importlib
import inspect
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import NETWORKS, ROOT, random_images, random_packed

from twta import TwtaError
from twta.packed import (
    engines,
    file_format,
    inference,
    kernels,
    numba_engine,
    numpy_engine,
    paired_engine,
    paired_kernels,
    passes,
    pool,
    sliced_engine,
    sliced_kernels,
    vectors,
)
from twta.packed.file_format import Layer

pytestmark = pytest.mark.processor


avx2 = pytest.mark.skipif(not vectors.has_avx2(), reason='needs AVX2')
PAIRED = pytest.param(paired_engine.PairedEngine, marks=avx2)
FAST = [numba_engine.NumbaEngine, sliced_engine.SlicedEngine, PAIRED]


@pytest.fixture(params=NETWORKS)
def packed(request):
    return random_packed(*NETWORKS[request.param])


def with_border(packed, border):
    """Return a packed network whose ternary layers have this border."""
    return packed._replace(layers=(packed.layers[0], *(layer._replace(border=border) for layer in packed.layers[1:])))


# ----------------------------------------------------------------------------------------------------------------------
# Engines


@pytest.mark.parametrize('count', [1, 2, 21])
@pytest.mark.parametrize('threads', [1, 2, None])
@pytest.mark.parametrize('fast', FAST)
def test_engines_have_the_same_activations_and_logits(packed, count, threads, fast, monkeypatch):
    if threads:
        monkeypatch.setattr(numba_engine, 'SHARED', 0)  # else a network as small as this gets one thread
    fast, plain = fast(packed, threads), numpy_engine.NumpyEngine(packed)
    x = random_images(packed, count)
    logits, maps = plain.run(x)
    for layer, found, expected in zip(packed.layers, fast.activations(x), maps, strict=True):
        np.testing.assert_array_equal(found, expected, err_msg=layer.name)
    assert any((values != 0).any() and (values == 0).any() for values in maps)
    np.testing.assert_allclose(fast.logits(x), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('fast', FAST)
@pytest.mark.filterwarnings('ignore:overflow encountered')
@pytest.mark.parametrize('scale', [1, 1e-30, 1e30, 3e37])
@pytest.mark.parametrize('crop', [0, 9])
def test_encoder_sums_on_and_beside_the_thresholds(fast, scale, crop):
    """Where float32 cannot tell a sum from a threshold, where it overflows, and where it is all zeros."""
    base = random_packed((11, 10, 3), crop, [(72, 3, 1, 'SAME', 1), (8, 9, 1, 'VALID', 1)])
    x = random_images(base, 7)
    x[5], x[6] = 0, 255
    x[6, 4, 4] = 0
    encoder = base.layers[0]._replace(weights=base.layers[0].weights * np.float32(scale))
    sums = numpy_engine.convolve(numpy_engine.encoder_input(x, base), encoder).astype(np.float32)
    filters = np.arange(72)
    upper = sums[filters % 7, filters % 9, filters // 9, filters]  # one sum of each filter
    lower = np.minimum(sums[filters % 3, filters % 5, filters % 9, filters],
                       np.nextafter(upper, np.float32(-np.inf)))
    for toward in (-np.inf, 0, np.inf):  # the float32 before it, itself, the next one
        moved = [np.nextafter(limits, np.float32(toward)) if toward else limits for limits in (upper, lower)]
        packed = base._replace(layers=(encoder._replace(upper=moved[0], lower=moved[1]), *base.layers[1:]))
        expected = numpy_engine.NumpyEngine(packed).activations(x)
        for found, right in zip(fast(packed).activations(x), expected, strict=True):
            np.testing.assert_array_equal(found, right)


@pytest.mark.filterwarnings('ignore:overflow encountered')
@pytest.mark.parametrize('fast', FAST)
@pytest.mark.parametrize('limit', [1e38, 3.3e38])
def test_one_filter_of_the_encoder_overflows_float32(fast, limit):
    """Its doubt is not lost among filters that are certain."""
    base = random_packed((12, 12, 1), 0, [(32, 3, 1, 'SAME', 1), (8, 3, 1, 'SAME', 1)])
    weights, upper = base.layers[0].weights.copy(), np.full(32, 1e3, np.float32)
    weights[..., 0], upper[0] = 0, limit
    weights[0, :, 0, 0] = 3e38, 3e38, -3e38
    packed = base._replace(layers=(base.layers[0]._replace(weights=weights, upper=upper, lower=-upper), base.layers[1]))
    x = random_images(packed, 3)
    for found, right in zip(fast(packed).activations(x), numpy_engine.NumpyEngine(packed).activations(x), strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize('threads', [2, 3, 7])
@pytest.mark.parametrize('fast', [numba_engine.NumbaEngine, PAIRED])
def test_threads_that_share_an_image(fast, threads, monkeypatch):
    """Layers that are shared by positions, by blocks, and not at all; more shares than there may be threads."""
    monkeypatch.setattr(numba_engine, 'SHARED', 0)
    monkeypatch.setattr(pool.numba, 'set_num_threads', lambda number: None)
    packed = random_packed((24, 24, 1), 0, [(64, 5, 1, 'SAME', 1), (64, 3, 1, 'SAME', 2), (128, 4, 4, 'VALID', 2),
                                            (256, 6, 1, 'VALID', 1), (24, 1, 1, 'VALID', 1)])
    engine = fast(packed, 1)
    engine.threads = engine.cores = threads
    x = random_images(packed, 1)
    expected = numpy_engine.NumpyEngine(packed).activations(x)
    zeros = 64 if fast is paired_engine.PairedEngine else 0
    for _ in range(20):
        for planes in engine.planes:
            planes.data[:] = zeros
        for found, right in zip(engine.activations(x), expected, strict=True):
            np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize('border', [-1, 0, 1])
@pytest.mark.parametrize('fast', [sliced_engine.SlicedEngine, PAIRED])
def test_all_images_of_a_vector(fast, packed, border):
    """256 images, with a border that is no zero."""
    packed = with_border(packed, border)
    x = random_images(packed, 256)
    for found, right in zip(fast(packed).activations(x), numpy_engine.NumpyEngine(packed).activations(x), strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize('filters', [40, 125, 126, 127, 253, 300, 3000])
@pytest.mark.parametrize('sign', [-1, 1])
@pytest.mark.parametrize('fast', [sliced_engine.SlicedEngine, PAIRED])
def test_sums_of_every_size(fast, filters, sign):
    """Every variant of the kernels: products all +1 or -1, thresholds at the sum and beyond it."""
    packed = random_packed((2, 2, 1), 0, [(filters, 2, 1, 'VALID', 1), (6, 1, 1, 'VALID', 1)])
    encoder, layer = packed.layers
    encoder = encoder._replace(upper=np.full(filters, -np.inf, np.float32), lower=np.full(filters, -np.inf, np.float32))
    count = np.array([filters, filters, filters - 1, filters - 1, 0, 0])
    weights = np.where(np.arange(filters)[:, np.newaxis] < count, sign, 0).astype(np.int8)[np.newaxis, np.newaxis]
    beyond = np.array([0, 1] * 3)
    upper, lower = (sign * count + beyond, [-filters - 1] * 6) if sign > 0 else ([filters + 1] * 6, -count - beyond)
    layer = layer._replace(weights=weights, upper=np.array(upper, np.int32), lower=np.array(lower, np.int32))
    engine = fast(packed._replace(layers=(encoder, layer)))
    found = engine.activations(random_images(packed, 3))[1]
    assert (found == sign * (1 - beyond)).all()


def test_a_number_of_images_goes_to_the_engine_for_it(packed, monkeypatch):
    engine, x = engines.open_engine(packed, 'numba'), random_images(packed, 403)
    expected = numpy_engine.NumpyEngine(packed).logits(x)
    for counts, suits, names in ((True, True, 'numba numba numba'), (False, False, 'numba numba sliced'),
                                 (False, True, 'paired paired paired')):
        monkeypatch.setattr(numba_engine, 'counts_in_vectors', lambda counts=counts: counts)
        monkeypatch.setattr(paired_engine, 'suits', lambda packed, suits=suits: suits)
        if 'paired' in names and not vectors.has_avx2():
            continue
        engine.others.clear()
        numbers = 1, engines.MANY - 1, engines.MANY
        assert [engines.engine_for(engine, number).name for number in numbers] == names.split()
        for number in (3, 403):
            np.testing.assert_allclose(engines.logits(engine, x[:number]), expected[:number], rtol=1e-5, atol=1e-5)
    assert engines.engine_for(numpy_engine.NumpyEngine(packed), 256).name == 'numpy'


@avx2
def test_networks_that_suit_the_paired_engine(monkeypatch):
    """They fill its vectors, and their sums have 16 bits."""
    for filters, groups, fits in ((64, 1, True), (36, 1, True), (65, 1, False), (34, 1, False), (8, 1, False),
                                  (64, 2, True), (64, 4, False), (64, 64, False)):
        packed = random_packed((8, 8, 1), 0, [(64, 1, 1, 'SAME', 1), (filters, 3, 1, 'SAME', groups)])
        assert paired_engine.suits(packed) == fits, (filters, groups)
    assert not paired_engine.suits(random_packed((8, 8, 1), 0, [(64, 1, 1, 'SAME', 1)]))
    monkeypatch.setattr(numba_engine, 'counts_in_vectors', lambda: False)
    for fan_in in (32000, 32001):
        packed = random_packed((4, 4, 1), 0, [(1, 1, 1, 'SAME', 1), (32, 1, 1, 'VALID', 1)])
        weights = np.ones((fan_in, 1, 1, 32), np.int8)
        packed = packed._replace(layers=(packed.layers[0], packed.layers[1]._replace(weights=weights, padding='SAME')))
        assert paired_engine.can_run(packed) == (fan_in == 32000)
        assert engines.engine_for(engines.open_engine(packed, 'numba'), 1).name == 'numba'
        if fan_in > 32000:
            with pytest.raises(ValueError, match='sums of 16 bits'):
                paired_engine.PairedEngine(packed)


@avx2
def test_a_network_whose_maps_are_too_large_when_filled_up():
    dense = random_packed((32, 32, 1), 0, [(256, 3, 1, 'SAME', 1), (256, 3, 1, 'SAME', 64), (256, 3, 2, 'SAME', 1)])
    assert paired_engine.can_run(dense)
    assert not paired_engine.can_run(random_packed((64, 64, 1), 0, [
        (512, 1, 1, 'SAME', 1), (512, 1, 1, 'SAME', 256), (64, 5, 4, 'SAME', 1)]))


@avx2
@pytest.mark.parametrize('filters', [32, 36])
def test_the_largest_sums_and_thresholds_beyond_16_bits(filters):
    limits = np.iinfo(np.int32)
    for sign in (-1, 1):
        packed = random_packed((1, 1, 1), 0, [(32000, 1, 1, 'SAME', 1), (filters, 1, 1, 'SAME', 1)])
        encoder, layer = packed.layers
        encoder = encoder._replace(upper=np.full(32000, -np.inf, np.float32), lower=np.full(32000, -np.inf, np.float32))
        upper = np.resize([sign * 32000, sign * 32000 + 1, limits.max, limits.min, 0], filters).astype(np.int32)
        lower = np.resize([limits.min, sign * 32000, sign * 32000 - 1, -32001, limits.min], filters).astype(np.int32)
        lower = np.minimum(lower, upper - 1.0).clip(limits.min).astype(np.int32)
        layer = layer._replace(weights=np.full_like(layer.weights, sign), upper=upper, lower=lower)
        packed = packed._replace(layers=(encoder, layer))
        x = random_images(packed, 2)
        for found, expected in zip(paired_engine.PairedEngine(packed, 1).activations(x),
                                   numpy_engine.NumpyEngine(packed).activations(x), strict=True):
            np.testing.assert_array_equal(found, expected)


@avx2
def test_threads_that_begin_together_open_one_engine(monkeypatch):
    monkeypatch.setattr(numba_engine, 'counts_in_vectors', lambda: False)
    monkeypatch.setattr(paired_engine, 'suits', lambda packed: True)
    engine = engines.open_engine(random_packed(*NETWORKS['strides']), 'numba')
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(lambda _: engines.engine_for(engine, 1), range(4)))) == 1


@avx2
def test_without_avx2_there_is_no_paired_engine(monkeypatch):
    packed = random_packed((8, 8, 1), 0, [(64, 1, 1, 'SAME', 1), (64, 3, 1, 'SAME', 1)])
    assert paired_engine.suits(packed)
    monkeypatch.setattr(paired_engine, 'has_avx2', lambda: False)
    assert not paired_engine.suits(packed)
    with pytest.raises(ValueError, match='wants AVX2'):
        paired_engine.PairedEngine(packed)


@avx2
@pytest.mark.parametrize('border', [-1, 0, 1])
@pytest.mark.parametrize('layers', [
    [(64, 3, 1, 'SAME', 1), (128, 4, 2, 'SAME', 2), (256, 3, 1, 'SAME', 8), (64, 2, 2, 'VALID', 4)],  # no odd ones
    [(35, 2, 1, 'SAME', 1), (30, 3, 1, 'SAME', 5), (66, 3, 2, 'SAME', 6), (33, 1, 1, 'SAME', 11)],  # odd ones
    [(18, 1, 1, 'SAME', 1), (18, 3, 1, 'SAME', 3), (27, 3, 1, 'SAME', 9), (70, 2, 1, 'SAME', 1)]])  # most are alone
def test_pairs_of_groups_that_are_read_by_other_groups(layers, border):
    packed = random_packed((9, 10, 2), 0, layers)
    packed = with_border(packed, border)
    x = random_images(packed, 5)
    expected = numpy_engine.NumpyEngine(packed).activations(x)
    engine = paired_engine.PairedEngine(packed, 1)
    for count in (1, 5):
        for found, right in zip(engine.activations(x[:count]), expected, strict=True):
            np.testing.assert_array_equal(found, right[:count])


@avx2
def test_a_pair_has_one_writer_and_one_reader():
    order = paired_engine.order_of(24, 2, 4, 8)
    assert order.shape == (16, 2)
    assert order[:8].tolist() == [[0, 4], [8, -1], [1, 5], [9, -1], [2, 6], [10, -1], [3, 7], [11, -1]]
    assert sorted(order[order >= 0]) == list(range(24))
    assert paired_engine.order_of(5, 1, 1, 4).tolist() == [[0, 1], [2, 3], [4, -1], [-1, -1]]


@pytest.mark.parametrize('fast', FAST)
def test_copies_of_an_engine_have_memory_of_their_own(packed, fast):
    engine, x = fast(packed), random_images(packed, 5)
    x.setflags(write=False)
    expected = engine.logits(x)
    for twin in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert twin.encoder.x.ctypes.data != engine.encoder.x.ctypes.data
        np.testing.assert_array_equal(twin.logits(x), expected)


def test_networks_that_are_too_large_for_the_sliced_engine(monkeypatch):
    monkeypatch.setattr(numba_engine, 'counts_in_vectors', lambda: False)
    for channels, kernel, fits in ((1, 32751, True), (1, 32752, False), (8192, 1, True)):
        packed = random_packed((8, 8, 1), 0, [(channels, 8, 1, 'VALID', 1), (2, 1, 1, 'VALID', 1)])
        weights = np.ones((kernel, 1, channels, 2), np.int8)
        packed = packed._replace(layers=(packed.layers[0], packed.layers[1]._replace(weights=weights, padding='SAME')))
        assert sliced_engine.suits(packed) == fits
        engine = engines.open_engine(packed, 'numba')
        assert (engines.engine_for(engine, 200).name == 'sliced') == fits
        if not fits:
            with pytest.raises(ValueError, match='too large'):
                sliced_engine.SlicedEngine(packed)
    assert not sliced_engine.suits(random_packed((2048, 2048, 1), 0, [(8, 1, 1, 'SAME', 1), (8, 1, 1, 'SAME', 1)]))


def test_the_cache_of_numba_is_that_of_these_kernels():
    """Numba looks only at the file of the outermost function; the others compile functions of kernels, too."""
    for module in (kernels, paired_kernels, sliced_kernels):
        assert module.run.py_func.__qualname__ == f'run_{pool.SOURCES}'


@pytest.mark.parametrize('fast', FAST)
def test_an_engine_does_not_remember_earlier_images(packed, fast):
    engine = fast(packed)
    first = engine.logits(random_images(packed, 9, seed=1))
    engine.logits(random_images(packed, 30, seed=2))
    np.testing.assert_array_equal(engine.logits(random_images(packed, 9, seed=1)), first)


def test_batches_of_any_length(packed):
    engine = engines.open_engine(packed, 'numba')
    x = random_images(packed, engine.batch + 3)
    together = engines.logits(engine, x)
    assert together.shape == (engine.batch + 3, len(packed.classes))
    np.testing.assert_array_equal(together[-3:], engine.logits(x[-3:]))


@pytest.mark.parametrize('fast', FAST)
def test_kernels_refuse_images_that_would_overrun_their_buffers(packed, fast):
    engine = fast(packed)
    height, width, channels = packed.image
    for wrong in (np.zeros((engine.batch + 1, *packed.image), np.uint8), random_images(packed, 2).astype(float),
                  np.zeros((1, height + 1, width, channels), np.uint8), np.zeros((1, height, width), np.uint8)):
        with pytest.raises(ValueError, match='not uint8'):
            engine.logits(wrong)


@pytest.mark.parametrize('sources', [1, 2, 4, 8])
def test_eight_filters_that_read_several_groups(sources):
    """Use every variant of the kernel: eight filters take their inputs from `sources` groups of the layer before."""
    packed = random_packed((6, 6, 3), 0, [(64, 3, 1, 'SAME', 1), (128, 2, 1, 'SAME', 8),
                                          (64, 3, 1, 'SAME', 2 * sources)])
    engine = engines.open_engine(packed, 'numba')
    assert engine.table[1, passes.COLUMNS.index('kind')] == sources
    x = random_images(packed, 5)
    for found, expected in zip(engine.activations(x), numpy_engine.NumpyEngine(packed).activations(x), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('layers', [
    [(40, 3, 1, 'SAME', 1), (40, 2, 2, 'VALID', 40), (16, 3, 1, 'SAME', 8)],  # the reader has groups
    [(130, 1, 1, 'SAME', 1), (130, 3, 2, 'SAME', 130), (130, 2, 1, 'SAME', 130)],  # twice, and last
    [(8, 2, 1, 'SAME', 1), (2, 3, 1, 'SAME', 2), (2, 8, 8, 'VALID', 2), (8, 1, 1, 'SAME', 1)]])  # 64 cells
@pytest.mark.parametrize('border', [-1, 0, 1])
def test_filters_that_read_a_channel_each(layers, border):
    """As in pooling without weights, with any weights and thresholds: some are out of reach, some always reached."""
    rng = np.random.default_rng(len(layers) + border)
    packed = random_packed((8, 8, 3), 0, layers)
    hostile = []
    for layer in packed.layers[1:]:
        most = file_format.fan_in(layer.weights)
        upper = rng.integers(-most, most + 2, layer.upper.shape, np.int32)
        hostile.append(layer._replace(border=border, upper=upper, lower=rng.integers(-most - 1, upper, dtype=np.int32)))
    packed = packed._replace(layers=(packed.layers[0], *hostile))
    engine = numba_engine.NumbaEngine(packed, 2)
    assert kernels.POOLING in engine.table[1:, kernels.KIND]
    for count in (1, 3):
        x = random_images(packed, count)
        for found, expected in zip(engine.activations(x), numpy_engine.NumpyEngine(packed).activations(x), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_filters_without_weights_read_a_group_that_is_there():
    """Fill the writer's order up to words with -1, as for a reader with a channel each."""
    filters = numba_engine.words_of(np.arange(48)[np.newaxis]).reshape(-1, 8)
    assert (filters[-1] == -1).all()
    assert set(numba_engine.groups_read(filters, 24).ravel()) == {0, 1}


def test_sums_on_the_thresholds_fire():
    """Check that upper and lower are inclusive: with thresholds equal to the sums, every filter fires."""
    base = random_packed((6, 6, 1), 0, [(16, 3, 1, 'SAME', 1), (8, 6, 1, 'VALID', 1)])
    x = random_images(base, 1)
    before = numpy_engine.NumpyEngine(base).activations(x)[0].astype(np.float32)
    sums = numpy_engine.convolve(before, base.layers[1])[0, 0, 0].astype(np.int32)
    for shift, expected in ((0, 1), (1, 0)):
        layer = base.layers[1]._replace(upper=sums + shift, lower=sums - 100)
        for engine in ('numba', 'numpy'):
            found = engines.open_engine(base._replace(layers=(base.layers[0], layer)), engine).activations(x)[1]
            assert (found == expected).all()
        layer = base.layers[1]._replace(upper=sums + 100, lower=sums - shift)
        found = engines.open_engine(base._replace(layers=(base.layers[0], layer)), 'numba').activations(x)[1]
        assert (found == -expected).all()


def test_the_fallback_if_numba_is_not_installed(monkeypatch):
    packed = random_packed(*NETWORKS['odd'])
    monkeypatch.setitem(sys.modules, 'twta.packed.numba_engine', None)
    assert engines.open_engine(packed).name == 'numpy'
    with pytest.raises(TwtaError, match='--engine numpy'):
        engines.open_engine(packed, 'numba')


@pytest.mark.parametrize('fault', [ValueError, RuntimeError, ImportError])
def test_the_fallback_if_numba_refuses_a_setting(monkeypatch, capsys, fault):
    def refuse(packed, threads):
        raise fault('the variable NUMBA_X\nis wrong')

    packed = random_packed(*NETWORKS['odd'])
    monkeypatch.setattr(numba_engine, 'NumbaEngine', refuse)
    assert engines.open_engine(packed).name == 'numpy'
    assert capsys.readouterr().err.count('\n') == 1
    with pytest.raises(TwtaError, match='NUMBA_X is wrong; use --engine numpy'):
        engines.open_engine(packed, 'numba')


def test_an_older_numba_is_not_used(monkeypatch):
    monkeypatch.setattr(numba_engine.numba, 'version_info', (0, 60, 0))
    with pytest.raises(ImportError, match=r'is too old, 0\.61 is needed'):
        importlib.reload(numba_engine)
    monkeypatch.undo()
    importlib.reload(numba_engine)


def test_no_images_and_images_of_another_kind(packed):
    for name in ('numba', 'numpy'):
        engine = engines.open_engine(packed, name)
        assert engines.logits(engine, random_images(packed, 0)).shape == (0, len(packed.classes))
        for wrong in (random_images(packed, 2) / 256, random_images(packed, 2)[:, 1:], random_images(packed, 0) / 256):
            with pytest.raises(ValueError, match='not uint8'):
                engines.logits(engine, wrong)


def test_layers_have_no_name_that_numpy_takes_for_an_argument():
    """Vectors of a network are saved by names of layers: np.savez_compressed(file, **vectors)."""
    arguments = set(inspect.signature(np.savez_compressed).parameters) - {'args', 'kwds'}
    assert arguments <= set(file_format.RESERVED)
    packed = random_packed(*NETWORKS['odd'])
    for name in file_format.RESERVED:
        renamed = packed._replace(layers=(*packed.layers[:-1], packed.layers[-1]._replace(name=name)))
        with pytest.raises(file_format.InvalidFile, match='is taken, empty, or has a /'):
            file_format.parse(file_format.serialize(renamed))


def test_a_weight_sets_its_bit_in_the_words():
    layer = Layer('l', np.zeros((1, 2, 3, 9), np.int8), None, None, 1, 'SAME', 1)
    layer.weights[0, 1, 2, 8] = -1
    words = numba_engine.ternary_words(layer, np.array([[0] * 7 + [8], [-1] * 8]), cell=1, words=1)
    assert words.shape == (2, 1, 1, 2, 8) and (words[1] == 0).all()
    assert list(words[0, 0, 0, :, 7]) == [1 << 10] * 2 and (words[..., :7] == 0).all()  # bit 2 of the second byte


# ----------------------------------------------------------------------------------------------------------------------
# File format


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'network.twta'
    file_format.write(path, random_packed(*NETWORKS['pieces']))
    return path


def assert_equal(found, expected):
    """Check that two packed networks are equal, field by field."""
    for name, value in expected._asdict().items():
        if name == 'layers':
            for a, b in zip(found.layers, value, strict=True):
                for x, y in zip(a, b, strict=True):
                    np.testing.assert_array_equal(x, y)
        elif name == 'stem' and value:
            for x, y in zip(found.stem, value, strict=True):
                np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


def test_what_is_written_is_read(packed, tmp_path):
    size = file_format.write(tmp_path / 'network.twta', packed)
    assert size == (tmp_path / 'network.twta').stat().st_size
    assert_equal(file_format.read(tmp_path / 'network.twta'), packed)


def test_five_trits_to_a_byte():
    rng = np.random.default_rng(0)
    for count in range(1, 40):
        trits = rng.integers(-1, 2, count).astype(np.int8)
        data = file_format.pack_trits(trits)
        assert len(data) == -(-count // 5) and data.dtype == np.uint8
        np.testing.assert_array_equal(file_format.unpack_trits(data, count), trits)
    assert list(file_format.pack_trits(np.array([1, -1, -1, -1, 0, -1]))) == [2 + 81, 0]


def broken(data):
    """Return the message with which a reader refuses the bytes."""
    with pytest.raises(file_format.InvalidFile) as error:
        file_format.parse(bytes(data))
    assert '\n' not in str(error.value)
    return str(error.value)


def sealed(body):
    """Return a file: the body and its checksum."""
    return body + hashlib.sha256(body).digest()


def with_header(data, change):
    """Return the file after `change` has altered its header; the checksum is right."""
    length = struct.unpack('<I', data[8:12])[0]
    header = json.loads(data[12:12 + length])
    change(header)
    text = json.dumps(header).encode()
    return sealed(data[:8] + struct.pack('<I', len(text)) + text + data[12 + length:-32])


def test_every_flipped_byte_and_every_truncation_is_found(file):
    data = file.read_bytes()
    for position in [*range(60), *range(60, len(data), 97)]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        assert broken(damaged)
        assert broken(data[:position])
    assert 'damaged' in broken(data + b'\0')


def test_a_refusal_names_the_file_and_what_to_do(tmp_path, file):
    for content, word in ((b'', 'not a .twta file'), (b'<html>' * 99, 'not a .twta file'),
                          (file.read_bytes()[:-1], 'damaged')):
        (tmp_path / 'bad.twta').write_bytes(content)
        with pytest.raises(TwtaError, match=f'bad.twta: .*{word}.*--mode export'):
            file_format.read(tmp_path / 'bad.twta')
    with pytest.raises(TwtaError, match=r'/dev/zero: not a \.twta file'):  # a file that never ends
        file_format.read(Path('/dev/zero'))
    (tmp_path / 'large.twta').write_bytes(file_format.MAGIC)
    os.truncate(tmp_path / 'large.twta', 1 << 30)
    with pytest.raises(TwtaError, match=r'large\.twta: larger than 268,435,456 bytes'):
        file_format.read(tmp_path / 'large.twta')
    with pytest.raises(TwtaError, match=r'absent\.twta: No such file'):
        file_format.read(tmp_path / 'absent.twta')
    with pytest.raises(TwtaError, match='Is a directory'):
        file_format.read(tmp_path)


def test_a_newer_version_is_refused_as_such(file):
    data = file.read_bytes()
    assert 'newer version' in broken(sealed(data[:4] + struct.pack('<I', file_format.VERSION + 1) + data[8:-32]))


@pytest.mark.parametrize('change, word', [
    (lambda header: header.pop('layers'), 'layers'),
    (lambda header: header.update(image=[32, 32]), 'image'),
    (lambda header: header.update(image=[32, 32, True]), 'whole number'),
    (lambda header: header.update(image=[10 ** 9, 32, 3]), 'whole number'),
    (lambda header: header.update(crop=33), 'crop'),
    (lambda header: header.update(classes=[]), 'classes'),
    (lambda header: header.update(classes=[1, 2]), 'classes'),
    (lambda header: header.update(classes=['a'] * 11), 'shorter'),
    (lambda header: header.update(layers=[]), 'no layers'),
    (lambda header: header.update(layers=header['layers'][:-1]), 'too many|shorter|range'),
    (lambda header: header['layers'][1].update(stride=0), 'stride'),
    (lambda header: header['layers'][1].update(stride='1'), 'stride'),
    (lambda header: header['layers'][1].update(padding='REFLECT'), 'padding'),
    (lambda header: header['layers'][1].update(groups=3), 'divide'),
    (lambda header: header['layers'][1].update(border=2), 'border'),
    (lambda header: header['layers'][1].update(border=-1), 'which format 1 has not'),
    (lambda header: header['layers'][1].update(border=True), 'border'),
    (lambda header: header['layers'][0].update(border=-1), 'border'),
    (lambda header: header['layers'][0].update(kernel=[99, 1], padding='VALID'), 'padding'),
    (lambda header: header['layers'][2].update(filters=65536), 'shorter'),
    (lambda header: header.update(dataset=3), 'dataset'),
    (lambda header: header.update(image=[4000, 4000, 3], crop=0), 'too large'),
    (lambda header: header['layers'][1].update(kernel=[65536, 1]), 'shorter'),
    (lambda header: header.update(network='two\nlines'), 'network'),
    (lambda header: header.update(classes=['\ud800', 'b', 'c']), 'classes'),
    (lambda header: header['layers'][1].update(name='\x1b[31m'), 'name'),
    (lambda header: header['layers'][1].update(name=''), 'name'),
    (lambda header: header['layers'][1].update(name='images'), 'name'),
    (lambda header: header['layers'][1].update(name='a/b'), 'name'),
    (lambda header: header['layers'][1].update(name=header['layers'][0]['name']), 'name'),
    (lambda header: header['record'].update(choices=[1]), 'choices'),
    (lambda header: header['record'].update(choices={'k': '\x1b[31m'}), 'choices'),
])
def test_a_header_that_contradicts_itself(file, change, word):
    assert re.search(word, broken(with_header(file.read_bytes(), change)))


def test_arrays_out_of_range_are_refused():
    packed = random_packed(*NETWORKS['dense'])
    encoder, layer, last = packed.layers
    for bad in ((encoder, layer._replace(upper=layer.lower), last),
                (encoder, layer, last._replace(upper=last.upper + 9999)),
                (encoder._replace(upper=encoder.upper * np.nan), layer, last),
                (encoder._replace(lower=encoder.upper), layer, last),
                (encoder._replace(weights=encoder.weights * np.inf), layer, last)):
        assert 'out of range' in broken(rewritten(packed._replace(layers=bad)))
    assert 'NaN' in broken(rewritten(packed._replace(shift=packed.shift * np.nan)))
    packed = random_packed(*NETWORKS['stem'])
    for field in packed.stem._fields:
        stem = packed.stem._replace(**{field: getattr(packed.stem, field) * np.inf})
        assert 'its stem holds NaN' in broken(rewritten(packed._replace(stem=stem)))
    data = rewritten(packed)
    for change in (lambda header: header.pop('stem'), lambda header: header['stem'].update(filters=0),
                   lambda header: header['stem'].update(kernel=[3])):
        assert 'stem' in broken(with_header(data, change))


def rewritten(packed):
    """Return the bytes of the file of a packed network."""
    with tempfile.TemporaryDirectory() as folder:
        file_format.write(Path(folder) / 'x', packed)
        return (Path(folder) / 'x').read_bytes()


def test_noise_under_a_right_checksum_raises_nothing_but_bad(file):
    """Read 3,000 files in which bytes are changed, cut or repeated, each with a right checksum."""
    body, rng = file.read_bytes()[:-32], np.random.default_rng(0)
    header = 12 + struct.unpack('<I', body[8:12])[0]
    refused = 0
    for _ in range(3000):
        noisy = bytearray(body)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, header if rng.random() < 0.8 else len(noisy)))
            kind = rng.integers(3)
            if kind == 0:
                noisy[at:at + 1] = bytes([rng.integers(256)])
            elif kind == 1:
                del noisy[at:at + int(rng.integers(1, 50))]
            else:
                noisy[at:at] = noisy[at:at + int(rng.integers(1, 50))]
        try:
            packed = file_format.parse(sealed(bytes(noisy)))
        except file_format.InvalidFile:
            refused += 1
            continue
        x = random_images(packed, 1)  # what is accepted can be run
        for found, expected in zip(engines.open_engine(packed, 'numba').activations(x),
                                   numpy_engine.NumpyEngine(packed).activations(x), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert refused > 2000


# ----------------------------------------------------------------------------------------------------------------------
# The stand-alone command


def standalone(*arguments, cwd):
    """Run python -m twta.packed where only numpy and numba can be imported; return the finished process."""
    for package in ('tensorflow', 'tensorlayer', 'tqdm', 'matplotlib', 'sklearn'):
        (cwd / f'{package}.py').write_text(f'raise SystemExit("{package} was imported")')
    return subprocess.run([sys.executable, '-m', 'twta.packed', *map(str, arguments)], cwd=cwd, capture_output=True,
                          text=True, timeout=300, env={'PYTHONPATH': f'{cwd}:{ROOT}', 'PATH': ''})


@pytest.mark.parametrize('engine', ['numba', 'numpy'])
def test_the_standalone_command(tmp_path, engine):
    packed = random_packed(*NETWORKS['dense'])
    file_format.write(tmp_path / 'network.twta', packed)
    x = random_images(packed, 5)
    np.save(tmp_path / 'images.npy', x[..., 0])
    finished = standalone('network.twta', 'images.npy', '--engine', engine, cwd=tmp_path)
    expected = numpy_engine.NumpyEngine(packed).logits(x).argmax(1)
    assert finished.returncode == 0 and finished.stdout.split() == list(map(str, expected))
    assert f'engine: {engine}, ' in finished.stderr and ' ready after ' in finished.stderr
    finished = standalone('network.twta', 'images.npy', '--engine', engine, '--names', cwd=tmp_path)
    assert finished.stdout.split() == [packed.classes[k] for k in expected]


def test_a_network_of_other_images_or_classes():
    packed = random_packed(*NETWORKS['dense'])
    dataset = SimpleNamespace(test=SimpleNamespace(images=random_images(packed, 1)), classes=packed.classes)
    args = SimpleNamespace(file='x.twta', dataset='digits')
    inference.check_images(packed, dataset, args)
    with pytest.raises(TwtaError, match=r'for images \[9, 9, 1\], but those of digits are \[9, 8, 1\]'):
        inference.check_images(packed._replace(image=(9, 9, 1)), dataset, args)
    with pytest.raises(TwtaError, match=r'its classes are a, a, .* those of digits'):
        inference.check_images(packed._replace(classes=('a',) * len(packed.classes)), dataset, args)


HEADER = b'\x93NUMPY\x01\x00\x76\x00%-118b'  # of an npy file


@pytest.mark.parametrize('array, words', [
    (np.zeros((2, 28, 28), np.uint8), '[2, 28, 28], but'), (np.zeros((2, 9, 8, 1)), 'float64'),
    (np.zeros((0, 9, 8, 1), np.uint8), '[0, 9, 8, 1] has no images'), (np.array([{}], object), 'numpy.save'),
    (b'no array', 'numpy.save'), (b'PK\x03\x04garbage', 'numpy.save'), (HEADER % b"{'descr':\n", 'numpy.save'),
    (HEADER % b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 9, 8, 1)}", 'numpy.save')])
def test_images_that_do_not_fit(tmp_path, array, words):
    file_format.write(tmp_path / 'network.twta', random_packed(*NETWORKS['dense']))
    if isinstance(array, bytes):
        (tmp_path / 'images.npy').write_bytes(array)
    else:
        np.save(tmp_path / 'images.npy', array, allow_pickle=True)
    finished = standalone('network.twta', 'images.npy', cwd=tmp_path)
    assert finished.returncode == 1 and finished.stdout == ''
    assert finished.stderr.count('\n') == 1 and 'images.npy' in finished.stderr and words in finished.stderr


@pytest.mark.parametrize('arguments', [(), ('a',), ('absent.twta', 'absent.npy'), ('--threads', '0', 'a', 'b')])
def test_mistakes_at_the_standalone_command(tmp_path, arguments):
    finished = standalone(*arguments, cwd=tmp_path)
    assert finished.returncode in (1, 2) and 'Traceback' not in finished.stderr and 'error: ' in finished.stderr
