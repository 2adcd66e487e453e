"""The data sets: downloaded if absent, checked, and read into numpy arrays without pickle.

A loader takes the data directory and the number of training images to hold out for validation, from the end; it returns
a Dataset. MNIST is in the IDX format (yann.lecun.com/exdb/mnist): a magic number and the dimensions as big-endian
32-bit integers, then one byte per value. CIFAR-10 is in its binary version (www.cs.toronto.edu/~kriz/cifar.html): per
image one byte of label, then the red, green and blue plane of 32*32 bytes; 10,000 images per file.
"""
import gzip
import hashlib
import struct
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from twta import TwtaError, UsageError
from twta.data import shapes
from twta.data.download import download, one_at_a_time
from twta.files import digest, replacing

MNIST_MIRRORS = ('https://ossci-datasets.s3.amazonaws.com/mnist/', 'https://storage.googleapis.com/cvdf-datasets/mnist/')
# by name: size in bytes and SHA-256 of the published .gz file, SHA-256 of its contents, dimensions
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
DIGITS = tuple('0123456789')
REMEDY = 'move it elsewhere, and it is downloaded again'

CIFAR10_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
CIFAR10_ARCHIVE = 170052171, 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'  # bytes, SHA-256
CIFAR10_FOLDER = 'cifar-10-batches-bin'  # name of the folder in the archive and in data_dir/cifar10
CIFAR10_FILES = {  # published files and their SHA-256
    'data_batch_1.bin': 'cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5',
    'data_batch_2.bin': 'a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed',
    'data_batch_3.bin': 'bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67',
    'data_batch_4.bin': '014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48',
    'data_batch_5.bin': '755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add',
    'test_batch.bin': '8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b',
}
CIFAR10_IMAGES = 10000  # per file
CIFAR10_RECORD = 1 + 3 * 32 * 32  # bytes per image, label included
CIFAR10_CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
CIFAR10_CROP = 24


class Split(NamedTuple):
    images: np.ndarray  # uint8 [count, height, width, channels]
    labels: np.ndarray  # int32 [count]


class Dataset(NamedTuple):
    name: str
    origin: str  # the published files, other files, an embedded sample
    folder: Path | None  # folder of the files
    published: bool  # True if images and labels are bit for bit the published ones
    train: Split
    validation: Split  # may be empty
    test: Split
    classes: tuple  # class names, by label
    crop: int  # 0: pixels / 256; 24: augmented crops of 24*24, standardised; see twta.graph.preprocessing
    sha256: str  # over all images and labels, in hexadecimal: equal if two runs had the same data and split

    @property
    def title(self):
        """Return a name for pictures: it includes the origin, because pictures are shown without their record."""
        return self.name if self.published else f'{self.name} ({self.origin})'

    def __str__(self):
        origin = f'{self.origin} (in {self.folder})' if self.folder else self.origin
        counts = f'{len(self.train.labels):,} training, {len(self.validation.labels):,} validation'
        return f'{self.name}, {origin}: {counts} and {len(self.test.labels):,} test images'


def load(name, data_dir, validation=None):
    """Return the data set `name` (see DATASETS), with the last `validation` training images held out.

    Without `validation`, the loader's default holds. Raises UsageError if no training image would be left.
    """
    return DATASETS[name](Path(data_dir), **({} if validation is None else {'validation': validation}))


def assemble(name, origin, folder, published, train, validation, test, classes, crop):
    """Return the Dataset; the last `validation` images of `train` are held out.

    origin         None: files of the data set, published or not
    train, test    pairs of images and labels

    Raises UsageError if no training image would be left.
    """
    images, labels = train
    n = len(labels) - validation
    if n < 1:
        raise UsageError(f'--validation {validation}: {name} has {len(labels):,} training images; hold out 0 to '
                         f'{len(labels) - 1} of them')
    splits = [Split(images, labels.astype(np.int32))
              for images, labels in ((images[:n], labels[:n]), (images[n:], labels[n:]), test)]
    content = hashlib.sha256()
    for split in splits:
        for array in split:
            content.update(array)
    origin = origin or ('the published files' if published else 'NOT the published files')
    return Dataset(name, origin, folder, published, *splits, classes, crop, content.hexdigest())


def load_mnist(data_dir, validation=10000):
    """Return MNIST from data_dir/mnist, as .gz or unpacked: 60,000 training and 10,000 test images, 28*28*1.

    Raises TwtaError if a file is damaged, of another format, or cannot be downloaded.
    """
    arrays, published = [], True
    for name, (gz_size, gz_sha256, sha256, shape) in MNIST_FILES.items():
        path = find_mnist_file(data_dir / 'mnist', name)
        if not path.exists():
            download([mirror + path.name for mirror in MNIST_MIRRORS], path, gz_size, gz_sha256,
                     f'put the file in {path.parent}; --dataset digits needs no internet')
        content = read_file(path, limit=16 + int(np.prod(shape)))
        arrays.append(parse_idx(content, shape, path))
        published &= hashlib.sha256(content).hexdigest() == sha256
    images, labels, test_images, test_labels = arrays
    return assemble('MNIST', None, data_dir / 'mnist', published, (images[..., np.newaxis], labels), validation,
                    (test_images[..., np.newaxis], test_labels), DIGITS, crop=0)


def find_mnist_file(folder, name):
    """Return the path of a file of MNIST: NAME or NAME.gz, also with a dot before idx; NAME.gz if none is there."""
    names = [name, f'{name}.gz', name.replace('-idx', '.idx'), f'{name.replace("-idx", ".idx")}.gz']
    return next((folder / name for name in names if (folder / name).exists()), folder / f'{name}.gz')


def load_cifar10(data_dir, validation=0):
    """Return CIFAR-10 from data_dir/cifar10/cifar-10-batches-bin: 50,000 training and 10,000 test images, 32*32*3.

    Absent files are unpacked from data_dir/cifar10/cifar-10-binary.tar.gz, which is downloaded if absent. Raises
    TwtaError if a file is damaged, of another format, or cannot be downloaded.
    """
    folder = data_dir / 'cifar10' / CIFAR10_FOLDER
    absent = [name for name in CIFAR10_FILES if not (folder / name).exists()]
    if absent:
        unpack_cifar10(folder, absent)
    images, labels, published = [], [], True
    for name, sha256 in CIFAR10_FILES.items():
        content = read_file(folder / name, limit=CIFAR10_IMAGES * CIFAR10_RECORD)
        batch_images, batch_labels = parse_cifar(content, CIFAR10_IMAGES, folder / name)
        images.append(batch_images)
        labels.append(batch_labels)
        published &= hashlib.sha256(content).hexdigest() == sha256
    return assemble('CIFAR-10', None, folder, published,
                    (np.concatenate(images[:-1]), np.concatenate(labels[:-1])), validation, (images[-1], labels[-1]),
                    CIFAR10_CLASSES, CIFAR10_CROP)


def load_digits(data_dir, validation=297):
    """Return scikit-learn's 1,797 handwritten digits, 8*8 scaled to 28*28: 1,497 for training, 300 for test.

    The order is a fixed permutation. data_dir and the network are not used.
    """
    from scipy.ndimage import zoom  # here: scikit-learn takes a second to import
    from sklearn.datasets import load_digits as load_sklearn_digits

    digits = load_sklearn_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))  # a legacy generator: its stream never changes
    images = zoom(digits.images[order] * (255 / 16), (1, 3.5, 3.5), order=1).round().astype(np.uint8)[..., np.newaxis]
    labels = digits.target[order]
    return assemble('digits', "scikit-learn's sample of handwritten digits, not MNIST", None, False,
                    (images[:1497], labels[:1497]), validation, (images[1497:], labels[1497:]), DIGITS, crop=0)


def load_shapes(data_dir, validation=500):
    """Return 3,000 generated images of shapes and textures for training and 1,000 for test, 32*32*3, of a fixed seed.

    data_dir and the network are not used.
    """
    images, labels = shapes.draw(4000, seed=0)
    return assemble('shapes', 'a generated sample, not CIFAR-10', None, False, (images[:3000], labels[:3000]),
                    validation, (images[3000:], labels[3000:]), shapes.CLASSES, CIFAR10_CROP)


DATASETS = {'mnist': load_mnist, 'digits': load_digits, 'cifar10': load_cifar10, 'shapes': load_shapes}


def read_file(path, limit):
    """Return the contents of a file, unpacked if it is a .gz file; at most limit + 1 bytes, against .gz bombs.

    Its first bytes decide, not its name: some browsers unpack what they download, and keep the name.
    """
    try:
        with open(path, 'rb') as file:
            is_packed = file.read(2) == b'\x1f\x8b'
        with gzip.open(path) if is_packed else open(path, 'rb') as file:
            return file.read(limit + 1)
    except PermissionError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise TwtaError(f'{path}: cannot be read ({getattr(error, "strerror", None) or error}); {REMEDY}') from None


def parse_idx(content, shape, path):
    """Return an IDX file of unsigned bytes as an array of `shape`; labels (one dimension) must be 0 to 9."""
    header = struct.pack(f'>I{len(shape)}I', 0x800 + len(shape), *shape)
    found = content[:len(header)]
    if found != header:
        raise TwtaError(f'{path}: starts with {found.hex(" ", 4) or "nothing"} instead of {header.hex(" ", 4)}, the '
                        f'IDX header of {shape} bytes; {REMEDY}')
    check_length(content, len(header) + int(np.prod(shape)), path)
    array = np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
    if len(shape) == 1:
        check_labels(array, path)
    return array


def parse_cifar(content, n_images, path):
    """Return a file of CIFAR-10's binary version as images [n_images, 32, 32, 3] and labels [n_images], 0 to 9."""
    check_length(content, n_images * CIFAR10_RECORD, path)
    records = np.frombuffer(content, np.uint8).reshape(n_images, CIFAR10_RECORD)
    check_labels(records[:, 0], path)
    return np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), records[:, 0]


def check_length(content, expected, path):
    if len(content) != expected:
        raise TwtaError(f'{path}: {"shorter" if len(content) < expected else "longer"} than the expected '
                        f'{expected:,} bytes; {REMEDY}')


def check_labels(labels, path):
    if labels.max() > 9:
        raise TwtaError(f'{path}: image {labels.argmax()} has label {labels.max()}, labels are 0 to 9; {REMEDY}')


def unpack_cifar10(folder, names):
    """Unpack the files `names` into the folder, from the archive beside it; download the archive if it is absent.

    For safety, only an archive with the published SHA-256 is opened, only regular files of these names are taken, and
    paths from the archive are never written to. Raises TwtaError if the archive has another SHA-256.
    """
    archive = folder.parent / CIFAR10_URL.rpartition('/')[2]
    size, sha256 = CIFAR10_ARCHIVE
    if not archive.exists():
        otherwise = f'put {", ".join(names)} of its binary version in {folder}'
        for other in ('cifar-10-batches-py', 'cifar-10-python.tar.gz'):
            if (folder.parent / other).exists():
                otherwise = f'convert {folder.parent / other}, its Python version, as data/README.md shows'
        download([CIFAR10_URL], archive, size, sha256, f'{otherwise}; --dataset shapes needs no internet')
    actual = digest(archive)
    if actual != sha256:
        raise TwtaError(f'{archive}: its SHA-256 is {actual}, not {sha256}; {REMEDY}, or put the files of the binary '
                        f'version of CIFAR-10 in {folder}')
    with one_at_a_time(folder), tarfile.open(archive, 'r|gz') as members:
        for member in members:
            head, _, name = member.name.rpartition('/')
            if head == CIFAR10_FOLDER and name in names and member.isfile() and not (folder / name).exists():
                with replacing(folder / name) as part:
                    part.write_bytes(members.extractfile(member).read())
