"""A corpus: an ordered list of text sources, deduplicated and split (training, held out) on reading."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hbert.errors import HbertError

from .hf_dataset import export_dataset
from .prose import ParagraphDeduplicator
from .sources import fetch_source, resolve_names
from .storage import content_key, read_json, sha256_file
from .terminal import progress
from .textfile import TextFile

CORPUS_VERSION = 1
HELD_OUT_SHARE = 0.03


@dataclass(frozen=True)
class Document:
    """One document after deduplication: its paragraphs joined by newlines."""

    source: str
    text: str
    held_out: bool


@dataclass
class SourceStatistics:
    """What one source contributes; ``megabytes`` are 10^6 bytes of UTF-8 text."""

    documents: int = 0
    held_out_documents: int = 0
    paragraphs: int = 0
    duplicate_paragraphs: int = 0
    megabytes: float = 0.0


@dataclass(frozen=True)
class Corpus:
    """Text sources in order, of different names. Reading drops paragraphs that stood anywhere before in the corpus."""

    files: tuple[TextFile, ...]

    @property
    def fingerprint(self) -> str:
        """Names the content: sources, their digests, and the rules of reading."""
        sources = [(file.name, file.sha256) for file in self.files]
        return content_key(sources, CORPUS_VERSION, HELD_OUT_SHARE)

    @property
    def size(self) -> int:
        """Bytes of all source files."""
        return sum(file.path.stat().st_size for file in self.files)

    def documents(self) -> Iterator[Document]:
        """Yields the documents, source after source, without what is left empty by deduplication."""
        for source, paragraphs, unique in self._deduplicated():
            if unique:
                yield Document(source, "\n".join(unique), is_held_out(paragraphs))

    def train_texts(self) -> Iterator[str]:
        """Yields the texts of the training documents."""
        return (document.text for document in self.documents() if not document.held_out)

    def statistics(self) -> dict[str, SourceStatistics]:
        """Reads the corpus once and counts what each source contributes."""
        counts = {file.name: SourceStatistics() for file in self.files}
        with progress("read the corpus", self.size) as advance:
            for source, paragraphs, unique in self._deduplicated():
                text = "\n".join(unique)
                entry = counts[source]
                entry.documents += bool(unique)
                entry.held_out_documents += bool(unique) and is_held_out(paragraphs)
                entry.paragraphs += len(unique)
                entry.duplicate_paragraphs += len(paragraphs) - len(unique)
                entry.megabytes += len(text.encode()) / 1e6
                advance(sum(map(len, paragraphs)))
        return counts

    def _deduplicated(self) -> Iterator[tuple[str, list[str], list[str]]]:
        seen = ParagraphDeduplicator()
        for file in self.files:
            for paragraphs in file.documents():
                yield file.name, paragraphs, [paragraph for paragraph in paragraphs if seen.is_new(paragraph)]


def load_corpus(
    names: str | Sequence[str] = (),
    *,
    text: Iterable[str | Path] = (),
    dataset: str | None = None,
    dataset_config: str | None = None,
) -> Corpus:
    """Returns a corpus of named sources, text files and a Hugging Face data set, in this order.

    A file or folder is named by its last part, so that the same text is the same corpus wherever it lies; where
    that is the name of another source, too, digits of the file's digest follow.

    Args:
        names: source or recipe names (``hbert corpus --list``), fetched where they are not in the cache yet.
        text: UTF-8 files with a blank line between documents, or ``.jsonl`` files with a ``text`` field.
        dataset: name or folder of a data set with a ``text`` column; its ``train`` split is cached.
        dataset_config: the data set's configuration, where it has several.

    Raises:
        FetchError: a package could not be downloaded.
        HbertError: nothing was asked for, an unknown name, a missing or unreadable file, two sources of one name.
    """
    chosen = resolve_names([names] if isinstance(names, str) else names)
    others = [source.name for source in chosen] + ([] if dataset is None else [_dataset_name(dataset)])
    own = _named_files(_different_files(text), others)
    _check_names([*others, *(file.name for file in own)])
    files = [_extracted_file(source.name, fetch_source(source)) for source in chosen] + own
    if dataset is not None:
        files.append(_extracted_file(_dataset_name(dataset), export_dataset(dataset, dataset_config)))
    if not files:
        raise HbertError("an empty corpus: name a source or recipe, a text file, or a data set")
    return Corpus(tuple(files))


def is_held_out(paragraphs: Sequence[str]) -> bool:
    """Tells whether a document belongs to the held-out split: a hash of its content below ``HELD_OUT_SHARE``.

    It depends on the document alone, so it stays on its side in every corpus.
    """
    digest = hashlib.blake2b("\n".join(paragraphs).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def _extracted_file(name: str, path: Path) -> TextFile:
    return TextFile(name, path, read_json(path.with_name("meta.json"))["sha256"])


def _different_files(names: Iterable[str | Path]) -> list[Path]:
    """The files of these paths; one that is named twice, in whatever way, counts once."""
    found: dict[Path, Path] = {}
    for path in map(Path, names):
        if not path.is_file():
            raise HbertError(f"no such text file: {path}")
        found.setdefault(path.resolve(), path)
    return list(found.values())


def _dataset_name(dataset: str) -> str:
    return Path(dataset).resolve().name if Path(dataset).is_dir() else dataset


def _named_files(paths: Sequence[Path], others: Sequence[str]) -> list[TextFile]:
    taken = Counter([*others, *(path.name for path in paths)])
    digests = [_digest(path) for path in paths]
    names = [
        path.name if taken[path.name] == 1 else f"{path.name}-{digest[:8]}"
        for path, digest in zip(paths, digests, strict=True)
    ]
    return [TextFile(*entry) for entry in zip(names, paths, digests, strict=True)]


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise HbertError(f"{path} cannot be read: {error.strerror}") from error


def _check_names(names: Sequence[str]) -> None:
    # Tokens, masks and results are kept by source.
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise HbertError(
            f"two sources of text are called {twice[0]!r}; leave one out, or rename the file or folder of yours"
        )
