"""The blocks of Python of the pages that a newcomer copies from, run in their order."""

import functools
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["getting-started.md", "modules.md"])
def test_every_block_runs(page, monkeypatch, capsys):
    # The compiled graph is the subject here, not the minute that generating code for it takes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 3
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    printed = capsys.readouterr().out
    for promised in re.findall(r"^print\(.*\) +# (torch\.Size[^:\n]*)", "".join(blocks), re.MULTILINE):
        assert promised in printed
