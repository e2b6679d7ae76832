"""Writes that are complete or not there: on the disk before they get their name, on systems that are strict, too."""

import errno
import os
import stat

import pytest

from hbert.data import storage
from hbert.pretrain.checkpoint import complete_folder


class System:
    """The ``os`` of the module, which notes what is synced and named, with Windows's rules where ``name`` is "nt"."""

    def __init__(self, name):
        self.name = name
        self.calls = []
        self._open = {}

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags):
        if self.name == "nt" and os.path.isdir(path):
            raise PermissionError(f"{path} is a directory")
        descriptor = os.open(path, flags)
        self._open[descriptor] = (os.path.basename(path), flags)
        return descriptor

    def fsync(self, descriptor):
        name, flags = self._open[descriptor]
        if self.name == "nt" and not flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError("not open for writing")
        os.fsync(descriptor)
        self.calls.append(("sync", "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else name))

    def replace(self, source, target):
        self.calls.append(("name", os.path.basename(target)))
        os.replace(source, target)

    def rename(self, source, target):
        if self.name == "nt" and os.path.exists(target):
            raise FileExistsError(f"{target} exists")
        self.calls.append(("name", os.path.basename(target)))
        os.rename(source, target)


@pytest.fixture(params=["posix", "nt"])
def system(request, monkeypatch):
    system = System(request.param)
    monkeypatch.setattr(storage, "os", system)
    return system


def test_a_file_is_on_the_disk_before_its_name(system, tmp_path):
    storage.write_json(tmp_path / "a.json", {"old": 1})
    system.calls.clear()
    storage.write_json(tmp_path / "a.json", {"new": 2})
    assert storage.read_json(tmp_path / "a.json") == {"new": 2}
    (kind, name), *later = system.calls
    assert kind == "sync" and name.startswith(".a.json.")
    assert later == [("name", "a.json"), *([("sync", "folder")] if system.name == "posix" else [])]


def test_files_are_on_the_disk_before_they_are_moved(system, tmp_path):
    (tmp_path / "temporary").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).write_text("old")
        (tmp_path / "temporary" / name).write_text(name)
    storage.move_files(tmp_path / "temporary", tmp_path)
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["one", "two"]
    *files, third, fourth = system.calls[:4]
    assert files == [("sync", "one"), ("sync", "two")] and [third, fourth] == [("name", "one"), ("name", "two")]
    assert system.calls[4:] == ([("sync", "folder")] if system.name == "posix" else [])


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("8 requested and 0 written")]
)
@pytest.mark.parametrize("write", [storage.building, storage.replacing])
def test_a_full_disk_is_named(tmp_path, monkeypatch, write, error):
    monkeypatch.setenv("HBERT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OSError) as raised, write(tmp_path / "cache" / "entry"):
        raise error
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "cache" / "entry")
    refusal = storage.cache_refusal(raised.value)
    assert refusal.startswith(f"the cache {tmp_path / 'cache'} cannot be used: ") and "make room, or" in refusal
    assert storage.cache_refusal(error) is None
    monkeypatch.setenv("HBERT_CACHE", str(tmp_path / "another"))
    assert storage.cache_refusal(raised.value) is None


@pytest.mark.parametrize("write", [storage.building, complete_folder])
@pytest.mark.parametrize("empty", [False, True])
def test_a_folder_is_on_the_disk_before_its_name(system, tmp_path, write, empty):
    if empty:
        (tmp_path / "folder").mkdir()
    with write(tmp_path / "folder") as temporary:
        for name in ("one", "two"):
            (temporary / name).write_text(name)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["one", "two"]
    synced = system.calls[: system.calls.index(("name", "folder"))]
    folders = [("sync", "folder")] if system.name == "posix" else []
    assert sorted(synced) == sorted([("sync", "one"), ("sync", "two"), *folders])
    assert system.calls[len(synced) + 1 :] == folders


def test_a_folder_that_another_process_has_finished_stays(system, tmp_path):
    with storage.building(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("ours")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").write_text("theirs")
    assert (tmp_path / "folder" / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
