"""Linear layers whose weights are laid out once for the product that reads them."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from hbert_kernels import pack_int8_weight

_OPS = torch.ops.mkldnn
_MOST_PACKED_ROWS = 128  # of a product, where the weight is there in both layouts


class PackedLinear:
    """``x W^T + b``, optionally ``+ other``, for x [T, K] -> [T, N].

    On a CPU with oneDNN the weight is reordered once, and the sum is part of the product; elsewhere it is
    ``torch.nn.functional.linear``. In float32 on a CPU with AVX2 alone it is both, by the number of rows.

    Args:
        weight: [N, K], any floating dtype.
        bias: [N], or None.
        dtype: float32 or bfloat16; of the weights, of x and of the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        plain = weight.detach().to(dtype, copy=True).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self.packed = _OPS._reorder_linear_weight(plain, None) if _can_pack(weight.device.type, dtype) else None
        self.plain = plain if self.packed is None or _plain_is_faster_for_many_rows(dtype) else None

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if self.plain is not None and (self.packed is None or x.shape[0] > _MOST_PACKED_ROWS):
            y = F.linear(x, self.plain, self.bias)
            return y if other is None else y.add_(other)
        if other is not None:
            return _OPS._linear_pointwise.binary(x, other, self.packed, self.bias, "add")
        return _OPS._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")


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


def row_count(rows: int) -> int:
    """Rows that a product of so many is better made with: one of 16 numbers in each octave, at most 1/16 more.

    oneDNN compiles code for each number of rows and never gives all of it back: half a MiB for each number and shape
    of a weight, whatever ONEDNN_PRIMITIVE_CACHE_CAPACITY says (docs/inference.md).
    """
    step = 1 << max(rows.bit_length() - 5, 0)
    return -(-rows // step) * step


@functools.cache
def _plain_is_faster_for_many_rows(dtype: torch.dtype) -> bool:
    # MKL packs the weight at each call: a third of the time of 16 rows, nothing beside hundreds (docs/inference.md).
    alone = torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.backends.mkl.is_available()
    return dtype == torch.float32 and alone


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
