"""Tables in Markdown, and the places in a page that they are written to, each between two comments.

    <!-- table NAME: anything -->
    <!-- end -->
"""
import re
import shutil

from twta import TwtaError
from twta.files import replacing


def table(header, rows):
    yield '| ' + ' | '.join(header) + ' |'
    yield '|---' * len(header) + '|'
    for row in rows:
        yield '| ' + ' | '.join(row) + ' |'


def fill(page, tables):
    """The text of a page (its file) with each of the tables (lines by name) in its place.

    TwtaError where a table has no place, or a place no table or no end.
    """
    text = page.read_text()
    places = re.findall(r'<!-- table (\w+)[^>]*-->\n(?:(?!<!-- table).)*?<!-- end -->', text, re.DOTALL)
    if not sorted(places) == sorted(re.findall(r'<!-- table (\w+)', text)) == sorted(tables):
        raise TwtaError(f'{page} has places for the tables {", ".join(sorted(places))}; needed, each with its <!-- '
                        f'end -->, are {", ".join(sorted(tables))}')
    for name, lines in tables.items():
        text = re.sub(rf'(<!-- table {name}\b[^>]*-->\n).*?(<!-- end -->)',
                      lambda match, lines=lines: match[1] + '\n'.join(lines) + '\n' + match[2], text, flags=re.DOTALL)
    return text


def replace_text(file, text):
    """Writes the file, whole or not at all, with its permissions; not where it holds the text already."""
    if file.read_text() != text:
        with replacing(file) as part:
            part.write_text(text)
            shutil.copymode(file, part)
