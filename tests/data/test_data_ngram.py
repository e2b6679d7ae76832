from collections import Counter, defaultdict
from math import log2
from types import SimpleNamespace

import numpy as np
import pytest

from hbert.data import HbertError, TokenCache, load_corpus, ngram, ngram_marks

SPECIAL = range(5)


def brute_force(train, held_out, common):
    """The definition, one token at a time."""
    unigrams = Counter(token for token in train if token not in SPECIAL)
    bigrams, trigrams = defaultdict(Counter), defaultdict(Counter)
    for left, word, right in zip(train, train[1:], train[2:], strict=False):
        if word not in SPECIAL:
            bigrams[left][word] += 1
            trigrams[left, right][word] += 1

    def best(counter):
        return min(counter, key=lambda word: (-counter[word], word))

    frequent = sorted(unigrams, key=lambda word: (-unigrams[word], word))[:common]
    hits, rare, seen = Counter(), [], []
    for left, word, right in zip(held_out, held_out[1:], held_out[2:], strict=False):
        if word in SPECIAL:
            continue
        by_left = best(bigrams[left]) if bigrams[left] else best(unigrams)
        by_both = best(trigrams[left, right]) if trigrams[left, right] else by_left
        hits.update(unigram=word == best(unigrams), left=word == by_left, both=word == by_both)
        seen.append(bool(trigrams[left, right]))
        if word not in frequent:
            rare.append(word == by_both)
    total = sum(unigrams.values())
    entropy = -sum(count / total * log2(count / total) for count in unigrams.values())
    shares = [hits[name] / len(seen) for name in ("unigram", "left", "both")]
    return [*shares, np.mean(rare), np.mean(seen), entropy, len(seen)]


def values(marks):
    fields = ("unigram", "left_bigram", "trigram", "trigram_rare", "context_seen", "entropy", "predictions")
    return [getattr(marks, field) for field in fields]


@pytest.mark.parametrize("chunk", [3, 50, 1 << 20])
def test_marks_of_a_corpus_equal_the_definition(corpus, tokenizer, monkeypatch, chunk):
    monkeypatch.setattr(ngram, "_CHUNK", chunk)
    monkeypatch.setattr(ngram, "COMMON_TOKENS", 10)
    cache = TokenCache.build(corpus, tokenizer)
    expected = brute_force(cache.train.tokens.tolist(), cache.held_out.tokens.tolist(), 10)
    assert values(ngram_marks(cache)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_marks_with_unseen_contexts_and_ties(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(ngram, "COMMON_TOKENS", 2)
    monkeypatch.setattr(ngram, "_CHUNK", 7)
    train, held_out = (np.r_[2, rng.zipf(1.3, size) % 41, 3].astype(np.uint16) for size in (150, 90))
    cache = SimpleNamespace(
        train=SimpleNamespace(tokens=train),
        held_out=SimpleNamespace(tokens=held_out),
        vocab_size=41,
        special_ids={str(index): index for index in SPECIAL},
    )
    expected = brute_force(train.tolist(), held_out.tolist(), 2)
    assert 0 < expected[4] < 1
    assert values(ngram_marks(cache)) == pytest.approx(expected, rel=1e-12)


def test_no_held_out_text(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("one fox")
    with pytest.raises(HbertError, match="no held-out token"):
        ngram_marks(TokenCache.build(load_corpus(text=[tmp_path / "x.txt"]), tokenizer))
