"""The kernels suite, as the coordinator sees it: cases from the ops' own declarations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from bench.harness import FLOOR, MEMORY, TIME, Case, is_floor
from bench.ops import NAMES, STREAM, Op, Setting, load
from bench.suites.suite import BANDWIDTH, FLOP_RATE, Metric, Suite, Wanted


class KernelSuite(Suite):
    """All peers of an op work on one problem in one process. Each op has its own shapes, so the suite has none."""

    one_process: ClassVar[bool] = True
    has_ops: ClassVar[bool] = True
    max_seq: ClassVar[int] = 1 << 16
    min_time: ClassVar[float] = 0.1
    quick_min_time: ClassVar[float] = 0.05
    weighs: ClassVar[str] = "forward and backward, beyond inputs and gradients"

    def cases(self, wanted: Wanted) -> list[Case]:
        """One case for each op, dtype, variant, shape and step; `quick`: the first shape of each, in the last dtype."""
        dtypes = wanted.dtypes or self.default_dtypes[-1 if wanted.quick else 0 :]
        return [
            case
            for op in map(load, wanted.ops or NAMES)
            for dtype in dtypes
            for case in self._cases_of(op, dtype, wanted)
        ]

    def _cases_of(self, op: Op, dtype: str, wanted: Wanted) -> Iterator[Case]:
        for variant, own in op.variants.items():
            settings = [
                Setting(variant, batch, seq, step, dtype)
                for batch, seq in wanted.shapes or own[: 1 if wanted.quick else None]
                for step in op.steps
            ]
            for setting in settings:
                yield self._case(op, setting, "dram" if op.cold(setting) else "cache", TIME)
            if variant in op.memory:
                yield self._case(op, settings[-1], "peak", MEMORY)

    def _case(self, op: Op, setting: Setting, where: str, measures: str) -> Case:
        title = ".".join(filter(None, (op.name, setting.variant)))
        peers = (*op.baselines, *op.candidates(setting.variant), FLOOR)
        if measures == MEMORY:  # in a fresh process the compiler's own memory would be in the peak
            peers = tuple(peer for peer in peers if peer not in ("compile", FLOOR))
        return Case(
            self.name,
            f"{title}/{setting.batch}x{setting.seq}/{setting.step}/{where}",
            setting.dtype,
            setting.batch,
            setting.seq,
            op.cost(setting).work,
            params={"op": op.name, "variant": setting.variant, "step": setting.step},
            peers=peers,
            measures=(measures,),
        )

    def floor_of(self, peer: str) -> str:
        """One for all: the least time of the op."""
        return "" if is_floor(peer) else FLOOR

    def rate(self, case: Case) -> Metric:
        """Bytes a second where the floor is a stream, operations a second where it is a product."""
        params = case.params
        setting = Setting(params["variant"], case.batch, case.seq, params["step"], case.dtype)
        return BANDWIDTH if load(params["op"]).cost(setting).floor == STREAM else FLOP_RATE
