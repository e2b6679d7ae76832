"""Runs every CUDA kernel on NumPy arrays and compares the results with formulas in float64.

``python cuda_numpy_driver.py MODULE SEED [CASE...]``: MODULE is what cuda_shim_build.numpy_library built. A process of
its own, without torch, so that it can be started with the runtime of a sanitizer.
"""

from __future__ import annotations

import sys
from math import erf

import numpy as np
from cuda_shim_build import load

EPS = 1e-5
PLAIN, RESIDUAL, ACTIVATION, GATED = range(4)
# float32 sums of some hundred terms, two of them in a row; a missing barrier or row is wrong by far more.
TOLERANCE = 2e-5


def check(error: int) -> None:
    """A launcher's cudaError_t."""
    assert error == 0, f"CUDA error {error}"


def nans(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def assert_close(name: str, actual: np.ndarray, exact: np.ndarray) -> None:
    """Within the tolerance of the largest value; NaN fails."""
    scale = max(1.0, float(np.abs(exact).max(initial=0)))
    worst = float(np.abs(actual - exact).max(initial=0))
    assert worst <= TOLERANCE * scale, f"{name}: wrong by {worst:.3g}"


def gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and derivatives."""
    cdf = 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))
    return x * cdf, cdf + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


def sequences(cu: np.ndarray) -> list[slice]:
    return [slice(a, b) for a, b in zip(cu, cu[1:], strict=False)]


class Case:
    """Runs kernels on random arrays, each an allocation of exact size, ``offset`` values behind an aligned address."""

    def __init__(self, module, offset: int = 0) -> None:
        self.module, self.offset = module, offset
        self.rng = np.random.default_rng(0)

    def normal(self, *shape: int) -> np.ndarray:
        values = self.rng.standard_normal(self.offset + int(np.prod(shape))).astype(np.float32)
        return values[self.offset :].reshape(shape)

    def row_norm(self, source: int, rows: int, width: int, lengths: tuple[int, ...] = ()) -> None:
        """Forward and backward of one of the row norms."""
        x, dy = self.normal(rows, width), self.normal(rows, width)
        weight, bias, other = self.normal(width), self.normal(width), self.normal(rows, width)
        cu = np.cumsum([0, *lengths]).astype(np.int32)
        gate, input_bias = self.normal(len(lengths), width), self.normal(width)
        alive = np.arange(rows) < (cu[-1] if source == GATED else rows)
        spread = np.zeros((rows, width))
        for s, where in enumerate(sequences(cu)):
            spread[where] = gate[s]
        wide = x.astype(np.float64)
        value, slope = {
            PLAIN: lambda: (wide, 1.0),
            RESIDUAL: lambda: ((x + other).astype(np.float64), 1.0),
            ACTIVATION: lambda: gelu(wide + input_bias),
            GATED: lambda: (wide * spread, spread),
        }[source]()
        mean, rstd = value.mean(1), 1 / np.sqrt(value.var(1) + EPS)
        xhat = (value - mean[:, None]) * rstd[:, None]

        y, total, got_mean, got_rstd = nans(rows, width), nans(rows, width), nans(rows), nans(rows)
        optional = {
            PLAIN: (None, None, None, None, None),
            RESIDUAL: (other, total, None, None, None),
            ACTIVATION: (None, None, input_bias, None, None),
            GATED: (None, None, None, gate, cu),
        }[source]
        check(self.module.row_norm_forward(source, 0, EPS, x, *optional, weight, bias, y, got_mean, got_rstd))
        assert_close("y", y, np.where(alive[:, None], xhat * weight + bias, 0))
        assert_close("mean", got_mean, np.where(alive, mean, 0))

        g = dy * weight.astype(np.float64)
        dv = rstd[:, None] * (g - g.mean(1, keepdims=True) - xhat * (g * xhat).mean(1, keepdims=True))
        live = alive[:, None]
        dx, dweight, dbias = nans(rows, width), nans(width), nans(width)
        dsource = nans(len(lengths), width) if source == GATED else nans(width) if source == ACTIVATION else None
        back = PLAIN if source == RESIDUAL else source
        kept = total if source == RESIDUAL else x
        arrays = (dy, None, kept, *optional[2:], got_mean, got_rstd, weight, dx, dweight, dbias, dsource)
        check(self.module.row_norm_backward(back, 0, *arrays))
        assert_close("dx", dx, np.where(live, dv * slope, 0))
        assert_close("dweight", dweight, np.where(live, dy * xhat, 0).sum(0))
        assert_close("dbias", dbias, np.where(live, dy, 0).sum(0))
        if source == ACTIVATION:
            assert_close("dinput_bias", dsource, (dv * slope).sum(0))
        if source == GATED:
            assert_close("dgate", dsource, np.stack([(dv * wide)[where].sum(0) for where in sequences(cu)]))

    def pool(self, lengths: tuple[int, ...], width: int, heads: int, scorer_shape: tuple[int, ...], full: bool) -> None:
        """Forward and backward of pooling, three dead rows behind."""
        rows, scale = sum(lengths) + 3, (width // heads) ** -0.5
        x, scorer, cu = (
            self.normal(rows, width),
            self.normal(*scorer_shape),
            np.cumsum([0, *lengths]).astype(np.int32),
        )
        shape = (len(lengths), heads, width) if full else (len(lengths), width)
        pooled, softmax, dpooled = nans(*shape), nans(len(lengths), 2, heads), self.normal(*shape)
        check(self.module.pool_forward(x, scorer, cu, heads, full, scale, pooled, softmax))
        dx, dscorer = nans(rows, width), nans(*scorer_shape)
        check(self.module.pool_backward(dpooled, x, scorer, cu, pooled, softmax, heads, full, scale, dx, dscorer))
        exact_pooled, exact_dx, exact_dscorer = np.zeros(shape), np.zeros((rows, width)), np.zeros(scorer_shape)
        slices = [slice(j * width // heads, (j + 1) * width // heads) for j in range(heads)]
        for s, where in enumerate(sequences(cu)):
            if where.start == where.stop:
                continue
            for j, own in enumerate(slices):
                index = (s, j) if scorer.ndim == 3 else (j,)
                seen = slice(None) if scorer.shape[-1] == width else own
                out, target = (slice(None), (s, j)) if full else (own, (s, own))
                tokens, vector = x[where].astype(np.float64), scorer[index].astype(np.float64)
                score = tokens[:, seen] @ vector * scale
                alpha = np.exp(score - score.max())
                alpha /= alpha.sum()
                exact_pooled[target] = alpha @ tokens[:, out]
                dalpha = tokens[:, out] @ dpooled[target]
                dscore = alpha * (dalpha - alpha @ dalpha) * scale
                exact_dscorer[index] += dscore @ tokens[:, seen]
                exact_dx[where, out] += np.outer(alpha, dpooled[target])
                exact_dx[where, seen] += np.outer(dscore, vector)
        assert_close("pooled", pooled, exact_pooled)
        assert_close("dx", dx, exact_dx)
        assert_close("dscorer", dscorer, exact_dscorer)


# Several warps per row, several rows per block, several blocks; more than one chunk; aligned and not.
CASES = {
    "plain": lambda case: (case.row_norm(PLAIN, 21, 300), case.row_norm(PLAIN, 9, 520)),
    "unaligned": lambda case: (case.row_norm(PLAIN, 4, 64), case.pool((5,), 32, 4, (4, 32), True)),
    "residual": lambda case: case.row_norm(RESIDUAL, 10, 264),
    "activation": lambda case: (case.row_norm(ACTIVATION, 19, 64), case.row_norm(ACTIVATION, 5, 301)),
    "gated": lambda case: case.row_norm(GATED, 42, 272, (20, 0, 1, 18)),
    "pool_dense": lambda case: case.pool((70, 0, 5), 48, 6, (6, 48), False),
    "pool_sequences": lambda case: case.pool((66, 3), 40, 5, (2, 5, 40), True),
    "pool_heads": lambda case: (case.pool((5, 65), 36, 4, (4, 9), True), case.pool((5, 9), 32, 4, (2, 4, 8), False)),
}


def main(path: str, seed: str, *names: str) -> None:
    module = load(path)
    module.seed(int(seed))
    for name in names or CASES:
        CASES[name](Case(module, offset=int(name == "unaligned")))
        print(f"{name}: ok", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
