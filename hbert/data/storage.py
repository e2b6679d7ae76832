"""The user's cache directory, and writes that are either complete or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_dir() -> Path:
    """Returns the cache root: ``$HBERT_CACHE``, else ``$XDG_CACHE_HOME/hbert``, else ``~/.cache/hbert``."""
    if root := os.environ.get("HBERT_CACHE"):
        return Path(root).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hbert"


def cache_refusal(error: OSError) -> str | None:
    """Returns what an error of the file system means to the user whose cache it is about; None: it is about another."""
    if not isinstance(error.filename, str):
        return None
    cache, path = cache_dir().absolute(), Path(error.filename).absolute()
    above = not os.path.isdir(cache) and cache.is_relative_to(path)  # the folder in which it cannot be made
    if not above and not path.is_relative_to(cache):
        return None
    remedy = "make room, or set" if error.errno in NO_ROOM else "set"
    return f"the cache {cache} cannot be used: {error}; {remedy} $HBERT_CACHE to another folder"


def temporary_sibling(path: Path) -> Path:
    """Returns an unused name beside ``path``, ``.NAME.XXXXXXXX.tmp``, and makes their folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def remains(folder: Path, name: str = "*") -> list[Path]:
    """Returns what writers that were killed have left: the temporary siblings of ``name``, or of every name."""
    return list(folder.glob(f".{name}.{'[0-9a-f]' * 8}.tmp"))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Gives the errors of a full disk the path that they are about; writing names none, and NumPy not even a number."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (None, *NO_ROOM):
            raise OSError(error.errno or errno.ENOSPC, str(error.strerror or error), str(path)) from error
        raise


def sync(path: Path) -> None:
    """Brings a file, or the names in a directory, to the disk."""
    windows, directory = os.name == "nt", path.is_dir()
    if windows and directory:
        return  # which it does not open
    # Windows syncs only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not directory:  # some network file systems sync none, and the files in it are there
            raise
    finally:
        os.close(descriptor)


def move_complete(temporary: Path, folder: Path) -> None:
    """Brings a directory to the disk and gives it its name.

    Raises:
        OSError: ``folder`` is there and not empty, or a file could not be written.
    """
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    if folder.is_dir():
        folder.rmdir()  # only POSIX renames onto an empty folder
    os.rename(temporary, folder)
    sync(folder.parent)


def move_files(temporary: Path, folder: Path) -> None:
    """Brings the files of a directory to the disk and moves them into ``folder``, in place of those of their names.

    Raises:
        OSError: a file could not be written or moved.
    """
    files = sorted(temporary.iterdir())
    for path in files:
        sync(path)
    for path in files:
        os.replace(path, folder / path.name)
    sync(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path that takes the place of ``path`` if the block succeeds, else is removed."""
    temporary = temporary_sibling(path)
    try:
        with _naming(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes ``folder`` if the block succeeds, and is removed if not.

    ``folder`` is named by its content: if another process finished it meanwhile, ours is dropped.
    """
    temporary = temporary_sibling(folder)
    temporary.mkdir()
    try:
        with _naming(folder):
            yield temporary
            try:
                move_complete(temporary, folder)
            except OSError:
                if not folder.is_dir():
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_key(*parts: object) -> str:
    """Returns 16 hex digits that name this combination of JSON-serialisable values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
