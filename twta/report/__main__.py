"""The evidence: tables, figures in the scripts' docstrings, pictures, from the records of finished runs and benchmarks.

    python -m twta.report                                  # writes them: README.md, benchmarks/README.md, MNIST/*.py,
                                                           # CIFAR10/*.py, pictures
    python -m twta.report --add runs/TWTA_4_4_MNIST-mnist  # before that, a finished run becomes a record in results/
    python -m twta.report --add RUN_DIR --packed TWTA_4_4_MNIST.twta  # and its network one in pretrained/
    python -m twta.report --reproduce                      # only evaluates the networks in pretrained/ and compares

Records: twta.report.evidence. results/spikes has what the Spiking scripts write, benchmarks/*.json what
the benchmarks do (twta.report.speeds). Each table stands between two comments (twta.report.markdown).
"""
import argparse

from twta import UsageError
from twta.report import evidence, speeds
from twta.report.evidence import ROOT, load_records
from twta.report.markdown import fill, replace_text
from twta.report.tables import BENCHMARKS, README, docstrings, tables
from twta.terminal import Parser, errors_in_a_line, path


def main(argv=None):
    parser = Parser(prog='python -m twta.report', description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_mutually_exclusive_group()
    either.add_argument('--add', type=path, metavar='RUN_DIR',
                        help='a finished run on MNIST or CIFAR-10, whose record.json to take in')
    either.add_argument('--reproduce', action='store_true', help='evaluate pretrained/ and compare with the records')
    parser.add_argument('--packed', type=path, metavar='FILE', help='with --add: its network, from --mode export')
    parser.add_argument('--data_dir', type=path, default=ROOT / 'data', help='default: data/ beside README.md')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    with errors_in_a_line('twta.report'):
        args = parser.parse_args(argv)
        if args.packed and not args.add:
            raise UsageError(f'--packed {args.packed}: with --add RUN_DIR only, the run that it comes from')
        if args.reproduce:
            evidence.reproduce(args.data_dir)
            return
        if args.add:
            evidence.add(args.add, args.packed, args.data_dir)
        from twta.report import pictures  # here: the first two do without matplotlib

        records = load_records()
        replace_text(README, fill(README, tables(records)))
        replace_text(BENCHMARKS, fill(BENCHMARKS, speeds.benchmark_tables()))
        for file, text in docstrings(records).items():
            replace_text(file, text)
        pictures.write_all(records, args.data_dir)


if __name__ == '__main__':
    main()
