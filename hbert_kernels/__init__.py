"""Fused kernels for additive attention and sub-layer normalization, as torch ops with a plain-torch reference.

Activations are packed tokens [T, H] with ``cu_seqlens`` [B+1]: no kernel sees a mask (:class:`Packing`). See
``python -m hbert_kernels.info`` for what runs on this machine.
"""

from . import _gpu as _gpu  # registers what runs on GPUs
from . import nn
from ._dispatch import BACKENDS, INFERENCE_OPS, OPS, BackendError, explain, use_backend
from ._library import cpu_capability
from ._version import __version__
from .memory import keep_heap
from .ops import (
    Int8Rows,
    PackedInt8Weight,
    PackedWeight,
    activation_layer_norm,
    activation_layer_norm_int8,
    add_layer_norm,
    add_layer_norm_int8,
    additive_attention,
    additive_pool,
    attention,
    conv_layer_norm,
    conv_layer_norm_int8,
    gated_layer_norm,
    int8_linear,
    layer_norm,
    layer_norm_int8,
    masked_lm_loss,
    pack_int8_weight,
    pack_weight,
    packed_linear,
    quantize_rows,
)
from .packing import Packing

__all__ = [
    "BACKENDS",
    "INFERENCE_OPS",
    "OPS",
    "BackendError",
    "Int8Rows",
    "PackedInt8Weight",
    "PackedWeight",
    "Packing",
    "__version__",
    "activation_layer_norm",
    "activation_layer_norm_int8",
    "add_layer_norm",
    "add_layer_norm_int8",
    "additive_attention",
    "additive_pool",
    "attention",
    "conv_layer_norm",
    "conv_layer_norm_int8",
    "cpu_capability",
    "explain",
    "gated_layer_norm",
    "int8_linear",
    "keep_heap",
    "layer_norm",
    "layer_norm_int8",
    "masked_lm_loss",
    "nn",
    "pack_int8_weight",
    "pack_weight",
    "packed_linear",
    "quantize_rows",
    "use_backend",
]
