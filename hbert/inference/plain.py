"""What an encoder is made of: only where these classes stand do its weights say what it computes."""

from __future__ import annotations

from torch import nn

from hbert.embeddings import HBertEmbeddings
from hbert.layers import (
    HBertAdditiveAttention,
    HBertBranchConvLayerNorm,
    HBertFeedForward,
    HBertMerge,
    HBertPostNormLayer,
    HBertPreNormLayer,
    HBertSelfAttention,
)
from hbert_kernels.nn import (
    ActivationLayerNorm,
    AddLayerNorm,
    ConvLayerNorm,
    HeadScorer,
    LayerNorm,
    SubLNFeedForward,
    computed_by_hook,
)

_OF_TORCH = (nn.Embedding, nn.LayerNorm, nn.Linear, nn.ModuleList)
_OF_OURS = (
    *(HBertEmbeddings, HBertPreNormLayer, HBertPostNormLayer, HBertMerge),
    *(HBertSelfAttention, HBertAdditiveAttention, HBertFeedForward, SubLNFeedForward, HeadScorer),
    *(LayerNorm, AddLayerNorm, ActivationLayerNorm, ConvLayerNorm, HBertBranchConvLayerNorm),
)
_POOLER = "pooler"


def check_modules(encoder: nn.Module) -> None:
    """Checks that the modules whose weights are read are what the encoder's library put there, and no adapters.

    The library's own are the classes of the Python module that defines the encoder. The pooler is called, not read.

    Raises:
        ValueError: one is of another class, a subclass included, or a hook computes its parameters; the message
            names it.
    """
    home = type(encoder).__module__
    for name, module in encoder.named_modules():
        kind = type(module)
        if name.split(".")[0] == _POOLER:
            continue
        if computed_by_hook(module):
            raise ValueError(
                f"{type(encoder).__name__} cannot be optimized: a hook computes parameters of its {name}; make them"
                " parameters first, as torch.nn.utils.prune.remove does"
            )
        if kind in _OF_TORCH or kind in _OF_OURS or kind.__module__ == home:
            continue
        if next(module.parameters(), None) is not None:
            raise ValueError(
                f"{type(encoder).__name__} cannot be optimized: its {name} is a {kind.__name__} of {kind.__module__},"
                " of which the weights do not say what it computes; merge adapters first (merge_and_unload()), or"
                " remove it"
            )
