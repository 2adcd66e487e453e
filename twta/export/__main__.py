"""python -m twta.export NET.twta --format FORMAT: write a packed network for other programs, without TensorFlow.

python -m twta.export NET.onnx --format twta: the other way round, from QONNX.
"""
from functools import partial
from pathlib import Path

import numpy as np

from twta import UsageError
from twta.export import formats
from twta.options import SUFFIXES
from twta.packed import file_format
from twta.packed.images import read_images
from twta.terminal import Parser, errors_in_a_line, input_file, number, output_file, say


def main(argv=None):
    parser = make_parser()
    with errors_in_a_line('twta.export'):
        args = parser.parse_args(argv)
        out = (args.output or Path(name_file(args))).resolve()
        check_out(out, args)
        if args.divisor and args.format != 'twta':
            raise UsageError('--divisor is for --format twta; leave it out')
        if args.format == 'twta':
            return import_network(args, out)
        packed = file_format.read(args.file)
        formats.check_format(args.format, packed, args.core, args.dialect)
        images, which = choose_images(args, packed)
        size = formats.write(args.format, out, packed, images, args.core, args.dialect)
        say(formats.describe_images(args.format, out, len(images), which))
        say(f'{out}: {size:,} bytes')


def name_file(args):
    """Return the default of --output: the name of the packed file, what is not usual about it, the ending."""
    usual = formats.DIALECTS.get(args.format, (None,))[0]
    words = [stem(args.file), *(['core'] if args.core else []),
             *([args.dialect] if args.dialect not in (None, usual) else [])]
    return '.'.join(words) + SUFFIXES[args.format]


def stem(path):
    """Return the name of a file without its ending."""
    return path.name.removesuffix('.onnx').removesuffix('.qonnx') if path.suffix == '.onnx' else path.stem


def import_network(args, out):
    """Write the packed network of a QONNX file."""
    formats.check_format('twta', None, args.core, args.dialect)
    formats.check_package('twta', 'onnx')  # it reads the QONNX file
    if args.file.suffix == '.twta':
        raise UsageError(f'{args.file}: a packed network already; give a QONNX file (.onnx)')
    from twta.export import qonnx_import  # here: onnx is optional

    packed, original = qonnx_import.import_file(args.file, stem(args.file), args.divisor or 255)
    images, which = choose_images(args, packed)
    for compared in [images] + [noise(packed.image, 20)] * bool(args.images):
        qonnx_import.compare(packed, original, compared)
    file_format.write(out, packed)
    count = f'{len(images)} image{"s" * (len(images) > 1)} ({which})' + ' and 20 of noise' * bool(args.images)
    say(f'the same scores as {args.file.name} on {count}')
    say(f'{out}: {out.stat().st_size:,} bytes')


def check_out(out, args):
    """Raise UsageError if the file or its test vectors cannot be written there, or would replace what is read."""
    if not out.name.endswith(SUFFIXES[args.format]):
        raise UsageError(f'--output {out}: with --format {args.format} its name ends in {SUFFIXES[args.format]}')
    read = {args.file.resolve(), args.images and args.images.resolve()}
    for path in (out, formats.vectors_file(args.format, out)):
        if path in read - {None}:
            raise UsageError(f'--output {out}: {path.name} is read; choose another name')
        if path and path.exists() and not path.is_file():
            raise UsageError(f'--output {out}: {path.name} is there and is not a file; choose another name')


def choose_images(args, packed):
    """Return the images that the file needs, uint8 [n, *packed.image], and where they are from."""
    most = formats.count_images(args.format)
    if args.images:
        return read_images(args.images, packed.image)[:most], str(args.images)
    if args.format == 'html':  # a page without test images
        return np.zeros((0, *packed.image), np.uint8), 'none given'
    return noise(packed.image, most), 'noise'


def noise(shape, count):
    """Return so many images of noise, uint8 [count, *shape]."""
    return np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)


def make_parser():
    parser = Parser(prog='python -m twta.export', allow_abbrev=False,
                    description='Write a packed network in the format of another program, without TensorFlow.')
    add = parser.add_argument
    add('file', type=input_file,
        help='packed network (.twta), written by --mode export; with --format twta: a QONNX file (.onnx)')
    add('--format', choices=list(SUFFIXES), required=True,
        help='npz: plain arrays; c: a C header; onnx: ONNX; qonnx: QONNX, for FINN and the package qonnx; nir: NIR, '
             'for spiking networks; html: a web page that runs the network; twta: import a ternary network of Brevitas '
             'from QONNX')
    add('--output', type=output_file, metavar='FILE',
        help='file to write (default: the name of the packed file, with .core and .DIALECT if you ask for these, and '
             '.npz, .h, .onnx, .qonnx.onnx, .nir, .html or .twta, in the current folder)')
    add('--images', type=input_file, metavar='NPY',
        help=f'uint8 images [n, height, width, channels], written by numpy.save. The first {formats.VECTORS} become '
             f'test vectors (default: noise); the first {formats.count_images("html")} are in a web page (default: '
             'none)')
    add('--core', action='store_true',
        help="begin with the encoder's activations. qonnx: also without the classifier and without groups; nir: the "
             'classifier stays')
    add('--dialect', choices=sorted({dialect for dialects in formats.DIALECTS.values() for dialect in dialects}),
        help='how weights or activations are written. onnx: weights as int8 or int2 (opset 25; 2 bits per weight). '
             'qonnx: thresholds (MultiThreshold) or quant (Mul, Add, Quant; for readers without MultiThreshold). '
             'nir: thresholds, or biases for readers with one threshold per layer (default: int8, thresholds)')
    add('--divisor', type=partial(number, least=1e-3, most=1e6), metavar='D',
        help="twta: the file's network takes pixels / D (default: 255, torchvision's ToTensor)")
    add('--debug', action='store_true', help='show the traceback of an error')
    return parser


if __name__ == '__main__':
    main()
