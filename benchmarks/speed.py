"""What training_speed.py and inference_speed.py share: networks, images, flags and the file of rows."""
import json
from pathlib import Path

import numpy as np

from twta.files import replacing
from twta.results import environment, installed
from twta.terminal import output_file, positive_integer

SHORT = ('TWTA_4_4_MNIST', 'TWTA_3_3_CIFAR10_VGG13', 'TWTA_3_3_CIFAR10_Group_V2')


def image_of(script):
    """Return the shape of a script's images in the files of its data set, and the side of their crop, or 0."""
    return ((28, 28, 1), 0) if script.parent.name == 'MNIST' else ((32, 32, 3), 24)


def cropped(image, crop):
    """Return the shape of an image as the network sees it: after the crop, if there is one."""
    return (crop, crop, image[2]) if crop else image


def random_images(shape, count):
    """Return uint8 images [count, *shape], the same at each call."""
    return np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)


def peak_memory():
    """Return the peak memory of this process in bytes, as Linux counts it."""
    status = Path('/proc/self/status').read_text()  # getrusage would count the process that started this one
    return 1024 * int(status.split('VmHWM:')[1].split()[0])


def add_flags(parser, scripts, repetitions, profiled):
    """Add the flags that both benchmarks have; `profiled` says what --profile times."""
    parser.add_argument('networks', nargs='*', metavar='NETWORK',
                        help=f'{", ".join(scripts)} (default: {", ".join(SHORT)})')
    parser.add_argument('--all', action='store_true', help='time every network')
    parser.add_argument('--repetitions', type=positive_integer, default=repetitions, metavar='N',
                        help='timings per figure; the median is reported (default: %(default)s)')
    parser.add_argument('--json', type=output_file, metavar='FILE',
                        help='also write the rows to this file (default: only print them)')
    parser.add_argument('--profile', choices=scripts, metavar='NETWORK', help=profiled)


def choose_networks(parser, args, scripts):
    """Return the names of the networks to time; end the process with a message if the flags do not allow it."""
    unknown = set(args.networks) - scripts.keys()
    if unknown:
        parser.error(f'{min(unknown)}: unknown network; valid are {", ".join(scripts)}')
    if args.all and args.networks:
        parser.error(f'--all with {args.networks[0]}: leave out one of them')
    if args.profile and (args.networks or args.all or args.json):
        parser.error('--profile: goes with --repetitions only; leave out the other flags')
    return tuple(scripts) if args.all else args.networks or SHORT


def write_rows(file, packages, repetitions, rows):
    """Write the rows as JSON, with the machine, the versions and those of the other packages that are installed."""
    record = {'environment': environment(), 'others': dict(installed(packages)), 'repetitions': repetitions,
              'rows': rows}
    with replacing(file) as part:
        part.write_text(json.dumps(record, indent=1) + '\n')
