"""Every example, at its smallest."""

import http.client
import json
import re
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "defaults")
TEXTS = ["happy boats sail", "the old stone bridge of the sea and then sad wind", "a green sea"]


@pytest.fixture(autouse=True)
def fast_path_again():
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", NAMES)
def test_help(run, name):
    assert "--help" in run(name, "--help")


def test_swap_one_layer(run):
    printed = run("swap_one_layer", "--length", 24, "--width", 32, "--steps", 60)
    losses = re.findall(r"(\w+) +[\d.]+ ms a step   loss ([\d.]+) -> ([\d.]+)", printed)
    assert [name for name, *_ in losses] == ["MultiheadAttention", "AdditiveAttention"]
    assert all(float(after) < 0.75 * float(before) for _, before, after in losses)


def test_swap_one_layer_ignores_padding(load):
    example = load("swap_one_layer")
    ids, padding, _ = example.draw_batch(4, 24)
    assert padding.any()
    model = example.Classifier(32, 1, 2)
    model.encoder.layers[0].self_attn = example.AdditiveSelfAttention(32, 1)
    torch.testing.assert_close(model(ids.masked_fill(padding, 0), padding), model(ids, padding))


def test_swap_one_layer_refuses_what_additive_attention_is_not(load):
    attention, x = load("swap_one_layer").AdditiveSelfAttention(32, 1), torch.randn(2, 3, 32)
    for options in ({"attn_mask": torch.zeros(3, 3)}, {"is_causal": True}, {"need_weights": True}):
        with pytest.raises(ValueError, match="additive attention is self-attention"):
            attention(x, x, x, **options)


@pytest.mark.parametrize("model", [[], ["--model", "checkpoint"]], ids=["random", "folder"])
def test_patch_bert(run, bert_checkpoint, tmp_path, model):
    (tmp_path / "checkpoint").symlink_to(bert_checkpoint)
    printed = run("patch_bert", "--layers", 2, "--width", 64, "--batch", 3, "--length", 20, "--rounds", 2, *model)
    assert "replaced  2 attention blocks" in printed
    assert float(re.search(r"no padding: (\S+) of the largest", printed)[1]) < 1e-5
    assert re.search(r"before [\d.]+ ms, after [\d.]+ ms", printed)
    assert "unpatched: the same bits as before" in printed


def test_pretrain_ten_minutes(run, text, tmp_path):
    flags = "--max-steps 4 --vocab-size 150 --block-size 32 --batch-size 4 --eval-blocks 4 --dtype fp32".split()
    printed = run(
        "pretrain_ten_minutes", "--size", "2x32x2", "--data", text, "--out", tmp_path / "run",
        "--ask", "a lazy {mask}", "--", *flags,
    )  # fmt: skip
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["step"] == 4
    assert len(re.findall(r"^0\.\d+  a lazy", printed, re.MULTILINE)) == 3


def test_pretrain_ten_minutes_has_a_budget(load, monkeypatch):
    example, commands = load("pretrain_ten_minutes"), []
    monkeypatch.setattr(example.hbert.cli, "main", lambda words: commands.append(words) or 2)
    monkeypatch.setattr("sys.argv", ["pretrain_ten_minutes"])
    assert example.main() == 2
    assert commands == [["pretrain", "--size", "mini", "--out", "runs/ten-minutes", "--budget", "10m"]]


def test_finetune(run, bert_checkpoint, task, tmp_path):
    out = tmp_path / "classifier"
    printed = run("finetune", "--model", bert_checkpoint, "--data", task, "--epochs", 1, "--out", out)
    assert json.loads((out / "config.json").read_text())["model_type"] == "hbert"
    assert len(re.findall(r"^(good|bad|odd) \(0\.\d+\): ", printed, re.MULTILINE)) == 2


@contextmanager
def serving(example, embedder):
    server = example.make_server(embedder, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def post(url, body):
    """(status, content) of a request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def vectors_of_transformers(folder, texts):
    """The mean of the last hidden states of each text alone, of length 1."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        means = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    return np.stack([(mean / mean.norm()).numpy() for mean in means])


def test_serve_embeddings(load, bert_checkpoint):
    example = load("serve_embeddings")
    with serving(example, example.Embedder(bert_checkpoint, dtype="fp32")) as url:
        status, content = post(f"{url}/embed", {"texts": TEXTS})
        assert status == 200
        np.testing.assert_allclose(content["vectors"], vectors_of_transformers(bert_checkpoint, TEXTS), atol=1e-5)
        with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
            assert json.load(response) == {"width": 32, "max_length": 24, "requests": 1, "rounds": 1}


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_serve_embeddings_in_other_dtypes(load, bert_checkpoint, dtype, monkeypatch):
    example = load("serve_embeddings")
    if dtype == "int8":  # runs on CPUs, also where there is a GPU
        monkeypatch.setattr("hbert.finetune.models.device", lambda: torch.device("meta"))
    with serving(example, example.Embedder(bert_checkpoint, dtype=dtype)) as url:
        vectors = np.array(post(f"{url}/embed", {"texts": TEXTS})[1]["vectors"])
    expected = vectors_of_transformers(bert_checkpoint, TEXTS)
    assert (vectors != expected).any() and ((vectors * expected).sum(1) > 0.99).all()


def test_check_optimized(run, bert_checkpoint, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    printed = run("check_optimized", "--model", bert_checkpoint, "--texts", tmp_path / "texts.txt")
    found = re.findall(r"(\w+): cosine to the original: mean ([\d.]+), lowest ([\d.]+)", printed)
    assert [dtype for dtype, *_ in found] == ["fp32", "bf16", "int8"]
    assert all(0.99 < float(lowest) <= float(mean) < 1.00001 for _, mean, lowest in found)
    assert float(found[0][2]) > 0.99999


def test_serve_embeddings_computes_waiting_requests_together(load, bert_checkpoint):
    embedder = load("serve_embeddings").Embedder(bert_checkpoint, dtype="fp32")
    waiting = [embedder.submit([text]) for text in TEXTS]
    embedder.start()
    found = np.concatenate([future.result(60) for future in waiting])
    np.testing.assert_allclose(found, vectors_of_transformers(bert_checkpoint, TEXTS), atol=1e-5)
    assert (embedder.requests, embedder.rounds) == (3, 1)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/embed", b"no json", 400, "the body must be JSON"),
        ("/embed", {"text": "one"}, 400, "the body must be JSON"),
        ("/embed", {"texts": []}, 400, "one or more strings"),
        ("/embed", {"texts": ["a", 1]}, 400, "one or more strings"),
        ("/embed", {"texts": ["a"] * 257}, 400, "257 texts; at most 256"),
        ("/other", {"texts": ["a"]}, 404, "POST /embed"),
    ],
    ids=["no json", "no texts", "empty", "number", "many", "path"],
)
def test_serve_embeddings_says_what_is_wrong(load, bert_checkpoint, path, body, status, message):
    example = load("serve_embeddings")
    with serving(example, example.Embedder(bert_checkpoint)) as url:
        found, content = post(url + path, body)
        assert found == status and message in content["error"]
        assert post(f"{url}/embed", {"texts": TEXTS})[0] == 200


@pytest.mark.parametrize(("length", "status"), [(None, 411), ("1048577", 413)])
def test_serve_embeddings_reads_no_more_than_it_takes(load, bert_checkpoint, length, status):
    example = load("serve_embeddings")
    with serving(example, example.Embedder(bert_checkpoint)) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        connection.putrequest("POST", "/embed")
        if length is not None:
            connection.putheader("Content-Length", length)
        connection.endheaders()
        assert connection.getresponse().status == status
        connection.close()


def test_serve_embeddings_goes_on_after_a_failure(load, bert_checkpoint, monkeypatch):
    example = load("serve_embeddings")
    embedder = example.Embedder(bert_checkpoint)
    with serving(example, embedder) as url:
        with monkeypatch.context() as broken:
            broken.setattr(example, "encode_texts", lambda *_: 1 / 0)
            assert post(f"{url}/embed", {"texts": TEXTS}) == (500, {"error": "ZeroDivisionError: division by zero"})
        assert post(f"{url}/embed", {"texts": TEXTS})[0] == 200
