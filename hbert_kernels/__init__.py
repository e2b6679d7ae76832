"""Fused kernels for additive attention and sub-layer normalization, as torch ops with a plain-torch reference.

Activations are packed tokens [T, H] with ``cu_seqlens`` [B+1]: no kernel sees a mask (:class:`Packing`). See
``python -m hbert_kernels.info`` for what runs on this machine.
"""

from . import _gpu as _gpu  # registers what runs on GPUs
from . import nn
from ._dispatch import BACKENDS, OPS, BackendError, explain, use_backend
from ._library import cpu_capability
from ._version import __version__
from .memory import keep_heap
from .ops import (
    activation_layer_norm,
    add_layer_norm,
    additive_attention,
    additive_pool,
    attention,
    conv_layer_norm,
    gated_layer_norm,
    layer_norm,
    masked_lm_loss,
)
from .packing import Packing

__all__ = [
    "BACKENDS",
    "OPS",
    "BackendError",
    "Packing",
    "__version__",
    "activation_layer_norm",
    "add_layer_norm",
    "additive_attention",
    "additive_pool",
    "attention",
    "conv_layer_norm",
    "cpu_capability",
    "explain",
    "gated_layer_norm",
    "keep_heap",
    "layer_norm",
    "masked_lm_loss",
    "nn",
    "use_backend",
]
