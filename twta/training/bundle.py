"""Checks of a checkpoint's files before TensorFlow reads them: its reader believes the lengths that it finds there.

A crafted checkpoint could otherwise make TensorFlow take all memory, or crash. The checks accept what tf.train.Saver
writes for the variables here, and nothing else. Checksums are left to TensorFlow.

NAME.index is a table of LevelDB (tensorflow/core/lib/io/table_format.txt): blocks of sorted keys and values, an index
of the blocks, and a footer of 48 bytes. The first value is a BundleHeaderProto, each other one the BundleEntryProto of
a tensor (tensorflow/core/protobuf/tensor_bundle.proto), whose bytes are in NAME.data-00000-of-00001.
"""
import math
import struct

from google.protobuf.message import DecodeError

from twta.graph.tf1 import tensor_bundle_pb2, tf

FOOTER = 48  # bytes: two handles, padded to 40, then MAGIC
MAGIC = 0xdb4775248b80fb57
TRAILER = 5  # bytes after each block: 0 if it is not compressed, and a checksum
LARGEST_INDEX = 1 << 20  # bytes; the largest network here has 25,000
LONGEST_NAME, MOST_ENTRIES = 500, 10_000  # entries share parts of their names: a small index could hold large ones
CHECKSUM = 4  # bytes before the characters of a string


def check(index, data):
    """Raise ValueError if a checkpoint is not as Saver writes it; index, data: paths of its files."""
    size = index.stat().st_size
    if not FOOTER <= size <= LARGEST_INDEX:
        raise ValueError(f'its index has {size:,} bytes')
    try:
        pairs = list(read_table(index.read_bytes()))
        header = tensor_bundle_pb2.BundleHeaderProto.FromString(pairs[0][1] if pairs else b'')
        if not pairs or pairs[0][0] or header.num_shards != 1 or header.endianness:
            raise ValueError('its index has no header')
        with open(data, 'rb') as file:
            for name, value in pairs[1:]:
                check_entry(name, tensor_bundle_pb2.BundleEntryProto.FromString(value), file, data.stat().st_size)
    except (DecodeError, IndexError, struct.error) as error:
        raise ValueError(f'its index is damaged ({type(error).__name__})') from None


def read_table(table):
    """Yield key and value of each entry, in the order of the table."""
    if struct.unpack('<Q', table[-8:])[0] != MAGIC:
        raise ValueError('its index is no table')
    handles = table[-FOOTER:]
    start, at = read_varint(handles, 0)
    length, at = read_varint(handles, at)
    for _ in read_block(table, start, length):  # "metaindex": empty, but TensorFlow reads it
        pass
    start, at = read_varint(handles, at)
    length, at = read_varint(handles, at)
    end = entries = 0
    for _, handle in read_block(table, start, length):
        start, at = read_varint(handle, 0)
        length, at = read_varint(handle, at)
        if start < end:
            raise ValueError('two blocks of its index overlap')
        end = start + length
        for pair in read_block(table, start, length):
            entries += 1
            if entries > MOST_ENTRIES:
                raise ValueError(f'its index has more than {MOST_ENTRIES:,} entries')
            yield pair


def read_block(table, start, length):
    """Yield key and value of each entry of a block."""
    end = start + length
    if not 4 <= length <= len(table) or end + TRAILER > len(table):
        raise ValueError('a block of its index is longer than the file')
    if table[end]:
        raise ValueError('its index is compressed')
    end -= 4 + 4 * struct.unpack('<I', table[end - 4:end])[0]  # positions for a binary search, and their number
    key, at = b'', start
    while at < end:
        shared, at = read_varint(table, at)
        added, at = read_varint(table, at)
        size, at = read_varint(table, at)
        if shared > len(key) or shared + added > LONGEST_NAME or at + added + size > end:
            raise ValueError('an entry of its index is too long')
        key = key[:shared] + table[at:at + added]
        yield key, table[at + added:at + added + size]
        at += added + size


def check_entry(name, entry, file, size):
    """Raise ValueError if the entry of a tensor does not fit its bytes in the open data file of that size."""
    shape = [dim.size for dim in entry.shape.dim]
    if (entry.slices or entry.shard_id or entry.shape.unknown_rank or len(shape) > 8 or min(shape, default=0) < 0
            or entry.offset < 0 or not 0 <= entry.size <= size - entry.offset):
        raise ValueError(f'{name[:80]} is outside of its data file')
    if entry.dtype == tf.string.as_datatype_enum and not shape:
        file.seek(entry.offset)
        length, at = read_varint(file.read(min(10, entry.size)), 0)
        declared = at + CHECKSUM + length
    elif entry.dtype in (tf.float32.as_datatype_enum, tf.int32.as_datatype_enum):
        declared = 4 * math.prod(shape)
    else:
        raise ValueError(f'{name[:80]} is of type {entry.dtype} and shape {shape}')
    if declared != entry.size:
        raise ValueError(f'{name[:80]} declares {declared:,} bytes and has {entry.size:,}')


def read_varint(data, at):
    """Return the number at a position of the bytes, 7 bits per byte and the lowest first, and the position after it."""
    value = 0
    for shift in range(0, 64, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError('a number of its index has more than 64 bits')
