"""HybridBERT encoders: self-attention and additive-attention layers with sub-layer normalization.

The names below are loaded on first use, so that ``import hbert``, ``import hbert.data`` and the command line
stay quick and need neither torch nor transformers. The Auto classes of transformers know HBERT as soon as both
packages are imported, in any order::

    import hbert
    from transformers import AutoModel

    model = AutoModel.from_pretrained("path/of/an/hbert/checkpoint")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import processor as processor  # before torch: its ALLOWED
from ._registration import register_with_transformers

if TYPE_CHECKING:
    from . import convert as convert
    from ._version import __version__
    from .collate import PackedCollator, PackedMaskedLMCollator
    from .config import HBertConfig
    from .export import export_onnx
    from .heads import HBertForQuestionAnswering, HBertForSequenceClassification, HBertForTokenClassification
    from .inference import optimize
    from .layout import DenseLayout, Layout, PackedLayout
    from .modeling import HBertForMaskedLM, HBertMaskedLMOutput, HBertModel, HBertPreTrainedModel
    from .patching import PatchReport, patch, unpatch

_EXPORTS = {
    "__version__": "hbert._version",
    "HBertConfig": "hbert.config",
    "DenseLayout": "hbert.layout",
    "Layout": "hbert.layout",
    "PackedLayout": "hbert.layout",
    "export_onnx": "hbert.export",
    "PackedCollator": "hbert.collate",
    "PackedMaskedLMCollator": "hbert.collate",
    "HBertForMaskedLM": "hbert.modeling",
    "HBertMaskedLMOutput": "hbert.modeling",
    "HBertModel": "hbert.modeling",
    "HBertPreTrainedModel": "hbert.modeling",
    "HBertForQuestionAnswering": "hbert.heads",
    "HBertForSequenceClassification": "hbert.heads",
    "HBertForTokenClassification": "hbert.heads",
    "optimize": "hbert.inference",
    "PatchReport": "hbert.patching",
    "patch": "hbert.patching",
    "unpatch": "hbert.patching",
}

_MODULES = ("convert",)

__all__ = [
    "DenseLayout",
    "HBertConfig",
    "HBertForMaskedLM",
    "HBertForQuestionAnswering",
    "HBertForSequenceClassification",
    "HBertForTokenClassification",
    "HBertMaskedLMOutput",
    "HBertModel",
    "HBertPreTrainedModel",
    "Layout",
    "PackedCollator",
    "PackedLayout",
    "PackedMaskedLMCollator",
    "PatchReport",
    "__version__",
    "export_onnx",
    "optimize",
    "patch",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS and name not in _MODULES:
        raise AttributeError(f"module 'hbert' has no attribute {name!r}")
    if name != "__version__":
        import_module("hbert.config")  # first: it says which transformers is needed where that is missing
    if name in _MODULES:
        return import_module(f"hbert.{name}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


register_with_transformers()
