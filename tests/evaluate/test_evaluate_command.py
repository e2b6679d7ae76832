"""``hbert eval`` on folders as people have them."""

import argparse
import json

import pytest
import torch
from evaluate_helpers import bert_model, hbert_model, run_info, write_documents, write_run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

import hbert
from hbert import cli
from hbert.data import TokenCache, save_tokenizer
from hbert.data.tokenizer import special_ids, tokenizer_digest
from hbert.errors import HbertError
from hbert.evaluate.checkpoint import checkpoint_tokenizer, with_bert_names
from hbert.evaluate.held_out import evaluate
from hbert.precision import device_of


def run(capsys, *arguments):
    capsys.readouterr()  # the progress bars of save_pretrained
    status = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def files_of(corpus):
    return [file.path for file in corpus.files]


@pytest.mark.parametrize("build", [hbert_model, bert_model])
def test_result_is_that_of_evaluate_on_the_model(capsys, tmp_path, corpus, tokenizer, cache, build):
    model = build(cache.vocab_size)
    folder, file = save(model, tokenizer, tmp_path / "model"), tmp_path / "result.json"
    options = ["--length", 32, "--rate", 0.3, "--dtype", "fp32", "--json", file]
    status, out, err = run(capsys, "eval", folder, "--data", *files_of(corpus), *options)
    assert (status, err) == (0, "")
    expected = evaluate(model, cache, 32, rate=0.3)
    total = next(line.split() for line in out.splitlines() if line.startswith("total"))
    assert total[1:4] == [f"{value:.4f}" for value in (expected.loss, expected.bits, expected.accuracy)]
    assert total[4:6] == [f"{expected.mask_accuracy:.4f}", f"{expected.num_masked:,}"]
    assert all(f"\n{path.name} " in out for path in files_of(corpus))
    written = json.loads(file.read_text())
    assert written["loss"] == pytest.approx(expected.loss, rel=1e-6) and written["rate"] == 0.3
    assert written["per_source"].keys() == expected.per_source.keys()
    assert written["tokenizer_sha256"] == tokenizer_digest(tokenizer)
    assert "not the tokenizer of a run" in out


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("build", [hbert_model, bert_model])
def test_optimized_for_serving(capsys, tmp_path, corpus, tokenizer, cache, build, dtype):
    model = build(cache.vocab_size)
    folder, file = save(model, tokenizer, tmp_path / "model"), tmp_path / "result.json"
    words = ["eval", folder, "--data", *files_of(corpus), "--length", 32, "--json", file]
    file.write_text("of an evaluation before")
    status, out, err = run(capsys, *words, "--overwrite", "--optimize", dtype)
    assert (status, err) == (0, "") and f"of them masked, optimized for {dtype};" in out
    expected, plain = evaluate(hbert.optimize(model, dtype), cache, 32), evaluate(model, cache, 32)
    written = json.loads(file.read_text())
    assert written["dtype"] == f"optimized for {dtype}"
    assert written["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert written["loss"] == pytest.approx(plain.loss, rel=1e-5 if dtype == "fp32" else 1e-2)
    assert dtype == "fp32" or written["loss"] != pytest.approx(plain.loss, rel=1e-6)


def test_int8_stays_on_the_cpu_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr("hbert.precision.device", lambda: torch.device("cuda"))
    assert device_of(argparse.Namespace(optimize="int8")) == torch.device("cpu")
    assert {device_of(argparse.Namespace(optimize=dtype)) for dtype in (None, "bf16")} == {torch.device("cuda")}


def test_one_kind_of_numbers_at_a_time(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["eval", str(tmp_path), "--dtype", "bf16", "--optimize", "int8"])
    assert "not allowed with argument --dtype" in capsys.readouterr().err


def test_a_run_folder_is_evaluated_on_its_own_text(capsys, tmp_path, corpus, tokenizer, cache):
    folder = write_run(tmp_path / "run", run_info(corpus, tokenizer), [])
    save(hbert_model(cache.vocab_size), tokenizer, folder)
    status, out, _ = run(capsys, "eval", folder, "--max-blocks", 6)
    assert status == 0 and "total" in out and "blocks of 32 tokens" in out and "not the tokenizer of a run" not in out
    other = write_documents(tmp_path / "other.txt", 3)
    status, out, _ = run(capsys, "eval", folder, "--data", other, "--length", 32, "--max-blocks", 6)
    assert status == 0 and other.name in out and "total" not in out


def test_a_run_whose_text_has_changed_is_evaluated_on_request_only(
    capsys, tmp_path, corpus, tokenizer, cache, text_files
):
    folder = write_run(tmp_path / "run", run_info(corpus, tokenizer), [])
    save(hbert_model(cache.vocab_size), tokenizer, folder)
    write_documents(text_files[0], seed=9)
    status, out, err = run(capsys, "eval", folder, "--max-blocks", 6)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert f"the text of {folder} is no longer the one it was trained with" in err and "give it with --data" in err
    status, out, _ = run(capsys, "eval", folder, "--data", *text_files, "--max-blocks", 6)
    assert status == 0 and "total" in out


@pytest.fixture
def roberta_tokenizer(corpus):
    """Names, ids and pre-tokenization of another family; one ordinary piece looks like a special token."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "[SEP]", *sorted({w for t in corpus.train_texts() for w in t.split()})]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate([*pieces, "<mask>"])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    names = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{role}_token": name for role, name in names.items()}
    )


def test_tokenizer_with_other_special_tokens(capsys, tmp_path, corpus, roberta_tokenizer):
    size = len(roberta_tokenizer)
    config = RobertaConfig(
        vocab_size=size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=34
    )
    folder = tmp_path / "roberta"
    RobertaForMaskedLM(config).save_pretrained(folder)
    roberta_tokenizer.save_pretrained(folder)
    renamed = checkpoint_tokenizer(str(folder))
    assert special_ids(renamed) == {"[CLS]": 0, "[PAD]": 1, "[SEP]": 2, "[UNK]": 3, "[MASK]": size - 1}
    assert renamed.token_to_id("</s>") == 4 and renamed.get_vocab_size() == size
    cache = TokenCache.build(corpus, renamed)
    document = next(document for document in corpus.documents() if document.held_out)
    expected = roberta_tokenizer(document.text)["input_ids"]
    assert cache.held_out.document(0).tolist() == [0, *expected, 2]
    assert cache.mask_id == size - 1
    status, out, _ = run(capsys, "eval", folder, "--data", *files_of(corpus), "--length", 32, "--dtype", "fp32")
    assert status == 0 and "total" in out


def test_unigram_vocabulary_keeps_ids_and_pieces():
    pieces = [("<pad>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0), ("ab", -1.5), ("b", -2.0)]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("<mask>", 0.0)], unk_id=3))
    own = dict(
        zip(("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"), (p for p, _ in [*pieces[:4], ("<mask>", 0)]), strict=True)
    )
    renamed = with_bert_names(tokenizer, own)
    assert renamed.encode("abba?").ids == tokenizer.encode("abba?").ids == [5, 6, 4, 3]
    assert [renamed.token_to_id(role) for role in own] == [0, 1, 2, 3, 7]


def test_roles_without_a_token_of_their_own(tokenizer):
    own = {role: role for role in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    assert with_bert_names(tokenizer, own) is tokenizer
    with pytest.raises(HbertError, match=r"no token in the role of \[MASK\]"):
        with_bert_names(tokenizer, own | {"[MASK]": None})
    with pytest.raises(HbertError, match="one token in two of the roles"):
        with_bert_names(tokenizer, own | {"[CLS]": "[SEP]"})


NO_TOKENIZER = "has no tokenizer: save one into the folder (tokenizer.save_pretrained), or give one with --tokenizer"


def without_head(folder, tokenizer):
    save(BertModel(bert_model().config), tokenizer, folder)


def incomplete(folder, tokenizer):
    model = bert_model()
    state = {name: t for name, t in model.state_dict().items() if "layer.1" not in name}
    model.save_pretrained(folder, state_dict=state)
    save_tokenizer(tokenizer, folder)


def decoder_only(folder, tokenizer):
    save(GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1)), tokenizer, folder)


def corrupt(folder, tokenizer):
    save(bert_model(), tokenizer, folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)


def without_tokenizer(folder, tokenizer):
    bert_model().save_pretrained(folder)


def hbert_without_tokenizer(folder, tokenizer):
    hbert_model(300).save_pretrained(folder)


def without_config(folder, tokenizer):
    save_tokenizer(tokenizer, folder)


def with_small_vocabulary(folder, tokenizer):
    save(bert_model(50), tokenizer, folder)


def broken_config(folder, tokenizer):
    save(bert_model(), tokenizer, folder)
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_head, "it was saved without its masked-LM head"),
        (incomplete, "its weights are incomplete"),
        (decoder_only, "is a gpt2 model: that has no masked-LM head"),
        (corrupt, "cannot be loaded"),
        (broken_config, "cannot be loaded"),
        (without_tokenizer, NO_TOKENIZER),
        (hbert_without_tokenizer, NO_TOKENIZER),
        (without_config, "is not a model folder: it has no config.json"),
        (with_small_vocabulary, "the vocabulary does not match"),
    ],
)
def test_checkpoints_that_cannot_be_evaluated(capsys, tmp_path, corpus, tokenizer, make, message):
    folder = tmp_path / "model"
    make(folder, tokenizer)
    status, _, err = run(capsys, "eval", folder, "--data", *files_of(corpus), "--length", 32)
    assert status == 2 and message in err and err.count("\n") == 1


def test_tokenizer_from_elsewhere(capsys, tmp_path, corpus, tokenizer, cache):
    bert_model(cache.vocab_size).save_pretrained(tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    options = ["--tokenizer", tmp_path / "tokenizer", "--length", 32, "--max-blocks", 4]
    status, out, _ = run(capsys, "eval", tmp_path / "model", "--data", *files_of(corpus), *options)
    assert status == 0 and tokenizer_digest(tokenizer)[:12] in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/at/all"], "no such folder: /nowhere/at/all"),
        (["runs/not/there"], "no such folder: runs/not/there"),
        (["nobody/nothing"], "'nobody/nothing' cannot be loaded (there is no folder of this name either)"),
        (["MODEL", "--rate", "0"], "the masking rate is 0.0"),
        (["MODEL", "--length", "0"], "length is 0"),
        (["MODEL", "--max-blocks", "0"], "max_blocks is 0"),
        (["MODEL", "--json", "/nowhere/result.json"], "cannot write /nowhere/result.json"),
        (["MODEL", "--json", "SHORT"], "short.txt exists; choose another name or pass --overwrite"),
        (["MODEL", "--json", "MODEL", "--overwrite"], "it must be a file in a folder that exists"),
        (["MODEL", "--data", "nowhere.txt", "--length", "32"], "no such text file: nowhere.txt"),
        (["MODEL", "--length", "65"], "the model has 64 positions"),
        (["MODEL", "--data", "SHORT", "--length", "32"], "shorter than one block of 32 tokens"),
    ],
)
def test_errors_are_one_line(capsys, tmp_path, tokenizer, arguments, message):
    model = save(bert_model(), tokenizer, tmp_path / "model")
    short = tmp_path / "short.txt"
    short.write_text("one fox")
    replaced = {"MODEL": str(model), "SHORT": str(short)}
    status, _, err = run(capsys, "eval", *(replaced.get(argument, argument) for argument in arguments))
    assert status == 2 and message in err and err.count("\n") == 1


def test_nothing_of_the_checkpoint_is_run(capsys, tmp_path, corpus, tokenizer):
    folder = save(bert_model(), tokenizer, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForMaskedLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "was-run"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    status, _, err = run(capsys, "eval", folder, "--data", *files_of(corpus))
    assert status == 2 and "cannot be loaded" in err and not marker.exists()


def test_auto_takes_what_the_machine_computes(capsys, tmp_path, corpus, tokenizer, monkeypatch):
    folder = save(bert_model(), tokenizer, tmp_path / "model")
    for native, dtype in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("hbert.pretrain.machine.native_bf16", lambda device, native=native: native)
        status, out, _ = run(capsys, "eval", folder, "--data", *files_of(corpus), "--length", 32, "--max-blocks", 4)
        assert status == 0 and f"of them masked, {dtype};" in out
