"""What a runtime offers to the task that measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

Graphs = Mapping[str, str]  # paths of what was exported for a peer, by name
Forward = Callable[[], Any]


class Engine(Protocol):
    """A loaded model."""

    def prepared(self, ids: Any, mask: Any) -> Forward:
        """The forward of ids and mask, int64 [B, N]; each call gives the last hidden state as an array [B, N, H]."""


Variants = dict[str, Callable[[], Engine]]  # how a peer's model may be loaded, by what a row calls it
