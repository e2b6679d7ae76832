"""The suites latency and varlen, as the coordinator sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from bench import machine
from bench.harness import FLOOR, MEMORY, TIME, Case
from bench.lengths import BUCKETS, spread_lengths
from bench.names import DTYPES, is_packed
from bench.suites.suite import Suite, Wanted


class LatencySuite(Suite):
    """Forwards of full sequences, their memory, and as floor the products that a model cannot do without."""

    max_seq: ClassVar[int] = 4096
    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    takes_checkpoint: ClassVar[bool] = True

    def measures(self) -> tuple[str, ...]:
        return (TIME, MEMORY) if machine.counts_peak_memory() else (TIME,)

    def floor_of(self, peer: str) -> str:
        """One for all forms of a model of ours: hbert-v1 and hbert-v1+optimize, bert+patch and bert+optimize."""
        return f"{FLOOR}-{peer.partition('+')[0]}" if is_packed(peer) else ""


class VarlenSuite(LatencySuite):
    """Forwards of batches with padding on the right; the work is the tokens that are none.

    In a second case of each batch, `CASE/buckets`, those who compute the padding get the batch sorted by length in
    four calls, each padded to its own longest sequence.
    """

    def cases(self, wanted: Wanted) -> list[Case]:
        return [form for case in super().cases(wanted) for form in self._forms(case, wanted.quick)]

    def _forms(self, case: Case, quick: bool) -> Iterator[Case]:
        yield case
        if case.batch > 1 and not quick:
            count = min(BUCKETS, case.batch)
            yield self.named(case, f"{case.name}/buckets", buckets=count)

    def work(self, batch: int, seq: int) -> float:
        return sum(spread_lengths(batch, seq))

    def params(self, model: str) -> dict[str, Any]:
        return {"size": model, "padded": True}
