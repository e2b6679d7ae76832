"""Kernels: one op, forward or backward, against plain torch, torch.compile and the machine's floor, in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import machine, memory
from bench.floor import Product, Stream
from bench.gate import Gate, in_packed
from bench.harness import Case
from bench.ops import FLOOR, Op, Setting, load
from bench.ops.problem import Function, Problem
from bench.runtime import DTYPES, hbert_traits, torch_traits
from hbert_kernels import BackendError, use_backend

_BEYOND_CACHE = 2  # buffers in turn add up to this many times the last-level cache


def setting_of(case: Case) -> Setting:
    """What the coordinator wrote into the case."""
    return Setting(case.params["variant"], case.batch, case.seq, case.params["step"], case.dtype)


class Subject:
    """The problem of one case, shared by the peers of the process."""

    def __init__(self, case: Case) -> None:
        self.op: Op = load(case.params["op"])
        self.setting = setting_of(case)
        self.cost = self.op.cost(self.setting)
        self.problem: Problem = self.op.problem(self.setting)
        self.gate = Gate(self.problem, self.setting.step != "fwd")
        self.turns = _turns(self.cost.reads + self.cost.writes) if self.op.cold(self.setting) else 1


def _turns(call_bytes: int) -> int:
    """How many sets of buffers have to take turns so that each is out of the cache when its turn comes."""
    return max(1, -(-_BEYOND_CACHE * machine.last_level_cache() // call_bytes))


@functools.lru_cache(maxsize=1)
def _subject(op: str, setting: Setting, case: Case) -> Subject:
    raise NotImplementedError
