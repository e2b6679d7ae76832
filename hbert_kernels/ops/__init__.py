"""The ops, one module each: public function, reference, schema and autograd."""

from .activation_layer_norm import activation_layer_norm
from .additive_attention import additive_attention
from .additive_pool import additive_pool
from .attention import attention
from .conv_layer_norm import conv_layer_norm
from .gated_layer_norm import gated_layer_norm
from .int8_linear import PackedInt8Weight, int8_linear, pack_int8_weight
from .int8_norm import (
    Int8Rows,
    activation_layer_norm_int8,
    add_layer_norm_int8,
    conv_layer_norm_int8,
    layer_norm_int8,
    quantize_rows,
)
from .layer_norm import add_layer_norm, layer_norm
from .masked_lm_loss import masked_lm_loss
from .packed_linear import PackedWeight, pack_weight, packed_linear

__all__ = [
    "Int8Rows",
    "PackedInt8Weight",
    "PackedWeight",
    "activation_layer_norm",
    "activation_layer_norm_int8",
    "add_layer_norm",
    "add_layer_norm_int8",
    "additive_attention",
    "additive_pool",
    "attention",
    "conv_layer_norm",
    "conv_layer_norm_int8",
    "gated_layer_norm",
    "int8_linear",
    "layer_norm",
    "layer_norm_int8",
    "masked_lm_loss",
    "pack_int8_weight",
    "pack_weight",
    "packed_linear",
    "quantize_rows",
]
