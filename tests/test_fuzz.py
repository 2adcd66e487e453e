"""Readers of files from strangers, on files damaged by hypothesis; inputs that found a fault are kept as tests."""
import gzip
import json
import tracemalloc
import zipfile

import fuzz
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twta import TwtaError
from twta.data import datasets

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=5)
SEEDS = {reader: fuzz.seeds(reader) for reader in fuzz.READERS}
LARGEST = 1 << 20  # bytes of memory that a reader may take; the seeds have a few kilobytes


@st.composite
def damaged(draw, reader):
    """Draw a file with up to four places in which bytes are changed, removed or inserted."""
    data = bytearray(draw(st.sampled_from(SEEDS[reader])))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        data[start:start + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data)


@st.composite
def with_another_value(draw, reader):
    """Draw a JSON file in which one value, at any depth, is replaced or removed."""
    tree = json.loads(draw(st.sampled_from(SEEDS[reader])))
    node = tree
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or draw(st.booleans()):
            break
        node = node[key]
    if draw(st.booleans()):
        node[key] = draw(JSON)
    else:
        del node[key]
    return json.dumps(tree).encode()


def memory(reader, data):
    """Return the peak memory of a reader, in bytes."""
    tracemalloc.start()
    try:
        fuzz.check(reader, data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize('reader', fuzz.READERS)
def test_no_exception_but_ours_and_no_memory_beyond_the_input(reader):
    inputs = damaged(reader)
    if reader in ('state', 'record'):
        inputs |= with_another_value(reader)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(inputs)
    def run(data):
        assert memory(reader, data) < LARGEST or memory(reader, data) < LARGEST  # the first call may import

    fuzz.check(reader, SEEDS[reader][0])  # imports most of what it needs
    run()


@pytest.mark.parametrize('changed, words', [
    ({'size': 84}, 'declares 80 bytes and has 84'), ({'shape': {'dim': [{'size': 2 ** 40}]}}, 'declares'),
    ({'shape': {'dim': [{'size': 2 ** 62}] * 3}}, 'declares'), ({'shape': {'dim': [{'size': -4}]}}, 'outside'),
    ({'shape': {'unknown_rank': True}}, 'outside'), ({'shape': {'dim': [{'size': 1}] * 99}}, 'outside'),
    ({'offset': 150}, 'outside'), ({'offset': 2 ** 62}, 'outside'), ({'offset': -8}, 'outside'),
    ({'shard_id': 1}, 'outside'),
    ({'slices': [{'extent': [{'start': 0}]}]}, 'outside'), ({'dtype': 7}, 'of type 7'), ({'dtype': 20}, 'of type 20'),
    ({'dtype': 7, 'shape': {}, 'size': 60}, 'declares')])
def test_a_checkpoint_that_would_take_all_memory_is_not_opened(changed, words):
    """Each of these, with right checksums, makes TensorFlow's reader take what the entry declares, or crash."""
    with pytest.raises(TwtaError, match=words):
        fuzz.read_index(fuzz.index(fuzz.tensors(**changed)))


def test_a_small_index_that_would_become_large_is_not_opened():
    """Entries share the beginning of their names: half a megabyte would become ten gigabytes."""
    with pytest.raises(TwtaError, match='too long'):
        fuzz.read_index(fuzz.index({b'': fuzz.tensors()[b''], b'n' * 400_000: b''}))
    entries = {b'': fuzz.tensors()[b'']} | {str(i).encode(): fuzz.tensors()[b'W'] for i in range(10_001)}
    with pytest.raises(TwtaError, match='more than 10,000 entries'):
        fuzz.read_index(fuzz.index(entries))


def test_a_table_that_would_take_all_memory_is_not_opened():
    whole = fuzz.index(fuzz.tensors())
    for damaged, words in ((fuzz.index(fuzz.tensors(), compressed=1), 'compressed'), (whole[:-48], 'no table|bytes'),
                           (whole[:-48] + b'\x00\xff\xff\xff\xff\x7f' + whole[-42:], 'longer than the file'),
                           (bytes(2 << 20), 'its index has'), (b'', 'its index has 0 bytes')):
        with pytest.raises(TwtaError, match=words):
            fuzz.read_index(damaged)


@pytest.mark.parametrize('reader', fuzz.READERS)
def test_whole_files_are_read(reader):
    for data in SEEDS[reader]:
        fuzz.READERS[reader](data)


def header(text):
    """Return an npy file with the text as its header."""
    return b'\x93NUMPY\x01\x00' + len(text).to_bytes(2, 'little') + text.encode() + bytes(48)


STATE = json.dumps(fuzz.STATE)


@pytest.mark.parametrize('reader, data', [
    ('member', header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2, 1, 3), } (")),  # tokenize.TokenError
    ('member', header('(' * 4000)),  # MemoryError
    ('member', header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }")),  # 4 TB
    ('member', header("{'descr': (), 'fortran_order': False, 'shape': (2, 2, 1, 3), }")),  # IndexError
    ('npy', header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10 ** 30}, 2, 2), }}")),  # OverflowError
    ('npy', header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 2, 2), }")),  # 4 GB
    ('state', STATE.replace('threshold"', 'thresh"').encode()),  # KeyError: a flag that no script has
    ('state', b'{"format": 2, "script": "S", "dataset": "digits", "stages": {"a": "b"}}'),  # AttributeError
    ('state', ('[' * 100_000).encode()),  # RecursionError
    ('state', STATE.replace('0.001', '1e999').encode()),
    ('state', STATE.replace('"epoch": 1', '"epoch": 1000000000').encode()),  # would take that many numbers in memory
    ('state', STATE.replace('0.001', f'1{400 * "0"}').encode()),  # OverflowError: no float is as large
    ('state', STATE.replace('"shares": {}', '"shares": 5').encode()),  # AttributeError when the run ended
    ('state', STATE.replace('"S"', '"S\\nT"').encode()),  # gave a message of two lines
    ('state', STATE.replace('"cosine"', '"linear"').encode()),  # was taken for cosine
    ('state', STATE.replace('"first_epoch": 1, "epochs": 4', '"first_epoch": 21, "epochs": 0').encode()),  # fuzz.py
    ('record', b'[]'), ('record', b'\xff')])
def test_what_was_found(reader, data):
    with pytest.raises(TwtaError) as error:
        fuzz.READERS[reader](data)
    assert '\n' not in str(error.value)


def test_a_state_without_one_of_its_choices_is_read():
    fuzz.read_state(STATE.replace('"threshold": "fixed", ', '').encode())  # was a KeyError


@pytest.mark.parametrize('packing', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bomb_is_not_unpacked(tmp_path, packing):
    """Read 50 MB of zeros in 50 kB or less: in a member whose header tells its size, and in one that hides it."""
    whole = fuzz.npy(np.zeros((2, 2, 1, 3), np.float32))
    for content in (fuzz.npy(np.zeros(12_500_000, np.float32)), whole + bytes(50_000_000)):
        with zipfile.ZipFile(tmp_path / 'bomb.npz', 'w', packing) as archive:
            archive.writestr('conv1/W:0.npy', content)
            archive.writestr('bn1/beta:0.npy', fuzz.npy(np.zeros(3, np.float32)))
        del content
        tracemalloc.start()
        with pytest.raises(TwtaError):
            fuzz.read_npz((tmp_path / 'bomb.npz').read_bytes())
        assert tracemalloc.get_traced_memory()[1] < LARGEST
        tracemalloc.stop()


def test_a_gz_bomb_is_not_unpacked(tmp_path):
    (tmp_path / 'bomb.gz').write_bytes(gzip.compress(bytes(50_000_000), 1))
    tracemalloc.start()
    assert len(datasets.read_file(tmp_path / 'bomb.gz', limit=1000)) == 1001
    assert tracemalloc.get_traced_memory()[1] < LARGEST
    tracemalloc.stop()
