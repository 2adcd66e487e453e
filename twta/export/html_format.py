"""Export of a packed network as a web page: one file, which runs the network in the browser, without a network.

The page consists of page/page.html, page.css, engine.js and page.js. Its Content-Security-Policy allows the page's own
script and style, by their hashes, and no connection. What the network's file says reaches the page as text only.
"""
import base64
import hashlib
import html
import json
from pathlib import Path

import numpy as np

from twta.files import replacing
from twta.packed import file_format

FOLDER = Path(__file__).parent / 'page'


def build_page(packed, images):
    """Return the page as text, with these images in it, uint8 [n, height, width, channels]."""
    data = file_format.serialize(packed)
    encoded = [base64.b64encode(np.ascontiguousarray(image).tobytes()).decode() for image in images]
    values = {'network': base64.b64encode(data).decode(), 'images': encoded, 'bytes': len(data)}
    engine = (FOLDER / 'engine.js').read_text().partition("\nif (typeof module")[0]
    script = f'const DATA = {json.dumps(values)};\n{engine}\n{(FOLDER / "page.js").read_text()}'
    style = (FOLDER / 'page.css').read_text()
    page = (FOLDER / 'page.html').read_text()
    for mark, text in (('@TITLE@', html.escape(packed.network)), ('@STYLE_HASH@', digest(style)),
                       ('@SCRIPT_HASH@', digest(script)), ('@STYLE@', style), ('@SCRIPT@', script)):
        page = page.replace(mark, text, 1)
    return page


def digest(text):
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_html(path, packed, images):
    """Write the page and return its size in bytes."""
    page = build_page(packed, images).encode()
    with replacing(path) as part:
        part.write_bytes(page)
    return len(page)
