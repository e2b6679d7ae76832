"""Encoders for serving: ``hbert.optimize(model, dtype)``.

>>> model = AutoModelForSequenceClassification.from_pretrained("my-classifier")
>>> fast = hbert.optimize(model, "bf16")
>>> fast(**tokenizer(texts, padding=True, return_tensors="pt")).logits
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import BertModel, DistilBertModel, RobertaModel, XLMRobertaModel

from hbert.modeling import HBertModel

from .bert import OptimizedBertModel
from .encoder import OptimizedHBertModel

__all__ = ["OptimizedBertModel", "OptimizedHBertModel", "optimize"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ENCODERS: dict[type[nn.Module], Any] = {
    HBertModel: OptimizedHBertModel,
    BertModel: OptimizedBertModel,
    DistilBertModel: OptimizedBertModel,
    RobertaModel: OptimizedBertModel,
    XLMRobertaModel: OptimizedBertModel,
}


def optimize(model: nn.Module, dtype: str = "fp32") -> nn.Module:
    """Returns a copy of ``model`` for inference, with the same call signature and outputs.

    Each encoder in it is replaced: weights are converted to ``dtype`` and laid out once for the CPU's matrix
    library, parameters of norms go into the layers that read them, residual sums into the products, and
    tokens run packed, without padding. What is around the encoders is copied in ``dtype``.

    The copy is in evaluation mode, has no gradients and does not see later changes of the original's weights. It
    cannot be saved: save the original, and optimize it again when it is loaded.

    Args:
        model: an HBERT model, a BERT, RoBERTa, XLM-R or DistilBERT of transformers, with a head or without, or a
            module that holds some, such as a SentenceTransformer.
        dtype: "fp32" or "bf16", of weights and activations; softmax and the statistics of norms are float32.

    Raises:
        TypeError: not a module.
        ValueError: another dtype; no encoder that can be optimized, or one that HBERT cannot express.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize takes a torch.nn.Module, got {type(model).__name__}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(map(repr, DTYPES))}")
    encoders = [module for module in model.modules() if type(module) in _ENCODERS]
    if not encoders:
        raise ValueError(
            f"{type(model).__name__} holds none of {', '.join(kind.__name__ for kind in _ENCODERS)}"
        )
    made: dict[int, Any] = {id(e): _ENCODERS[type(e)](e, DTYPES[dtype]) for e in encoders}
    inside = {id(part) for module in made.values() for part in module.modules()}
    # Where deepcopy meets an encoder it takes the one that was made for it.
    twin = copy.deepcopy(model, made)
    for module in twin.modules():
        if id(module) not in inside:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(DTYPES[dtype])
    return twin.eval().requires_grad_(False)
