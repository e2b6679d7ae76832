"""The walk of docs/huggingface.md, as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from model_helpers import small_masked_lm, small_model
from test_transformers_integration import small_tokenizer

from hbert import HBertForQuestionAnswering

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"


def run_block(heading: str, names: dict) -> None:
    """Runs the first Python of a section with these names, and leaves its own there."""
    section = PAGE.read_text(encoding="utf-8").split(f"# {heading}\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    exec(compile(code, str(PAGE), "exec"), names)


def test_from_a_checkpoint_to_a_classifier_to_an_onnx_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_masked_lm(dtype=torch.float32).save_pretrained("my-hbert")
    small_tokenizer().save_pretrained("my-hbert")
    names = {"texts_and_labels": [(f"w{i} film w{i + 1}", i % 2) for i in range(16)]}
    run_block("From a checkpoint to a classifier to an ONNX file", names)
    assert names["trainer"].state.global_step == 3
    assert (tmp_path / "my-classifier.onnx").stat().st_size > 0
    assert (tmp_path / "my-classifier" / "tokenizer.json").exists()


def test_answers(tmp_path, monkeypatch):
    """A model that was taught one answer."""
    monkeypatch.chdir(tmp_path)
    names = {"question": "w1 w2", "context": "w3 w4 w5 w6 w7"}
    tokenizer, model = small_tokenizer(), small_model(HBertForQuestionAnswering, dtype=torch.float32)
    inputs = tokenizer(names["question"], names["context"], return_tensors="pt")
    span = {"start_positions": torch.tensor([3]), "end_positions": torch.tensor([5])}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        model(**inputs, **span).loss.backward()
        optimizer.step()
    model.save_pretrained("my-answers")
    tokenizer.save_pretrained("my-answers")
    run_block("Answers", names)
    assert names["answer"] == "w4 w5 w6"
