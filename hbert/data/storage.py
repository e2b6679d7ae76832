"""The user's cache directory, and writes that are either complete or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Returns the cache root: ``$HBERT_CACHE``, else ``$XDG_CACHE_HOME/hbert``, else ``~/.cache/hbert``."""
    if root := os.environ.get("HBERT_CACHE"):
        return Path(root).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hbert"


def temporary_sibling(path: Path) -> Path:
    """Returns an unused name beside ``path``, ``.NAME.XXXXXXXX.tmp``, and makes their folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path that takes the place of ``path`` if the block succeeds, else is removed."""
    temporary = temporary_sibling(path)
    try:
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
