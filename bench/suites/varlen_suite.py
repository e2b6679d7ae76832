"""The varlen suite, as the coordinator sees it: the latency suite on padded batches."""

from __future__ import annotations

from typing import Any

from bench.lengths import spread_lengths
from bench.suites.suite import Suite


class VarlenSuite(Suite):
    """Forwards of batches with padding on the right; the work is the tokens that are none."""

    def work(self, batch: int, seq: int) -> float:
        return sum(spread_lengths(batch, seq))

    def params(self, size: str) -> dict[str, Any]:
        return {"size": size, "padded": True}
