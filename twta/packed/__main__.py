"""python -m twta.packed FILE.twta IMAGES.npy: print one class per image, without TensorFlow."""
import os
import sys

import numpy as np

from twta import TwtaError, files
from twta.packed import file_format
from twta.packed.engines import logits, warm_engine
from twta.terminal import Parser, errors_in_a_line, input_file, positive_integer


def main(argv=None):
    parser = Parser(prog='python -m twta.packed', description=__doc__.partition('\n')[0], allow_abbrev=False)
    parser.add_argument('file', type=input_file, help='packed network (.twta), written by --mode export')
    parser.add_argument('images', type=input_file, help='uint8 array [n, height, width, channels] written by '
                        'numpy.save; [n, height, width] if the images have one channel')
    parser.add_argument('--engine', choices=('auto', 'numba', 'numpy'), default='auto',
                        help='numba, numpy (slower, same classes) or auto: numba if installed (default: auto)')
    parser.add_argument('--threads', type=positive_integer, metavar='N',
                        help='threads for --engine numba (default: one per core that the process may use)')
    parser.add_argument('--names', action='store_true', help='print names of classes instead of numbers')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    with errors_in_a_line('twta.packed'):
        args = parser.parse_args(argv)
        packed = file_format.read(args.file)
        images = read_images(args.images, packed.image)
        predicted = logits(warm_engine(packed, args.engine, args.threads), images).argmax(1)
        try:
            print('\n'.join(packed.classes[k] if args.names else str(k) for k in predicted), flush=True)
        except BrokenPipeError:  # head, say, has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_images(path, shape):
    """Return the images of an .npy file, uint8 [n, *shape]; shape is [height, width, channels].

    Raises TwtaError if the file cannot be read or holds other images.
    """
    try:
        images = files.read_npy(path)
    except files.UNREADABLE as error:
        reason = getattr(error, 'strerror', None) or 'damaged, or no array of numbers'
        raise TwtaError(f'{path}: {reason}; give images written by numpy.save') from None
    wanted = f'uint8 [n, {", ".join(map(str, shape))}]'
    if images.dtype != np.uint8:
        raise TwtaError(f'{path}: {images.dtype}, but the network takes {wanted}')
    if images.ndim == 3 and shape[2] == 1:
        images = images[..., np.newaxis]
    if not len(images):
        raise TwtaError(f'{path}: {list(images.shape)} has no images; the network takes {wanted}')
    if images.shape[1:] != tuple(shape):
        raise TwtaError(f'{path}: {list(images.shape)}, but the network takes {wanted}')
    return images


if __name__ == '__main__':
    main()
