"""Tables in Markdown, and their places in a page. A place is between two comments:

    <!-- table NAME: anything -->
    <!-- end -->
"""
import re
import shutil

from twta import TwtaError
from twta.files import replacing


def table(header, rows):
    """Yield the lines of a table; header and rows are sequences of strings."""
    yield '| ' + ' | '.join(header) + ' |'
    yield '|---' * len(header) + '|'
    for row in rows:
        yield '| ' + ' | '.join(row) + ' |'


def fill(page, tables):
    """Return the text of a page (a file) with each table in its place; tables are {name: lines}.

    Raises TwtaError if a table has no place, or a place has no table or no end.
    """
    text = page.read_text(encoding='utf-8')
    places = re.findall(r'<!-- table (\w+)[^>]*-->\n(?:(?!<!-- table).)*?<!-- end -->', text, re.DOTALL)
    if not sorted(places) == sorted(re.findall(r'<!-- table (\w+)', text)) == sorted(tables):
        raise TwtaError(f'{page} has places for the tables {", ".join(sorted(places))}; needed, each with its <!-- '
                        f'end -->, are {", ".join(sorted(tables))}')
    for name, lines in tables.items():
        text = re.sub(rf'(<!-- table {name}\b[^>]*-->\n).*?(<!-- end -->)',
                      lambda match, lines=lines: match[1] + '\n'.join(lines) + '\n' + match[2], text, flags=re.DOTALL)
    return text


def replace_text(file, text):
    """Write the text, whole or not at all, with the file's permissions, unless the file holds it already."""
    if file.read_text(encoding='utf-8') != text:
        with replacing(file) as part:
            part.write_text(text, encoding='utf-8')
            shutil.copymode(file, part)
