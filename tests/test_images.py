"""Images for the stand-alone command: arrays and pictures; its engine after a fork and with a damaged cache."""
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import NETWORKS, ROOT, random_images, random_packed

from twta.packed import __main__, file_format, images, numpy_engine, vectors


def standalone_main(arguments):
    __main__.main(list(map(str, arguments)))


@pytest.mark.parametrize('array', [np.zeros((9, 8), np.uint8), np.zeros((9, 8, 1), np.uint8),
                                   np.zeros((1, 9, 8), np.uint8), np.zeros((1, 9, 8, 1), np.uint8)])
def test_one_image_is_one_image(tmp_path, array):
    np.save(tmp_path / 'x.npy', array)
    assert images.read_images(tmp_path / 'x.npy', (9, 8, 1)).shape == (1, 9, 8, 1)


def picture(path, array, **how):
    from PIL import Image

    Image.fromarray(array).save(path, **how)
    return path


def test_a_picture_of_the_right_size_is_its_pixels(tmp_path):
    for shape in ((9, 8, 1), (9, 8, 3)):
        pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        path = picture(tmp_path / 'a.png', pixels.squeeze())
        np.testing.assert_array_equal(images.read_picture(path, shape), pixels)


def test_pictures_of_other_sizes_and_kinds(tmp_path):
    """A square in the centre stays there: resized, cut, grey or coloured, with 16 bits, transparent, turned."""
    from PIL import Image

    square = np.zeros((40, 80), np.uint8)
    square[10:30, 30:50] = 255
    expected = np.pad(np.full((4, 4, 1), 255, np.uint8), ((2, 2), (2, 2), (0, 0)))
    clear = np.stack([square * 0, square * 0, square * 0, 255 - square], axis=-1)  # the square is transparent, so white
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    paths = [picture(tmp_path / 'grey.png', square), picture(tmp_path / 'colour.bmp', np.stack([square] * 3, axis=-1)),
             picture(tmp_path / 'deep.png', square.astype(np.uint16) * 257), picture(tmp_path / 'clear.png', clear),
             picture(tmp_path / 'turned.jpg', square, exif=exif)]
    for path in paths:
        found = images.read_picture(path, (8, 8, 1)).astype(int)
        assert np.abs(found - expected).max() < 60, (path, found[..., 0])
    assert images.read_picture(paths[0], (8, 8, 3)).shape == (8, 8, 3)


def test_pictures_at_the_command(tmp_path, capsys):
    packed = random_packed(*NETWORKS['dense'])._replace(dataset='mnist')
    file_format.write(tmp_path / 'n.twta', packed)
    x = random_images(packed, 3) // 4
    paths = [picture(tmp_path / f'{i}.png', image[..., 0]) for i, image in enumerate(x)]
    expected = numpy_engine.NumpyEngine(packed).logits(x).argmax(1)
    standalone_main([tmp_path / 'n.twta', *paths, '--engine', 'numpy', '--picture', tmp_path / 'drawn.png'])
    said = capsys.readouterr()
    assert said.out.splitlines() == [f'{path}: {k} class{k}' for path, k in zip(paths, expected, strict=True)]
    assert 'WARNING' not in said.err and (tmp_path / 'drawn.png').stat().st_size > 1000
    bright = [picture(tmp_path / f'{i}.png', 255 - image[..., 0]) for i, image in enumerate(x)]
    standalone_main([tmp_path / 'n.twta', *bright, '--engine', 'numpy', '--names'])
    assert 'try --invert' in capsys.readouterr().err
    standalone_main([tmp_path / 'n.twta', *bright, '--engine', 'numpy', '--invert'])
    assert capsys.readouterr().out.splitlines() == [f'{path}: {k} class{k}' for path, k in
                                                    zip(bright, expected, strict=True)]


@pytest.mark.parametrize('names, words', [(['no.png'], 'damaged, or none of PNG'), (['x.npy', 'no.png'], 'given alone'),
                                          (['large.png'], 'too large')])
def test_pictures_that_cannot_be_read(tmp_path, monkeypatch, capsys, names, words):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    file_format.write(tmp_path / 'n.twta', random_packed(*NETWORKS['dense']))
    np.save('x.npy', np.zeros((2, 9, 8), np.uint8))
    Path('no.png').write_text('no picture')
    picture('large.png', np.zeros((40, 40), np.uint8))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(SystemExit):
        standalone_main(['n.twta', *names])
    said = capsys.readouterr()
    assert words in said.err and said.err.count('\n') == 1 and said.out == ''


# ----------------------------------------------------------------------------------------------------------------------
# Processes and caches


FORK = """
import multiprocessing, sys, threading, time
from conftest import NETWORKS, random_images, random_packed
from twta.packed import engines
packed = random_packed(*NETWORKS['strides'])
engine, x = engines.open_engine(packed, 'numba'), random_images(packed, int(sys.argv[2]))
def classes(_):
    return engines.logits(engine, x).argmax(1).tolist()
if sys.argv[1] == 'after':
    classes(0)
if sys.argv[1] == 'while it compiles':
    threading.Thread(target=classes, args=[0]).start()
    time.sleep(0.5)
with multiprocessing.get_context('fork').Pool(2) as pool:
    for found in pool.map(classes, range(2)):
        print(found == classes(0))
"""


AVX2 = {'NUMBA_CPU_NAME': 'haswell', 'NUMBA_CPU_FEATURES': ''}
INTEL = pytest.param(AVX2, marks=pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='needs x86'))


@pytest.mark.parametrize('settings, count', [({}, 9), pytest.param(AVX2, 9, marks=INTEL.marks),
                                             pytest.param(AVX2, 256, marks=INTEL.marks)],
                         ids=['this processor', 'AVX2, paired engine', 'AVX2, sliced engine'])
@pytest.mark.parametrize('moment', ['before', 'after', 'while it compiles'])
def test_a_fork_at_any_moment_of_the_first_use_of_an_engine(moment, settings, count, tmp_path):
    caches = {'NUMBA_CACHE_DIR': str(tmp_path)} if moment == 'while it compiles' else {}
    finished = subprocess.run([sys.executable, '-c', FORK, moment, str(count)], capture_output=True, text=True,
                              timeout=200, env={**os.environ, **settings, **caches,
                                                'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'})
    assert finished.stdout.split() == ['True', 'True'], finished.stderr


BOTH = """
import sys
import numpy as np
from conftest import NETWORKS, random_images, random_packed
from twta.packed import numba_engine, numpy_engine, paired_engine, sliced_engine
packed = random_packed(*NETWORKS['dense'])
x = random_images(packed, 3)
for name in sys.argv[1:]:
    engine = {'numba': numba_engine.NumbaEngine, 'sliced': sliced_engine.SlicedEngine,
              'paired': paired_engine.PairedEngine}[name](packed)
    for found, expected in zip(engine.activations(x), numpy_engine.NumpyEngine(packed).activations(x)):
        np.testing.assert_array_equal(found, expected)
"""


@pytest.mark.slow
def test_engines_that_two_processes_have_compiled(tmp_path):
    """Each has its own machine code of what both use; one process takes both from the cache."""
    paired = ['paired'] if vectors.has_avx2() else []
    for engines in (['numba'], ['sliced'], paired, ['numba', 'sliced', *paired], [*paired, 'sliced', 'numba']):
        subprocess.run([sys.executable, '-c', BOTH, *engines], check=True, env={
            **os.environ, 'NUMBA_CACHE_DIR': str(tmp_path), 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'})


@pytest.mark.parametrize('suffix, settings', [('nbi', {}), pytest.param('nbc', AVX2, marks=INTEL.marks)])
def test_a_damaged_cache_of_numba_costs_only_time(tmp_path, suffix, settings):
    packed = random_packed(*NETWORKS['dense'])
    file_format.write(tmp_path / 'n.twta', packed)
    np.save(tmp_path / 'x.npy', random_images(packed, 200))
    outputs = []
    for damage in (False, True):
        for path in (tmp_path / 'cache').rglob(f'*.{suffix}') if damage else ():
            path.write_bytes(path.read_bytes()[:300])
        command = [sys.executable, '-m', 'twta.packed', tmp_path / 'n.twta', tmp_path / 'x.npy']
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                                  env={**os.environ, **settings, 'NUMBA_CACHE_DIR': f'{tmp_path}/cache'})
        assert finished.returncode == 0 and ("numba's cache cannot be used" in finished.stderr) == damage
        outputs.append(finished.stdout)
    assert outputs[0] == outputs[1] and outputs[0]
