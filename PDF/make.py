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


def main():
    import pymupdf
    from markdown_it import MarkdownIt

    html = MarkdownIt('commonmark').enable('table').render(README.read_text())
    story = pymupdf.Story(html, STYLE, archive=pymupdf.Archive(str(README.parent)))
    page = pymupdf.paper_rect('a4')
    part = FOLDER / '.part.pdf'
    writer = pymupdf.DocumentWriter(str(part))
    more = True
    while more:
        device = writer.begin_page(page)
        more, _ = story.place(page + (40, 40, -40, -40))
        story.draw(device)
        writer.end_page()
    writer.close()
    with pymupdf.open(part) as document:
        document.set_metadata({'title': 'TWTA-Net', 'keywords': fingerprint(), 'creationDate': None})
        document.subset_fonts()
        document.save(FOLDER / 'README.pdf', garbage=4, deflate=True)
    part.unlink()
    print(FOLDER / 'README.pdf')


if __name__ == '__main__':
    main()
