"""What a conversion did with every tensor, and how it is told."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Move:
    """The tensors of the checkpoint that a tensor was made of, and how, where that is more than a copy."""

    sources: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The fate of every tensor of a checkpoint and of every parameter of the model that was made of it.

    Attributes:
        moved: parameter of the HBERT model -> what it was made of.
        fresh: parameter that kept its first value -> why.
        left_out: tensor of the checkpoint that was used nowhere -> why.
    """

    moved: dict[str, Move] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str, str]]:
        """Returns (fate, tensor, where from or why), with the layers of one kind in one row.

        The fates are ``moved`` and ``fresh``, of parameters, and ``left out``, of tensors of the checkpoint.
        """
        moved = [
            (name, _joined(_template(s) for s in move.sources), move.note, move.sources)
            for name, move in self.moved.items()
        ]
        rows = [
            ("moved", names, f"{_joined(_merged(part) for part in zip(*sources, strict=True))}{_aside(note)}")
            for names, note, sources in _grouped(moved)
        ]
        for fate, tensors in (("fresh", self.fresh), ("left out", self.left_out)):
            entries = [(name, why, why, ()) for name, why in tensors.items()]
            rows += [(fate, names, why) for names, why, _ in _grouped(entries)]
        return rows

    def record(self) -> dict[str, Any]:
        """Returns :meth:`rows` by fate as JSON-serialisable dictionaries."""
        kinds: dict[str, dict[str, str]] = {"moved": {}, "fresh": {}, "left out": {}}
        for fate, names, text in self.rows():
            kinds[fate][names] = text
        return kinds

    def __str__(self) -> str:
        return "\n".join(
            f"{fate:9} {names}  <-  {text}" if fate == "moved" else f"{fate:9} {names}: {text}"
            for fate, names, text in self.rows()
        )


def _grouped(entries: Iterable[tuple[str, str, str, tuple[str, ...]]]) -> list[tuple[str, str, list[tuple[str, ...]]]]:
    """Entries (name, what tells groups apart, text, sources) -> (merged name, text, sources of each)."""
    groups: dict[tuple[str, str, str], list[tuple[str, tuple[str, ...]]]] = {}
    for name, kind, text, sources in entries:
        groups.setdefault((_template(name), kind, text), []).append((name, sources))
    return [
        (_merged(name for name, _ in group), text, [sources for _, sources in group])
        for (_, _, text), group in groups.items()
    ]


def _template(name: str) -> str:
    return _INDEX.sub("*", name)


def _merged(names: Iterable[str]) -> str:
    """One name for names that differ in their number at most: ``layers.{0-3,5}.ffn``."""
    listed = list(names)
    numbers = sorted({int(found[0]) for name in listed if (found := _INDEX.search(name))})
    return listed[0] if len(numbers) < 2 else _INDEX.sub(f"{{{_ranges(numbers)}}}", listed[0], count=1)


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _joined(names: Iterable[str]) -> str:
    return " + ".join(names)


def _aside(note: str) -> str:
    return f" ({note})" if note else ""
