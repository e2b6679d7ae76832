"""What step s does, as pure functions of s: its learning rate and its place in the stream of blocks."""

from __future__ import annotations

import math

import numpy as np

from .recipes import Recipe


def lr_factor(step: int, max_steps: int, recipe: Recipe) -> float:
    """Share of the peak learning rate that step ``step`` (of ``max_steps``, from 0) uses, in (0, 1].

    With n steps, w = ceil(warmup n) and d = ceil(decay n): (s + 1) / (w + 1) for s < w; then for ``linear``
    (n - s) / (n - w), for ``cosine`` (1 + cos(pi (s - w) / (n - w))) / 2, for ``wsd`` min(1, (n - s) / d).
    """
    warm = math.ceil(recipe.warmup * max_steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    left = max_steps - step
    if recipe.schedule == "linear":
        return left / (max_steps - warm)
    if recipe.schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warm) / (max_steps - warm))) / 2
    return min(1.0, left / max(1, math.ceil(recipe.decay * max_steps)))


class BatchPlan:
    """How many blocks each step takes, and from where in the stream of blocks."""

    def __init__(self, recipe: Recipe, max_steps: int) -> None:
        ramp = round(recipe.ramp_fraction * max_steps)
        growth = recipe.batch_size - recipe.ramp_start
        self._full = recipe.batch_size
        self._sizes = recipe.ramp_start + growth * np.arange(ramp) // max(ramp, 1)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])

    def size(self, step: int) -> int:
        """Blocks of this step."""
        return int(self._sizes[step]) if step < len(self._sizes) else self._full

    def start(self, step: int) -> int:
        """Blocks of all steps before this one."""
        beyond = max(0, step - len(self._sizes))
        return int(self._starts[min(step, len(self._sizes))]) + beyond * self._full

    def ramp_sizes(self) -> np.ndarray:
        """Blocks of the steps of the ramp, int64 [steps of the ramp]."""
        return self._sizes
