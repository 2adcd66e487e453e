"""The IDX reader on hand-made files, the digits, the published files if present, downloads from a faulty server."""
import contextlib
import errno
import gzip
import hashlib
import http.client
import struct
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT

from twta import TwtaError
from twta.data import datasets, download

SHARED_MNIST = ROOT.parent / 'shared' / 'datasets' / 'mnist'
SHAPES = {'train-images-idx3-ubyte': (60, 28, 28), 'train-labels-idx1-ubyte': (60,),
          't10k-images-idx3-ubyte': (10, 28, 28), 't10k-labels-idx1-ubyte': (10,)}


def idx(array):
    return struct.pack(f'>I{array.ndim}I', 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Return a data directory with 60 + 10 images in the four files, and their arrays; patch the expected checksums."""
    rng = np.random.default_rng(2)
    arrays = {name: rng.integers(0, 10 if len(shape) == 1 else 256, shape) for name, shape in SHAPES.items()}
    folder = tmp_path / 'mnist'
    folder.mkdir()
    expected = {}
    for name, array in arrays.items():
        packed = gzip.compress(idx(array), mtime=0)
        (folder / f'{name}.gz').write_bytes(packed)
        expected[name] = (len(packed), hashlib.sha256(packed).hexdigest(),
                          hashlib.sha256(idx(array)).hexdigest(), array.shape)
    monkeypatch.setattr(datasets, 'MNIST_FILES', expected)
    monkeypatch.setattr(datasets, 'MNIST_MIRRORS', ())
    return tmp_path, arrays


def test_mnist_is_split_as_published(small_mnist):
    data_dir, arrays = small_mnist
    mnist = datasets.load('mnist', data_dir, 10)
    assert mnist.published and 'the published files' in str(mnist) and 'NOT' not in str(mnist)
    images = np.concatenate([mnist.train.images, mnist.validation.images])[..., 0]
    np.testing.assert_array_equal(images, arrays['train-images-idx3-ubyte'])
    np.testing.assert_array_equal(mnist.validation.labels, arrays['train-labels-idx1-ubyte'][50:])
    np.testing.assert_array_equal(mnist.test.labels, arrays['t10k-labels-idx1-ubyte'])
    assert mnist.train.images.shape == (50, 28, 28, 1) and mnist.train.images.dtype == np.uint8


def test_unpacked_files_do_as_well(small_mnist):
    data_dir, _ = small_mnist
    for path in (data_dir / 'mnist').glob('*.gz'):
        path.with_suffix('').write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert datasets.load('mnist', data_dir, 10).published


def test_files_that_a_browser_unpacked_or_another_program_named(small_mnist):
    """Raw files called .gz, and names with a dot before idx."""
    data_dir, _ = small_mnist
    first, second, *_ = sorted((data_dir / 'mnist').iterdir())
    first.write_bytes(gzip.decompress(first.read_bytes()))
    second.rename(second.with_name(second.name.replace('-idx', '.idx')))
    assert datasets.load('mnist', data_dir, 10).published


def test_other_images_in_the_same_format_are_read_and_named(small_mnist):
    data_dir, arrays = small_mnist
    published = datasets.load('mnist', data_dir, 10)
    other = arrays['t10k-images-idx3-ubyte'].copy()
    other[3, 3, 3] ^= 1
    (data_dir / 'mnist' / 't10k-images-idx3-ubyte.gz').write_bytes(gzip.compress(idx(other)))
    mnist = datasets.load('mnist', data_dir, 10)
    assert not mnist.published and 'NOT the published files' in str(mnist)
    assert mnist.sha256 != published.sha256


def test_damaged_files_are_refused_by_name(small_mnist):
    data_dir, arrays = small_mnist
    images, labels = arrays['t10k-images-idx3-ubyte'], arrays['t10k-labels-idx1-ubyte']
    packed = gzip.compress(idx(images))
    damages = [
        ('t10k-images-idx3-ubyte.gz', b'<html>404</html>', 'starts with 3c68746d'),
        ('t10k-images-idx3-ubyte.gz', b'', 'starts with'),
        ('t10k-images-idx3-ubyte.gz', packed[:-20], 'cannot be read'),
        ('t10k-images-idx3-ubyte.gz', packed[:100] + b'~' + packed[101:], 'cannot be read'),
        ('t10k-images-idx3-ubyte.gz', gzip.compress(idx(images)[:-1]), 'shorter than'),
        ('t10k-images-idx3-ubyte.gz', gzip.compress(idx(images) + bytes(10 ** 7)), 'longer than'),
        ('t10k-images-idx3-ubyte.gz', gzip.compress(idx(images[:9])), 'IDX header'),
        ('t10k-images-idx3-ubyte.gz', gzip.compress(idx(labels)), 'IDX header'),
        ('t10k-labels-idx1-ubyte.gz', gzip.compress(idx(labels + 10)), 'labels are 0 to 9'),
    ]
    for name, content, reason in damages:
        path = data_dir / 'mnist' / name
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(TwtaError, match=reason) as error:
            datasets.load('mnist', data_dir, 10)
        assert str(path) in str(error.value) and '\n' not in str(error.value)
        assert path.read_bytes() == content  # never overwritten
        path.write_bytes(whole)


def test_digits_need_no_network_and_are_split_once_and_for_all(tmp_path):
    digits = datasets.load('digits', tmp_path / 'absent')
    assert [len(split.labels) for split in (digits.train, digits.validation, digits.test)] == [1200, 297, 300]
    assert digits.train.images.shape[1:] == (28, 28, 1) and digits.train.images.dtype == np.uint8
    assert digits.train.images.max() == 255 and digits.train.images.min() == 0
    assert not digits.published and 'not MNIST' in str(digits)
    assert digits.train.labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    everything = np.concatenate([split.images for split in (digits.train, digits.validation, digits.test)])
    assert len(np.unique(everything, axis=0)) == 1797  # no image in two splits


@pytest.mark.skipif(not SHARED_MNIST.exists(), reason=f'needs the real MNIST in {SHARED_MNIST}')
def test_the_real_files_are_the_published_ones():
    mnist = datasets.load('mnist', SHARED_MNIST.parent)
    assert mnist.published
    assert [len(split.labels) for split in (mnist.train, mnist.validation, mnist.test)] == [50000, 10000, 10000]
    assert mnist.train.labels[:5].tolist() == [5, 0, 4, 1, 9] and mnist.test.labels[:5].tolist() == [7, 2, 1, 0, 4]


# ----------------------------------------------------------------------------------------------------------------------
# Downloads

CONTENT = np.random.default_rng(3).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


MOVED = {'/moved': '/good', '/loop': '/loop', '/nowhere': 'http://a..b/x', '/no_address': 'http://[bad/'}


class Handler(BaseHTTPRequestHandler):
    """A server: /good serves ranges, /whole ignores them, /wrong serves other bytes, others do what their names say."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers['Range']))
        asked = [path for path, _ in self.server.requests].count(self.path)
        if self.path == '/absent':
            return self.send_error(404)
        if self.path in ('/busy', '/too_many') and asked < 3:
            return self.send_error({'/busy': 503, '/too_many': 429}[self.path])
        if self.path in MOVED:
            self.send_response(302)
            self.send_header('Location', MOVED[self.path])
            return self.end_headers()
        start = int(self.headers['Range'].removeprefix('bytes=').removesuffix('-'))
        content = bytes(len(CONTENT)) if self.path == '/wrong' else CONTENT
        ranges = self.path not in ('/whole', '/wrong', '/endless')
        self.send_response(206 if ranges else 200)
        if ranges:
            first = 0 if self.path == '/other_range' else start
            self.send_header('Content-Range', f'bytes {first}-{len(content) - 1}/{len(content)}')
            content = content[first:]
        length = {'/says_less': len(content) // 2, '/says_more': len(content) + 1000}.get(self.path, len(content))
        if self.path != '/endless':
            self.send_header('Content-Length', str(length))
        self.end_headers()
        if self.path == '/stalls' and asked < 2:
            self.wfile.write(content[:100_000])
            time.sleep(3)
        elif self.path == '/drips' and asked < 2:
            for i in range(10):
                self.wfile.write(content[i:i + 1])
                time.sleep(0.3)
        elif self.path == '/endless':
            with contextlib.suppress(OSError):  # until the client closes the connection
                while True:
                    self.wfile.write(content)
        else:
            self.wfile.write(content[:100_000] if self.path == '/breaks' else content)

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    monkeypatch.setattr(download, 'WAITS', (0, 0.01, 0.02))


@pytest.fixture
def server():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.requests = []
    server.handle_error = lambda *_: None  # a client that hangs up is not an error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(server, path, *names, sha256=SHA256):
    urls = [f'http://127.0.0.1:{server.server_port}/{name}' for name in names]
    download.download(urls, path, len(CONTENT), sha256, 'put it there')


def test_download(server, tmp_path):
    fetch(server, tmp_path / 'new' / 'file', 'good')
    assert (tmp_path / 'new' / 'file').read_bytes() == CONTENT
    assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == ['.lock', 'file']


@pytest.mark.parametrize('second', ['good', 'whole'])
def test_a_broken_download_goes_on_at_the_next_mirror_and_in_the_next_call(server, tmp_path, second, monkeypatch):
    with monkeypatch.context() as context, pytest.raises(TwtaError, match='100,000 of 300,000 bytes'):
        context.setattr(download, 'WAITS', (0,))
        fetch(server, tmp_path / 'file', 'breaks')
    assert not (tmp_path / 'file').exists()
    fetch(server, tmp_path / 'file', 'absent', 'breaks', second)
    assert (tmp_path / 'file').read_bytes() == CONTENT
    assert server.requests[1:] == [('/absent', 'bytes=100000-'), ('/breaks', 'bytes=100000-'),
                                   (f'/{second}', 'bytes=200000-')]


def test_mirrors_are_asked_again_but_not_for_what_they_do_not_have(server, tmp_path, capsys):
    fetch(server, tmp_path / 'file', 'absent', 'breaks')
    assert (tmp_path / 'file').read_bytes() == CONTENT
    assert server.requests == [('/absent', 'bytes=0-'), ('/breaks', 'bytes=0-'), ('/breaks', 'bytes=100000-'),
                               ('/breaks', 'bytes=200000-')]
    assert 'file has not arrived; trying again in 0.01 s' in capsys.readouterr().out


@pytest.mark.parametrize('name, requests', [('busy', 3), ('too_many', 3), ('stalls', 2), ('drips', 2), ('moved', 2),
                                            ('says_more', 1)])
def test_from_a_server_with_a_fault(server, tmp_path, monkeypatch, name, requests):
    """The next request resumes after the bytes that have arrived."""
    if name in ('stalls', 'drips'):
        monkeypatch.setattr(download, 'TIMEOUT', 1)
    fetch(server, tmp_path / 'file', name)
    assert (tmp_path / 'file').read_bytes() == CONTENT and len(server.requests) == requests
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.lock', 'file']


def test_says_less(server, tmp_path):
    """Each answer brings half of the rest: the file is incomplete after three rounds, and the next call resumes."""
    with pytest.raises(TwtaError, match='ended after 262,500 of 300,000 bytes'):
        fetch(server, tmp_path / 'file', 'says_less')
    fetch(server, tmp_path / 'file', 'good')
    assert (tmp_path / 'file').read_bytes() == CONTENT


@pytest.mark.parametrize('name, reason', [
    ('loop', 'infinite loop'), ('nowhere', 'label'),
    ('no_address', 'IPv6|bad'), ('endless', 'its SHA-256 is'), ('wrong', 'its SHA-256 is'),
    ('other_range', r'asked for the bytes from 1 on, got bytes 0-299999/300000')])
def test_a_wrong_answer_never_gets_the_name(server, tmp_path, name, reason):
    (tmp_path / 'file.part').write_bytes(CONTENT[:1])
    with pytest.raises(TwtaError, match=reason) as error:
        fetch(server, tmp_path / 'file', name)
    assert '\n' not in str(error.value) and not (tmp_path / 'file').exists()
    fetch(server, tmp_path / 'file', name, 'good')
    assert (tmp_path / 'file').read_bytes() == CONTENT


@pytest.mark.parametrize('part', [bytes(len(CONTENT)), bytes(len(CONTENT) + 1), bytes(1000)])
def test_what_is_wrong_in_the_part_is_not_blamed_on_a_mirror(server, tmp_path, part):
    (tmp_path / 'file.part').write_bytes(part)
    fetch(server, tmp_path / 'file', 'good')
    assert (tmp_path / 'file').read_bytes() == CONTENT


def test_tls_is_not_left(tmp_path):
    request = urllib.request.Request('https://example.org/file')
    with pytest.raises(urllib.error.URLError, match=r'redirected to .*, which is not https'):
        download.Redirects().redirect_request(request, None, 302, 'Found', {}, 'http://example.org/file')


def test_a_fault_of_the_disk_is_not_blamed_on_the_mirrors(server, tmp_path):
    (tmp_path / 'file.part').mkdir()
    with pytest.raises(IsADirectoryError):
        fetch(server, tmp_path / 'file', 'good')


@pytest.mark.parametrize('method', [(http.client.HTTPResponse, 'read1'), (http.client.HTTPConnection, 'getresponse')])
def test_a_fault_of_the_network_is_not_taken_for_one_of_the_disk(server, tmp_path, monkeypatch, method):
    tries = []

    def unreachable(*_):
        tries.append(1)
        raise OSError(errno.EHOSTUNREACH, 'No route to host')

    monkeypatch.setattr(*method, unreachable)
    with pytest.raises(TwtaError, match='No route to host'):
        fetch(server, tmp_path / 'file', 'good')
    assert len(tries) == 3


def test_two_that_want_the_same_file_download_it_once(server, tmp_path):
    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(fetch, server, tmp_path / 'file', 'good') for _ in range(4)]:
            future.result()
    assert (tmp_path / 'file').read_bytes() == CONTENT and len(server.requests) == 1


def test_without_a_network_the_message_names_every_mirror(server, tmp_path):
    port = server.server_port
    server.shutdown()
    server.server_close()
    with pytest.raises(TwtaError) as error:
        urls = [f'http://127.0.0.1:{port}/{name}' for name in 'ab']
        download.download(urls, tmp_path / 'file', 1, '', 'put it there')
    assert f'{port}/a: ' in str(error.value) and f'{port}/b: ' in str(error.value) and '\n' not in str(error.value)


def test_absent_mnist_is_downloaded(server, small_mnist, monkeypatch):
    data_dir, _ = small_mnist
    name = 't10k-labels-idx1-ubyte.gz'
    path = data_dir / 'mnist' / name
    monkeypatch.setattr(Handler, 'do_GET', lambda self: (
        self.send_response(200), self.end_headers(), self.wfile.write(packed)))
    monkeypatch.setattr(datasets, 'MNIST_MIRRORS', (f'http://127.0.0.1:{server.server_port}/',))
    packed = path.read_bytes()
    path.unlink()
    assert datasets.load('mnist', data_dir, 10).published
    assert path.read_bytes() == packed


def test_mirrors_are_trusted_over_tls_only():
    assert all(mirror.startswith('https://') for mirror in datasets.MNIST_MIRRORS)
