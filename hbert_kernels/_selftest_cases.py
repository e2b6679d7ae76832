"""The problems that the selftest runs every kernel on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, ops
from ._accuracy import Function
from .ops.activation_layer_norm import ACTIVATIONS

_ROWS = [(1, 64), (7, 5), (37, 768), (129, 1000), (1000, 192)]  # rows, H
_SEQUENCES = [([1], 64, 4), ([37, 0, 129], 192, 3), ([7, 300], 1000, 8), ([1000], 40, 5)]  # lengths, H, heads
_MIXED = {  # activations, residual stream, parameters
    "float32": (torch.float32, torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "bfloat16, float32 parameters": (torch.bfloat16, torch.bfloat16, torch.float32),
    "bfloat16, float32 stream": (torch.bfloat16, torch.float32, torch.float32),
    "float32, bfloat16 stream": (torch.float32, torch.bfloat16, torch.float32),
    "float64": (torch.float64, torch.float64, torch.float64),
}
_MIXED_ON_GPUS = {
    "float16": (torch.float16, torch.float16, torch.float16),
    "float16, float32 parameters": (torch.float16, torch.float16, torch.float32),
    "float16, float32 stream": (torch.float16, torch.float32, torch.float32),
}


@dataclass(frozen=True)
class Case:
    """An op on concrete inputs; ``options`` is what a backend may refuse beside the tensors."""

    op: str
    label: str
    function: Function
    inputs: list[Tensor]
    options: tuple[Any, ...] = ()

    def refusal(self, backend: str) -> str | None:
        """Why a backend cannot run it; None if it can."""
        return _dispatch.refusal(self.op, backend, *self.inputs, *self.options)


def _mixed(device: str) -> dict[str, tuple[torch.dtype, torch.dtype, torch.dtype]]:
    """Activations, residual stream and parameters; float16 is for GPUs."""
    return _MIXED if device == "cpu" else _MIXED | _MIXED_ON_GPUS


def _dtypes(device: str) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """Activations and parameters."""
    return {name: (x, parameter) for name, (x, stream, parameter) in _mixed(device).items() if x == stream}


def _normal(seed: int) -> Callable[..., Tensor]:
    """Normal numbers of a given shape in float64, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def _norm_cases(device: str) -> Iterator[Case]:
    for rows, width in _ROWS:
        random = _normal(rows * 1009 + width)
        x, residual = random(rows, width) * 2 + 5, random(rows, width)
        weight, bias = 1 + random(width) / 4, random(width)
        for name, (activation, stream, parameter) in _mixed(device).items():
            label = f"{rows}x{width} {name}"
            affine = [weight.to(device, parameter), bias.to(device, parameter)]
            branch = x.to(device, activation)
            if activation == stream:
                yield Case("layer_norm", label, ops.layer_norm, [branch, *affine])
            yield Case("add_layer_norm", label, ops.add_layer_norm, [branch, residual.to(device, stream), *affine])


def _activation_cases(device: str) -> Iterator[Case]:
    for rows, width in _ROWS:
        random = _normal(rows * 1013 + width)
        x, weight, bias, input_bias = random(rows, width) * 2, 1 + random(width) / 4, random(width), random(width)
        for activation in ACTIVATIONS:

            def function(x: Tensor, w: Tensor, b: Tensor, added: Tensor, name: str = activation) -> Tensor:
                return ops.activation_layer_norm(x, w, b, activation=name, input_bias=added)

            for name, (dtype, parameter) in _dtypes(device).items():
                inputs = [x.to(device, dtype), *(t.to(device, parameter) for t in (weight, bias, input_bias))]
                yield Case("activation_layer_norm", f"{activation} {rows}x{width} {name}", function, inputs)


def _cu_seqlens(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def _sequence_norm_cases(device: str) -> Iterator[Case]:
    for lengths, width, _ in _SEQUENCES:
        random, cu_seqlens = _normal(sum(lengths) * 1019 + width), _cu_seqlens(lengths, device)
        x, gate, taps = random(sum(lengths), width) * 2 + 5, random(len(lengths), width), random(3, width)
        weight, bias = 1 + random(width) / 4, random(width)

        def gated(x: Tensor, gate: Tensor, w: Tensor, b: Tensor, cu: Tensor = cu_seqlens) -> Tensor:
            return ops.gated_layer_norm(x, gate, cu, w, b)

        def conv(x: Tensor, taps: Tensor, w: Tensor, b: Tensor, cu: Tensor = cu_seqlens) -> Tensor:
            return ops.conv_layer_norm(x, w, b, taps.view(3, -1), cu)

        # The taps are flat because the policy takes what has one dimension for a parameter.
        for op, function, second in (("gated_layer_norm", gated, gate), ("conv_layer_norm", conv, taps.flatten())):
            for name, (dtype, parameter) in _dtypes(device).items():
                inputs = [x.to(device, dtype), *(t.to(device, parameter) for t in (second, weight, bias))]
                yield Case(op, f"lengths {lengths} width {width} {name}", function, inputs)


def _pool_cases(device: str) -> Iterator[Case]:
    for lengths, width, heads in _SEQUENCES:
        random, cu_seqlens = _normal(sum(lengths) * 1021 + width), _cu_seqlens(lengths, device)
        x, head_dim = random(sum(lengths), width), width // heads
        forms = {
            "dense scorer": (random(heads, width) / heads**0.5, "slice"),
            "own scorers": (random(len(lengths), heads, width) / heads**0.5, "full"),
            "scorer per head": (random(heads, head_dim), "slice"),
        }
        for form, (scorer, output) in forms.items():
            function = partial(
                ops.additive_pool, cu_seqlens=cu_seqlens, max_seqlen=max(lengths), num_heads=heads, output=output
            )
            for name, (dtype, parameter) in _dtypes(device).items():
                label = f"{form} lengths {lengths} {heads}x{head_dim} {name}"
                yield Case("additive_pool", label, function, [x.to(device, dtype), scorer.to(device, parameter)])


def _additive_attention_cases(device: str) -> Iterator[Case]:
    """Without the sub-layer norm, which divides by the deviation of a product of small numbers."""
    for lengths, width, heads in _SEQUENCES:
        random, cu_seqlens = _normal(sum(lengths) * 1039 + width), _cu_seqlens(lengths, device)
        query, x, key_weight = (random(rows, width) for rows in (sum(lengths), sum(lengths), width))
        scorers = [random(heads, width) / heads**0.5 for _ in range(2)]
        varlen: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths), "num_heads": heads}
        for form in ("direct", "key_free"):
            function = partial(_core, form=form, **varlen)
            for name, (dtype, parameter) in _dtypes(device).items():
                inputs = [t.to(device, dtype) for t in (query, x)]
                inputs += [t.to(device, parameter) for t in (*scorers, key_weight / width**0.5)]
                yield Case("additive_attention", f"{form} lengths {lengths} {heads} heads {name}", function, inputs)


def _core(query: Tensor, x: Tensor, query_att: Tensor, key_att: Tensor, key_weight: Tensor, **options: Any) -> Tensor:
    return ops.additive_attention(query, x, query_att, key_weight, None, key_att, **options)


def _attention_cases(device: str) -> Iterator[Case]:
    for lengths, width, heads in _SEQUENCES:
        random, cu_seqlens = _normal(sum(lengths) * 1031 + width), _cu_seqlens(lengths, device)
        qkv = random(sum(lengths), 3 * width)
        function = partial(ops.attention, cu_seqlens=cu_seqlens, max_seqlen=max(lengths), num_heads=heads)
        for dtype in dict.fromkeys(dtype for dtype, _ in _dtypes(device).values()):
            label = f"lengths {lengths} {heads}x{width // heads} {dtype}"
            yield Case("attention", label, function, [qkv.to(device, dtype)], options=(0.0, heads))


def _loss_cases(device: str) -> Iterator[Case]:
    """The losses of single rows: how wrong plain torch's mean of many bfloat16 losses is, is a matter of luck.

    Not in float64, where the library's matrix products lose more, in relation, than in float32.
    """
    random, (rows, width, vocab) = _normal(1033), (7, 64, 1000)
    hidden, weight, bias = random(rows, width) / 8, random(vocab, width) / 8, random(vocab) / 8
    labels = torch.arange(rows, device=device) * 131

    def losses(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        pairs = zip(hidden.split(1), labels.split(1), strict=True)
        return torch.stack([ops.masked_lm_loss(row, weight, bias, label)[0] for row, label in pairs])

    for name, (dtype, parameter) in _dtypes(device).items():
        if torch.float64 in (dtype, parameter) or dtype != parameter:
            continue
        inputs = [hidden.to(device, dtype), weight.to(device, parameter), bias.to(device, parameter)]
        yield Case("masked_lm_loss", f"{rows}x{width}x{vocab} {name}", losses, inputs)


def _quantized(rows: ops.Int8Rows) -> Tensor:
    return rows.values.float() * rows.scale[:, None]


def _int8_norm_cases() -> Iterator[Case]:
    """In float64, what is quantised: then the policy's error of plain torch is half a step."""

    def quantize(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return x.clone() if x.dtype == torch.float64 else _quantized(ops.quantize_rows(x))

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.layer_norm(x, w, b) if x.dtype == torch.float64 else _quantized(ops.layer_norm_int8(x, w, b)[0])

    def residual(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if x.dtype == torch.float64:
            return ops.add_layer_norm(x, x, w, b)
        rows, _, total = ops.add_layer_norm_int8(x, x, w, b)
        return _quantized(rows), total

    def activation(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return ops.activation_layer_norm(x, w, b)
        return _quantized(ops.activation_layer_norm_int8(x, w, b))

    def conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        cu, taps = _cu_seqlens([x.shape[0] // 3, x.shape[0] - x.shape[0] // 3], "cpu"), w.expand(3, -1)
        if x.dtype == torch.float64:
            return ops.conv_layer_norm(x, w, b, taps, cu)
        return _quantized(ops.conv_layer_norm_int8(x, w, b, taps, cu)[0])

    functions: dict[str, Function] = {
        "quantize_rows": quantize,
        "layer_norm_int8": plain,
        "add_layer_norm_int8": residual,
        "activation_layer_norm_int8": activation,
        "conv_layer_norm_int8": conv,
    }
    for rows, width in _ROWS:
        random = _normal(rows * 1039 + width)
        x, weight, bias = random(rows, width) * 2, 1 + random(width) / 4, random(width)
        for dtype in (torch.float32, torch.bfloat16):
            for name, function in functions.items():
                inputs = [x.to(dtype), weight.to(dtype), bias.to(dtype)]
                yield Case(name, f"{rows}x{width} {dtype}", torch.no_grad()(function), inputs)


def _int8_linear_cases() -> Iterator[Case]:
    """Rows of integers with a largest of 127 are quantised without an error, and so are weights whose neighbours have
    different signs."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return F.linear(x, weight, bias)
        return ops.int8_linear(ops.quantize_rows(x), ops.pack_int8_weight(weight), bias, out_dtype=x.dtype)

    generator = torch.Generator().manual_seed(1049)
    for tokens, width, columns in ((6, 768, 3072), (129, 1000, 130), (16, 3072, 65)):
        x, weight = (torch.randint(-127, 128, (n, width), generator=generator).double() for n in (tokens, columns))
        x[:, 0], weight[:, 0] = 127, -127
        weight[:, ::2], weight[:, 1::2] = -weight[:, ::2].abs(), weight[:, 1::2].abs()
        bias = torch.randn(columns, generator=generator, dtype=torch.float64) * 1000
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [x.to(dtype), weight.to(dtype), bias.to(dtype)]
            yield Case("int8_linear", f"{tokens}x{width}x{columns} {dtype}", torch.no_grad()(linear), inputs)


def _packed_linear_cases() -> Iterator[Case]:
    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return F.gelu(F.linear(x, weight, bias))
        return ops.packed_linear(x, ops.pack_weight(weight), bias, activation="gelu")

    for tokens, width, columns in ((6, 768, 3072), (129, 1000, 130), (1, 3072, 65)):
        random = _normal(tokens * 1051 + width)
        inputs = random(tokens, width), random(columns, width) / width**0.5, random(columns)
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{tokens}x{width}x{columns} {dtype}"
            yield Case("packed_linear", name, torch.no_grad()(linear), [t.to(dtype) for t in inputs])


def cases(device: str) -> Iterator[Case]:
    """All cases of the ops that have kernels; those for inference have none for GPUs."""
    if device == "cpu":
        yield from _int8_norm_cases()
        yield from _int8_linear_cases()
        yield from _packed_linear_cases()
    yield from _norm_cases(device)
    yield from _activation_cases(device)
    yield from _sequence_norm_cases(device)
    yield from _pool_cases(device)
    yield from _additive_attention_cases(device)
    yield from _attention_cases(device)
    yield from _loss_cases(device)
