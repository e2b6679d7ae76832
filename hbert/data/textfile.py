"""Text on disk: one paragraph a line and a blank line between documents, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hbert.errors import HbertError

from .storage import building, sha256_file, write_json


@dataclass(frozen=True)
class TextFile:
    """One source on disk: plain text (a blank line between documents) or ``.jsonl`` with a ``text`` field."""

    name: str
    path: Path
    sha256: str

    def documents(self) -> Iterator[list[str]]:
        """Yields the documents as lists of non-empty paragraphs.

        Raises:
            HbertError: the file is not UTF-8, or a JSON line has no string ``text``, or half a character in it.
        """
        reader = _json_documents if self.path.suffix == ".jsonl" else _plain_documents
        with open(self.path, encoding="utf-8") as file:
            try:
                yield from reader(file)
            except UnicodeDecodeError as error:
                raise HbertError(f"{self.path} is not UTF-8 text: {error}") from error
            except _LineError as error:
                raise HbertError(f"{self.path}, {error}") from error


def text_paragraphs(text: str) -> list[str]:
    """Splits a document into its non-empty lines.

    Raises:
        UnicodeEncodeError: half of a pair of surrogates, which JSON can hold, and UTF-8 cannot.
    """
    text.encode()
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


def write_documents(folder: Path, documents: Iterable[list[str]], origin: Mapping[str, str]) -> None:
    """Writes a new folder of ``text.txt`` and ``meta.json`` (its digest and origin), all or nothing."""
    with building(folder) as temporary:
        text = temporary / "text.txt"
        with open(text, "w", encoding="utf-8", newline="\n") as file:
            for paragraphs in documents:
                file.write("\n".join(paragraphs) + "\n\n")
        write_json(temporary / "meta.json", {**origin, "sha256": sha256_file(text)})


class _LineError(ValueError):
    pass


def _plain_documents(lines: Iterable[str]) -> Iterator[list[str]]:
    paragraphs: list[str] = []
    for line in lines:
        if stripped := line.strip():
            paragraphs.append(stripped)
        elif paragraphs:
            yield paragraphs
            paragraphs = []
    if paragraphs:
        yield paragraphs


def _json_documents(lines: Iterable[str]) -> Iterator[list[str]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _LineError(f"line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise _LineError(f'line {number}: no string field "text"')
        try:
            paragraphs = text_paragraphs(row["text"])
        except UnicodeEncodeError as error:
            raise _LineError(f'line {number}: "text" is not Unicode text ({error})') from error
        if paragraphs:
            yield paragraphs
