"""The --help of every command: a text and the default of each flag, whole sentences, lines that fit."""
import argparse
import re
import runpy

import pytest
from conftest import ROOT

COMMANDS = [path for pattern in ('MNIST/*.py', 'CIFAR10/*.py', 'twta/*/*.py', 'benchmarks/*.py', 'tests/*.py')
            for path in sorted(ROOT.glob(pattern)) if re.search('^if __name__', path.read_text(), re.M)]
WIDTH = 120


@pytest.fixture(params=COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def parser(request, monkeypatch):
    """The argument parser of a command, which is stopped there."""
    found = []

    def stop(parser, *arguments):
        found.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', stop)
    monkeypatch.setenv('COLUMNS', str(WIDTH))
    monkeypatch.syspath_prepend(str(request.param.parent))
    with pytest.raises(SystemExit):
        runpy.run_path(str(request.param), run_name='__main__')
    return found[0]


def is_whole(text):
    """Return whether a text does not end in the middle: no open bracket, comma or preposition at its end."""
    end = re.search(r'([,;:(-]|\b(a|an|and|are|as|at|by|for|from|is|of|or|than|that|the))$', text)
    return not end and text.count('(') == text.count(')')


def test_every_flag_says_what_it_does_and_its_default(parser):
    for action in parser._actions:
        if action.help is argparse.SUPPRESS:  # for child processes
            continue
        name = '/'.join(action.option_strings) or action.dest
        assert action.help and is_whole(action.help), f'{name}: {action.help}'
        if action.default not in (None, False, argparse.SUPPRESS, []):
            assert 'default' in action.help.lower(), f'{name}: {action.help}'


def test_the_description_has_whole_sentences(parser):
    for paragraph in parser.description.strip().split('\n\n'):
        if not re.match(' |Architecture:', paragraph):  # commands and lists
            assert paragraph.rstrip().endswith(('.', ':')), paragraph


def test_lines_fit(parser):
    for line in parser.format_help().splitlines():
        is_list = re.fullmatch(r' +\[?--\w+ {\S+}]?', line)  # argparse does not break a list of values
        assert len(line) <= WIDTH or is_list, line
