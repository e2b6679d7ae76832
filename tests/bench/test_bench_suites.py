"""What the suites build: the gate on real models, the shared batches, and one whole run with tiny models."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch

import hbert.data
import hbert_kernels
from bench import harness, machine, run
from bench.corpus import BATCHES, masked_batches
from bench.device import Cpu
from bench.floor import ProductsFloor
from bench.harness import FEWEST, Case
from bench.lengths import mean_fill
from bench.names import (
    BERT_OPTIMIZED,
    ENCODERS,
    HBERTS,
    LOADED,
    LOADED_OPTIMIZED,
    PATCHED,
    TRAINED_PEERS,
    computes_in,
    fixed_dtype,
    is_packed,
)
from bench.names import DTYPES as ALL_DTYPES
from bench.peers import FROZEN, VOCAB_SIZE, batches, build, compiled, dense_copy, dtype_name, ids_and_mask, traits
from bench.peers import SIZES as BUILT_SIZES
from bench.runtime import DTYPES
from bench.suites import SIZES, SUITES, latency, throughput
from bench.suites.latency import Forward, builder
from bench.suites.suite import Wanted
from bench.suites.throughput import TrainingStep
from hbert.patching import is_patched

CPU = Cpu()


@pytest.fixture
def local_corpus(tmp_path, monkeypatch):
    """Stands for the fetched text: 400 documents of made-up words, in a cache of its own."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(300)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(rng.choice(words, 60)) for _ in range(400)))
    corpus = hbert.data.load_corpus(text=[path])
    monkeypatch.setenv("HBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hbert.data, "load_corpus", lambda names: corpus)


def latency_case(dtype, **params):
    return Case("latency", "2x37", dtype, 2, 37, 74, {"size": "tiny", **params})


OPTIMIZED = "hbert-v2c+optimize"


def training_case(folder, dtype="bf16", seq=37):
    case = Case("throughput", f"2x{seq}", dtype, 2, seq, 2 * seq, {"size": "tiny"})
    return Case(**{**vars(case), "params": {"size": "tiny", **masked_batches(case, folder)}})


def test_batches_are_full_masked_and_reproducible(local_corpus, tmp_path):
    case = training_case(tmp_path)
    with np.load(case.params["batches"]) as stored:
        ids, labels = stored["input_ids"], stored["labels"]
    assert ids.shape == labels.shape == (BATCHES, 2, 37)
    assert 0 < ids.min() and ids.max() < VOCAB_SIZE  # 0 is padding
    masked = (labels != -100).mean()
    assert 0.08 < masked < 0.22 and len(np.unique(ids.reshape(BATCHES, -1), axis=0)) == BATCHES
    with np.load(masked_batches(case, tmp_path)["batches"]) as again:
        assert np.array_equal(again["input_ids"], ids) and np.array_equal(again["labels"], labels)


@pytest.mark.parametrize("peer", ["hf", "hbert-v2c", OPTIMIZED, PATCHED, BERT_OPTIMIZED])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("params", [{}, {"padded": True}, {"padded": True, "buckets": 2}])
def test_gate_of_a_forward_lets_the_right_one_pass_and_no_other(peer, dtype, params):
    task = Forward(peer, latency_case(dtype, **params), CPU)
    lengths = [inputs["attention_mask"].sum(1).tolist() for inputs in task._batches]
    in_parts = "buckets" in params and peer == "hf"
    assert lengths == ([[37], [1]] if in_parts else [[37, 1]] if params else [[37, 37]])
    error, allowed = task.check()
    assert 0 < error <= allowed
    right = task.step

    def off_in_one_place():
        outputs = [output.clone() for output in right()]
        outputs[0][0, 36, 5] += 4 * allowed
        return outputs

    task.step = off_in_one_place
    error, allowed = task.check()
    assert error > allowed


@pytest.mark.parametrize(
    "peer, wrong, passes",
    [
        (OPTIMIZED, 0.08, True),
        (OPTIMIZED, 0.14, False),  # as wrong as a model that takes padding for tokens
        (OPTIMIZED, float("nan"), False),
        ("torchao-int8", 0.25, True),
        ("torchao-int8", 0.41, False),  # as wrong as one without its last layer
    ],
)
def test_gate_of_int8_is_the_relative_error_of_all_rows(peer, wrong, passes, monkeypatch):
    monkeypatch.setattr(latency, "serving", lambda peer, model, dtype, device: model.eval())
    task = Forward(peer, latency_case("int8"), CPU)
    assert task.check()[0] < 1e-5
    right = task.step
    task.step = lambda: [output * (1 + wrong) for output in right()]
    error, allowed = task.check()
    assert error == pytest.approx(wrong, rel=1e-3, nan_ok=True) and (error <= allowed) is passes


@pytest.mark.parametrize("peer, size", [("floor-hbert-v1", "tiny"), ("floor-bert", "tiny")])
def test_the_floor_of_a_forward_is_its_products(peer, size):
    padded, full = (builder(latency_case("fp32", **params), CPU)(peer) for params in ({"padded": True}, {}))
    assert isinstance(full, ProductsFloor)
    operations = [float(task.traits()["gflop"]) for task in (padded, full)]
    assert operations[0] < 0.6 * operations[1]  # 38 tokens and 74
    padded.step()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, peer in (("bert", "hf"), ("hbert", "hbert-v1")):
        build(peer, "encoder", "tiny").save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    "peer, folder",
    [("hf", "bert"), (PATCHED, "bert"), (BERT_OPTIMIZED, "bert"), (LOADED, "hbert"), (LOADED_OPTIMIZED, "hbert")],
)
def test_a_checkpoint_is_measured_with_its_own_weights(peer, folder, checkpoints):
    case = Case("latency", "1x9", "fp32", 1, 9, 9, {"size": str(checkpoints / folder)})
    task = builder(case, CPU)(peer)
    error, allowed = task.check()
    assert 0 < error <= allowed
    same = {"bert": "hf", "hbert": "hbert-v1"}[folder]
    with torch.inference_mode():
        random = build(same, "encoder", "tiny").eval()(**task._batches[0]).last_hidden_state
    assert torch.allclose(task.step()[0], random, atol=1e-5)
    floor = builder(case, CPU)(f"floor-{folder}")
    assert float(floor.traits()["gflop"]) > 0


def test_a_checkpoint_of_the_other_kind_is_refused(checkpoints):
    for peer, folder in (("hf", "hbert"), (LOADED_OPTIMIZED, "bert")):
        with pytest.raises(ValueError, match=f"{peer.replace('+', '.')} cannot be had of it"):
            build(peer, "encoder", str(checkpoints / folder))


def test_names_tell_the_dtype_of_a_peer():
    assert {fixed_dtype(peer) for peer in (*ENCODERS, "hf", "hf-compile", "hf-compile-freeze", LOADED)} == {None}
    assert [fixed_dtype(peer) for peer in ("hf-fp32", "ov-bf16", "torchao-int8")] == list(ALL_DTYPES)
    assert computes_in(OPTIMIZED, "int8") and computes_in("hf-fp32", "int8") and not computes_in("hbert-v1", "int8")
    assert is_packed(OPTIMIZED) and is_packed(PATCHED) and not is_packed("hf") and not is_packed("ort-fp32")


@pytest.mark.parametrize("peer", ["hf-compile", *FROZEN])
def test_a_compiled_peer_is_compiled_and_the_same(peer, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, inputs = build("hf", "encoder", "tiny"), ids_and_mask(2, 9, CPU)
    with torch.no_grad(), config.patch(freezing=False), torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        found = compiled(peer, model)
        assert isinstance(found, torch._dynamo.OptimizedModule) and config.freezing == (peer in FROZEN)
        assert torch.equal(found(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


@pytest.mark.parametrize("module", [latency, throughput])
def test_each_case_has_the_recompilations_of_dynamo_anew(module, monkeypatch, local_corpus, tmp_path):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    cases = [training_case(tmp_path, "fp32", seq) for seq in (37, 20)]
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=False):
        for case in cases:
            module.builder(case, CPU)("hf-compile").step()


def test_a_peer_that_is_compiled_no_more_fails(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=False), torch.no_grad():
        torch.compiler.reset()
        model = compiled("hf-compile", build("hf", "encoder", "tiny"))
        model(**ids_and_mask(2, 9, CPU))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            model(**ids_and_mask(2, 8, CPU))


def test_longer_sequences_get_more_positions():
    model = build("hf", "encoder", "tiny", 700)
    with torch.inference_mode():
        assert model(**ids_and_mask(1, 700, CPU)).last_hidden_state.shape == (1, 700, 128)


def test_parts_of_a_batch_hold_all_its_tokens():
    params = {"padded": True, "buckets": 4}
    (whole,) = batches(16, 64, CPU, params, VOCAB_SIZE, together=True)
    parts = batches(16, 64, CPU, params, VOCAB_SIZE, together=False)
    kept = [torch.cat([b["input_ids"][b["attention_mask"] == 1] for b in some]) for some in ([whole], parts)]
    assert torch.equal(*kept) and [b["input_ids"].shape[0] for b in parts] == [4] * 4
    assert all(b["attention_mask"][:, -1].any() for b in parts)


@pytest.mark.parametrize("peer", ["hf", "hbert-v1", PATCHED])
def test_gate_of_a_training_step_sees_wrong_gradients(peer, local_corpus, tmp_path):
    task = TrainingStep(peer, training_case(tmp_path), CPU)
    error, allowed = task.check()
    assert 0 < error <= allowed < 0.05
    right = task._call

    def with_a_larger_loss(**batch):
        output = right(**batch)
        output.loss = 1.05 * output.loss
        return output

    task._call = with_a_larger_loss
    error, allowed = task.check()
    assert error == pytest.approx(0.05, rel=0.3) and error > allowed


def test_a_training_step_trains(local_corpus, tmp_path):
    task = TrainingStep("hbert-v1", training_case(tmp_path, "fp32"), CPU)
    before = {name: value.clone() for name, value in task._model.named_parameters()}
    task.step()
    changed = [name for name, value in task._model.named_parameters() if not torch.equal(value, before[name])]
    assert len(changed) > len(before) / 2
    assert all(value.grad is None for value in task._model.parameters())


@pytest.mark.parametrize("peer", (*HBERTS, PATCHED, TRAINED_PEERS[0]))
def test_every_named_peer_is_built_with_the_same_weights_each_time(peer):
    with torch.inference_mode():
        first, second = (build(peer, "encoder", "tiny").eval()(**ids_and_mask(1, 7, CPU)) for _ in range(2))
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)
    assert first.last_hidden_state.shape == (1, 7, 128)


def test_the_patched_peer_is_bert_itself():
    plain, patched = (build(peer, "masked_lm", "tiny").eval() for peer in ("hf", PATCHED))
    assert is_patched(patched) and not is_patched(dense_copy(patched, torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), patched.parameters(), strict=True))
    assert traits(PATCHED, torch.float32, CPU)["backend"] == traits("hbert-v1", torch.float32, CPU)["backend"]


def test_padded_batches_have_one_full_sequence_and_the_mean_fill():
    for batch, seq in ((8, 128), (8, 512)):
        case, _ = SUITES["varlen"].cases(Wanted(shapes=((batch, seq),), dtypes=("fp32",)))
        mask = ids_and_mask(batch, seq, CPU, case.params["padded"])["attention_mask"]
        assert case.work == mask.sum() == pytest.approx(mean_fill(seq) * batch * seq, rel=0.01)
        assert mask.sum(1).max() == seq and mask.sum(1).min() > 0
        assert (mask.sort(1, descending=True).values == mask).all()


def test_sizes_and_shapes_are_known_to_both_sides():
    assert set(SIZES) == set(BUILT_SIZES) == set(SUITES["latency"].shapes) == set(SUITES["throughput"].shapes)
    assert BUILT_SIZES["4x256"]["num_hidden_layers"] == 4 and BUILT_SIZES["4x256"]["hidden_size"] == 256


def test_the_fp32_peer_is_fp32_in_every_case(local_corpus, tmp_path):
    assert dtype_name("hf-fp32", "bf16") == "fp32" and dtype_name("hf", "bf16") == "bf16"
    case = training_case(tmp_path)
    errors = {peer: TrainingStep(peer, case, CPU).check() for peer in ("hf-fp32", "hf")}
    assert all(0 < error <= allowed for error, allowed in errors.values())
    assert errors["hf-fp32"][1] < 1e-4 < errors["hf"][0]


@pytest.mark.parametrize("head", ["encoder", "masked_lm"])
@pytest.mark.parametrize("peer", ["hf", "hf-compile", "hf-fp32"])
def test_bert_is_the_one_of_transformers_with_sdpa(peer, head):
    assert build(peer, head, "tiny").config._attn_implementation == "sdpa"


def test_traits_name_backends_that_exist():
    assert set(traits("hbert-v1", torch.bfloat16, CPU)["backend"].split("+")) <= set(hbert_kernels.BACKENDS)
    with hbert_kernels.use_backend("reference"):
        assert traits("hbert-v1", torch.float32, CPU)["backend"] == "reference"
    assert traits("hf", torch.float32, CPU)["backend"] == "torch"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The rows and the JSON of a run of both suites, tiny models, one shape."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        local_corpus.__wrapped__(folder, patch)
        patch.setattr(harness, "DISTURBED", float("inf"))  # the machine of a test run is not quiet
        models = ["--peers", "hf", "--size", "tiny", "--models", "hbert-v1", "--shapes", "2x37", "--dtype", "bf16"]
        models += ["--heap", "ours"]
        effort = ["--min-time", "0.05", "--threads", "1", "--out", str(folder / "results")]
        code = run.main([*models, *effort])
    (table,), (stored,) = (folder / "results").glob("*.csv"), (folder / "results").glob("*.json")
    return code, list(csv.DictReader(table.open())), json.loads(stored.read_text())


def test_a_whole_run_has_a_row_for_each_peer_and_case(whole_run):
    code, rows, stored = whole_run
    assert code == 0 and stored["failures"] == []
    assert [(row["metric"], row["candidate"], row["baseline"]) for row in rows if row["metric"] != "peak_memory"] == [
        one
        for metric in ("latency", "throughput")
        for one in [
            (metric, "hf", "hf"),
            (metric, "hbert-v1", "hf"),
            (metric, "floor-hbert-v1", ""),
            ("flop_rate", "hbert-v1", ""),
            ("flop_rate", "floor-hbert-v1", ""),
            ("floor_ratio", "hbert-v1", "floor-hbert-v1"),
        ]
    ]
    for row in [row for row in rows if row["metric"] == SUITES[row["suite"]].metric.name and row["baseline"]]:
        assert float(row["median"]) > 0 and float(row["max_err"]) > 0 and int(row["rounds"]) >= FEWEST
        assert float(row["ratio_lo"]) <= float(row["ratio"]) <= float(row["ratio_hi"])
        assert row["unit"] == SUITES[row["suite"]].metric.unit
        assert (row["dtype"], row["device"], row["heap_kept"]) == ("bf16", "cpu", "ours")


def peaks(rows, suite):
    return {r["candidate"]: float(r["median"]) for r in rows if (r["metric"], r["suite"]) == ("peak_memory", suite)}


def test_a_whole_run_measures_the_memory_of_serving(whole_run):
    found = peaks(whole_run[1], "latency")
    assert set(found) == ({"hf", "hbert-v1"} if machine.counts_peak_memory() else set())
    assert all(mebibytes > VOCAB_SIZE * 128 * 2 / 2**20 for mebibytes in found.values())  # the embedding in bf16


def test_a_whole_run_measures_the_memory_of_training(whole_run):
    found = peaks(whole_run[1], "throughput")
    # Both take at least the gradients of a decoder; BERT's logits of all tokens come on top.
    assert set(found) == ({"hf", "hbert-v1"} if machine.counts_peak_memory() else set())
    assert all(mebibytes > VOCAB_SIZE * 128 * 4 / 2**20 for mebibytes in found.values())
    assert not found or found["hf"] > found["hbert-v1"]


def test_the_header_of_a_whole_run_tells_how_it_was_measured(whole_run):
    about = whole_run[2]["about"]
    assert about["pinning"] in (machine.PINNED, machine.UNCHECKED) and about["transformers"]
    assert about["device"] == "cpu" and about["heap_kept"] in ("ours", "none")
    assert about["torch"] == torch.__version__ and about["threads"] == 1
