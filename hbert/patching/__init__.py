"""Packed execution and the kernels of hbert_kernels for the encoders that people already have, in place.

>>> model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
>>> print(hbert.patch(model))
>>> hbert.unpatch(model)

The modules of the model stay what they are: the packed forward calls its linear layers, activations and
dropouts on tokens without padding, and reads its norms. Which of its modules does what is told by the tables
of :mod:`hbert.convert.families`.

**Why three products and not one.** HBERT has one matrix for queries, keys and values, BERT has three. The
packed forward calls the three linear layers and concatenates their *outputs*, 3TH numbers for T tokens.
Concatenating the *weights* at each call would copy 3H^2 numbers, which is more for T < H, and would go around
whatever stands in for a linear layer (LoRA, quantized layers, hooks). Views into one storage would cost
nothing, but the parameters would no longer be those that the optimizer, ``tie_weights`` and ``.to()`` know.
Measured once by hand at width 768, on one thread of a busy machine (Zen 3, AVX2, fp32, 2026-11-23, ms):
outputs 12.5, weights 13.9, one matrix 12.5 for 128 tokens; 93, 91, 88 for 1024.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import (
    BertForMaskedLM,
    BertModel,
    DistilBertForMaskedLM,
    DistilBertModel,
    PreTrainedModel,
    RobertaForMaskedLM,
    RobertaModel,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)

from hbert.convert.families import FAMILIES, SELF_BLOCKS, Family, check_encoder

from .classes import patch_module, unpatch_module
from .encoder import has_patch
from .parts import getter, is_plain_norm, layers_of
from .report import PatchReport

__all__ = ["PatchReport", "is_patched", "patch", "unpatch"]

_ENCODERS: dict[Any, str] = {
    BertModel: "bert",
    RobertaModel: "roberta",
    XLMRobertaModel: "xlm-roberta",
    DistilBertModel: "distilbert",
}
_MASKED_LMS = (BertForMaskedLM, RobertaForMaskedLM, XLMRobertaForMaskedLM, DistilBertForMaskedLM)
_LINEAR = (*(f"attention.{block}" for block in SELF_BLOCKS), "attention.out", "ffn.fc1", "ffn.fc2")
_NORMS = ("attention_norm", "ffn_norm")


def patch(model: nn.Module) -> PatchReport:
    """Lets the BERT, RoBERTa, XLM-R and DistilBERT encoders in ``model`` run packed, in place.

    Padding is taken out in front of the embeddings and comes back as zeros behind the last layer; attention
    and norms run through hbert_kernels; with labels and in training, masked-LM models compute their head at
    the masked tokens only. Hidden states, poolers and losses are those of the original to rounding at tokens
    that are not masked. No parameter is copied, moved or renamed. A call that asks for what the packed
    forward has not (``output_attentions``, masks that are not [B, N], caches, float16 on a CPU) runs the
    original one and says so; docs/patch.md lists them, and what differs.

    Args:
        model: one of these encoders, or any module that holds some, such as a model with a head or a
            SentenceTransformer. What is patched already stays so.

    Returns:
        What was replaced, and what was not and why.

    Raises:
        TypeError: not a module.
        ValueError: there is nothing in it that can be patched; it is as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch takes a torch.nn.Module, got {type(model).__name__}")
    report = PatchReport()
    for name, module in model.named_modules():
        if has_patch(module) and type(module).__base__ in _ENCODERS:
            report.kept[_label(name, module)] = "it is patched already"
        elif type(module) in _ENCODERS:
            _patch_encoder(name, module, report)
    if not is_patched(model):
        raise ValueError(f"{type(model).__name__} cannot be patched: {_why_not(report)}")
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and type(module) not in _ENCODERS and not has_patch(module):
            _patch_head(name, module, report)
    return report


def is_patched(model: nn.Module) -> bool:
    """Returns whether anything in ``model`` is patched."""
    return any(map(has_patch, model.modules()))


def unpatch(model: nn.Module) -> None:
    """Undoes :func:`patch`: every object in ``model`` has its class back, and so its own forward.

    Raises:
        ValueError: nothing in it is patched, or something has changed the class of a patched object since;
            then nothing is undone.
    """
    for name, module in model.named_modules():
        if has_patch(module) and "_hbert_original" not in vars(type(module)):
            raise ValueError(f"the class of {name or 'the model'} was changed after patching (fully_shard?)")
    if not any([unpatch_module(module) for module in model.modules()]):
        raise ValueError(f"nothing in this {type(model).__name__} is patched")


def _why_not(report: PatchReport) -> str:
    if report.kept:
        return "; ".join(f"{what}: {why}" for what, why in report.kept.items())
    return f"it holds none of {', '.join(kind.__name__ for kind in _ENCODERS)}"


def _label(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} ({name})" if name else type(module).__name__


def _patch_encoder(name: str, encoder: Any, report: PatchReport) -> None:
    label, model_type = _label(name, encoder), _ENCODERS[type(encoder)]
    family = FAMILIES[model_type]
    try:
        check_encoder(encoder.config)
        _check_modules(encoder, family)
    except ValueError as error:
        report.kept[label] = str(error)
        return
    layers = layers_of(family)(encoder)
    norms = [getter(family, "embeddings.norm")(encoder)]
    norms += [getter(family, f"layers.*.{name}", "layers.*.")(layer) for layer in layers for name in _NORMS]
    report.replaced["encoder, run without padding"] += 1
    report.replaced["attention blocks"] += len(layers)
    _count_norms(norms, label, report)
    for module, role in ((encoder.embeddings, "embeddings"), *((layer, "layer") for layer in layers)):
        patch_module(module, role, model_type)
    patch_module(encoder, "encoder", model_type)
    if getattr(encoder, "pooler", None) is not None:
        report.kept[_label(f"{name}.pooler".removeprefix("."), encoder.pooler)] = "it works on one token of a sequence"


def _count_norms(norms: list[nn.Module], where: str, report: PatchReport) -> None:
    plain = sum(map(is_plain_norm, norms))
    report.replaced["norms"] += plain
    if plain < len(norms):
        report.kept[f"{len(norms) - plain} norms of {where}"] = (
            "they are not torch's LayerNorm, were wrapped, or a hook computes their parameters"
        )


def _patch_head(name: str, model: PreTrainedModel, report: PatchReport) -> None:
    label = _label(name, model)
    if type(model) not in _MASKED_LMS:
        report.kept[label] = "its own layers read the hidden states, as before"
    elif not has_patch(model.base_model):
        report.kept[label] = "its encoder is not patched"
    elif "forward" in vars(model):
        report.kept[label] = "its forward was replaced on the object"
    else:
        model_type = model.config.model_type
        _count_norms([getter(FAMILIES[model_type], "head.norm")(model)], label, report)
        patch_module(model, "masked_lm", model_type)
        report.replaced["masked-LM head, in training run on the masked tokens only"] += 1


def _check_modules(encoder: Any, family: Family) -> None:
    """Checks that what is called no more is what transformers built, so that nothing of the user's is lost.

    Raises:
        ValueError: it is not.
    """
    home = type(encoder).__module__
    for path in _containers(encoder, family):
        module = encoder.get_submodule(path)
        if type(module).__module__ not in (home, nn.ModuleList.__module__):
            raise ValueError(f"its {path} is a {type(module).__name__} of {type(module).__module__}")
        if "forward" in vars(module):
            raise ValueError(f"the forward of its {path or 'encoder'} was replaced on the object (by accelerate?)")
    width = encoder.config.hidden_size
    for index, layer in enumerate(layers_of(family)(encoder)):
        for block in SELF_BLOCKS:
            linear = getter(family, f"layers.*.attention.{block}", "layers.*.")(layer)
            if getattr(linear, "out_features", width) != width:
                raise ValueError(f"layer {index} has {linear.out_features} channels in its {block[5:]}, not {width}")


def _containers(encoder: Any, family: Family) -> Iterator[str]:
    """Paths of the encoder itself and of the modules between it and those that the packed forward calls."""
    depth = len(layers_of(family)(encoder))
    tensors = [f"layers.*.{name}" for name in (*_LINEAR, *_NORMS)] + ["embeddings.word_embeddings"]
    found = {""}
    for path in filter(None, map(family.path, tensors)):
        names = path.split(".")[:-1]
        prefixes = [".".join(names[: end + 1]) for end in range(len(names))]
        found.update(p.replace("*", str(index)) for p in prefixes for index in range(depth if "*" in p else 1))
    yield from sorted(found)
