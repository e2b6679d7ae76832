"""Batches of similar lengths, in training and in inference, and texts as token ids."""

import numpy as np
import pytest
import torch
from finetune_helpers import LENGTH, PIECES, bert, hbert_model
from transformers import AutoTokenizer
from transformers.training_args import ParallelMode

from hbert.finetune import training
from hbert.finetune.encoding import encode_texts
from hbert.finetune.inference import Runner, class_probabilities, pooled_states, token_batches
from hbert.finetune.settings import Settings
from hbert.finetune.training import ShuffledLengthBatches


def test_batches_of_similar_lengths():
    lengths = np.random.default_rng(0).integers(3, 60, 1003)
    sampler = ShuffledLengthBatches(lengths, 16, seed=1)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(1003)) and first != second
    assert list(ShuffledLengthBatches(lengths, 16, seed=1)) == first
    longest = [lengths[first[i : i + 16]].max() for i in range(0, 992, 16)]
    padded = sum(16 * top for top in longest)
    assert padded < 1.1 * lengths.sum()
    # Not in waves of falling length.
    falling = np.mean([a >= b for a, b in zip(longest, longest[1:], strict=False)])
    assert 0.3 < falling < 0.7


def test_a_batch_has_its_size_on_a_machine_with_several_gpus(tmp_path):
    arguments = training._arguments(Settings("model", tmp_path, batch_size=16), 1e-3, 0, "fp32", tmp_path, 10)
    assert arguments.n_gpu == 0 and arguments.train_batch_size == 16
    arguments._n_gpu = 4  # what transformers counts there
    assert arguments.n_gpu == 1 and arguments.train_batch_size == arguments.eval_batch_size == 16
    assert arguments.parallel_mode == ParallelMode.NOT_PARALLEL


@pytest.fixture(scope="module")
def tokenizer(hbert_folder):
    return AutoTokenizer.from_pretrained(hbert_folder)


def test_token_budget():
    lengths = np.array([3, 50, 7, 7, 120, 1, 9])
    batches = [batch.tolist() for batch in token_batches(lengths, 100)]
    assert batches == [[4], [1, 6], [2, 3, 0, 5]]  # 120 tokens alone are over it: a batch has one text at least
    assert [b.tolist() for b in token_batches(np.array([5, 5, 5]), 10)] == [[0, 1], [2]]
    assert not list(token_batches(np.array([], np.int64), 10))


def test_encoding_is_that_of_the_tokenizer(tokenizer):
    texts = ["happy boat", "sad " * 60, "the sea on the bridge"] * 700
    found = encode_texts(tokenizer, texts, None, LENGTH)
    expected = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
    assert [found[i]["input_ids"] for i in range(len(found))] == expected
    assert found.num_truncated == 700 and found.lengths.tolist() == list(map(len, expected))


def test_pairs_are_truncated_at_the_longer_text(tokenizer):
    found = encode_texts(tokenizer, ["happy", "sad"], ["boat " * 40, "sea"], 8)
    sep = tokenizer.sep_token_id
    ids = found[0]["input_ids"]
    assert len(ids) == 8 and ids[:3] == [tokenizer.cls_token_id, PIECES.index("happy"), sep] and ids[-1] == sep
    assert found.num_truncated == 1 and found.lengths.tolist() == [8, 5]


@pytest.mark.parametrize("build", [hbert_model, bert])
@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_is_that_of_each_text_alone(tokenizer, build, side):
    model = build().eval().base_model
    tokenizer.padding_side = side
    texts = ["happy boat", "the sea on the bridge and then a green wind", "sad"]
    data = encode_texts(tokenizer, texts, None, LENGTH)
    for pooling in ("mean", "cls"):
        runner = Runner(model, tokenizer, pooled_states(pooling, False), batch_tokens=40)
        vectors = runner.run(data)
        for text, vector in zip(texts, vectors, strict=True):
            with torch.no_grad():
                states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            expected = states.mean(0) if pooling == "mean" else states[0]
            if build is bert and side == "left":
                continue  # BERT counts columns: on the left its positions are others
            torch.testing.assert_close(torch.from_numpy(vector), expected, atol=1e-5, rtol=1e-4)
        assert (runner.texts, runner.tokens, runner.truncated) == (3, sum(data.lengths), 0)
        assert "3 texts, 19 tokens" in runner.pace()
    unit = Runner(model, tokenizer, pooled_states("mean", True)).run(data)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)


def test_probabilities():
    logits = torch.tensor([[1.0, 2.0, -1.0]])
    outputs = type("Outputs", (), {"logits": logits})
    assert torch.equal(class_probabilities(False)(outputs, None), logits.softmax(-1))
    assert torch.equal(class_probabilities(True)(outputs, None), logits.sigmoid())
