"""Lint of the documents: nothing in them is stale, every link leads somewhere. `make lint` runs it.

pytest tests/documents.py; the name keeps it out of `make test`, which a comma in a page should not fail.
"""
import ast
import re

import pytest
from conftest import ROOT
from PIL import Image

from twta import options
from twta.export import formats
from twta.report import evidence, markdown, pictures, tables

RECORDS = evidence.load_records()
PAGES = [page for page in (*ROOT.glob('*.md'), *ROOT.glob('*/*.md')) if not page.parent.name.startswith('.')]


@pytest.mark.parametrize('page, found', tables.pages(RECORDS).items(), ids=lambda value: getattr(value, 'name', ''))
def test_pages_have_the_tables_of_the_records(page, found):
    assert markdown.fill(page, found) == page.read_text(), f'{page}: run make report'


def test_docstrings_have_the_figures_of_the_records():
    for file, text in tables.docstrings(RECORDS).items():
        assert file.read_text() == text, f'{file}: run make report'
        assert '\nAccuracy: ' in text and '\nSpeed: ' in text, file


@pytest.mark.parametrize('name', pictures.sources(RECORDS))
def test_pictures_are_of_the_records_and_networks(name):
    _, *arguments = pictures.sources(RECORDS)[name]
    with Image.open(pictures.FOLDER / f'{name}.png') as image:
        assert image.info['Source'] == pictures.fingerprint(arguments), 'run make report'


def test_every_picture_is_shown_and_opaque():
    shown = {page.parent / name for page in PAGES for name in re.findall(r'!\[[^]]+\]\(([^)]+)\)', page.read_text())}
    shown = {path.resolve() for path in shown}
    assert {(pictures.FOLDER / f'{name}.png').resolve() for name in pictures.sources(RECORDS)} <= shown
    for path in shown:
        assert path.stat().st_size < 200_000
        with Image.open(path) as image:
            assert image.convert('RGBA').getextrema()[3] == (255, 255)


def anchors(page):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r'^#+ (.+)$', re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r'\]\((?!http)([^)#]*)#?([^)]*)\)', page.read_text())
    for name, anchor in links:
        target = page.parent / name if name else page
        assert target.exists(), f'{page}: {name}'
        assert not anchor or anchor in anchors(target), f'{page}: {name}#{anchor}'


def test_there_are_the_pages_that_the_readme_links_to():
    assert len(PAGES) >= 12
    linked = {(ROOT / name).resolve() for name in re.findall(r'\]\((?!http|#)([^)#]+)', tables.README.read_text())}
    assert {page.resolve() for page in (ROOT / 'docs').glob('*.md')} <= linked, 'a page of docs/ that no one finds'


def test_the_readme_is_short():
    assert len(tables.README.read_bytes()) < 11_500


def test_file_names_in_the_pages_are_files():
    """A path that is told in code spans exists, here or beside the page."""
    for page in PAGES:
        for name in re.findall(r'`((?:MNIST|CIFAR10|twta|tests|benchmarks|docs)/[\w./-]+\.\w+)`', page.read_text()):
            if name != 'MNIST/TWTA_3_3_MNIST.py':  # the example of a new script
                assert (ROOT / name).exists() or (page.parent / name).exists(), f'{page}: {name}'


def test_docstrings_of_the_modules_name_files_that_exist():
    for module in sorted((ROOT / 'twta').rglob('*.py')):
        docstring = ast.get_docstring(ast.parse(module.read_text())) or ''
        for name in re.findall(r'\b((?:docs|benchmarks|tests)/\w+\.\w+)', docstring):
            assert (ROOT / name).exists(), f'{module}: {name}'


def test_the_page_of_experiments_names_every_option():
    page = (ROOT / 'docs' / 'experiments.md').read_text()
    for name in options.OPTIONS:
        assert re.search(rf'^\|.*`--{name}[ `]', page, re.MULTILINE), name


def test_the_exchange_page_names_every_dialect():
    page = (ROOT / 'docs' / 'exchange.md').read_text()
    for names in formats.DIALECTS.values():
        for name in names:
            assert f'--dialect {name}' in page


def test_the_pdf_is_whole_and_of_this_version():
    """It is made at a release: make pdf."""
    pdf = (ROOT / 'PDF' / 'README.pdf').read_bytes()
    version = re.search(r'^version = "(.+)"$', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)[1]
    assert pdf.startswith(b'%PDF-') and pdf.rstrip().endswith(b'%%EOF')
    start = int(re.findall(rb'startxref\s+(\d+)', pdf)[-1])
    assert pdf[start:start + 4] == b'xref' or re.match(rb'\d+ \d+ obj', pdf[start:]), 'no table of its objects'
    assert f'TWTA-Net {version}'.encode() in pdf, 'run make pdf'
