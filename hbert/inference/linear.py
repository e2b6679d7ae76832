"""Linear layers whose weights are laid out once for the product that reads them."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from hbert.layers import ACTIVATIONS
from hbert_kernels import cpu_capability, pack_int8_weight, pack_weight

from .kernels import Kernels

_OPS = torch.ops.mkldnn


class KernelLinear:
    """The weight and bias of :func:`hbert_kernels.packed_linear`.

    Args:
        weight: [N, K], any floating dtype.
        bias: [N], or None; float32.
        dtype: float32 or bfloat16; of the weights, of x and of the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.weight = pack_weight(weight.detach().to(dtype))
        self.bias = None if bias is None else bias.detach().to(torch.float32, copy=True)

    def __call__(self, kernels: Kernels, x: Tensor, other: Tensor | None = None) -> Tensor:
        return kernels.packed_linear(x, self.weight, self.bias, other)

    def activated(self, kernels: Kernels, x: Tensor, activation: str) -> Tensor:
        return kernels.packed_linear(x, self.weight, self.bias, None, activation)


class TorchLinear:
    """``x W^T + b``, optionally ``+ other``, for x [T, K] -> [T, N].

    On a CPU with oneDNN the weight is reordered once, and the sum is part of the product; elsewhere it is
    ``torch.nn.functional.linear``.

    Args:
        weight: [N, K], any floating dtype.
        bias: [N], or None.
        dtype: float32 or bfloat16; of the weights, of x and of the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        plain = weight.detach().to(dtype, copy=True).contiguous()
        self.is_packed = _can_pack(weight.device.type, dtype)
        self.weight = _OPS._reorder_linear_weight(plain, None) if self.is_packed else plain
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)

    def __call__(self, kernels: Kernels, x: Tensor, other: Tensor | None = None) -> Tensor:
        if not self.is_packed:
            y = F.linear(x, self.weight, self.bias)
            return y if other is None else y.add_(other)
        if other is not None:
            return _OPS._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
        # The encoder pads the tokens of a batch once; rows of sequences and heads come as they are.
        rows = x.shape[0]
        if (dead := row_count(rows) - rows) > 0:
            x = F.pad(x, (0, 0, 0, dead))
        return _OPS._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")[:rows]

    def activated(self, kernels: Kernels, x: Tensor, activation: str) -> Tensor:
        # GELU inside of oneDNN's product takes longer than torch's behind it (docs/inference.md).
        return ACTIVATIONS[activation](self(kernels, x))


class Int8Linear:
    """The weight and bias of :func:`hbert_kernels.int8_linear`.

    Args:
        weight: [N, K], any floating dtype; quantised by the largest magnitude of each row.
        bias: [N], or None; float32.

    Raises:
        ValueError: weight holds NaN or infinity.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = pack_int8_weight(weight.detach().float())
        self.bias = None if bias is None else bias.detach().to(torch.float32, copy=True)


def pack(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> KernelLinear | TorchLinear:
    """The fastest layer for this weight, dtype and processor."""
    if weight.device.type == "cpu" and own_product_is_faster():
        return KernelLinear(weight, bias, dtype)
    return TorchLinear(weight, bias, dtype)


def own_product_is_faster() -> bool:
    """Whether linear layers on the CPU run our kernel, not oneDNN's: where it was measured (docs/inference.md)."""
    return cpu_capability().startswith("avx")


def row_count(rows: int) -> int:
    """Rows that a product of oneDNN of so many is better made with: one of 16 numbers an octave, at most 1/16 more.

    oneDNN compiles code for each number of rows and never gives all of it back: half a MiB for each number and shape
    of a weight, whatever ONEDNN_PRIMITIVE_CACHE_CAPACITY says (docs/inference.md).
    """
    step = 1 << max(rows.bit_length() - 5, 0)
    return -(-rows // step) * step


@functools.cache
def _can_pack(device: str, dtype: torch.dtype) -> bool:
    # Private ops of torch: one that changed or is missing must cost speed only.
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    try:
        weight, x = torch.zeros(16, 16, dtype=dtype), torch.ones(1, 16, dtype=dtype)
        packed = _OPS._reorder_linear_weight(weight, None)
        _OPS._linear_pointwise.default(x, packed, None, "none", [], "")
        return torch.equal(_OPS._linear_pointwise.binary(x, x, packed, None, "add"), x)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
