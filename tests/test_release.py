"""What a release says of itself: one version everywhere, and every public name in the API reference."""

import json
import re
import runpy
from pathlib import Path

import pytest

import hbert.data
import hbert_kernels as hk

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_everywhere():
    found = {
        "CITATION.cff": re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE),
        "CHANGELOG.md": re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE),
    }
    assert {name: match and match[1] for name, match in found.items()} == dict.fromkeys(found, hk.__version__)
    assert hbert.__version__ == hk.__version__


def test_ci_has_the_triton_whose_registers_are_counted():
    budget = json.loads((ROOT / "tests/gpu/triton_budget.json").read_text())
    assert f"triton=={budget['triton']['version']}\n" in (ROOT / ".ci/constraints.txt").read_text()


def test_the_check_of_a_wheel_passes_here(capsys):
    runpy.run_path(str(ROOT / ".ci/check_wheel.py"), run_name="__main__")
    assert "saved, loaded, the same in compiled kernels" in capsys.readouterr().out


@pytest.mark.parametrize("module", [hk, hbert, hbert.data], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module):
    reference = (ROOT / "docs" / "api.md").read_text()
    entry = re.search(rf"^::: {module.__name__}\n((?: .*\n)*)", reference, re.MULTILINE)
    assert entry is not None
    named = set(re.findall(r"\w+", reference)) if "members:" in entry[1] else set(module.__all__)
    assert set(module.__all__) - named - {"__version__"} == set()
