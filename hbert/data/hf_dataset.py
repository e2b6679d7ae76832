"""A Hugging Face data set as a corpus source: its train split is streamed once into the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hbert.errors import HbertError

from .storage import cache_dir, content_key
from .terminal import progress
from .textfile import text_paragraphs, write_documents


def export_dataset(name: str, config: str | None = None) -> Path:
    """Returns the cached copy of the ``text`` column of a data set's train split, one document a row.

    A hub data set is copied once; a local folder again whenever one of its files has changed.

    Raises:
        HbertError: the ``datasets`` library is missing, or the data set cannot be loaded or read, or has no text.
    """
    key = content_key(name, config, _local_files(Path(name)))
    folder = cache_dir() / "datasets" / f"{Path(name).name}-{key}"
    if not folder.is_dir():
        rows = _stream(name, config)
        with progress(f"copy {name}", None):
            write_documents(folder, _documents(name, rows), {"source": name, "config": config or ""})
    return folder / "text.txt"


def _local_files(path: Path) -> list[tuple[str, int, int]]:
    if not path.is_dir():
        return []
    files = sorted(entry for entry in path.rglob("*") if entry.is_file())
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _stream(name: str, config: str | None) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise HbertError("--dataset needs the datasets library: pip install datasets") from error
    try:
        return datasets.load_dataset(name, config, split="train", streaming=True)
    except Exception as error:
        # A dozen unrelated types are raised here: not found, offline, no such split, ambiguous configuration.
        raise HbertError(f"data set {name!r} cannot be loaded: {error}") from error


def _documents(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[list[str]]:
    for row in _read(name, rows):
        if not isinstance(row.get("text"), str):
            raise HbertError(f"data set {name!r} has no text column of strings; its columns are: {', '.join(row)}")
        if paragraphs := text_paragraphs(row["text"]):
            yield paragraphs


def _read(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    try:
        yield from rows
    except Exception as error:
        # Damaged files, half characters and lost connections are of unrelated types, too.
        raise HbertError(f"data set {name!r} cannot be read: {error}") from error
