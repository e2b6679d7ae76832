"""An op on concrete tensors, and the helpers that the ops share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.ops import HIDDEN, Setting
from bench.runtime import DTYPES, SEED

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Layout:
    """How a peer holds the tokens of activations and results, where that is not packed: made outside the timed part."""

    from_packed: Callable[[Tensor], Tensor]
    to_packed: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Inputs and everybody's function of them, `function(*activations, *parameters)`, floating inputs only.

    All functions take and return the same packed tensors [T, ...], but for the peers in `layouts`.
    """

    activations: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    candidates: Mapping[str, Function]
    baselines: Mapping[str, Function]
    layouts: Mapping[str, Layout] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.activations + self.parameters


class Draw:
    """Random tensors of one setting in its dtype, the same at every call of the benchmark."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._generator = torch.Generator().manual_seed(SEED)

    def normal(self, *shape: int, scale: float = 1.0, offset: float = 0.0, dtype: str = "") -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator) * scale + offset
        return drawn.to(self._setting.device, DTYPES[dtype or self._setting.dtype])

    def rows(self, width: int = HIDDEN) -> Tensor:
        """An activation [tokens, width]."""
        return self.normal(self._setting.tokens, width)

    def affine(self, width: int = HIDDEN) -> tuple[Tensor, Tensor]:
        """Weight and bias [width] of a norm."""
        return self.normal(width, scale=0.25, offset=1.0), self.normal(width)


def uniform_cu_seqlens(setting: Setting) -> Tensor:
    """int32 [B+1] of a batch without padding."""
    return torch.arange(0, setting.tokens + 1, setting.seq, dtype=torch.int32, device=setting.device)
