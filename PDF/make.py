#!/usr/bin/env python3
"""Makes PDF/README.pdf from README.md: `make pdf`, which installs the two libraries that it takes.

Markdown becomes HTML (markdown-it-py), HTML pages (PyMuPDF, which brings a font with Chinese characters). The PDF's
keywords hold the hash of what it was made from, README.md and its pictures, for tests/test_report.py.
"""
import hashlib
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


def fingerprint():
    """SHA-256 of README.md and its pictures."""
    text = README.read_text()
    pictures = re.findall(r'!\[[^]]*\]\(([^)]+)\)', text)
    parts = [text.encode(), *((README.parent / name).read_bytes() for name in pictures)]
    return hashlib.sha256(b''.join(parts)).hexdigest()


def anchor(heading):
    """As links to a heading are written in Markdown."""
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
    document.set_metadata({'title': 'TWTA-Net', 'keywords': fingerprint()})
    document.subset_fonts()
    document.save(FOLDER / 'README.pdf', garbage=4, deflate=True)
    print(FOLDER / 'README.pdf')


if __name__ == '__main__':
    main()
