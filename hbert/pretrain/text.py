"""The text of a run: corpus, tokenizer and token cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from hbert.data import Corpus, HbertError, TokenCache, load_corpus, load_tokenizer, train_tokenizer
from hbert.data.sources import resolve_names
from hbert.data.tokenizer import tokenizer_digest

from .settings import Settings


@dataclass(frozen=True)
class Text:
    """A corpus and its tokens."""

    corpus: Corpus
    tokenizer: Tokenizer
    cache: TokenCache

    def record(self) -> dict[str, Any]:
        """What a run keeps of it."""
        sources = {file.name: {"sha256": file.sha256, **self._tokens(file.name)} for file in self.corpus.files}
        splits = {split: self.cache.meta["splits"][split]["tokens"] for split in ("train", "held_out")}
        return {
            "corpus": {"fingerprint": self.corpus.fingerprint, "tokens": splits, "sources": sources},
            "tokenizer": {"sha256": tokenizer_digest(self.tokenizer), "vocab_size": self.cache.vocab_size},
            "token_cache": str(self.cache.path),
        }

    def _tokens(self, source: str) -> dict[str, int]:
        return {split: self.cache.source_tokens(split, source) for split in ("train", "held_out")}


def prepare_text(settings: Settings, say: Callable[[str], None]) -> Text:
    """Fetches, tokenizes and caches what is not in the cache yet; ``say`` takes each source's licence.

    Raises:
        HbertError: there is no text, or less than one block of it to train on or to evaluate on.
    """
    names = [settings.recipe_corpus] if settings.recipe_corpus else []
    for source in resolve_names(names):
        say(f"{source.name}: {source.licence}; {source.attribution}")
    corpus = load_corpus(names, text=settings.data)
    if settings.tokenizer is None:
        tokenizer = train_tokenizer(corpus, settings.recipe.vocab_size)
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
    cache = TokenCache.build(corpus, tokenizer)
    _check_length(cache, settings.recipe.block_size)
    return Text(corpus, tokenizer, cache)


def _check_length(cache: TokenCache, block_size: int) -> None:
    tokens = len(cache.train.tokens)
    if tokens < block_size:
        raise HbertError(f"the training text has {tokens:,} tokens: less than one block of {block_size}")
    longest = max((cache.source_tokens("held_out", name) for name in cache.held_out.spans), default=0)
    if longest < block_size:
        raise HbertError(
            f"no source has a block of {block_size} held-out tokens: 3 % of the documents are held out; in "
            "text files a blank line stands between documents"
        )
