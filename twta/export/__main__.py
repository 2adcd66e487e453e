"""python -m twta.export NET.twta --format FORMAT: write a packed network for other programs, without TensorFlow."""
from pathlib import Path

import numpy as np

from twta import UsageError
from twta.export import formats
from twta.options import SUFFIXES
from twta.packed import file_format
from twta.packed.images import read_images
from twta.terminal import Parser, errors_in_a_line, input_file, output_file, say


def main(argv=None):
    parser = make_parser()
    with errors_in_a_line('twta.export'):
        args = parser.parse_args(argv)
        packed = file_format.read(args.file)
        formats.check_format(args.format, packed, args.core, args.dialect)
        out = (args.out or Path(args.file.stem + SUFFIXES[args.format])).resolve()
        check_out(out, args)
        images, which = choose_images(args, packed)
        size = formats.write(args.format, out, packed, images, args.core, args.dialect)
        say(formats.describe_images(args.format, out, len(images), which))
        say(f'{out}: {size:,} bytes')


def check_out(out, args):
    """Raise UsageError if the file or its test vectors cannot be written there, or would replace what is read."""
    if not out.name.endswith(SUFFIXES[args.format]):
        raise UsageError(f'--out {out}: with --format {args.format} its name ends in {SUFFIXES[args.format]}')
    read = {args.file.resolve(), args.images and args.images.resolve()}
    for path in (out, formats.vectors_file(args.format, out)):
        if path in read - {None}:
            raise UsageError(f'--out {out}: {path.name} is read; choose another name')
        if path and path.exists() and not path.is_file():
            raise UsageError(f'--out {out}: {path.name} is there and is not a file; choose another name')


def choose_images(args, packed):
    """Return the images that the file needs, uint8 [n, *packed.image], and where they are from."""
    most = formats.count_images(args.format)
    if args.images:
        return read_images(args.images, packed.image)[:most], str(args.images)
    if args.format == 'html':  # a page without test images
        return np.zeros((0, *packed.image), np.uint8), 'none given'
    return np.random.default_rng(0).integers(0, 256, (most, *packed.image)).astype(np.uint8), 'noise'


def make_parser():
    parser = Parser(prog='python -m twta.export', allow_abbrev=False,
                    description='Write a packed network in the format of another program, without TensorFlow.')
    add = parser.add_argument
    add('file', type=input_file, help='packed network (.twta), written by --mode export')
    add('--format', choices=[name for name in SUFFIXES if name != 'twta'], required=True,
        help='npz: plain arrays; c: a C header; onnx: ONNX; qonnx: QONNX, for FINN and Brevitas; nir: NIR, for spiking '
             'networks; html: a web page that runs the network')
    add('--out', type=output_file, metavar='FILE',
        help='file to write (default: the name of the packed file with .npz, .h, .onnx, .qonnx.onnx, .nir or .html, '
             'in the current folder)')
    add('--images', type=input_file, metavar='NPY',
        help=f'uint8 images [n, height, width, channels], written by numpy.save. The first {formats.VECTORS} become '
             f'test vectors (default: noise); the first {formats.count_images("html")} are in a web page (default: '
             'none)')
    add('--core', action='store_true',
        help="begin with the encoder's activations. qonnx: also without the classifier and without groups; nir: the "
             'classifier stays')
    add('--dialect', choices=sorted({dialect for dialects in formats.DIALECTS.values() for dialect in dialects}),
        help='how activations are written. qonnx: thresholds (MultiThreshold) or quant (Mul, Add, Quant; for '
             'readers without MultiThreshold). '
             'nir: thresholds, or biases for readers with one threshold per layer (default: thresholds)')
    add('--debug', action='store_true', help='show the traceback of an error')
    return parser


if __name__ == '__main__':
    main()
