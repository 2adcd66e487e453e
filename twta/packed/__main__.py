"""python -m twta.packed FILE.twta IMAGES: print the class of each image, without TensorFlow."""
import sys

import numpy as np

from twta import UsageError, in_a_line
from twta.packed import file_format
from twta.packed.engines import logits, warm_engine
from twta.packed.images import have_bright_borders, read_images, read_picture
from twta.terminal import Parser, complain, errors_in_a_line, input_file, output_file, positive_integer, silence

DIGITS = 'mnist', 'digits'  # data sets of light digits on a dark ground
SHOWN = 20  # images in a picture, at most


def main(argv=None):
    parser = make_parser()
    with errors_in_a_line('twta.packed'):
        args = parser.parse_args(argv)
        check_flags(args)
        packed = file_format.read(args.file)
        is_array = args.images[0].suffix.lower() == '.npy'
        images = read_all(args.images, packed.image)
        if args.invert:
            images = 255 - images
        if packed.dataset in DIGITS and have_bright_borders(images):
            complain('WARNING: most images have a bright border, but this network reads light digits on a dark ground; '
                     + ('leave out --invert' if args.invert else 'try --invert'))
        values = logits(warm_engine(packed, args.engine, args.threads, len(images)), images)
        predicted = values.argmax(1)
        lines = [packed.classes[k] if args.names else str(k) for k in predicted]
        if not is_array:
            lines = [f'{in_a_line(str(path))}: {describe(k, packed.classes)}'
                     for path, k in zip(args.images, predicted, strict=True)]
        write(lines)
        if args.picture:
            from twta.results import save_picture  # here: the classes need no matplotlib

            shown = images[:SHOWN], values[:SHOWN]
            save_picture(args.picture, draw, args.images, *shown, packed.classes, tell=complain)


def make_parser():
    parser = Parser(prog='python -m twta.packed', allow_abbrev=False,
                    description='Print the class of each image, without TensorFlow.')
    add = parser.add_argument
    add('file', type=input_file, help='packed network (.twta), written by --mode export')
    add('images', type=input_file, nargs='+', metavar='IMAGES',
        help='one .npy file: uint8 array [n, height, width, channels] written by numpy.save, or [n, height, width] if '
             'images have one channel. Or pictures (PNG, JPEG, WEBP, GIF, BMP), cut to the proportions of the network '
             'and resized. Write -- before a name like -x.png')
    add('--invert', action='store_true', help='swap light and dark, for dark digits on a light ground')
    add('--names', action='store_true',
        help='with an .npy file: print names of classes instead of numbers (with pictures both are printed)')
    add('--picture', type=output_file, metavar='PNG',
        help=f'draw the first {SHOWN} images as the network gets them, each with its three most probable classes; '
         'replaces a file of that name')
    add('--engine', choices=('auto', 'numba', 'numpy'), default='auto',
        help='numba, numpy (slower, same classes) or auto: numba if installed (default: auto)')
    add('--threads', type=positive_integer, metavar='N',
        help='threads for --engine numba (default: one per core that the process may use)')
    add('--debug', action='store_true', help='show the traceback of an error')
    return parser


def check_flags(args):
    """Raise UsageError if --threads has no meaning, or if --picture is no .png or would replace a file that is read."""
    if args.engine == 'numpy' and args.threads is not None:
        raise UsageError(f'--threads {args.threads} has no meaning with --engine numpy, which has one; leave it out')
    if args.picture and args.picture.suffix.lower() != '.png':
        raise UsageError(f'--picture {args.picture}: it is a PNG; give it a name that ends in .png')
    if args.picture in [path.resolve() for path in (args.file, *args.images)]:
        raise UsageError(f'--picture {args.picture}: this file is read; choose another name')


def read_all(paths, shape):
    """Return the images of one .npy file, or of pictures, uint8 [n, *shape]."""
    arrays = [path for path in paths if path.suffix.lower() == '.npy']
    if arrays and len(paths) > 1:
        raise UsageError(f'{arrays[0]}: an .npy file is given alone, without other files')
    if arrays:
        return read_images(arrays[0], shape)
    return np.stack([read_picture(path, shape) for path in paths])


def describe(k, classes):
    """Return number and name of a class as words."""
    return str(k) if classes[k] == str(k) else f'{k} {classes[k]}'


def write(lines):
    """Write lines to stdout; if its reader, say `head`, has read enough, the rest is not written."""
    try:
        print('\n'.join(lines), flush=True)
    except BrokenPipeError:
        silence(sys.stdout)


def draw(paths, images, values, classes):
    """Return a figure of images, uint8 [n, height, width, channels], and their logits [n, classes]."""
    from matplotlib.figure import Figure  # here: only --picture draws

    columns = min(len(images), 5)
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.4 * columns, 3.4 * rows), layout='constrained')
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis('off')
        if i >= len(images):
            continue
        probabilities = np.exp(values[i] - values[i].max())
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities, kind='stable')[:3]
        axes.imshow(images[i].squeeze(), cmap='gray', vmin=0, vmax=255)
        name = paths[i].name if len(paths) > 1 else f'image {i}'
        axes.set_title('\n'.join([name[-24:], *(f'{describe(k, classes)}: {probabilities[k]:.1%}' for k in best)]),
                       fontsize=8)
    return figure


if __name__ == '__main__':
    main()
