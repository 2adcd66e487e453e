"""Feed damaged files to every reader of files from strangers: only a TwtaError with a message of one line may come out.

    pip install atheris
    python tests/fuzz.py --minutes 60          # all readers in turn
    python tests/fuzz.py --minutes 60 npy state

Atheris (libFuzzer) mutates the seeds below towards code that no input has reached. One line per reader gives the number
of inputs. test_fuzz.py does the same with hypothesis for a few seconds, and keeps what was found.
"""
import argparse
import ast
import gzip
import hashlib
import inspect
import io
import json
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from twta import TwtaError, command_line, files
from twta.data import datasets
from twta.packed import file_format, images
from twta.report import evidence
from twta.training import records, state, weights

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(tempfile.mkdtemp())  # for readers that take a path
WEIGHTS = {'conv1/W:0': np.ones((2, 2, 1, 3), np.float32), 'bn1/beta:0': np.zeros(3, np.float32)}
NET = SimpleNamespace(all_params=[SimpleNamespace(name=name, shape=SimpleNamespace(as_list=lambda array=array: list(
    array.shape))) for name, array in WEIGHTS.items()])
STATE = {'format': 5, 'script': 'S', 'dataset': 'digits', 'data_sha256': '0', 'seed': 0, 'validation': 297, 'epoch': 1,
         'part': {'steps': 3, 'loss': 1.5, 'correct': 7, 'seconds': 0.5},
         'stages': [{'first_epoch': 1, 'epochs': 4, 'learning_rate': 0.001, 'batch_size': 100, 'schedule': 'cosine',
                     'augmentation': 'published', 'protocol': 'published'}],
         'history': [{'epoch': 1, 'learning_rate': 0.001, 'loss': 1.5, 'training_accuracy': 0.5,
                      'validation_accuracy': 0.5, 'images_per_second': 100.0, 'seconds': 2.0, 'shares': {}}],
         'best_validation_accuracy': 0.5, 'choices': {'threshold': 'fixed', 'threshold_value': 0.5},
         'weights': None, 'precision': ['bfloat16']}


def write(name, data):
    (FOLDER / name).write_bytes(data)
    return FOLDER / name


def read_images(data):
    datasets.parse_idx(data, (3, 4, 5), 'images')


def read_labels(data):
    datasets.parse_idx(data, (9,), 'labels')


def read_gz(data):
    content = datasets.read_file(write('images.gz', data), limit=100)
    assert len(content) <= 101


def read_cifar(data):
    datasets.parse_cifar(data, 2, 'data_batch_1.bin')


def read_state(data):
    """Read a state, then use it as resuming does."""
    from twta.training import checkpoints, schedule  # here: they import TensorFlow

    read = checkpoints.parse_state('last-1', data, 'S', 'digits')
    defaults = command_line.protocol(1e-4, 150, 200)
    stage = schedule.next_stage(read, {}, defaults)
    schedule.describe_stage(stage)
    schedule.scheduled_rate(stage, 0, 12)
    records.name_run(read)


def read_npz(data):
    weights.read_weights(write('model.npz', data), NET)


def read_npy(data):
    """Read an array of images as twta.packed does."""
    images.read_images(write('images.npy', data), (2, 2, 1))


def read_member(data):
    """Read the data as one array of an archive whose other arrays are whole."""
    weights.read_weights(write('model.npz', archive({'conv1/W:0': data})), NET)


def read_picture(data):
    images.read_picture(write('picture', data), (2, 3, 3))


def read_index(data):
    """Read the data as the index of a checkpoint whose data file has 200 bytes; nothing else may tell of damage."""
    from twta.training import bundle  # here: it imports TensorFlow

    try:
        bundle.check(write('last-1.index', data), write('last-1.data', b'\x02\0\0\0\0{}'.ljust(200, b'\0')))
    except ValueError as error:
        raise TwtaError(str(error)) from None


def read_twta(data):
    """Read the data with the checksum that belongs to it, so that only header and arrays can be wrong."""
    file_format.read(write('network.twta', data + hashlib.sha256(data).digest()))


def read_record(data):
    record = evidence.read_record(write('record.json', data))
    if record['dataset'] in evidence.TITLES:  # evidence.add refuses records of other data sets before this
        evidence.protocol(record)


READERS = {'images': read_images, 'labels': read_labels, 'gz': read_gz, 'cifar': read_cifar, 'state': read_state,
           'npz': read_npz, 'member': read_member, 'npy': read_npy, 'picture': read_picture, 'index': read_index,
           'twta': read_twta, 'record': read_record}


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def archive(changed):
    """Return WEIGHTS as an npz file; `changed` replaces members by other bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as members:
        for name, array in WEIGHTS.items():
            members.writestr(f'{name}.npy', changed.get(name, npy(array)))
    return file.getvalue()


def saved(picture, form):
    file = io.BytesIO()
    picture.save(file, form)
    return file.getvalue()


def tensors(**changed):
    """Return the entries of a checkpoint's index by name: a header, a matrix with what is `changed`, and a text."""
    from tensorflow.core.protobuf import tensor_bundle_pb2 as pb

    matrix = pb.BundleEntryProto(**{'dtype': 1, 'shape': {'dim': [{'size': 4}, {'size': 5}]}, 'offset': 7, 'size': 80,
                                    **changed})
    text = pb.BundleEntryProto(dtype=7, offset=0, size=7)
    return {b'': pb.BundleHeaderProto(num_shards=1).SerializeToString(), b'W': matrix.SerializeToString(),
            b'run_state': text.SerializeToString()}


def index(entries, compressed=0):
    """Return a LevelDB table with these entries in one block; its checksums are 0."""
    def varint(number):
        return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)

    def block(pairs):
        content = b''.join(b'\0' + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs)
        return content + struct.pack('<2I', 0, 1)

    table, handles = b'', []
    for pairs in (entries.items(), (), None):
        content = block([(b'~', handles[0])] if pairs is None else pairs)
        handles.append(varint(len(table)) + varint(len(content)))
        table += content + bytes([compressed, 0, 0, 0, 0])
    return table + (handles[1] + handles[2]).ljust(40, b'\0') + struct.pack('<Q', 0xdb4775248b80fb57)


def seeds(reader):
    """Return whole files for a reader, as bytes."""
    if reader == 'images':
        return [struct.pack('>4I', 0x803, 3, 4, 5) + bytes(60)]
    if reader == 'labels':
        return [struct.pack('>2I', 0x801, 9) + bytes(range(9))]
    if reader == 'gz':
        return [gzip.compress(bytes(50)), gzip.compress(bytes(100_000))]
    if reader == 'cifar':
        return [bytes(2 * 3073)]
    if reader == 'state':
        return [json.dumps(STATE).encode(), json.dumps({**STATE, 'part': None}).encode()]
    if reader == 'npz':
        return [archive({})]
    if reader == 'npy':
        return [npy(np.zeros((3, 2, 2), np.uint8)), npy(np.zeros((3, 2, 2, 1), np.uint8))]
    if reader == 'member':
        return [npy(WEIGHTS['conv1/W:0']), npy(np.asfortranarray(WEIGHTS['conv1/W:0'][::-1]))]
    if reader == 'picture':
        from PIL import Image
        pictures = [Image.new(mode, (5, 4)) for mode in ('RGB', 'LA', 'P', 'I;16')]
        return [saved(picture, 'PNG') for picture in pictures] + [saved(pictures[0], form) for form in images.FORMATS]
    if reader == 'index':
        return [index(tensors())]
    if reader == 'twta':
        from conftest import random_packed
        network = random_packed((5, 5, 1), 0, [(3, 3, 1, 'SAME', 1), (6, 2, 2, 'VALID', 3), (4, 0, 1, 'VALID', 1)])
        file_format.write(FOLDER / 'seed.twta', network)
        return [(FOLDER / 'seed.twta').read_bytes()[:-32]]
    return [json.dumps(record).encode() for record in small_records()]


def small_records():
    """Yield records of results/, cut down to two epochs."""
    for path in sorted((ROOT / 'results').glob('*mnist-0*.json'))[:3]:
        record = json.loads(path.read_text())
        curve = {field: column[:2] for field, column in record['curve'].items()}
        yield {**record, 'epochs': 2, 'curve': curve, 'shares': {}}


def check(reader, data):
    """Raise what the reader may not raise."""
    try:
        READERS[reader](data)
    except TwtaError as error:
        assert '\n' not in str(error), error


def fuzz(reader, seconds):
    """Run Atheris on a reader; it ends the process."""
    import atheris

    from twta.training import checkpoints

    check(reader, seeds(reader)[0])  # so that late imports are done
    for module in (files, checkpoints, datasets, evidence, file_format, state, weights, gzip, json.decoder, zipfile,
                   ast, np.lib._format_impl):
        instrument(module, atheris.instrument_func)
    corpus = FOLDER / 'corpus'
    corpus.mkdir()
    for number, seed in enumerate(seeds(reader)):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], f'-max_total_time={seconds}', '-max_len=40000', '-rss_limit_mb=4096',
                   '-print_final_stats=1', f'-artifact_prefix={reader}-', str(corpus)],
                  lambda data: check(reader, data))
    atheris.Fuzz()


def instrument(module, instrument_function):
    """Make the functions and methods of a module report to Atheris the code that they reach."""
    for owner in (module, *(item for item in vars(module).values() if inspect.isclass(item))):
        if owner is module or owner.__module__ == module.__name__:
            for item in vars(owner).values():
                if inspect.isfunction(item) and item.__module__ == module.__name__:
                    instrument_function(item)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('readers', nargs='*', metavar='READER', help=f'{", ".join(READERS)} (default: all)')
    parser.add_argument('--minutes', type=float, default=60, help='time for all readers together (default: 60)')
    args = parser.parse_args()
    readers = args.readers or list(READERS)
    seconds = round(args.minutes * 60 / len(readers))
    if len(readers) == 1:
        fuzz(*readers, seconds)
    for reader in readers:  # one process each, because Atheris ends it
        finished = subprocess.run([sys.executable, __file__, reader, '--minutes', str(seconds / 60)],
                                  capture_output=True, text=True)
        statistics = dict(re.findall(r'^stat::(\w+): +(\d+)', finished.stderr, re.M))
        print(f'{reader}: {int(statistics.get("number_of_executed_units", 0)):,} inputs, largest process '
              f'{statistics.get("peak_rss_mb")} MB, exit {finished.returncode}', flush=True)
        if finished.returncode:
            sys.exit(finished.stdout[-3000:] + finished.stderr[-1000:])


if __name__ == '__main__':
    main()
