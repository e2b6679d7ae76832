"""HybridBERT encoders: self-attention and additive-attention layers with sub-layer normalization.

The names below are loaded on first use, so that ``import hbert``, ``import hbert.data`` and the command line
stay quick and need neither torch nor transformers. Loading any of them also registers the model with the Auto
classes of transformers::

    from hbert import HBertModel
    from transformers import AutoModel

    model = AutoModel.from_pretrained("path/of/an/hbert/checkpoint")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import HBertConfig
    from .layout import DenseLayout, Layout, PackedLayout
    from .modeling import HBertForMaskedLM, HBertMaskedLMOutput, HBertModel, HBertPreTrainedModel

# Everything of the model layer is loaded by its last module, which is the one that registers the Auto
# classes.
_MODEL_LAYER = "hbert.modeling"
_EXPORTS = {
    "HBertConfig": "hbert.config",
    "DenseLayout": "hbert.layout",
    "Layout": "hbert.layout",
    "PackedLayout": "hbert.layout",
    "HBertForMaskedLM": _MODEL_LAYER,
    "HBertMaskedLMOutput": _MODEL_LAYER,
    "HBertModel": _MODEL_LAYER,
    "HBertPreTrainedModel": _MODEL_LAYER,
}

__all__ = [
    "DenseLayout",
    "HBertConfig",
    "HBertForMaskedLM",
    "HBertMaskedLMOutput",
    "HBertModel",
    "HBertPreTrainedModel",
    "Layout",
    "PackedLayout",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hbert' has no attribute {name!r}")
    import_module("hbert.config")  # first: it says which transformers is needed where that is missing
    import_module(_MODEL_LAYER)
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
