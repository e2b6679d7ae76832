"""Counting models on the inputs of an evaluation, against the definition, one token at a time."""

from collections import Counter, defaultdict
from math import log

import pytest
from evaluate_helpers import bert_model, masked_by_definition

from hbert.evaluate.held_out import evaluate, masked_blocks
from hbert.evaluate.same_input import same_input_marks

LENGTH = 32


def best(counter):
    return min(counter, key=lambda word: (-counter[word], word))


def counted(cache):
    """Counts of the words of the training tokens: alone, behind their left neighbour, between both neighbours."""
    special, train = set(cache.special_ids.values()), cache.train.tokens.tolist()
    unigrams, bigrams, trigrams = Counter(), defaultdict(Counter), defaultdict(Counter)
    for left, word, right in zip(train, train[1:], train[2:], strict=False):
        if word not in special:
            unigrams[word] += 1
            bigrams[left][word] += 1
            trigrams[left, right][word] += 1
    return unigrams, bigrams, trigrams


def by_definition(cache, rate, seed):
    unigrams, bigrams, trigrams = counted(cache)
    total = sum(unigrams.values()) + 0.5 * cache.vocab_size
    hits, losses, hidden = Counter(), [], []
    for name, (first, last) in cache.held_out.spans.items():
        tokens = cache.held_out.offsets[last] - cache.held_out.offsets[first]
        for index in range(tokens // LENGTH):
            ids, labels = (part.tolist() for part in masked_by_definition(cache, name, LENGTH, index, seed, rate))
            for place, (shown, word) in enumerate(zip(ids, labels, strict=True)):
                if word == -100:
                    continue
                is_mask, share = shown == cache.mask_id, (unigrams[word] + 0.5) / total
                left = ids[place - 1] if place else cache.mask_id
                right = ids[place + 1] if place + 1 < LENGTH else cache.mask_id
                alone = best(unigrams)
                behind = best(bigrams[left]) if bigrams[left] else alone
                between = best(trigrams[left, right]) if trigrams[left, right] else behind
                for key, guess in (("context_free", alone), ("left_bigram", behind), ("trigram", between)):
                    hits[key] += word == (guess if is_mask else shown)
                losses.append(-log(share if is_mask else 0.5 * (word == shown) + 0.5 * share))
                hidden.append(is_mask)
                hits["unigram"] += is_mask and word == alone
    count = len(losses)
    found = {key: hits[key] / count for key in ("context_free", "left_bigram", "trigram")}
    share = sum(hidden) / count
    return found | {
        "loss": sum(losses) / count,
        "unigram": hits["unigram"] / sum(hidden),
        "mask_share": share,
        "predictions": count,
    }


@pytest.mark.parametrize(("rate", "seed"), [(0.15, 0), (0.4, 3)])
def test_marks_equal_the_definition(cache, rate, seed):
    expected = by_definition(cache, rate, seed)
    assert vars(same_input_marks(cache, LENGTH, rate=rate, seed=seed)) == pytest.approx(expected, rel=1e-9)
    # They differ, or the comparison says less than it seems to.
    assert len({expected[name] for name in ("context_free", "left_bigram", "trigram", "unigram")}) == 4


def test_the_inputs_are_those_of_the_evaluation(cache):
    model, seen = bert_model(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.extend(kwargs["input_ids"]), with_kwargs=True)
    evaluate(model, cache, LENGTH, max_blocks=5, batch_size=2)
    blocks = [ids.tolist() for ids, _ in masked_blocks(cache, LENGTH, max_blocks=5)]
    assert [ids.tolist() for ids in seen] == blocks and len(blocks) == 5
