"""The data sets: found on disk, downloaded when absent, checked, and read into numpy arrays without pickle.

A loader takes the data directory and returns a Dataset. MNIST comes in the IDX format (yann.lecun.com/exdb/mnist: a
magic number and the dimensions as big-endian 32-bit integers, then one byte a value).
"""
import gzip
import hashlib
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from twta import TwtaError
from twta.download import download

MNIST_MIRRORS = ('https://ossci-datasets.s3.amazonaws.com/mnist/', 'https://storage.googleapis.com/cvdf-datasets/mnist/')
# name: bytes and SHA-256 of the published .gz file, SHA-256 of its contents, dimensions
MNIST_FILES = {
    'train-images-idx3-ubyte': (
        9912422, '440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609',
        'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db', (60000, 28, 28)),
    'train-labels-idx1-ubyte': (
        28881, '3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c',
        '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5', (60000,)),
    't10k-images-idx3-ubyte': (
        1648877, '8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6',
        '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7', (10000, 28, 28)),
    't10k-labels-idx1-ubyte': (
        4542, 'f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6',
        'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2', (10000,)),
}
MNIST_TRAINING = 50000  # of the published training set; the last 10,000 are for validation
DIGITS = tuple('0123456789')


class Split(NamedTuple):
    images: np.ndarray  # uint8 [count, height, width, channels]
    labels: np.ndarray  # int32 [count]


class Dataset(NamedTuple):
    name: str
    origin: str  # for the log: the published files, other files, an embedded sample
    published: bool  # whether these are, bit for bit, the published images and labels
    train: Split
    validation: Split
    test: Split
    classes: tuple  # names, by label

    def sha256(self):
        """A digest of every image and label, in hexadecimal: equal where two runs saw the same data."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for array in split:
                digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def __str__(self):
        counts = f'{len(self.train.labels):,} training, {len(self.validation.labels):,} validation'
        return f'{self.name}, {self.origin}: {counts} and {len(self.test.labels):,} test images'


def load(name, data_dir):
    """The data set of that name; see DATASETS."""
    return DATASETS[name](Path(data_dir))


def load_mnist(data_dir):
    """MNIST in data_dir/mnist, as .gz or unpacked: 50,000 training, 10,000 validation and 10,000 test images.

    Raises TwtaError where a file is not what its name says, or cannot be had.
    """
    arrays, published = [], True
    for name, (gz_size, gz_sha256, sha256, shape) in MNIST_FILES.items():
        path = data_dir / 'mnist' / name
        if not path.exists():
            path = path.with_name(f'{name}.gz')
        if not path.exists():
            download([mirror + path.name for mirror in MNIST_MIRRORS], path, gz_size, gz_sha256)
        content = read_file(path, limit=16 + int(np.prod(shape)))
        arrays.append(parse_idx(content, shape, path))
        published &= hashlib.sha256(content).hexdigest() == sha256
    images, labels, test_images, test_labels = arrays
    origin = 'the published files' if published else 'NOT the published files'
    n = MNIST_TRAINING
    return Dataset('MNIST', f'{origin} (in {data_dir / "mnist"})', published, split(images[:n], labels[:n]),
                   split(images[n:], labels[n:]), split(test_images, test_labels), DIGITS)


def load_digits(data_dir):
    """The 1,797 handwritten digits that scikit-learn ships, 8*8 scaled to 28*28: 1,200 training, 297 and 300 images.

    The split is a fixed permutation. Nothing is read from data_dir or the network.
    """
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits as load_sklearn_digits

    digits = load_sklearn_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))  # a legacy generator: its stream never changes
    images = zoom(digits.images[order] * (255 / 16), (1, 3.5, 3.5), order=1).round().astype(np.uint8)
    labels = digits.target[order]
    train, validation, test = (split(images[part], labels[part])
                               for part in (slice(0, 1200), slice(1200, 1497), slice(1497, None)))
    return Dataset('digits', "scikit-learn's sample of handwritten digits, not MNIST", False, train, validation, test,
                   DIGITS)


DATASETS = {'mnist': load_mnist, 'digits': load_digits}


def split(images, labels):
    return Split(images[..., np.newaxis], labels.astype(np.int32))


def read_file(path, limit):
    """The contents of a file, unpacked if its name ends in .gz: at most limit + 1 bytes, whatever it unpacks to."""
    try:
        with gzip.open(path) if path.suffix == '.gz' else open(path, 'rb') as file:
            return file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise TwtaError(f'{path}: cannot be read ({error}); remove it to have it downloaded again') from None


def parse_idx(content, shape, path):
    """An IDX file of unsigned bytes as an array of the shape; labels (one dimension) must be 0 to 9."""
    header = struct.pack(f'>I{len(shape)}I', 0x800 + len(shape), *shape)
    found = content[:len(header)]
    if found != header:
        raise TwtaError(f'{path}: starts with {found.hex(" ", 4)}, not with {header.hex(" ", 4)}, the IDX header of '
                        f'{shape} bytes; remove it to have it downloaded again')
    if len(content) != len(header) + np.prod(shape):
        raise TwtaError(f'{path}: {"shorter" if len(content) < len(header) + np.prod(shape) else "longer"} than the '
                        f'{len(header) + np.prod(shape):,} bytes of {shape}; remove it to have it downloaded again')
    array = np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
    if len(shape) == 1 and array.max() > 9:
        raise TwtaError(f'{path}: image {array.argmax()} has label {array.max()}, labels are 0 to 9; '
                        'remove the file to have it downloaded again')
    return array
