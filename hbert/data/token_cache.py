"""Tokenized corpora on disk: memory-mapped token streams with document offsets and per-source spans."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from hbert.errors import HbertError

from .corpus import Corpus, Document
from .storage import building, cache_dir, content_key, read_json, write_json
from .terminal import progress
from .tokenizer import special_ids, tokenizer_digest

TOKEN_CACHE_VERSION = 1
SPLITS = ("train", "held_out")
_BATCH_CHARS = 1_000_000


class Blocks:
    """Consecutive blocks of ``length`` tokens of a stream; the remainder at the end is left out.

    A map-style data set: ``blocks[i]`` is an int32 array [length]; a slice or an integer array of k indices
    gives [k, length].
    """

    def __init__(self, tokens: NDArray[Any], length: int) -> None:
        if length < 1:
            raise HbertError(f"a block has at least one token, not {length}")
        count = len(tokens) // length
        self._rows = tokens[: count * length].reshape(count, length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice | NDArray[np.integer]) -> NDArray[np.int32]:
        return np.asarray(self._rows[index], dtype=np.int32)

    def __iter__(self) -> Iterator[NDArray[np.int32]]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class TokenSplit:
    """A stream of documents, each [CLS] ... [SEP].

    ``tokens`` is [T] (uint16 or int32, memory-mapped), ``offsets`` [documents + 1] are positions in it, and
    ``spans`` maps a source's name to its (first, last + 1) document.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    spans: dict[str, tuple[int, int]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> NDArray[np.int32]:
        """Returns the tokens of one document, int32 [n]."""
        start, end = self.offsets[range(len(self))[index] + np.arange(2)]
        return np.asarray(self.tokens[start:end], dtype=np.int32)

    def blocks(self, length: int) -> Blocks:
        """Returns the stream cut into blocks of ``length`` tokens."""
        return Blocks(self.tokens, length)

    def source(self, name: str) -> TokenSplit:
        """Returns the documents of one source only.

        Raises:
            HbertError: no such source in this split.
        """
        if name not in self.spans:
            raise HbertError(f"no source {name!r} in this token cache; it has: {', '.join(self.spans)}")
        first, last = self.spans[name]
        start, end = self.offsets[first], self.offsets[last]
        return TokenSplit(self.tokens[start:end], self.offsets[first : last + 1] - start, {name: (0, last - first)})


class TokenCache:
    """A corpus encoded with a tokenizer, one directory; made by ``build``, opened by ``TokenCache(path)``.

    Attributes: ``train`` and ``held_out`` (``TokenSplit``), ``vocab_size``, ``mask_id`` and ``special_ids``
    (token to id).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "meta.json").is_file():
            raise HbertError(f"{self.path} is not a token cache")
        self.meta: dict[str, Any] = read_json(self.path / "meta.json")
        self.vocab_size: int = self.meta["vocab_size"]
        self.special_ids: dict[str, int] = self.meta["special_ids"]
        self.mask_id = self.special_ids["[MASK]"]

    @classmethod
    def build(cls, corpus: Corpus, tokenizer: Tokenizer) -> TokenCache:
        """Returns the cache of this corpus and tokenizer, encoding the corpus if it is not there yet.

        Raises:
            HbertError: the corpus has no training document, or the tokenizer lacks a special token.
        """
        key = content_key(corpus.fingerprint, tokenizer_digest(tokenizer), TOKEN_CACHE_VERSION)
        folder = cache_dir() / "tokens" / key
        if not folder.is_dir():
            with building(folder) as temporary:
                _encode_corpus(corpus, tokenizer, temporary)
        return cls(folder)

    @cached_property
    def train(self) -> TokenSplit:
        """The documents to train on."""
        return self._open("train")

    @cached_property
    def held_out(self) -> TokenSplit:
        """The documents kept for evaluation."""
        return self._open("held_out")

    def source_tokens(self, split: str, name: str) -> int:
        """Returns how many tokens of ``"train"`` or ``"held_out"`` are from this source."""
        documents: TokenSplit = getattr(self, split)
        return len(documents.source(name).tokens) if name in documents.spans else 0

    def _open(self, split: str) -> TokenSplit:
        # NumPy cannot map an empty file part, so an empty split is read.
        mode: Literal["r"] | None = "r" if self.meta["splits"][split]["tokens"] else None
        tokens = np.load(self.path / f"{split}.npy", mmap_mode=mode)
        spans = {name: (first, last) for name, (first, last) in self.meta["splits"][split]["spans"].items()}
        return TokenSplit(tokens, np.load(self.path / f"{split}.offsets.npy"), spans)


class _SplitWriter:
    """Appends documents of one split to a raw file; ``finish`` turns it into .npy files."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any]) -> None:
        self._base = folder / split
        self._dtype = dtype
        self._raw: BinaryIO = open(folder / f"{split}.raw", "w+b")
        self._ends = [0]
        self.spans: dict[str, tuple[int, int]] = {}

    def append(self, source: str, ids: list[int]) -> None:
        self._raw.write(np.asarray(ids, dtype=self._dtype).tobytes())
        documents = len(self._ends) - 1
        first, _ = self.spans.get(source, (documents, documents))
        self.spans[source] = (first, documents + 1)
        self._ends.append(self._ends[-1] + len(ids))

    def finish(self) -> dict[str, Any]:
        tokens = self._ends[-1]
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (tokens,)}
        with open(f"{self._base}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            self._raw.seek(0)
            shutil.copyfileobj(self._raw, file)
        self._raw.close()
        Path(self._raw.name).unlink()
        np.save(f"{self._base}.offsets.npy", np.asarray(self._ends, dtype=np.int64))
        return {"tokens": tokens, "documents": len(self._ends) - 1, "spans": self.spans}


def _encode_corpus(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    ids = special_ids(tokenizer)
    vocab_size = tokenizer.get_vocab_size()
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
    writers = [_SplitWriter(folder, split, dtype) for split in SPLITS]
    encoder = _plain_text_encoder(tokenizer)
    with progress("tokenize", corpus.size) as advance:
        for batch in _batches(corpus.documents()):
            encodings = encoder.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
            for document, encoding in zip(batch, encodings, strict=True):
                writers[document.held_out].append(document.source, [ids["[CLS]"], *encoding.ids, ids["[SEP]"]])
            advance(sum(len(document.text) for document in batch))
    splits = {split: writer.finish() for split, writer in zip(SPLITS, writers, strict=True)}
    if not splits["train"]["documents"]:
        raise HbertError("the corpus has no training document")
    meta = {"vocab_size": vocab_size, "special_ids": ids, "tokenizer_sha256": tokenizer_digest(tokenizer)}
    sources = {file.name: file.sha256 for file in corpus.files}
    write_json(folder / "meta.json", meta | {"corpus": corpus.fingerprint, "sources": sources, "splits": splits})


def _plain_text_encoder(tokenizer: Tokenizer) -> Tokenizer:
    encoder = Tokenizer.from_str(tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    # A literal "[MASK]" in the text is text, not a mask.
    encoder.encode_special_tokens = True
    return encoder


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
