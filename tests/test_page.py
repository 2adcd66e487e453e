"""The web page: its engine in Node and the page in Chromium, against the packed engine, if they are installed."""
import base64
import json
import re
import shutil
import subprocess
import time

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


THIN = """
const fs = require('fs'), [file, folder] = process.argv.slice(1), engine = require(file);
const read = name => new Uint8Array(fs.readFileSync(`${folder}/${name}`));
const net = engine.parse(read("n.twta")), pixels = read("x.bin");
const encoder = deleted => [...engine.run(net, pixels, deleted).activations[0]];
const whole = encoder(null);
console.log(JSON.stringify([whole, encoder(k => k >= whole.length), encoder(() => true)]));
"""


@pytest.mark.skipif(not shutil.which('node'), reason='needs Node.js')
@pytest.mark.parametrize('rest', [0, -1])
def test_deleted_spikes_return_to_the_state_of_rest(rest, tmp_path):
    """From rest, +1 is two spikes: without the second it is 0, without both -1."""
    packed = random_packed(*NETWORKS['odd'], border=rest)
    file_format.write(tmp_path / 'n.twta', packed)
    (tmp_path / 'x.bin').write_bytes(random_images(packed, 1).tobytes())
    finished = subprocess.run(['node', '-e', THIN, html_format.FOLDER / 'engine.js', tmp_path], capture_output=True,
                              text=True, check=True)
    whole, without_second, without_all = map(np.array, json.loads(finished.stdout))
    assert set(whole) == {-1, 0, 1} and set(without_all) == {rest}
    np.testing.assert_array_equal(without_second, np.minimum(whole, 0) if rest else whole)


@pytest.fixture(scope='module')
def browser():
    """A Chromium that playwright drives; pip install playwright, apt install chromium."""
    playwright = pytest.importorskip('playwright.sync_api', reason='needs playwright')
    if not shutil.which('chromium'):
        pytest.skip('needs Chromium')
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        yield running
        running.close()


@pytest.fixture
def show(browser, tmp_path):
    """A function that opens the page of a network in the browser; nothing may be wrong on its console."""
    complaints, pages = [], []

    def show(packed, images):
        html_format.write_html(tmp_path / 'n.html', packed, images)
        pages.append(browser.new_page(viewport={'width': 1000, 'height': 800}))
        pages[-1].on('console', lambda message: complaints.append(message.text))
        pages[-1].on('pageerror', lambda error: complaints.append(str(error)))
        pages[-1].goto((tmp_path / 'n.html').as_uri())
        return pages[-1]

    yield show
    for page in pages:
        page.close()
    assert not complaints


def wait_for(condition):
    """Wait until it is true. Playwright's own waiting evaluates text, which the page's policy forbids."""
    for _ in range(250):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError('it did not happen')


def cells(page, table):
    """Return the rows of a table of the page, as lists of texts."""
    texts = 'rows => rows.map(row => [...row.cells].map(cell => cell.textContent))'
    return page.eval_on_selector_all(f'#{table} tbody tr', texts)


def whole(row):
    return int(row[1].replace(',', ''))


@pytest.mark.parametrize('name', ['TWTA_4_4_MNIST', 'TWTA_3_3_CIFAR10_Group_V2', 'TWBA_CIFAR10_Model2', 'Quant_MNIST'])
def test_the_page_in_a_browser(name, show):
    """Scores of 200 images and activations of 20, by window.twta; what the page shows of its first test image."""
    packed = file_format.read(ROOT / 'pretrained' / f'{name}.twta')
    x = random_images(packed, 200)
    logits, maps = NumpyEngine(packed).run(x[:20])
    page = show(packed, x[:2])
    classify = '''([text, maps]) => {
        const found = twta.classify(Uint8Array.from(atob(text), c => c.charCodeAt(0)));
        return [[...found.scores], found.prediction, maps ? found.activations.map(map => [...map]) : []];
    }'''
    found = [page.evaluate(classify, [base64.b64encode(image.tobytes()).decode(), index < 20])
             for index, image in enumerate(x)]
    expected = NumpyEngine(packed).run(x)[0]
    np.testing.assert_allclose([scores for scores, *_ in found], expected, rtol=1e-6, atol=1e-6)
    assert [prediction for _, prediction, _ in found] == expected.argmax(1).tolist()
    for index, (*_, activations) in enumerate(found[:20]):
        for shown, fired in zip(activations, maps, strict=True):
            np.testing.assert_array_equal(shown, fired[index].ravel())
    scores = cells(page, 'scores')
    assert [row[0] for row in scores] == list(packed.classes)
    np.testing.assert_allclose([float(row[2]) for row in scores], logits[0], atol=0.0051)
    assert page.inner_text('#answer') == f'class: {packed.classes[logits[0].argmax()]}'
    assert [whole(row) for row in cells(page, 'counts')] == [int(np.abs(fired[0]).sum(dtype=int)) for fired in maps]


def test_drawing_by_mouse_and_by_keyboard(show):
    packed = file_format.read(ROOT / 'pretrained' / 'TWTA_4_4_MNIST.twta')
    page = show(packed, random_images(packed, 1))
    page.click('text=Clear')
    blank = cells(page, 'scores')
    box = page.locator('#input').bounding_box()
    x, top, bottom = (box['x'] + box['width'] / 2, *(box['y'] + box['height'] * part for part in (0.15, 0.85)))
    page.mouse.move(x, top)
    page.mouse.down()
    page.mouse.move(x, bottom, steps=10)
    page.mouse.up()
    wait_for(lambda: page.inner_text('#answer') == 'class: 1')
    assert cells(page, 'scores') != blank
    page.click('text=Clear')
    page.focus('#input')
    for key in ['ArrowUp'] * 9 + ['Shift+ArrowDown'] * 18:
        page.keyboard.press(key)
    wait_for(lambda: page.inner_text('#answer') == 'class: 1')


def test_a_map_shows_its_filter_and_sliders_change_the_scores(show):
    packed = file_format.read(ROOT / 'pretrained' / 'TWTA_4_4_MNIST.twta')
    page = show(packed, random_images(packed, 1))
    assert page.is_hidden('#filter')
    page.click('#map-2', position={'x': 2, 'y': 2})
    name, upper, lower = packed.layers[2].name, packed.layers[2].upper, packed.layers[2].lower
    assert page.inner_text('#filter-title') == f'{name}, filter 1 of 64'
    assert f'at least {upper[0]}, -1 where its sum is at most {lower[0]}, else 0.' in page.inner_text('#filter-text')
    page.keyboard.press('ArrowRight')
    assert page.inner_text('#filter-title') == f'{name}, filter 2 of 64'
    page.locator('#shift').fill('3')
    wait_for(lambda: f'at least {upper[1] + 3}, ' in page.inner_text('#filter-text'))
    page.locator('#shift').fill('0')
    page.keyboard.press('Escape')
    assert page.is_hidden('#filter')
    for slider in ('#noise', '#shift'):
        before = cells(page, 'scores')
        page.focus(slider)
        page.keyboard.press('End')
        wait_for(lambda before=before: cells(page, 'scores') != before)


@pytest.mark.parametrize(('name', 'steps'), [('TWTA_4_4_MNIST', 1), ('Quant_MNIST', 4)])
def test_steps_of_temporal_conversion(name, steps, show):
    """The spikes of all steps are those of the network. Each step has fewer: its level is above the one before."""
    packed = file_format.read(ROOT / 'pretrained' / f'{name}.twta')
    page = show(packed, random_images(packed, 1))
    assert page.is_visible('#next') == (steps > 1)
    if steps == 1:
        return
    total, found = [whole(row) for row in cells(page, 'counts')], []
    for step in range(1, steps + 1):
        page.click('#next')
        assert page.inner_text('#step').startswith(f'step {step} of {steps}')
        found.append([whole(row) for row in cells(page, 'counts')])
    assert np.sum(found, axis=0).tolist() == total and (np.diff(found, axis=0) <= 0).all() and sum(found[-1]) > 0
    page.click('#next')
    assert [whole(row) for row in cells(page, 'counts')] == total


EVIL = '@STYLE@@SCRIPT@@TITLE@<script>document.title = "evil"</script><img src=x onerror=alert(1)>'


def test_names_from_a_file_are_text(show):
    packed = random_packed(*NETWORKS['dense'])
    layers = tuple(layer._replace(name=f'{EVIL}{index}') for index, layer in enumerate(packed.layers))
    packed = packed._replace(network=EVIL, classes=(EVIL, f'</script>{EVIL}', 'x'), layers=layers)
    page = show(packed, random_images(packed, 1))
    assert page.locator('script').count() == 1 and page.locator('img').count() == 0
    assert page.evaluate('document.documentElement.scrollWidth') <= 1000
    assert page.title() == EVIL and [row[0] for row in cells(page, 'scores')] == list(packed.classes)


@pytest.mark.parametrize('name', ['Quant_MNIST', 'TWTA_3_3_CIFAR10_Group_V2-rest_-1'])
@pytest.mark.parametrize('width', [320, 360, 768, 1280])
def test_the_page_fits_its_window(name, width, show):
    """Nothing sticks out at the width of a phone; nothing moves while one draws, chooses or steps."""
    packed = file_format.read(ROOT / 'pretrained' / f'{name}.twta')
    page = show(packed, random_images(packed, 2))
    page.set_viewport_size({'width': width, 'height': 800})
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    height = page.evaluate('document.documentElement.scrollHeight')
    for button in ['#tools button', '#examples button:nth-child(2)', *['#next'] * 4 * (name == 'Quant_MNIST')]:
        page.click(button)
        assert page.evaluate('document.documentElement.scrollHeight') == height
    page.click('#map-1', position={'x': 4, 'y': 4})
    assert page.locator('#filter').bounding_box()['height'] <= 400


def test_own_pictures(show, tmp_path):
    """A dark digit on bright paper or on nothing is inverted; what is no picture changes nothing."""
    from PIL import Image, ImageDraw

    packed = file_format.read(ROOT / 'pretrained' / 'TWTA_4_4_MNIST.twta')
    page = show(packed, random_images(packed, 1))
    for mode, ground in (('L', 255), ('RGBA', (0, 0, 0, 0)), ('L', 0)):
        picture = Image.new(mode, (90, 60), ground)
        ImageDraw.Draw(picture).line((45, 10, 45, 50), fill=(0, 0, 0, 255) if mode == 'RGBA' else 255 - ground, width=5)
        picture.save(tmp_path / 'one.png')
        page.click('#tools button')
        assert page.inner_text('#answer') == 'nothing drawn'
        page.set_input_files('#tools input', tmp_path / 'one.png')
        wait_for(lambda: page.inner_text('#answer') == 'class: 1')
        assert ('inverted' in page.inner_text('#note')) == (ground != 0)
    (tmp_path / 'text.png').write_text('no picture')
    page.set_input_files('#tools input', tmp_path / 'text.png')
    wait_for(lambda: 'no picture' in page.inner_text('#note'))
    assert page.inner_text('#answer') == 'class: 1'


def test_filters_that_always_or_never_fire_are_named(show):
    packed = random_packed(*NETWORKS['dense'])
    encoder, layer, *others = packed.layers
    upper, lower, most = layer.upper.copy(), layer.lower.copy(), file_format.fan_in(layer.weights)
    upper[:3], lower[:3] = (-most, most + 1, most + 1), (-most - 1, -most - 1, most)
    packed = packed._replace(layers=(encoder, layer._replace(upper=upper, lower=lower), *others))
    page = show(packed, random_images(packed, 1))
    page.focus('#map-1')
    found = []
    for key in ('Enter', 'ArrowRight', 'ArrowRight'):
        page.keyboard.press(key)
        found.append(page.inner_text('#filter-text').split('.')[0])
    assert found == ['It is always +1', 'It is always 0', 'It is always -1']
    fired = page.evaluate('[...state.result.activations[1]]')
    page.locator('#shift').fill('-20')
    wait_for(lambda: page.inner_text('#shift-value') == '-20')
    moved = page.evaluate('[...state.result.activations[1]]')
    filters = len(upper)
    for index in range(3):
        assert fired[index::filters] == moved[index::filters]


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
    __main__.main(['net.twta', '--format', 'html', '--output', 'b.html'])
    assert 'test images in the page: 0 (none given)' in capsys.readouterr().out
