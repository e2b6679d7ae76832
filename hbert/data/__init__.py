"""Text for masked language modelling: corpora, tokenizers, token caches and masked batches.

Needs neither torch nor transformers. The quickest real batches::

    corpus = load_corpus(["wiki_vital"])
    cache = TokenCache.build(corpus, train_tokenizer(corpus))
    batch = MaskedBatches(cache, cache.train.blocks(128), batch_size=8)[0]
"""

from hbert.errors import FetchError, HbertError

from .corpus import Corpus, Document, load_corpus
from .masking import MaskedBatch, MaskedBatches, mask_tokens, step_rng
from .ngram import NgramMarks, ngram_marks
from .token_cache import Blocks, TokenCache, TokenSplit
from .tokenizer import load_tokenizer, packaged_tokenizer, save_tokenizer, train_tokenizer

__all__ = [
    "Blocks",
    "Corpus",
    "Document",
    "FetchError",
    "HbertError",
    "MaskedBatch",
    "MaskedBatches",
    "NgramMarks",
    "TokenCache",
    "TokenSplit",
    "load_corpus",
    "load_tokenizer",
    "mask_tokens",
    "ngram_marks",
    "packaged_tokenizer",
    "save_tokenizer",
    "step_rng",
    "train_tokenizer",
]
