"""The web page: its engine in Node and the page in Chromium, against the packed engine, if they are installed."""
import base64
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import NETWORKS, ROOT, random_images, random_packed

from twta.export import __main__, html_format
from twta.packed import file_format
from twta.packed.numpy_engine import NumpyEngine

PRETRAINED = sorted((ROOT / 'pretrained').glob('*.twta'))
RUN = """
const fs = require('fs'), {parse, run} = require(process.argv[1]), folder = process.argv[2];
const net = parse(new Uint8Array(fs.readFileSync(folder + '/n.twta')));
const all = new Uint8Array(fs.readFileSync(folder + '/x.bin')), size = net.image.reduce((a, b) => a * b);
const scores = [], counts = [], activations = [];
for (let at = 0; at < all.length; at += size) {
    const found = run(net, all.subarray(at, at + size));
    scores.push([...found.scores]);
    counts.push(found.counts);
    activations.push(...found.activations.map(map => Buffer.from(map.buffer)));
}
fs.writeFileSync(folder + '/a.bin', Buffer.concat(activations));
console.log(JSON.stringify([scores, counts]));
"""


def additions(maps, layer):
    """Return how many products of a ternary layer are not 0, for the activations that it reads, [n, h, w, c]."""
    from twta.packed.numpy_engine import convolve

    nonzero = layer._replace(weights=np.abs(layer.weights), border=abs(layer.border))
    return int(convolve(np.abs(maps).astype(np.float64), nonzero).sum())


@pytest.mark.skipif(not shutil.which('node'), reason='needs Node.js')
@pytest.mark.parametrize('source', [*NETWORKS, *PRETRAINED], ids=lambda source: getattr(source, 'stem', source))
def test_the_engine_of_the_page_is_exact(source, tmp_path):
    """Every activation, every score, spikes and additions, on random images."""
    packed = random_packed(*NETWORKS[source]) if source in NETWORKS else file_format.read(source)
    x = random_images(packed, 2)
    file_format.write(tmp_path / 'n.twta', packed)
    (tmp_path / 'x.bin').write_bytes(x.tobytes())
    finished = subprocess.run(['node', '-e', RUN, html_format.FOLDER / 'engine.js', tmp_path], capture_output=True,
                              text=True, check=True)
    scores, counts = json.loads(finished.stdout)
    logits, maps = NumpyEngine(packed).run(x)
    np.testing.assert_allclose(scores, logits, rtol=1e-6, atol=1e-6)
    expected = np.concatenate([fired[i].ravel() for i in range(len(x)) for fired in maps])
    np.testing.assert_array_equal(np.frombuffer((tmp_path / 'a.bin').read_bytes(), np.int8), expected)
    for index, layer in enumerate(packed.layers[1:], 1):
        assert sum(count[index]['additions'] for count in counts) == additions(maps[index - 1], layer)
        assert sum(count[index]['spikes'] for count in counts) == np.abs(maps[index]).sum(dtype=int)


def open_page(path, *flags):
    """Return the page as Chromium has made it, and what it complained of."""
    command = ['chromium', '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr',
               '--virtual-time-budget=5000', *flags]
    finished = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    return finished.stdout, [line for line in finished.stderr.splitlines() if 'CONSOLE' in line]


def cells(dom, table):
    """Return the rows of a table of the page, as lists of texts."""
    body = re.search(rf'<table[^>]*id="{table}".*?<tbody>(.*?)</tbody>', dom, re.S)[1]
    return [[html.unescape(re.sub('<.*?>', '', cell)) for cell in re.findall('<td.*?</td>', row, re.S)]
            for row in re.findall('<tr.*?</tr>', body, re.S)]


@pytest.mark.skipif(not shutil.which('chromium'), reason='needs Chromium')
@pytest.mark.parametrize('name', ['TWTA_4_4_MNIST', 'TWTA_3_3_CIFAR10_Group_V2', 'TWBA_CIFAR10_Model2', 'Quant_MNIST'])
def test_the_page_in_a_browser(name, tmp_path):
    """The page shows class, scores, spikes and additions of its first test image; nothing is wrong on the console."""
    packed = file_format.read(ROOT / 'pretrained' / f'{name}.twta')
    x = random_images(packed, 2)
    html_format.write_html(tmp_path / 'n.html', packed, x)
    dom, complaints = open_page(tmp_path / 'n.html', '--dump-dom')
    assert not complaints
    logits, maps = NumpyEngine(packed).run(x[:1])
    scores = cells(dom, 'scores')
    assert [row[0] for row in scores] == list(packed.classes)
    np.testing.assert_allclose([float(row[2]) for row in scores], logits[0], atol=0.0051)
    assert f'class: {packed.classes[logits[0].argmax()]}<' in dom
    spikes = [int(row[1].replace(',', '')) for row in cells(dom, 'counts')]
    assert spikes == [int(np.abs(fired).sum(dtype=int)) for fired in maps]


EVIL = '<script>document.title = "evil"</script><img src=x onerror=alert(1)>'


@pytest.mark.skipif(not shutil.which('chromium'), reason='needs Chromium')
def test_names_from_a_file_are_text(tmp_path):
    packed = random_packed(*NETWORKS['dense'])
    layers = tuple(layer._replace(name=f'{EVIL}{index}') for index, layer in enumerate(packed.layers))
    packed = packed._replace(network=EVIL, classes=(EVIL, f'</script>{EVIL}', 'x'), layers=layers)
    html_format.write_html(tmp_path / 'n.html', packed, random_images(packed, 1))
    dom, complaints = open_page(tmp_path / 'n.html', '--dump-dom')
    assert not complaints and dom.count('<script') == 1 and '<img' not in dom
    assert f'<title>{html.escape(EVIL, quote=False)}</title>' in dom.replace('&quot;', '"')


def test_the_page_connects_to_nothing_and_is_small(tmp_path):
    for path in PRETRAINED:
        packed = file_format.read(path)
        size = html_format.write_html(tmp_path / 'n.html', packed, random_images(packed, 10))
        assert size == (tmp_path / 'n.html').stat().st_size <= 3 * path.stat().st_size + 60_000
    text = (tmp_path / 'n.html').read_text()
    assert "default-src 'none'" in text and "connect-src 'none'" in text
    outside = re.sub(r'const DATA = .*', '', text)
    assert not re.search(r'https?://|fetch\(|XMLHttpRequest|WebSocket|innerHTML|eval\(', outside)


@pytest.mark.parametrize('path', sorted((ROOT / 'docs' / 'live').glob('*.html')), ids=lambda path: path.stem)
def test_the_pages_in_docs_are_not_stale(path, tmp_path):
    """Make each page again from its network and its images."""
    file = ROOT / 'pretrained' / f'{path.stem}.twta'
    packed = file_format.read(file)
    data = json.loads(re.search(r'const DATA = (.*);', path.read_text())[1])
    images = [np.frombuffer(base64.b64decode(text), np.uint8).reshape(packed.image) for text in data['images']]
    html_format.write_html(tmp_path / 'n.html', packed, np.stack(images))
    assert path.read_text() == (tmp_path / 'n.html').read_text(), f'python -m twta.export {file} --format html ...'


def test_the_command_writes_a_page(tmp_path, monkeypatch, capsys):
    packed = random_packed(*NETWORKS['dense'])
    file_format.write(tmp_path / 'net.twta', packed)
    np.save(tmp_path / 'x.npy', random_images(packed, 12))
    monkeypatch.chdir(tmp_path)
    __main__.main(['net.twta', '--format', 'html', '--images', 'x.npy'])
    assert capsys.readouterr().out.splitlines()[0] == f'test images in the page: 10 ({tmp_path / "x.npy"})'.replace(
        f'{tmp_path}/', '')
    __main__.main(['net.twta', '--format', 'html', '--out', 'b.html'])
    assert 'test images in the page: 0 (none given)' in capsys.readouterr().out
