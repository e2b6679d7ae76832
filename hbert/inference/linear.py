"""Linear layers whose weights are laid out once for the matrix library of the CPU."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

_OPS = torch.ops.mkldnn


class PackedLinear:
    """``x W^T + b``, optionally ``+ other``, for x [T, K] -> [T, N].

    On a CPU with oneDNN the weight is reordered once and the sum is part of the product; elsewhere it is
    ``torch.nn.functional.linear``.

    Args:
        weight: [N, K], any floating dtype.
        bias: [N], or None.
        dtype: float32 or bfloat16; of the weights, of x and of the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.weight = weight.detach().to(dtype, copy=True).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self.packed = _can_pack(weight.device.type, dtype)
        if self.packed:
            self.weight = _OPS._reorder_linear_weight(self.weight, None)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if not self.packed:
            y = F.linear(x, self.weight, self.bias)
            return y if other is None else y.add_(other)
        if other is None:
            return _OPS._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return _OPS._linear_pointwise.binary(x, other, self.weight, self.bias, "add")


@functools.cache
def _can_pack(device: str, dtype: torch.dtype) -> bool:
    # Private ops of torch: one that changed or is missing must cost speed only.
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    try:
        weight, x = torch.zeros(16, 16, dtype=dtype), torch.ones(1, 16, dtype=dtype)
        packed = _OPS._reorder_linear_weight(weight, None)
        return torch.equal(_OPS._linear_pointwise.binary(x, x, packed, None, "add"), x)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
