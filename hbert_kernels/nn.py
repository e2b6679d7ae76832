"""Drop-in modules over the ops. Parameters, names and initialization are torch's (and the official Fastformer's)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import ops
from .ops.activation_layer_norm import activation_function
from .packing import Packing

SCORERS = ("dense", "per_head")


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm (same signature, state dict and repr) on :func:`hbert_kernels.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., *normalized_shape] -> the same shape and dtype."""
        return _over_last_dims(self, input, lambda x, w, b: ops.layer_norm(x, w, b, self.eps))


def _over_last_dims(norm: nn.LayerNorm, input: Tensor, function: Any) -> Tensor:
    dims = len(norm.normalized_shape)
    if input.shape[-dims:] != torch.Size(norm.normalized_shape):
        expected = list(norm.normalized_shape)
        raise ValueError(f"LayerNorm: expected an input [*, {expected}], got shape {tuple(input.shape)}")
    if dims == 1:
        return function(input, norm.weight, norm.bias)
    flat = [None if p is None else p.flatten() for p in (norm.weight, norm.bias)]
    return function(input.flatten(-dims), *flat).view(input.shape)


class AddLayerNorm(nn.LayerNorm):
    """Residual sum and its norm: ``forward(x, residual) -> (LN(x + residual), x + residual)``.

    Without a residual: ``forward(x) -> (LN(x), x)``. Constructor and parameters are those of torch.nn.LayerNorm over
    the last dimension; see :func:`hbert_kernels.add_layer_norm` for dtypes.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """One or two [..., H] -> the norm in the dtype of the first, the sum in the promoted dtype."""
        if residual is None:
            return ops.layer_norm(input, self.weight, self.bias, self.eps), input
        return ops.add_layer_norm(input, residual, self.weight, self.bias, self.eps)


class ActivationLayerNorm(nn.LayerNorm):
    """``LN(act(x))`` over the last dimension; constructor of torch.nn.LayerNorm plus ``activation``.

    Raises:
        ValueError: the activation is not gelu, gelu_tanh or relu.
    """

    def __init__(self, width: int, *args: Any, activation: str = "gelu", **kwargs: Any) -> None:
        super().__init__(width, *args, **kwargs)
        activation_function(activation)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """[..., width] -> the same shape and dtype."""
        return ops.activation_layer_norm(input, self.weight, self.bias, self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class ConvLayerNorm(nn.LayerNorm):
    """Layer norm, then a residual depthwise convolution inside each packed sequence.

    Its parameters are weight and bias of the norm, and conv_weight [k, H], initialized as torch.nn.Conv1d would
    (uniform in +-1/sqrt(k)).

    Args:
        hidden_size: H.
        kernel_size: k, odd.

    Raises:
        ValueError: kernel_size is not a positive odd number.
    """

    def __init__(
        self, hidden_size: int, kernel_size: int, eps: float = 1e-5, *, device: Any = None, dtype: Any = None
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"ConvLayerNorm: kernel_size must be a positive odd number, got {kernel_size}")
        super().__init__(hidden_size, eps, device=device, dtype=dtype)
        self.conv_weight = nn.Parameter(torch.empty(kernel_size, hidden_size, device=device, dtype=dtype))
        self.reset_conv_parameters()

    def initial_conv_weight(self) -> Tensor:
        """A draw of conv_weight as torch.nn.Conv1d with groups=H makes it."""
        bound = self.conv_weight.shape[0] ** -0.5
        return torch.empty_like(self.conv_weight, requires_grad=False).uniform_(-bound, bound)

    def reset_parameters(self) -> None:
        """Initialize all parameters anew."""
        super().reset_parameters()
        if hasattr(self, "conv_weight"):  # torch's constructor calls this first
            self.reset_conv_parameters()

    def reset_conv_parameters(self) -> None:
        """Initialize conv_weight anew."""
        with torch.no_grad():
            self.conv_weight.copy_(self.initial_conv_weight())

    def forward(self, input: Tensor, cu_seqlens: Tensor) -> Tensor:  # type: ignore[override]
        """Packed [T, H] -> [T, H]."""
        return ops.conv_layer_norm(input, self.weight, self.bias, self.conv_weight, cu_seqlens, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel_size={self.conv_weight.shape[0]}"


class SubLNFeedForward(nn.Module):
    """Feed-forward network with sub-layer norm: ``fc2(LN(act(fc1(x))))`` (Wang et al. 2022, arXiv 2210.06423).

    Args:
        hidden_size: H, in and out.
        intermediate_size: width of the activation.
        activation: gelu, gelu_tanh or relu.
        eps: epsilon of the norm.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "gelu",
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(hidden_size, intermediate_size, **factory)
        self.norm = ActivationLayerNorm(intermediate_size, eps=eps, activation=activation, **factory)
        self.fc2 = nn.Linear(intermediate_size, hidden_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return self.fc2(self.norm(self.fc1(x)))


def weight_says_all(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether what a module computes can be read from its weight and bias, without a call.

    It is of one of these classes, maybe with torch's parametrizations, and not a stand-in; and no hook computes them.
    """
    plain = type(module) in kinds or (parametrize.is_parametrized(module) and isinstance(module, kinds))
    return plain and not computed_by_hook(module)


def computed_by_hook(module: nn.Module) -> bool:
    """Whether a hook computes parameters of a module before each call, as those of torch.nn.utils.prune do."""
    # Tensors that are no parameters, but without a hook, are what nn.DataParallel makes.
    return bool(module._forward_pre_hooks) and any(isinstance(value, Tensor) for value in vars(module).values())


@contextmanager
def onloaded(*modules: nn.Module | None) -> Iterator[None]:
    """Within, parameters that accelerate has offloaded are on the device that computes: for modules that are read.

    Those of modules that are called, it brings itself.
    """
    offloaded: list[Any] = [module for module in modules if module is not None and "_hf_hook" in vars(module)]
    for module in offloaded:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in offloaded:
            module._hf_hook.post_forward(module, None)


class HeadScorer(nn.Module):
    """A score vector per head on the head's own slice: weight [h, d] (the scorer of the Fastformer paper's text)."""

    def __init__(self, num_heads: int, head_dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, device=device, dtype=dtype))
        self.bias: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(d), as torch.nn.Linear with d inputs."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        return f"num_heads={self.weight.shape[0]}, head_dim={self.weight.shape[1]}"


class AdditiveAttention(nn.Module):
    """Additive attention (Wu et al. 2021, "Fastformer", arXiv 2108.09084) in the official parametrisation.

    ``out = transform(LN(Q o k)) + Q`` with Q = query(x) and the global key k of
    :func:`hbert_kernels.additive_attention`; no norm if ``sub_norm`` is False. The value shares the query projection.

    Query, key and transform may be other modules than nn.Linear, such as adapters: they are called. With such a key
    there is no K-free form.

    Args:
        hidden_size: H.
        num_heads: h; must divide H.
        scorer: "dense" (query_att and key_att are Linear(H, h), as in the official code) or "per_head"
            (:class:`HeadScorer`).
        sub_norm: normalize before the transform.
        eps: epsilon of that norm; tiny, because with fresh parameters Q o k has a variance of 1e-6 and less.

    Raises:
        ValueError: h does not divide H, or an unknown scorer.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        scorer: str = "dense",
        sub_norm: bool = True,
        eps: float = 1e-12,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"AdditiveAttention: hidden_size {hidden_size} is not divisible by num_heads {num_heads}")
        if scorer not in SCORERS:
            raise ValueError(f"AdditiveAttention: unknown scorer {scorer!r}; allowed: {', '.join(SCORERS)}")
        factory = {"device": device, "dtype": dtype}

        def make_scorer() -> nn.Linear | HeadScorer:
            if scorer == "dense":
                return nn.Linear(hidden_size, num_heads, **factory)
            return HeadScorer(num_heads, hidden_size // num_heads, **factory)

        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size, **factory)
        self.query_att = make_scorer()
        self.key = nn.Linear(hidden_size, hidden_size, **factory)
        self.key_att = make_scorer()
        self.norm = LayerNorm(hidden_size, eps=eps, **factory) if sub_norm else None
        self.transform = nn.Linear(hidden_size, hidden_size, **factory)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Padded batch.

        Args:
            x: [B, N, H].
            key_padding_mask: bool [B, N], True = padding (as in torch.nn.MultiheadAttention), any pattern; None: no
                padding.

        Returns:
            [B, N, H]; zeros at padding. What stands there does not influence any other row.

        Raises:
            TypeError: the mask is not bool, or as in :meth:`forward_packed`.
            ValueError: x is not [B, N, H] or the mask is not [B, N].
        """
        if x.dim() != 3 or x.shape[2] != self.query.in_features:
            raise ValueError(f"AdditiveAttention: x must be [B, N, {self.query.in_features}], got {tuple(x.shape)}")
        packing = self._packing(x, key_padding_mask)
        out = self.forward_packed(packing.pack(x), packing.cu_seqlens, packing.max_seqlen)
        return packing.unpack(out)

    def _packing(self, x: Tensor, key_padding_mask: Tensor | None) -> Packing:
        if key_padding_mask is None:
            return Packing.full(x.shape[0], x.shape[1], x.device)
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"AdditiveAttention: key_padding_mask must be bool, got {key_padding_mask.dtype}")
        if key_padding_mask.shape != x.shape[:2]:
            expected, got = tuple(x.shape[:2]), tuple(key_padding_mask.shape)
            raise ValueError(f"AdditiveAttention: key_padding_mask must have shape {expected}, got {got}")
        return Packing.from_mask(~key_padding_mask)

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Packed tokens [T, H] -> [T, H]; rows behind cu_seqlens[-1] are not defined.

        Raises:
            TypeError: a scorer is neither nn.Linear nor :class:`HeadScorer`, or a hook computes parameters of a scorer
                or the norm: the op reads their weights and does not call them.
        """
        self._check_read()
        query, norm = self.query(x), self.norm
        # The K-free form reads the weight of the key, which would go around whatever stands in for a linear layer.
        plain = weight_says_all(self.key, nn.Linear)
        with onloaded(self.query_att, self.key_att, norm, self.key if plain else None):
            mixed = ops.additive_attention(
                query,
                # Under autocast the projection is narrower than its input, and the core reads both.
                (x if plain else self.key(x)).to(query.dtype),
                self.query_att.weight,
                self.key.weight if plain else None,
                self.key.bias if plain else None,
                self.key_att.weight,
                cu_seqlens,
                max_seqlen,
                self.num_heads,
                query_att_bias=self.query_att.bias,
                key_att_bias=self.key_att.bias,
                norm_weight=None if norm is None else norm.weight,
                norm_bias=None if norm is None else norm.bias,
                sub_norm=norm is not None,
                eps=1e-12 if norm is None else norm.eps,
            )
        return self.transform(mixed) + query

    def _check_read(self) -> None:
        for name in ("query_att", "key_att", "norm"):
            module = getattr(self, name)
            if module is not None and computed_by_hook(module):
                raise TypeError(
                    f"AdditiveAttention: a hook computes parameters of {name}, but only these are read, and no hook is"
                    " called: make them parameters first, as torch.nn.utils.prune.remove does"
                )
            if name != "norm" and not weight_says_all(module, nn.Linear, HeadScorer):
                kind = type(module)
                raise TypeError(
                    f"AdditiveAttention: {name} is a {kind.__name__} of {kind.__module__}, but only the weight of a"
                    " torch.nn.Linear or a HeadScorer is read: leave scorers out of adapters"
                )
