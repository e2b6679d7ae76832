"""The ops, one module each: public function, reference, schema and autograd."""

from .activation_layer_norm import activation_layer_norm
from .additive_attention import additive_attention
from .additive_pool import additive_pool
from .attention import attention
from .conv_layer_norm import conv_layer_norm
from .gated_layer_norm import gated_layer_norm
from .layer_norm import add_layer_norm, layer_norm
from .masked_lm_loss import masked_lm_loss

__all__ = [
    "activation_layer_norm",
    "add_layer_norm",
    "additive_attention",
    "additive_pool",
    "attention",
    "conv_layer_norm",
    "gated_layer_norm",
    "layer_norm",
    "masked_lm_loss",
]
