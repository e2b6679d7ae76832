"""The walk of docs/huggingface.md, as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from model_helpers import small_masked_lm
from test_transformers_integration import small_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"


def test_from_a_checkpoint_to_a_classifier_to_an_onnx_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_masked_lm(dtype=torch.float32).save_pretrained("my-hbert")
    small_tokenizer().save_pretrained("my-hbert")
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    names = {"texts_and_labels": [(f"w{i} film w{i + 1}", i % 2) for i in range(16)]}
    exec(compile(code, str(PAGE), "exec"), names)
    assert names["trainer"].state.global_step == 3
    assert (tmp_path / "my-classifier.onnx").stat().st_size > 0
    assert (tmp_path / "my-classifier" / "tokenizer.json").exists()
