#!/usr/bin/env python3
"""Make PDF/README.pdf from README.md at a release: `make pdf`, which installs the two libraries that this takes.

markdown-it-py turns Markdown into HTML; PyMuPDF, which brings a font with Chinese characters, turns HTML into pages.
The title of the PDF names the version in pyproject.toml. tests/documents.py compares the two.
"""
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / 'README.md'
STYLE = '''
body { font-family: sans-serif; font-size: 9pt; }
h1 { font-size: 18pt; } h2 { font-size: 13pt; }
table { border-collapse: collapse; font-size: 6.5pt; }
th, td { border: 0.5px solid #999; padding: 2px; text-align: left; vertical-align: top; }
pre, code { font-family: monospace; font-size: 7.5pt; }
pre { background-color: #f4f4f4; padding: 4px; white-space: pre-wrap; }
img { width: 100%; }
'''


def anchor(heading):
    """Return the anchor to which links in Markdown lead."""
    return re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')


def main():
    import pymupdf
    from markdown_it import MarkdownIt

    html = MarkdownIt('commonmark').enable('table').render(README.read_text())
    html = re.sub(r'<(h\d)>(.*?)</h', lambda match: f'<{match[1]} id="{anchor(match[2])}">{match[2]}</h', html)
    html = re.sub(r'<a href="(?!http|#)[^"]*">(.*?)</a>', r'\1', html)  # files of the repository, not of the PDF
    story = pymupdf.Story(html, STYLE, archive=pymupdf.Archive(str(README.parent)))
    page = pymupdf.paper_rect('a4')
    document = story.write_with_links(lambda *_: (page, page + (40, 40, -40, -40), None))
    version = re.search(r'^version = "(.+)"$', (README.parent / 'pyproject.toml').read_text(), re.MULTILINE)[1]
    document.set_metadata({'title': f'TWTA-Net {version}'})
    document.subset_fonts()
    document.save(FOLDER / 'README.pdf', garbage=4, deflate=True)
    print(FOLDER / 'README.pdf')


if __name__ == '__main__':
    main()
