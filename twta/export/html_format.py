"""Export of a packed network as a web page: one file, which runs the network in the browser, without a network.

The page consists of page/page.html, page.css, engine.js, input.js and page.js. Its Content-Security-Policy allows the
page's own script and style, by their hashes, and no connection. What the network's file says reaches the page as text
only.
"""
import base64
import hashlib
import html
import json
import re
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
    engine, *others = ((FOLDER / name).read_text(encoding='utf-8') for name in ('engine.js', 'input.js', 'page.js'))
    engine = engine.partition('\nif (typeof module')[0]  # what follows is for Node
    script = '\n'.join(["'use strict';", f'const DATA = {json.dumps(values)};', engine, *others])
    style = (FOLDER / 'page.css').read_text(encoding='utf-8')
    texts = {'TITLE': html.escape(packed.network), 'STYLE': style, 'SCRIPT': script, 'STYLE_HASH': digest(style),
             'SCRIPT_HASH': digest(script)}
    page = (FOLDER / 'page.html').read_text(encoding='utf-8')
    return re.sub('@([A-Z_]+)@', lambda mark: texts[mark[1]], page)  # in one go: a name may look like a mark


def digest(text):
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_html(path, packed, images):
    """Write the page and return its size in bytes."""
    page = build_page(packed, images).encode()
    with replacing(path) as part:
        part.write_bytes(page)
    return len(page)
