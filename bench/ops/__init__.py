"""The kernels suite's subjects, one module for each op. No torch here: the coordinator asks only for the cases."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.ops.problem import Problem

NAMES = (
    "layer_norm",
    "activation_layer_norm",
    "conv_layer_norm",
    "gated_layer_norm",
    "additive_pool",
    "additive_attention",
    "attention",
    "masked_lm_loss",
    "packed_linear",
    "int8_linear",
)
ON_CPU_ONLY = ("packed_linear", "int8_linear")
HIDDEN = 768
HEADS = 12
FFN = 3072
TOKENS = ((1, 128), (8, 128), (8, 512))
COLD_FROM_TOKENS = 1024
ITEMSIZE = {"fp32": 4, "bf16": 2}
STREAM, GEMM = "stream", "gemm"
EXPONENTIAL = 20  # operations

Shape = tuple[int, int]


@dataclass(frozen=True)
class Setting:
    """What an op is measured at. `step` is fwd (in inference mode), bwd (the backward alone) or full (both)."""

    variant: str
    batch: int
    seq: int
    step: str
    dtype: str
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Gemm:
    """A product [m, k] x [k, n], done `times` times: the work of a compute-bound op as a plain library does it best."""

    m: int
    k: int
    n: int
    times: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n * self.times


@dataclass(frozen=True)
class Cost:
    """What one call cannot do without: bytes read and written, each tensor once and without write-allocate.

    `operations` are those of our CPU kernels, None where forms with other counts share the cost. An op with a `gemm`
    is bound by arithmetic: its floor is that product, not a stream of its bytes.
    """

    reads: int
    writes: int
    operations: int | None
    gemm: Gemm | None = None

    @property
    def floor(self) -> str:
        return STREAM if self.gemm is None else GEMM

    @property
    def work(self) -> int:
        """Bytes or floating-point operations: what the floor's rate is made of."""
        return self.reads + self.writes if self.gemm is None else self.gemm.flops


def tensors(setting: Setting, width: int, reads: int, writes: int, operations: int) -> Cost:
    """The cost of so many activations [tokens, width] and operations a token; parameters are not worth counting."""
    size = setting.tokens * width * setting.itemsize
    return Cost(reads * size, writes * size, setting.tokens * operations)


def cold_from_1024_tokens(setting: Setting) -> bool:
    """Whether the tensors of a call come from DRAM (buffers beyond the cache take turns) or stay in the cache."""
    return setting.tokens >= COLD_FROM_TOKENS


@dataclass(frozen=True)
class Op:
    """One op: at which settings, against whom, at what cost, and how it is built (in the worker).

    `variants` are the forms of the op with the batch x tokens of each; `compile` is torch.compile of the baseline
    `eager`; `memory` names the variants whose last shape also has a case for the peak of the extra memory.
    """

    name: str
    cost: Callable[[Setting], Cost]
    problem: Callable[[Setting], Problem]
    variants: Mapping[str, tuple[Shape, ...]] = field(default_factory=lambda: {"": TOKENS})
    steps: tuple[str, ...] = ("fwd", "bwd")
    candidates: Callable[[str], tuple[str, ...]] = lambda variant: ("hbert",)
    baselines: tuple[str, ...] = ("eager", "compile")
    cold: Callable[[Setting], bool] = cold_from_1024_tokens
    memory: tuple[str, ...] = ()


def load(name: str) -> Op:
    """The op declared by bench/ops/NAME.py."""
    return importlib.import_module(f"bench.ops.{name}").OP
