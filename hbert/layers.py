"""The layers of an HBERT encoder in its four norm styles.

With x the input of a layer, Attn its attention (self or additive), FFN(y) = W2 act(W1 y + b1) + b2:

* ``pre_ln``:  y = x + Attn(LN x);  z = y + FFN(LN y)
* ``sub_ln``:  as ``pre_ln``, with one more norm inside each branch (Magneto, arXiv 2210.06423): before the
  output projection of the attention, and after the activation of the feed-forward block
* ``post_ln``: y = LN(x + Attn(x));  z = LN(y + FFN(y))
* ``merge``:   as ``post_ln``, with Linear_{2H->H}(LN_{2H}([x ; Attn(x)])) in place of Attn(x)

Between layers travels a *carry* (x, residual) of two tensors [..., H]: in the pre-norm styles x is the output
of the last branch, not yet added to the residual stream, so that the sum and the next norm are one op. In the
post-norm styles, and behind the embeddings, x is the stream itself and residual is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hbert_kernels.nn import AdditiveAttention, AddLayerNorm, ConvLayerNorm, LayerNorm, SubLNFeedForward

from .config import ADDITIVE, PRE_NORM_STYLES, HBertConfig
from .layout import Layout

Carry = tuple[Tensor, "Tensor | None"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def stream_of(carry: Carry) -> Tensor:
    """The residual stream [..., H] that a carry stands for."""
    x, residual = carry
    return x if residual is None else x + residual


class HBertSelfAttention(nn.Module):
    """Multi-head self-attention, with a norm on the concatenated heads if ``norm_style`` is ``sub_ln``.

    [..., H] -> [..., H]. ``qkv`` is [q | k | v], each head-major.
    """

    def __init__(self, config: HBertConfig):
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.norm = LayerNorm(hidden, eps=config.layer_norm_eps) if config.norm_style == "sub_ln" else None
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[..., H] in the token order of ``layout`` -> [..., H]."""
        heads = layout.attend(self.qkv(x), self.num_heads, self.dropout_p if self.training else 0.0)
        return self.out(heads if self.norm is None else self.norm(heads))


class HBertAdditiveAttention(AdditiveAttention):
    """Additive attention (Fastformer, arXiv 2108.09084; value = query): [..., H] -> [..., H]."""

    def __init__(self, config: HBertConfig):
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            scorer=config.scorer,
            sub_norm=config.norm_style == "sub_ln",
            eps=config.layer_norm_eps,
        )

    def forward(self, x: Tensor, layout: Layout) -> Tensor:  # type: ignore[override]
        """[..., H] in the token order of ``layout`` -> [..., H]."""
        return layout.additive(self, x)


class HBertFeedForward(nn.Module):
    """W2 act(W1 x + b1) + b2: [..., H] -> [..., H]."""

    def __init__(self, config: HBertConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return self.fc2(self.activation(self.fc1(x)))


class HBertMerge(nn.Module):
    """Linear_{2H->H}(LN_{2H}([x ; a])): two tensors [..., H] -> [..., H]."""

    def __init__(self, config: HBertConfig):
        super().__init__()
        self.norm = LayerNorm(2 * config.hidden_size, eps=config.layer_norm_eps)
        self.out = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        """Two [..., H] -> [..., H]."""
        return self.out(self.norm(torch.cat([x, a], dim=-1)))


class HBertBranchConvLayerNorm(ConvLayerNorm):
    """A depthwise convolution of k taps of the normalized input: conv(LN x), packed [T, H] -> [T, H].

    The op adds the normalized input to its convolution, so the middle tap is stored one lower than it acts.
    """

    def initial_conv_weight(self) -> Tensor:
        """A draw of the taps; as they act, it is that of torch.nn.Conv1d with groups=H."""
        taps = super().initial_conv_weight()
        taps[taps.shape[0] // 2] -= 1
        return taps


class HBertPreNormLayer(GradientCheckpointingLayer):
    """A layer in style ``sub_ln`` or ``pre_ln``."""

    def __init__(self, config: HBertConfig, layer_type: str):
        super().__init__()
        taps, in_branch = config.conv_kernel_size, config.conv_placement == "branch"
        self.conv: HBertBranchConvLayerNorm | None = None
        if taps and in_branch:
            self.conv = HBertBranchConvLayerNorm(config.hidden_size, taps, eps=config.layer_norm_eps)
        self.attention_norm: AddLayerNorm | ConvLayerNorm
        if taps and not in_branch and layer_type == ADDITIVE:
            self.attention_norm = ConvLayerNorm(config.hidden_size, taps, eps=config.layer_norm_eps)
        else:
            self.attention_norm = AddLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = _attention(config, layer_type)
        self.ffn_norm = AddLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = _feed_forward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor | None, layout: Layout) -> Carry:
        """A carry in the token order of ``layout`` -> the next one: each tensor [..., H]."""
        carry = x, residual
        if self.conv is not None:
            stream = stream_of(carry)
            carry = self.dropout(layout.conv_norm(self.conv, stream)), stream
        normed, stream = self._attention_input(carry, layout)
        branch = self.dropout(self.attention(normed, layout))
        normed, stream = self.ffn_norm(branch, stream)
        return self.dropout(self.ffn(normed)), stream

    def _attention_input(self, carry: Carry, layout: Layout) -> tuple[Tensor, Tensor]:
        if isinstance(self.attention_norm, ConvLayerNorm):
            stream = stream_of(carry)
            return layout.conv_norm(self.attention_norm, stream), stream
        return self.attention_norm(*carry)


class HBertPostNormLayer(GradientCheckpointingLayer):
    """A layer in style ``post_ln`` or ``merge``."""

    def __init__(self, config: HBertConfig, layer_type: str):
        super().__init__()
        self.attention = _attention(config, layer_type)
        self.merge = HBertMerge(config) if config.norm_style == "merge" else None
        self.attention_norm = AddLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = _feed_forward(config)
        self.ffn_norm = AddLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: None, layout: Layout) -> Carry:
        """The stream [..., H] in the token order of ``layout`` -> that behind the layer, and None."""
        branch = self.attention(x, layout)
        if self.merge is not None:
            branch = self.merge(x, branch)
        y, _ = self.attention_norm(self.dropout(branch), x)
        z, _ = self.ffn_norm(self.dropout(self.ffn(y)), y)
        return z, None


def build_layer(config: HBertConfig, layer_type: str) -> HBertPreNormLayer | HBertPostNormLayer:
    """One layer of the type and norm style of ``config``."""
    pre_norm = config.norm_style in PRE_NORM_STYLES
    layer = HBertPreNormLayer(config, layer_type) if pre_norm else HBertPostNormLayer(config, layer_type)
    _set_init_gains(layer, math.sqrt(math.log(2 * config.num_hidden_layers)))
    return layer


def _set_init_gains(layer: nn.Module, gain: float) -> None:
    """Give each linear layer the gains of its output blocks under ``init="magneto"`` (arXiv 2210.06423).

    ``gain`` for values, outputs and feed-forward weights, 1 for queries and keys; the value of additive
    attention is its query. The linear layers carry it, because transformers initializes one module at a time.
    """
    for module in layer.modules():
        if isinstance(module, HBertSelfAttention):
            gains = {module.qkv: (1.0, 1.0, gain), module.out: (gain,)}
        elif isinstance(module, HBertAdditiveAttention):
            gains = {module.query: (1.0,), module.key: (1.0,), module.transform: (gain,)}
        elif isinstance(module, HBertFeedForward | SubLNFeedForward):
            gains = {module.fc1: (gain,), module.fc2: (gain,)}
        elif isinstance(module, HBertMerge):
            gains = {module.out: (gain,)}
        else:
            continue
        for linear, blocks in gains.items():
            linear.init_gains = blocks  # type: ignore[assignment]


def _attention(config: HBertConfig, layer_type: str) -> HBertSelfAttention | HBertAdditiveAttention:
    return HBertAdditiveAttention(config) if layer_type == ADDITIVE else HBertSelfAttention(config)


def _feed_forward(config: HBertConfig) -> HBertFeedForward | SubLNFeedForward:
    if config.norm_style != "sub_ln":
        return HBertFeedForward(config)
    return SubLNFeedForward(
        config.hidden_size, config.intermediate_size, activation=config.hidden_act, eps=config.layer_norm_eps
    )
