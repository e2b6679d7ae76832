"""Encoders for serving: ``hbert.optimize(model, dtype)``.

>>> fast = hbert.optimize("my-classifier", "bf16")
>>> fast(**tokenizer(texts, padding=True, return_tensors="pt")).logits
>>> fast.save_pretrained("my-fast-classifier")
>>> fast = hbert.optimize("my-fast-classifier")
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertModel, DistilBertModel, PreTrainedModel, RobertaModel, XLMRobertaModel

from hbert.modeling import HBertModel
from hbert.patching.encoder import has_patch

from .arithmetic import DTYPES
from .bert import OptimizedBertModel
from .checkpoint import InMemory, OnDisk, Original, load_model, read_recipe
from .encoder import OptimizedHBertModel
from .plain import check_modules

__all__ = ["OptimizedBertModel", "OptimizedHBertModel", "optimize"]

_ENCODERS: dict[type[nn.Module], Any] = {
    HBertModel: OptimizedHBertModel,
    BertModel: OptimizedBertModel,
    DistilBertModel: OptimizedBertModel,
    RobertaModel: OptimizedBertModel,
    XLMRobertaModel: OptimizedBertModel,
}


def optimize(model: nn.Module | str | Path, dtype: str | None = None) -> nn.Module:
    """Returns a copy of ``model`` for inference, with the same call signature and outputs.

    Each encoder in it is replaced: weights are converted to ``dtype`` and laid out once for the CPU's matrix
    library, parameters of norms go into the layers that read them, residual sums into the products, and
    tokens run packed, without padding. What is around the encoders is copied in ``dtype``, with int8 in float32.

    The copy is in evaluation mode, has no gradients and does not see later changes of the original's weights. Its
    ``save_pretrained(folder)`` writes the original's weights and a recipe; ``optimize(folder)`` loads them and
    packs again. To that end it refers to the original: a model stays in memory as long as the copy does, a folder is
    read again. So for the sake of memory, save a model that was trained in this process, and optimize the folder.

    Args:
        model: an HBERT model, a BERT, RoBERTa, XLM-R or DistilBERT of transformers, with a head or without, or a
            module that holds some, such as a SentenceTransformer; or a folder with such a model, as its
            ``save_pretrained`` wrote it. A folder is loaded as the class that its configuration names.
        dtype: "fp32" or "bf16", of weights and activations; softmax and the statistics of norms are float32. Or
            "int8", of the weights of the encoder's linear layers, of what these read, and of the token embedding; the
            rest is float32 (docs/inference.md). Default: that of the folder's recipe, else "fp32".

    Raises:
        TypeError: neither a module nor a path.
        ValueError: another dtype; no encoder that can be optimized, one that HBERT cannot express, that holds adapters
            (merge them first), or whose configuration asks for attentions; int8 on another device than a CPU, or for
            weights that are not finite.
        HbertError: no such folder, or its files are missing, damaged or of a later version.
    """
    if dtype is not None:
        _check_dtype(dtype)
    if isinstance(model, str | Path):
        folder = Path(model)
        dtype = dtype or read_recipe(folder)
        loaded = load_model(folder)
        return _optimized(loaded, OnDisk(folder), _check_dtype(dtype or "fp32"))
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize takes a torch.nn.Module or the path of a folder, got {type(model).__name__}")
    return _optimized(model, InMemory(model), _check_dtype(dtype or "fp32"))


def _check_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(map(repr, DTYPES))}")
    return dtype


def _optimized(model: nn.Module, source: InMemory | OnDisk, dtype: str) -> nn.Module:
    encoders: list[Any] = [module for module in model.modules() if type(module) in _ENCODERS]
    if not encoders:
        raise ValueError(f"{type(model).__name__} cannot be optimized: {_why_not(model)}")
    for encoder in encoders:
        check_modules(encoder)
        if encoder.config.output_attentions:
            raise ValueError(
                f"{type(encoder).__name__} cannot be optimized: its configuration asks for attentions, which no fused"
                " kernel holds; set config.output_attentions = False"
            )
    if dtype == "int8" and any(parameter.device.type != "cpu" for e in encoders for parameter in e.parameters()):
        raise ValueError("int8 runs on CPUs, and the model is on another device: move it, or take 'bf16'")
    made: dict[int, Any] = {id(e): _ENCODERS[type(e)](e, dtype) for e in encoders}
    inside = {id(part) for module in made.values() for part in module.modules()}
    # Where deepcopy meets an encoder it takes the one that was made for it.
    twin, around = copy.deepcopy(model, made), torch.bfloat16 if dtype == "bf16" else torch.float32
    for module in twin.modules():
        if id(module) not in inside:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(around)
    save: Any = Original(source, dtype).save_pretrained
    # On the object: its class stays the one that pipelines and other libraries know.
    for name in ("save_pretrained", "save"):
        if name == "save_pretrained" or hasattr(twin, name):
            setattr(twin, name, save)
    return twin.eval().requires_grad_(False)


def _why_not(model: nn.Module) -> str:
    """The reason why there is no encoder in a model that can be optimized."""
    for module in model.modules():
        if isinstance(module, OptimizedHBertModel):
            return "it is optimized already"
        if has_patch(module):
            return "its encoder is patched: hbert.unpatch it first"
    reason = f"it holds none of {', '.join(kind.__name__ for kind in _ENCODERS)}"
    others = {type(module).__name__ for module in model.modules() if isinstance(module, PreTrainedModel)}
    return f"{reason}, but {', '.join(sorted(others))}" if others else reason
