"""Tables, figures in the scripts' docstrings and pictures, made from the records of runs and benchmarks.

    python -m twta.report                                  # write them into the pages, MNIST/*.py, CIFAR10/*.py and
                                                           # results/pictures
    python -m twta.report --add runs/TWTA_4_4_MNIST-mnist  # first take a finished run into results/
    python -m twta.report --add RUN_DIR --packed TWTA_4_4_MNIST.twta  # and its network into pretrained/
    python -m twta.report --reproduce                      # only evaluate the networks in pretrained/ and compare

twta.report.evidence describes records. results/spikes holds what the Spiking scripts write, benchmarks/*.json what the
benchmarks write. A table stands in its page between two comments (twta.report.markdown).
"""
import argparse

from twta import UsageError
from twta.report import evidence
from twta.report.evidence import ROOT, load_records
from twta.report.markdown import fill, replace_text
from twta.report.tables import docstrings, pages
from twta.terminal import Parser, errors_in_a_line, path


def main(argv=None):
    parser = Parser(prog='python -m twta.report', description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_mutually_exclusive_group()
    either.add_argument('--add', type=path, metavar='RUN_DIR',
                        help='run directory of a finished run on MNIST or CIFAR-10, to take into results/')
    either.add_argument('--reproduce', action='store_true',
                        help='evaluate the networks in pretrained/ and compare with their records')
    parser.add_argument('--packed', type=path, metavar='FILE',
                        help='network of the run given to --add, written by --mode export')
    parser.add_argument('--data_dir', type=path, default=ROOT / 'data',
                        help='folder of the data sets (default: data/ beside README.md)')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    with errors_in_a_line('twta.report'):
        args = parser.parse_args(argv)
        if args.packed and not args.add:
            raise UsageError(f'--packed {args.packed} needs --add RUN_DIR, the run that the network comes from')
        if args.reproduce:
            evidence.reproduce(args.data_dir)
            return
        if args.add:
            evidence.add(args.add, args.packed, args.data_dir)
        from twta.report import pictures  # here: --reproduce and a refused --add do without matplotlib

        records = load_records()
        for page, tables in pages(records).items():
            replace_text(page, fill(page, tables))
        for file, text in docstrings(records).items():
            replace_text(file, text)
        pictures.write_all(records, args.data_dir)


if __name__ == '__main__':
    main()
