"""Steps of the engine against a training loop written out by hand."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import BertForMaskedLM

from hbert.pretrain.batches import StepBatches
from hbert.pretrain.engine import Engine, NonFiniteError, first_non_finite
from hbert.pretrain.models import build_model, dimensions, model_config, parameter_counts
from hbert.pretrain.optimizers import Optimizers
from hbert.pretrain.recipes import Recipe

CPU = torch.device("cpu")
MODEL = {"norm_style": "sub_ln", "positions": "sinusoidal"}


def small_recipe(**options):
    return Recipe(**{"batch_size": 6, "block_size": 32, "lr": 1e-2, "model": MODEL, **options})


def model_of(arch, recipe, cache, **fields):
    return build_model(model_config(arch, "2x32x2", fields, recipe, cache.vocab_size), seed=1)


def engine_of(arch, recipe, cache, compiled=False, dtype="fp32", **fields):
    model = model_of(arch, recipe, cache, **fields)
    return Engine(Accelerator(cpu=True, mixed_precision="no"), model, recipe, seed=5, dtype=dtype, compiled=compiled)


def batches_of(recipe, cache):
    return StepBatches(cache, recipe, 5, CPU)


def train(engine, recipe, cache, steps=3):
    batches = batches_of(recipe, cache)
    return [engine.step(step, batches.at(step, 6 * step, 6), 0.5) for step in range(steps)]


def by_hand(model, recipe, cache, steps=3, fraction=0.5):
    """Full logits, cross-entropy of torch, AdamW without fusion, clipping written out."""
    named = dict(model.named_parameters())
    decaying = [p for name, p in named.items() if p.dim() == 2 and "conv" not in name]
    rest = [p for p in named.values() if all(p is not d for d in decaying)]
    groups = [{"params": decaying, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr * fraction, betas=(recipe.beta1, recipe.beta2), foreach=False)
    batches, seen = batches_of(small_recipe(), cache), []
    for step in range(steps):
        (part,) = batches.at(step, 6 * step, 6).parts
        model.eval()  # no dropout in these tests; the logits of all tokens
        logits = model(input_ids=part.inputs["input_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), part.labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in named.values() if p.grad is not None))
        for p in named.values():
            if p.grad is not None:
                p.grad *= min(1.0, recipe.clip / norm)
        optimizer.step()
        hits = (logits.argmax(-1) == part.labels).sum().item()
        seen.append((loss.item(), hits, norm))
    return seen


def assert_same_weights(model, other, atol=2e-5):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("arch", ["v1c", "SA", "bert"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_steps_are_those_of_a_loop_by_hand(arch, accumulate, cache):
    recipe = small_recipe(accumulate=accumulate, clip=0.7)
    engine = engine_of(arch, recipe, cache)
    expected = by_hand(other := model_of(arch, recipe, cache), recipe, cache)
    for result, (loss, hits, norm) in zip(train(engine, recipe, cache), expected, strict=True):
        assert result.loss == pytest.approx(loss, rel=1e-4)
        assert result.correct == hits
        assert result.grad_norm == pytest.approx(norm, rel=1e-3)
    # Where a gradient is rounding noise, Adam still makes a full step of it.
    assert_same_weights(engine.model, other, atol=5e-4 if arch == "bert" else 2e-4)


def test_bert_is_that_of_transformers(cache):
    model = model_of("bert", small_recipe(dropout=0.1), cache, type_vocab_size=1)
    assert type(model) is BertForMaskedLM and model.config.type_vocab_size == 1
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.1
    assert model.config.intermediate_size == 128


def test_compiled_steps_are_the_same(cache, monkeypatch):
    # The capture is what a model can fail; generating code takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    recipe = small_recipe()
    eager, compiled = engine_of("SA", recipe, cache), engine_of("SA", recipe, cache, compiled=True)
    for one, other in zip(train(eager, recipe, cache, 2), train(compiled, recipe, cache, 2), strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4) and other.correct == one.correct


def test_inside_document_borders_a_step_is_that_of_the_documents_alone(cache):
    recipe = small_recipe(document_borders=True)
    engine, model = engine_of("v1c", recipe, cache), model_of("v1c", recipe, cache).eval()
    (part,) = batches_of(small_recipe(), cache).at(0, 0, 6).parts
    loss, hits, sequences = 0.0, 0, 0
    for ids, labels in zip(part.inputs["input_ids"], part.labels, strict=True):
        starts = [0, *(place for place in range(1, 32) if ids[place] == cache.special_ids["[CLS]"]), 32]
        for start, end in itertools.pairwise(starts):
            logits, own = model(input_ids=ids[None, start:end]).logits[0], labels[start:end]
            loss = loss + F.cross_entropy(logits, own, ignore_index=-100, reduction="sum")
            hits += (logits.argmax(-1) == own).sum().item()
            sequences += 1
    assert sequences > 6  # a document ends inside a block
    loss = loss / (part.labels != -100).sum()
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    (found,) = train(engine, recipe, cache, 1)
    assert (found.loss, found.grad_norm) == pytest.approx((loss.item(), norm), rel=1e-4) and found.correct == hits
    (without,) = train(engine_of("v1c", small_recipe(), cache), small_recipe(), cache, 1)
    assert without.loss != pytest.approx(found.loss, rel=1e-4)


@pytest.mark.parametrize("arch", ["SA", "bert"])
def test_bf16_is_autocast_of_the_products(arch, cache):
    recipe, found = small_recipe(), {}
    for dtype in ("fp32", "bf16"):
        engine, dtypes = engine_of(arch, recipe, cache, dtype=dtype), set()
        layers = [module for module in engine.model.base_model.modules() if isinstance(module, torch.nn.Linear)]
        for layer in layers:
            layer.register_forward_hook(lambda module, inputs, output, dtypes=dtypes: dtypes.add(output.dtype))
        found[dtype] = train(engine, recipe, cache, 1)[0].loss, dtypes, engine.model
    (loss, dtypes, _), (near, lower, model) = found.values()
    assert dtypes == {torch.float32} and lower == {torch.bfloat16}
    assert near != loss and near == pytest.approx(loss, rel=1e-2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_step_is_a_function_of_its_number(cache):
    recipe = small_recipe(dropout=0.3)
    batch = batches_of(recipe, cache).at(0, 0, 6)
    losses = []
    for step in (7, 7, 8):
        torch.manual_seed(len(losses))  # what others did to the generator does not matter
        losses.append(engine_of("v1c", recipe, cache).step(step, batch, 1.0).loss)
    assert losses[0] == losses[1] != losses[2]


def test_a_rehearsal_leaves_no_trace(cache):
    recipe = small_recipe(optimizer="muon")
    rehearsed, fresh = engine_of("v1c", recipe, cache), engine_of("v1c", recipe, cache)
    with rehearsed.rehearsal():
        train(rehearsed, recipe, cache)
        assert not torch.equal(rehearsed.model.head.dense.weight, fresh.model.head.dense.weight)
    for engine in (rehearsed, fresh):
        train(engine, recipe, cache)
    assert all(map(torch.equal, rehearsed.model.parameters(), fresh.model.parameters()))


def test_no_clipping(cache):
    recipe = small_recipe(clip=0.0)
    expected = by_hand(model := model_of("SA", recipe, cache), small_recipe(clip=1e9), cache)
    engine = engine_of("SA", recipe, cache)
    assert [r.grad_norm for r in train(engine, recipe, cache)] == pytest.approx([n for *_, n in expected], rel=1e-3)
    assert_same_weights(engine.model, model, atol=2e-4)


def test_muon_updates_the_matrices_of_the_encoder(cache):
    recipe = small_recipe(optimizer="muon", muon_lr=0.5, weight_decay=0.0)
    model = model_of("v1c", recipe, cache)
    optimizers = Optimizers(model, recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
        if p.dim() == 2:
            torch.nn.init.orthogonal_(p.grad, gain=3.0)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizers.step(0.5)
    moved = {name: (p.detach() - before[name]) for name, p in model.named_parameters()}
    for name, update in moved.items():
        matrix = name.startswith("hbert.layers.") and name.endswith(".weight") and min(update.shape) >= 32
        # AdamW's first step is its learning rate in every entry; Muon's a matrix whose singular values are near 1
        # (its Newton-Schulz iteration brings equal ones to somewhere between .7 and 1.2) times its learning rate.
        if matrix and update.dim() == 2:
            singular = torch.linalg.svdvals(update) / (0.25 * math.sqrt(max(1, update.shape[0] / update.shape[1])))
            assert 0.5 < singular.min() and singular.max() < 1.4, name
        else:
            size = gradients[name].abs()
            expected = 0.5 * recipe.lr * size / (size + 1e-8)
            torch.testing.assert_close(update.abs(), expected, rtol=1e-2, atol=1e-6)
    assert sum(p.numel() for group in optimizers._all[1].param_groups for p in group["params"]) > 0


def test_adamw_is_the_fused_one(cache):
    (adamw,) = Optimizers(model_of("v1c", small_recipe(), cache), small_recipe())._all
    assert all(group["fused"] for group in adamw.param_groups)


def test_what_decays(cache):
    recipe = small_recipe(weight_decay=0.5)
    model = model_of("v1c", recipe, cache)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    Optimizers(model, recipe).step(1.0)
    for name, p in model.named_parameters():
        decays = p.dim() == 2 and "conv" not in name
        torch.testing.assert_close(p.detach(), before[name] * (1 - 1e-2 * 0.5 * decays))


def test_a_nan_is_named_and_nothing_is_updated(cache):
    recipe = small_recipe()
    engine = engine_of("SA", recipe, cache)
    weight = engine.model.hbert.layers[1].ffn.fc1.weight
    with torch.no_grad():
        weight[3, 4] = math.nan
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"^step 1: loss nan.* parameter hbert.layers.1.ffn.fc1.weight$"):
        train(engine, recipe, cache)
    for name, p in engine.model.named_parameters():
        assert torch.equal(p.nan_to_num(nan=-7.0), before[name].nan_to_num(nan=-7.0))


def test_an_infinite_gradient_is_named(cache):
    recipe = small_recipe()
    engine = engine_of("SA", recipe, cache)
    engine.model.hbert.layers[0].attention.out.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match="step 1: .*gradient of hbert.layers.0.attention.out.weight"):
        train(engine, recipe, cache)
    assert first_non_finite(engine.model) == "gradient of hbert.layers.0.attention.out.weight"


def test_weights_are_a_function_of_the_seed(cache):
    config = model_config("v1", "tiny", {}, small_recipe(), cache.vocab_size)
    one, same, other = (build_model(config, seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, one.parameters(), same.parameters()))
    assert not all(map(torch.equal, one.parameters(), other.parameters()))
    counts = parameter_counts(one)
    assert counts["token_embedding"] == cache.vocab_size * 128
    assert counts["total"] == sum(p.numel() for p in {id(p): p for p in one.parameters()}.values())


def test_sizes():
    assert dimensions("tiny") == {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2}
    assert dimensions("6x256x4") == {"num_hidden_layers": 6, "hidden_size": 256, "num_attention_heads": 4}
