"""The blocks of Python of the pages that a newcomer copies from, with stand-ins for what they name."""

import functools
import re
from pathlib import Path

import pytest
import torch
from finetune_helpers import save_checkpoint, toy_rows, write_tsv
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

import hbert
from hbert.config import SIZES

ROOT = Path(__file__).parents[2]
TEXTS = ["happy boats sail", "the old stone bridge of the sea and then sad wind"]
BASE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}


def found(page, pattern):
    """What matches in a page, in its order."""
    return re.findall(pattern, (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def blocks_of(page, at_least=1):
    blocks = found(page, r"^```python\n(.*?)^```")
    assert len(blocks) >= at_least
    return blocks


def run_blocks(page, names, count=None, at_least=1):
    """Runs the blocks of a page, or the first ones, with these names and those that they define."""
    for block in blocks_of(page, at_least)[:count]:
        exec(compile(block, page, "exec"), names)
    return names


def run_each_alone(page, at_least):
    """Runs every block of a page as somebody does who copies no other; all names that they define."""
    names = {}
    for block in blocks_of(page, at_least):
        exec(compile(block, page, "exec"), alone := {})
        names |= alone
    return names


@pytest.fixture
def stand_in(monkeypatch):
    """Writes a BERT of two layers, with a tokenizer, where a page has one; presets of base size have its width."""
    monkeypatch.setitem(SIZES, "base", BASE)

    def stand_in(kind, folder):
        return save_checkpoint(kind(BertConfig(**BASE, intermediate_size=128)), folder)

    return stand_in


@pytest.mark.parametrize("page", ["docs/getting-started.md", "docs/modules.md"])
def test_every_block_runs(page, monkeypatch, capsys):
    # The compiled graph is the subject here, not the minute that generating code for it takes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    run_blocks(page, {}, at_least=4)
    printed = capsys.readouterr().out
    for promised in found(page, r"^print\([^\n]*\) +# (torch\.Size[^:\n]*)"):
        assert promised in printed


def test_readme(stand_in, capsys):
    stand_in(BertModel, "path/of/a/bert")
    names = run_each_alone("README.md", at_least=4)
    assert names["y"].shape == (8, 128, 768)
    assert names["out"].loss.isfinite()
    assert "replaced  1 encoder" in capsys.readouterr().out
    assert names["embeddings"].shape[::2] == (2, 32)
    assert type(hbert.optimize("fast-bert")) is type(names["fast"])


def test_patching(stand_in, capsys):
    stand_in(BertModel, "path/of/a/bert")
    names = run_blocks("docs/patch.md", {})
    assert type(names["model"]) is BertForSequenceClassification
    printed = capsys.readouterr().out
    promises = found("docs/patch.md", r"^    (kept [^\n]*|replaced  1 [^\n]*)$")
    assert len(promises) == 3 and all(promised in printed for promised in promises)


def test_inference(stand_in):
    tokenizer = AutoTokenizer.from_pretrained(stand_in(BertForMaskedLM, "path/of/a/model"))
    names = run_blocks("docs/inference.md", {"tokenizer": tokenizer, "texts": TEXTS})
    assert names["fast"](**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.shape[::2] == (2, 30522)


def test_conversion(stand_in, capsys):
    stand_in(BertForMaskedLM, "path/of/bert-base-uncased")
    # The block behind these two is of checkpoints of other libraries: tests/convert/test_convert_state_dicts.py.
    names = run_blocks("docs/convert.md", {}, count=2)
    assert names["hybrid"].config.layer_types == hbert.HBertConfig.v1("base").layer_types
    assert names["model"].config.max_position_embeddings == 2048
    assert "moved" in capsys.readouterr().out


def test_significance(tmp_path):
    for model in ("bert", "hbert"):
        (tmp_path / model / "predictions").mkdir(parents=True)
        for seed in (0, 1):
            rows = [(label, label) for label, _ in toy_rows(20, 0)]
            write_tsv(tmp_path / model / "predictions" / f"seed-{seed}.tsv", rows, ("label", "prediction"))
    run_blocks("docs/finetuning.md", {})
