import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluate_helpers import VOCAB, bert_model, hbert_model, masked_by_definition
from transformers import RobertaConfig, RobertaForMaskedLM

from hbert.data import HbertError
from hbert.evaluate.held_out import evaluate

LENGTH = 32


def reference(model, cache, length, rate=0.15, seed=0):
    """Block by block in float64 with the logits of every token: {source: (loss, accuracy, that at [MASK], number)}."""
    model = copy.deepcopy(model).double().eval()
    results = {}
    for name, (first, last) in cache.held_out.spans.items():
        tokens = cache.held_out.offsets[last] - cache.held_out.offsets[first]
        losses, hits, at_mask = [], [], []
        for index in range(tokens // length):
            ids, labels = (
                torch.from_numpy(part)[None] for part in masked_by_definition(cache, name, length, index, seed, rate)
            )
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none"))
            hits.append((logits.argmax(-1) == labels).flatten())
            losses[-1] = losses[-1][labels.flatten() != -100]
            hits[-1] = hits[-1][labels.flatten() != -100]
            at_mask.append((ids == cache.mask_id)[labels != -100])
        losses, hits, at_mask = torch.cat(losses), torch.cat(hits).double(), torch.cat(at_mask)
        results[name] = (losses.mean().item(), hits.mean().item(), hits[at_mask].mean().item(), len(losses))
    return results


@pytest.mark.parametrize("build", [hbert_model, bert_model])
@pytest.mark.parametrize("options", [{}, {"rate": 0.4, "seed": 3}])
def test_loss_and_accuracy_equal_the_definition(cache, build, options):
    model = build()
    result = evaluate(model, cache, LENGTH, **options)
    expected = reference(model, cache, LENGTH, **options)
    assert result.per_source.keys() == expected.keys() and len(expected) == 2
    for name, (loss, accuracy, at_mask, count) in expected.items():
        found = result.per_source[name]
        assert (found.loss, found.accuracy, found.mask_accuracy) == pytest.approx((loss, accuracy, at_mask), rel=1e-5)
        assert found.num_masked == count
        assert found.bits == pytest.approx(loss / math.log(2), rel=1e-5)
    counts = np.array([count for *_, count in expected.values()])
    assert result.num_masked == counts.sum()
    for column, name in enumerate(("loss", "accuracy")):
        mean = sum(row[column] * row[-1] for row in expected.values()) / counts.sum()
        assert getattr(result, name) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("build", [hbert_model, bert_model])
def test_batch_size_changes_nothing_but_rounding(cache, build):
    model = build()
    one, many = (evaluate(model, cache, LENGTH, batch_size=size) for size in (1, 7))
    assert one.num_masked == many.num_masked and one.accuracy == many.accuracy
    assert one.loss == pytest.approx(many.loss, rel=1e-5)
    assert evaluate(model, cache, LENGTH, batch_size=7) == many


def test_two_models_see_the_same_masked_inputs(cache):
    seen = []
    for model in (hbert_model(), bert_model()):
        seen.append([])
        model.get_input_embeddings().register_forward_pre_hook(
            lambda module, args, ids=seen[-1]: ids.append(args[0].flatten())
        )
        evaluate(model, cache, LENGTH, batch_size=5)
    torch.testing.assert_close(*map(torch.cat, seen), rtol=0, atol=0)


def test_head_runs_on_masked_tokens_only(cache):
    model, rows = hbert_model(), []
    model.head.dense.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    result = evaluate(model, cache, LENGTH)
    assert sum(rows) == result.num_masked


def test_a_sample_takes_evenly_spaced_blocks_of_each_source(cache):
    model, full = hbert_model(), {}
    for name in cache.held_out.spans:
        full[name] = len(cache.held_out.source(name).blocks(LENGTH))
    total = sum(full.values())
    ids = []
    model.hbert.register_forward_pre_hook(
        lambda module, args, kwargs: ids.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    evaluate(model, cache, LENGTH, max_blocks=10, batch_size=1000)
    assert sum(ids) == 10
    for taken, count in zip(ids, full.values(), strict=True):
        assert abs(taken - 10 * count / total) < 1
    assert evaluate(model, cache, LENGTH, max_blocks=total) == evaluate(model, cache, LENGTH)
    assert evaluate(model, cache, LENGTH, max_blocks=total + 1) == evaluate(model, cache, LENGTH)


def test_training_goes_on_as_if_nothing_had_been(cache):
    model = hbert_model(hidden_dropout_prob=0.5)
    model.train()
    model.hbert.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = evaluate(model, cache, LENGTH)
    assert first == evaluate(model, cache, LENGTH)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    ids = torch.ones(1, 8, dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "att.bias" not in name)


def test_mode_is_put_back_after_an_error(cache):
    model = hbert_model().train()
    model.head.dense.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, cache, LENGTH)
    assert all(module.training for module in model.modules())


def test_autocast(cache):
    model, dtypes = bert_model(), set()
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda module, args, output: dtypes.add(output.dtype)
    )
    exact, rounded = (evaluate(model, cache, LENGTH, dtype=dtype) for dtype in ("fp32", "bf16"))
    assert dtypes == {torch.float32, torch.bfloat16}
    assert rounded.loss != exact.loss and rounded.loss == pytest.approx(exact.loss, rel=0.02)
    assert evaluate(hbert_model(), cache, LENGTH, dtype="bf16").num_masked == exact.num_masked


def test_batches_without_a_masked_token(cache):
    for model in (hbert_model(), bert_model()):
        result = evaluate(model, cache, 2, rate=0.02, batch_size=1, max_blocks=150)
        assert 0 < result.num_masked < 30 and math.isfinite(result.loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "masking rate is 0.0"),
        ({"rate": 1.5}, "masking rate is 1.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_blocks": 0}, "max_blocks is 0"),
        ({"length": 0}, "length is 0"),
        ({"dtype": "fp16"}, "dtype is 'fp16'; allowed: fp32, bf16"),
    ],
)
def test_bad_arguments(cache, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(hbert_model(), cache, **{"length": LENGTH, **options})


@pytest.mark.parametrize("build", [hbert_model, bert_model])
def test_models_and_texts_that_do_not_fit(cache, build):
    too_few = cache.vocab_size - 1
    with pytest.raises(HbertError, match=f"{too_few + 1} pieces, but the model has {too_few} token embeddings"):
        evaluate(build(vocab_size=too_few), cache, LENGTH)
    with pytest.raises(HbertError, match="blocks of 65 tokens are too long: the model has 64 positions"):
        evaluate(build(), cache, 65)
    with pytest.raises(HbertError, match="no held-out token was masked"):
        evaluate(build(), cache, 2, rate=1e-9, max_blocks=1)


def test_positions_of_roberta_start_behind_the_padding_id(cache):
    config = RobertaConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=34
    )
    assert evaluate(RobertaForMaskedLM(config), cache, 32).num_masked > 0
    with pytest.raises(HbertError, match="the model has 32 positions"):
        evaluate(RobertaForMaskedLM(config), cache, 33)


def test_text_shorter_than_a_block(cache):
    longest = max(len(cache.held_out.source(name).tokens) for name in cache.held_out.spans)
    with pytest.raises(HbertError, match="shorter than one block"):
        evaluate(hbert_model(max_position_embeddings=longest + 1), cache, longest + 1)
