import numpy as np
import pytest

from hbert.data import MaskedBatches, TokenCache, mask_tokens, step_rng

OPTIONS = {"mask_id": 4, "vocab_size": 50, "special_ids": range(5)}


def masked(ids, seed=0, **changes):
    return mask_tokens(ids, step_rng(0, seed), **{**OPTIONS, **changes})


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_shares_of_the_three_replacements(dtype):
    ids = np.random.default_rng(1).integers(0, 50, size=(500, 400)).astype(dtype)
    before = ids.copy()
    inputs, labels = masked(ids)
    assert inputs.dtype == labels.dtype == np.int64 and inputs.shape == labels.shape == ids.shape
    assert np.array_equal(ids, before)
    chosen = labels != -100
    assert not (chosen & (ids < 5)).any()
    assert np.array_equal(labels[chosen], ids[chosen]) and np.array_equal(inputs[~chosen], ids[~chosen])
    ordinary = (ids >= 5).sum()
    # Bounds of five standard deviations of the binomial distributions.
    assert abs(chosen.sum() / ordinary - 0.15) < 5 * (0.15 * 0.85 / ordinary) ** 0.5
    share = {"mask": (inputs == 4) & chosen, "same": (inputs == ids) & chosen}
    assert abs(share["mask"].sum() / chosen.sum() - 0.8) < 5 * (0.16 / chosen.sum()) ** 0.5
    kept = 0.1 + 0.1 / 45
    assert abs(share["same"].sum() / chosen.sum() - kept) < 5 * (kept * (1 - kept) / chosen.sum()) ** 0.5
    drawn = inputs[chosen & ~share["mask"] & ~share["same"]]
    assert drawn.min() == 5 and drawn.max() == 49
    assert np.abs(np.bincount(drawn, minlength=50)[5:] / drawn.size - 1 / 45).max() < 0.012


def test_masking_is_a_function_of_seed_and_step():
    ids = np.arange(5, 45).reshape(4, 10)
    assert np.array_equal(masked(ids, 3)[0], masked(ids, 3)[0])
    assert not np.array_equal(masked(np.tile(ids, (9, 1)), 3)[1], masked(np.tile(ids, (9, 1)), 4)[1])


def test_extreme_rates():
    ids = np.arange(3, 50)
    inputs, labels = masked(ids, rate=1.0, mask_replace_prob=1.0, random_replace_prob=0.0)
    assert inputs.tolist() == [3] + [4] * 46 and labels.tolist() == [-100, -100, *range(5, 50)]
    inputs, labels = masked(ids, rate=0.0)
    assert inputs.tolist() == ids.tolist() and (labels == -100).all()
    inputs, labels = masked(ids, rate=1.0, mask_replace_prob=0.0, random_replace_prob=0.0)
    assert inputs.tolist() == ids.tolist() and (labels != -100).sum() == 45
    assert masked(np.empty((0, 8), dtype=np.int32))[0].shape == (0, 8)


@pytest.mark.parametrize(
    ("ids", "changes", "message"),
    [
        ([5], {"rate": 1.5}, r"rate is 1.5; allowed is \[0, 1\]"),
        ([5], {"rate": float("nan")}, "rate is nan"),
        ([5], {"random_replace_prob": -0.1}, "random_replace_prob is -0.1"),
        ([5], {"random_replace_prob": 0.3}, "at most 1"),
        ([5, 50], {}, r"span \[5, 50\]; allowed is \[0, 50\)"),
        ([-1, 5], {}, r"span \[-1, 5\]"),
        ([5], {"mask_id": 50}, r"are \[50, .*allowed is \[0, 50\)"),
        ([1], {"vocab_size": 5}, "all 5 tokens of the vocabulary are special"),
    ],
)
def test_bad_input(ids, changes, message):
    with pytest.raises(ValueError, match=message):
        masked(np.array(ids), **changes)


@pytest.fixture
def cache(corpus, tokenizer):
    return TokenCache.build(corpus, tokenizer)


def test_batches_are_random_access_and_cover_every_pass(cache):
    blocks = cache.train.blocks(64)
    count = len(blocks)
    batches = MaskedBatches(cache, blocks, 8, seed=3)
    steps = 3 * count // 8
    forward = [batches[step] for step in range(steps)]
    again = MaskedBatches(cache, blocks, 8, seed=3)
    for step in reversed(range(steps)):
        assert np.array_equal(again[step].input_ids, forward[step].input_ids)
        assert np.array_equal(again[step].labels, forward[step].labels)
    rows = np.concatenate([np.where(b.labels == -100, b.input_ids, b.labels) for b in forward])
    passes = [rows[start : start + count] for start in (0, count)]
    for seen in passes:
        assert sorted(map(tuple, seen)) == sorted(tuple(block) for block in blocks)
    assert not np.array_equal(passes[0], passes[1])
    assert not np.array_equal(MaskedBatches(cache, blocks, 8, seed=4)[0].labels, forward[0].labels)


def test_batches_larger_than_the_data_span_passes(cache):
    blocks = cache.held_out.blocks(64)
    batch = MaskedBatches(cache, blocks, 3 * len(blocks) + 1, rate=0.0)[1]
    assert len(batch.input_ids) == 3 * len(blocks) + 1
    assert {tuple(row) for row in batch.input_ids} == {tuple(block) for block in blocks}


def test_bad_batches(cache):
    with pytest.raises(ValueError, match="shorter than one block"):
        MaskedBatches(cache, cache.train.blocks(10**9), 8)
    with pytest.raises(ValueError, match="batch_size is 0"):
        MaskedBatches(cache, cache.train.blocks(8), 0)
    with pytest.raises(IndexError, match="step is -1"):
        MaskedBatches(cache, cache.train.blocks(8), 1)[-1]
