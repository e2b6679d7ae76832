"""The n-gram marks of runs, counted on each run's own tokens and kept as JSON beside the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hbert.data.ngram import NgramMarks, ngram_marks
from hbert.data.storage import cache_dir, content_key, read_json, write_json
from hbert.data.token_cache import TokenCache
from hbert.data.tokenizer import load_tokenizer, tokenizer_digest
from hbert.errors import HbertError

from .run_folder import Run

FILE_NAME = "ngram-marks.json"
DRAWN = {"unigram": "unigram", "left_bigram": "left bigram", "trigram": "trigram"}


def marks_of(runs: Sequence[Run], folder: Path) -> dict[tuple[str, str], NgramMarks | HbertError]:
    """Returns the marks of each different text among the runs (by ``Run.text_key``), or why there are none.

    Marks are taken from ``folder``/ngram-marks.json where they stand there; what had to be counted is added
    to that file, so that the report can be made again without the text.
    """
    file = folder / FILE_NAME
    kept: dict[str, Any] = read_json(file) if file.is_file() else {}
    found: dict[tuple[str, str], NgramMarks | HbertError] = {}
    for run in {run.text_key: run for run in runs}.values():
        name = content_key(*run.text_key)
        try:
            if name not in kept:
                kept[name] = asdict(ngram_marks(tokens_of(run)))
                write_json(file, kept)
            found[run.text_key] = NgramMarks(**kept[name])
        except HbertError as error:
            found[run.text_key] = error
    return found


def tokens_of(run: Run) -> TokenCache:
    """Returns the tokens that a run was trained and evaluated on, made again where they are not in the cache.

    Raises:
        HbertError: the text or the tokenizer is not here, or is another one than the run's.
    """
    info = run.info
    # A record that was moved to another machine: its tokens may be in the cache there.
    for folder in (Path(info.token_cache), cache_dir() / "tokens" / Path(info.token_cache).name):
        if (folder / "meta.json").is_file():
            cache = TokenCache(folder)
            if (cache.meta["corpus"], cache.meta["tokenizer_sha256"]) == run.text_key:
                return cache
    corpus, tokenizer = info.load_corpus(), load_tokenizer(run.path)
    if (corpus.fingerprint, tokenizer_digest(tokenizer)) != run.text_key:
        raise HbertError(f"the text or the tokenizer of {run.label} is no longer the one it was trained with")
    return TokenCache.build(corpus, tokenizer)
