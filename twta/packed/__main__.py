"""Packed networks: python -m twta.packed FILE.twta IMAGES.npy prints a class an image. No TensorFlow."""
import os
import sys

import numpy as np

from twta import TwtaError, files
from twta.packed import file_format
from twta.packed.engines import logits, warm_engine
from twta.terminal import Parser, errors_in_a_line, input_file, positive_integer


def main(argv=None):
    parser = Parser(prog='python -m twta.packed', description=__doc__.partition('\n')[0], allow_abbrev=False)
    parser.add_argument('file', type=input_file, help='a packed network, from --mode export')
    parser.add_argument('images', type=input_file, help='uint8 [n, height, width, channels] as numpy.save writes '
                        'them; of images with one channel, [n, height, width] does as well')
    parser.add_argument('--engine', choices=('auto', 'numba', 'numpy'), default='auto',
                        help='auto, the default: numba where it is installed, else numpy, slower; the same classes')
    parser.add_argument('--threads', type=positive_integer, metavar='N',
                        help='default: one per core that the process may use')
    parser.add_argument('--names', action='store_true', help="print the classes' names, not their numbers")
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error, not only its line')
    with errors_in_a_line('twta.packed'):
        args = parser.parse_args(argv)
        packed = file_format.read(args.file)
        images = read_images(args.images, packed.image)
        predicted = logits(warm_engine(packed, args.engine, args.threads), images).argmax(1)
        try:
            print('\n'.join(packed.classes[k] if args.names else str(k) for k in predicted), flush=True)
        except BrokenPipeError:  # a reader such as head has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_images(path, shape):
    try:
        images = files.read_npy(path)
    except files.UNREADABLE as error:
        reason = getattr(error, 'strerror', None) or 'not numbers that numpy.save wrote, or damaged'
        raise TwtaError(f'{path}: {reason}; give images as numpy.save writes them') from None
    wanted = f'uint8 [n, {", ".join(map(str, shape))}]'
    if images.dtype != np.uint8:
        raise TwtaError(f'{path}: {images.dtype}, but the network takes {wanted}')
    if images.ndim == 3 and shape[2] == 1:
        images = images[..., np.newaxis]
    if not len(images):
        raise TwtaError(f'{path}: {list(images.shape)} has no images in it; the network takes {wanted}')
    if images.shape[1:] != tuple(shape):
        raise TwtaError(f'{path}: {list(images.shape)}, but the network takes {wanted}')
    return images


if __name__ == '__main__':
    main()
