"""Input checks shared by the public ops.

Every failure is a ``TypeError`` (wrong kind or dtype) or a ``ValueError`` (wrong shape, device or value) that names
the op,
the argument, what was found and what is allowed. Values (of ``cu_seqlens`` and labels) are read where that costs no
device synchronisation: in eager mode on the CPU, and on GPUs only with ``HBERT_CHECK=1``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from operator import sub

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_GPU_DTYPES = (*_CPU_DTYPES, torch.float16)
_USUAL_DTYPES = (torch.float32, torch.bfloat16)  # all that int8 inference computes with
_CHECK_ON_GPU = os.environ.get("HBERT_CHECK", "0") == "1"


def _tensor(op: str, name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")


# The two functions named usual let nearly every call pass at the price of a few attributes. What they turn away need
# not be wrong: the checks that follow them decide, and say what is.


def _usual(tensors: Iterable[object]) -> bool:
    """All are tensors on the CPU, of dtypes that mix, or None."""
    for t in tensors:
        if t is not None and not (isinstance(t, Tensor) and t.is_cpu and t.dtype in _USUAL_DTYPES):
            return False
    return True


def _usual_rows(x: object, parameters: Iterable[object]) -> bool:
    """``x`` and the parameters are usual, and the parameters are None or as wide as x."""
    if not (isinstance(x, Tensor) and x.is_cpu and x.dtype in _USUAL_DTYPES and x.dim()):
        return False
    width = x.shape[-1:]
    for t in parameters:
        usual = t is None or (isinstance(t, Tensor) and t.is_cpu and t.dtype in _USUAL_DTYPES and t.shape == width)
        if not usual:
            return False
    return width[0] > 0


def floating(op: str, **tensors: Tensor | None) -> None:
    """All given tensors are floating tensors of dtypes that the op computes with, on one device."""
    if _usual(tensors.values()):
        return
    given = {name: t for name, t in tensors.items() if t is not None}
    for name, t in given.items():
        _tensor(op, name, t)
    device = next(iter(given.values())).device
    for name, t in given.items():
        allowed = _CPU_DTYPES if t.device.type == "cpu" else _GPU_DTYPES
        if t.dtype not in allowed:
            names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
            hint = " (float16 is for GPUs; use bfloat16 on a CPU)" if t.dtype == torch.float16 else ""
            raise TypeError(f"{op}: {name} has dtype {t.dtype} on {t.device.type}; allowed: {names}{hint}")
        if t.device != device:
            raise ValueError(f"{op}: {name} is on {t.device}, but the first input is on {device}")
    if len({t.dtype == torch.float64 for t in given.values()}) > 1:
        found = ", ".join(f"{name} {t.dtype}" for name, t in given.items())
        raise TypeError(f"{op}: float64 does not mix with other dtypes, got {found}")


def shape(op: str, name: str, t: Tensor | None, *expected: int) -> None:
    """``t`` is None or has exactly the expected shape."""
    if t is not None and tuple(t.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {expected}")


def rows(op: str, x: Tensor, **parameters: Tensor | None) -> None:
    """``x`` is [..., H] with H > 0, each parameter is None or [H], and all are as :func:`floating` wants them."""
    if _usual_rows(x, parameters.values()):
        return
    floating(op, x=x, **parameters)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    for name, parameter in parameters.items():
        shape(op, name, parameter, x.shape[-1])


def packed(op: str, name: str, t: Tensor) -> None:
    """``t`` is a packed activation: two dimensions, tokens and features, at least one feature."""
    _tensor(op, name, t)
    if t.dim() != 2 or t.shape[1] == 0:
        raise ValueError(f"{op}: {name} must be packed tokens [T, H] with H > 0, got shape {tuple(t.shape)}")


def quantizable(op: str, **tensors: Tensor | None) -> None:
    """All given tensors are float32 or bfloat16, on one device."""
    if _usual(tensors.values()):
        return
    floating(op, **tensors)
    for name, t in tensors.items():
        if t is not None and t.dtype not in _USUAL_DTYPES:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}; allowed: float32, bfloat16")


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """All given tensors have the dtype of the first one."""
    (first, like), *others = ((name, t) for name, t in tensors.items() if t is not None)
    for name, t in others:
        if t.dtype != like.dtype:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, but {first} has {like.dtype}")


def quantizable_rows(op: str, x: Tensor, **parameters: Tensor | None) -> None:
    """``x`` is [T, H] with H > 0, each parameter is None or [H], and all are as :func:`quantizable` wants them."""
    if _usual_rows(x, parameters.values()) and x.dim() == 2:
        return
    packed(op, "x", x)
    rows(op, x, **parameters)
    quantizable(op, x=x, **parameters)


def int8_rows(op: str, values: Tensor, scale: Tensor) -> None:
    """``values`` is int8 [T, H] with H > 0, ``scale`` float32 [T] on the same device."""
    packed(op, "x.values", values)
    _tensor(op, "x.scale", scale)
    for name, t, dtype in (("x.values", values, torch.int8), ("x.scale", scale, torch.float32)):
        if t.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype}, got {t.dtype}")
    shape(op, "x.scale", scale, values.shape[0])
    if not (scale.is_cpu and values.is_cpu) and scale.device != values.device:
        raise ValueError(f"{op}: x.scale is on {scale.device}, but x.values are on {values.device}")


def heads(op: str, hidden_size: int, num_heads: int) -> int:
    """The head size d = H/h; ``ValueError`` if h does not divide H."""
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"{op}: hidden size {hidden_size} is not divisible by num_heads {num_heads}")
    return hidden_size // num_heads


def has_values(t: Tensor) -> bool:
    """Whether there are numbers in ``t``: not while compiling, nor in meta and fake tensors."""
    return not (torch.compiler.is_compiling() or t.is_meta or isinstance(t, FakeTensor))


def may_read_values(t: Tensor) -> bool:
    """Whether the numbers in ``t`` can be read at a price that the caller agreed to."""
    return (t.is_cpu or _CHECK_ON_GPU) and has_values(t)


def cu_seqlens(op: str, cu: Tensor, num_tokens: int, device: torch.device, max_seqlen: int | None = None) -> None:
    """``cu`` is int32 [B+1], starts at 0, never decreases, and ends at or before ``num_tokens``.

    With ``max_seqlen`` no sequence may be longer than that.
    """
    _tensor(op, "cu_seqlens", cu)
    if cu.dtype != torch.int32:
        raise TypeError(f"{op}: cu_seqlens must be an int32 tensor, got {cu.dtype}")
    if cu.dim() != 1 or cu.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens must be [B+1], got shape {tuple(cu.shape)}")
    if cu.device != device:
        raise ValueError(f"{op}: cu_seqlens is on {cu.device}, but the activations are on {device}")
    if not may_read_values(cu):
        return
    bounds = cu.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{op}: cu_seqlens must start at 0, got {bounds[0]}")
    lengths = list(map(sub, bounds[1:], bounds))
    if lengths and min(lengths) < 0:
        at = next(i for i, n in enumerate(lengths) if n < 0)
        raise ValueError(f"{op}: cu_seqlens must not decrease, but cu_seqlens[{at}] = {bounds[at]} > {bounds[at + 1]}")
    if bounds[-1] > num_tokens:
        raise ValueError(f"{op}: cu_seqlens ends at {bounds[-1]}, but there are only {num_tokens} tokens")
    if max_seqlen is not None and lengths and max(lengths) > max_seqlen:
        raise ValueError(f"{op}: a sequence has {max(lengths)} tokens, but max_seqlen is {max_seqlen}")


def divisor(op: str, name: str, t: Tensor, device: torch.device) -> None:
    """``t`` is one number without a gradient, on the CPU or on ``device``."""
    if t.numel() != 1:
        raise ValueError(f"{op}: {name} must be one number, got shape {tuple(t.shape)}")
    if t.device.type != "cpu" and t.device != device:
        raise ValueError(f"{op}: {name} is on {t.device}, allowed: cpu or {device}")
    if t.requires_grad:
        raise ValueError(f"{op}: {name} requires a gradient, but the loss has none for it")


def labels(op: str, target: Tensor, hidden: Tensor, num_classes: int, ignore_index: int) -> None:
    """``target`` is int64 [M] beside hidden [M, H], and each value is ``ignore_index`` or a class in [0, V)."""
    _tensor(op, "labels", target)
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: labels must be int64, got {target.dtype}")
    shape(op, "labels", target, hidden.shape[0])
    if target.device != hidden.device:
        raise ValueError(f"{op}: labels are on {target.device}, but hidden is on {hidden.device}")
    if not may_read_values(target) or target.numel() == 0:
        return
    kept = target[target != ignore_index]
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= num_classes):
        raise ValueError(
            f"{op}: labels must be {ignore_index} (ignored) or in [0, {num_classes}), "
            f"found values from {int(kept.min())} to {int(kept.max())}"
        )
