"""From the tensors of one encoder to those of another of the same width and vocabulary.

Where both have the same layers and norm style, everything moves and the function stays. Elsewhere a tensor
moves to where it does the same work:

* A norm goes with the linear layer that reads it: the norm *behind* the attention of a post-norm layer is the
  norm *in front of* the feed-forward block of a pre-norm layer, and the one behind that block is in front of
  the next attention. In front of its first attention a pre-norm model has a norm that corresponds to nothing.
* In an additive layer that was self-attention, query <- value, key <- key, transform <- output. The query of
  additive attention is its value too: it is what is pooled, gated and handed to the transform, so that the
  transform goes on reading what the output projection read. The scorers are fresh, and pool almost evenly at
  first.
* Where there are no token types, the vector of type 0, which every token had, joins the learned positions.
* Of learned positions the first rows move; where the model has more, none does, unless it is asked for how.
* Layer i goes to layer i; layers beyond the other's depth stay fresh, or are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hbert.config import ADDITIVE, PRE_NORM_STYLES, HBertConfig
from hbert.modeling import HBertPreTrainedModel

from .families import SELF_BLOCKS
from .positions import EXTENSIONS, check_extension
from .report import Move, Report
from .source import DECODER, POSITIONS, WORDS, Source

ALL, EMBEDDINGS = "all", "embeddings"
PARTS = (EMBEDDINGS, ALL)
_TYPES = "embeddings.token_type_embeddings.weight"
_LAYER = re.compile(r"layers\.(\d+)\.(.*)")
_ADDITIVE_FROM_SELF = {"query": "self_value", "key": "self_key", "transform": "out"}
_NOT_ASKED = "not asked for"
_NOTHING = "nothing in the checkpoint corresponds"


def check_fits(source: Source, config: PreTrainedConfig) -> None:
    """Checks that the tensors of ``source`` can move into a model.

    Raises:
        ValueError: the model has another width or vocabulary.
    """
    for name in ("hidden_size", "vocab_size"):
        there, here = getattr(source.config, name), getattr(config, name)
        if there != here:
            raise ValueError(f"the checkpoint does not fit: its {name} is {there}, the model's is {here}")


def transfer(
    source: Source, model: HBertPreTrainedModel, parts: str = ALL, extend_positions: str | None = None
) -> Report:
    """Copies the tensors of ``source`` into the parameters of ``model`` that correspond to them.

    Args:
        parts: ``"all"``, or ``"embeddings"``: the token embedding alone, and with it a decoder that
            shares it.
        extend_positions: what becomes of learned positions where the model has more of them:
            ``"interpolate"`` or ``"sinusoidal"`` (:mod:`hbert.convert.positions`); None: they stay fresh.

    Raises:
        ValueError: the model has another width or vocabulary, or there is nothing to extend; nothing was
            changed.
    """
    config = model.config
    assert isinstance(config, HBertConfig)
    check_fits(source, config)
    check_extension(extend_positions, source.config, config)
    correspondence = _Correspondence(source, config, extend_positions)
    report, used, differing = Report(left_out=dict(source.left_out)), set[str](), dict[str, str]()
    for name, parameter in model.named_parameters():
        short = name.removeprefix("hbert.")
        plan = correspondence.plan(short) if parts == ALL or short == WORDS else _Plan(why=_NOT_ASKED)
        value = plan.value(source)
        if value is not None and value.shape != parameter.shape:
            plan, value = _Plan(why=f"{_size(value)} in the checkpoint, {_size(parameter)} here"), None
            differing[short] = plan.why
        if value is None:
            report.fresh[name] = plan.why
            continue
        with torch.no_grad():
            parameter.copy_(value)
        used.update(plan.pieces)
        report.moved[name] = Move(tuple(source.pieces[piece].origin for piece in plan.pieces), plan.why)
    for name, piece in source.pieces.items():
        if name not in used:
            why = differing.get(name) or correspondence.why_unused(name)
            report.left_out[piece.origin] = why if parts == ALL else _NOT_ASKED
    return report


@dataclass(frozen=True)
class _Plan:
    """The pieces that a parameter is made of, how, and a remark; without pieces, why there are none."""

    pieces: tuple[str, ...] = ()
    why: str = ""
    combine: Callable[[list[Tensor]], Tensor] = torch.cat

    def value(self, source: Source) -> Tensor | None:
        tensors = [source.pieces[piece].tensor for piece in self.pieces]
        return self.combine(tensors) if tensors else None


class _Correspondence:
    """What a parameter of a model with configuration ``target`` is made of."""

    def __init__(self, source: Source, target: HBertConfig, extend_positions: str | None = None) -> None:
        self._extension = EXTENSIONS[extend_positions] if extend_positions else None
        self._source, self._there, self._here = source, source.config, target
        self._norms_there = {reader: norm for norm, reader in _norm_readers(source.config).items()}
        self._readers_here = _norm_readers(target)

    def plan(self, name: str) -> _Plan:
        plan = self._corresponding(name)
        if any(piece not in self._source.pieces for piece in plan.pieces):
            return _Plan(why=_NOTHING)
        return plan

    def why_unused(self, piece: str) -> str:
        if piece == DECODER:
            return "the decoder shares the token embedding here"
        if piece.startswith("head."):
            return "a masked-LM head, which this model has not"
        layer = _LAYER.match(piece)
        if layer and layer[2].startswith("attention.self_query") and self._types_of(int(layer[1]))[1] == ADDITIVE:
            return "the query of an additive layer is its value: it took that"
        return "nothing in this model corresponds"

    def _corresponding(self, name: str) -> _Plan:
        module, _, leaf = name.rpartition(".")
        if name == POSITIONS:
            return self._positions()
        if name == _TYPES:
            return _Plan((name,), combine=lambda found: found[0][: self._here.type_vocab_size])
        if name.startswith("head."):
            return self._head(name)
        if module in self._readers_here and leaf in ("weight", "bias"):
            return _Plan((f"{self._norms_there.get(self._readers_here[module])}.{leaf}",))
        layer = _LAYER.fullmatch(name)
        if layer and layer[2].startswith("attention."):
            return self._attention(int(layer[1]), layer[2].removeprefix("attention."))
        return _Plan((name,))

    def _positions(self) -> _Plan:
        notes, rows = list[str](), self._rows
        if self._extension:
            notes.append(self._extension[0].format(self._there.max_position_embeddings))
        if self._there.type_vocab_size and not self._here.type_vocab_size:
            notes.append("with token type 0 in every row")
            both = POSITIONS, _TYPES
            return _Plan(both, ", ".join(notes), lambda found: rows(found[0]) + found[1][0])
        return _Plan((POSITIONS,), ", ".join(notes), lambda found: rows(found[0]))

    def _rows(self, table: Tensor) -> Tensor:
        """The learned positions, cut or extended to the length of ours."""
        length = self._here.max_position_embeddings
        return self._extension[1](table, length) if self._extension else table[:length]

    def _head(self, name: str) -> _Plan:
        if not self._source.has_head:
            return _Plan(why="the checkpoint has no masked-LM head")
        return _Plan((WORDS if name == DECODER and DECODER not in self._source.pieces else name,))

    def _attention(self, index: int, rest: str) -> _Plan:
        there, here = self._types_of(index)
        if there is None:
            return _Plan(why=_NOTHING)
        heads = self._there.num_attention_heads, self._here.num_attention_heads
        if heads[0] != heads[1]:
            return _Plan(why=f"{heads[0]} heads in the checkpoint, {heads[1]} here")
        module, _, leaf = rest.rpartition(".")
        if there == here:
            modules = SELF_BLOCKS if module == "qkv" else (module,)
        elif here == ADDITIVE and module in _ADDITIVE_FROM_SELF:
            modules = (_ADDITIVE_FROM_SELF[module],)
        else:
            return _Plan(why=f"additive attention {'here' if here == ADDITIVE else 'in the checkpoint'} only")
        return _Plan(tuple(f"layers.{index}.attention.{module}.{leaf}" for module in modules))

    def _types_of(self, index: int) -> tuple[str | None, str | None]:
        """The types of a layer in the checkpoint and here; None where there is no such layer."""
        there, here = (dict(enumerate(config.layer_types)).get(index) for config in (self._there, self._here))
        return there, here


def _norm_readers(config: HBertConfig) -> dict[str, str]:
    """The norms around the blocks of an encoder, and what reads the output of each."""
    layers = range(config.num_hidden_layers)
    if config.norm_style in PRE_NORM_STYLES:
        readers = {f"layers.{i}.{block}_norm": f"layers.{i}.{block}" for i in layers for block in ("attention", "ffn")}
        return {**readers, "norm": "output"}
    readers = {f"layers.{i}.attention_norm": f"layers.{i}.ffn" for i in layers}
    following = [*(f"layers.{i}.attention" for i in layers[1:]), "output"]
    return readers | {f"layers.{i}.ffn_norm": reader for i, reader in zip(layers, following, strict=True)}


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
