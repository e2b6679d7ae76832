"""A checkpoint in HBERT's names: each tensor has a place in an encoder, or a reason why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hbert.config import HBertConfig
from hbert.modeling import HBertForMaskedLM, HBertModel

from .families import FAMILIES, SELF_BLOCKS, STATE_DICTS, Family
from .files import read_config, read_weights

WORDS, POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
DECODER, DECODER_BIAS = "head.decoder.weight", "head.decoder.bias"
_OLD_LEAVES = {".gamma": ".weight", ".beta": ".bias"}
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


@dataclass(frozen=True)
class Piece:
    """A tensor or a block of one, and the name of that tensor in the checkpoint."""

    tensor: Tensor
    origin: str


@dataclass(frozen=True)
class Source:
    """An encoder, in our names.

    Attributes:
        config: of the HBERT encoder that computes the same.
        pieces: the tensors of that encoder by their names in ``HBertModel`` or, behind ``head.``, in
            ``HBertMaskedLMHead``; the blocks of ``attention.qkv`` apart.
        left_out: tensor of the checkpoint that no HBERT encoder has a place for -> why.
    """

    config: HBertConfig
    pieces: dict[str, Piece]
    left_out: dict[str, str]

    @property
    def has_head(self) -> bool:
        """Whether there is a masked-LM head."""
        return DECODER_BIAS in self.pieces


def read_source(checkpoint: PreTrainedModel | str | Path) -> Source:
    """Reads a model of transformers, or a folder with config.json and safetensors or PyTorch weights.

    Raises:
        TypeError: neither a model of transformers nor a path.
        HbertError: the folder or one of its files is missing or cannot be read.
        ValueError: as :func:`source_of`; the message names the checkpoint.
    """
    if isinstance(checkpoint, PreTrainedModel):
        config, where = checkpoint.config, f"this {type(checkpoint).__name__}"
        state: Mapping[str, Tensor] = checkpoint.state_dict()
    elif isinstance(checkpoint, str | Path):
        folder = Path(checkpoint)
        config, where = read_config(folder), str(folder)
        state = read_weights(folder)
    else:
        kind = type(checkpoint).__name__
        raise TypeError(f"a checkpoint is a model of transformers or the path of a folder, got {kind}")
    try:
        return source_of(config, state)
    except ValueError as error:
        raise ValueError(f"{where} cannot be converted: {error}") from error


def source_of(config: PreTrainedConfig, state: Mapping[str, Tensor]) -> Source:
    """Reads the state dict of a model of transformers.

    Raises:
        ValueError: an architecture that HBERT cannot express, or a tensor that is missing, unknown or of a
            wrong shape; the message names it.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"its model_type is {config.model_type}; allowed: {', '.join(FAMILIES)}")
    return _source(config, state, FAMILIES[config.model_type])


def read_state_dict(
    state: Mapping[str, Tensor], config: HBertConfig, writer: str, embedding_scale: float = 1.0
) -> Source:
    """Reads the state dict of an encoder of another library.

    Args:
        config: of the HBERT encoder with the same layers, norm style and epsilon (torchscale: 1e-5).
        writer: ``"fastformer"`` (A layers, post_ln) or ``"torchscale"`` (S layers, any style but merge).
        embedding_scale: what that encoder multiplies token embeddings by: torchscale 1, or sqrt(H) with
            ``no_scale_embedding=False``.

    Raises:
        ValueError: an unknown writer, or a tensor that is missing, unknown or of a wrong shape.
    """
    if writer not in STATE_DICTS:
        raise ValueError(f"unknown writer {writer!r}; allowed: {', '.join(STATE_DICTS)}")
    source = _source(config, state, STATE_DICTS[writer])
    words = source.pieces[WORDS]
    source.pieces[WORDS] = Piece(words.tensor * embedding_scale, words.origin)
    return source


def _source(config: PreTrainedConfig, state: Mapping[str, Tensor], family: Family) -> Source:
    found = _named(state, family)
    with_head = bool(family.head) and any(name.startswith(family.head) for name in found)
    tied = config.tie_word_embeddings
    if with_head:
        tied = tied and _same(found, family.name(DECODER), family.name(WORDS))
    ours = family.hbert_config(config, with_head, tied)
    skipped = {POSITIONS: family.skipped_positions(config)}
    pieces = {
        name: _piece(found, family.name(name), shape, skipped.get(name, 0))
        for name, shape in _shapes(ours, with_head).items()
        if not (tied and name == DECODER)
    }
    return Source(ours, pieces, _left_out(found, pieces, family))


def _named(state: Mapping[str, Tensor], family: Family) -> dict[str, Piece]:
    """The tensors by their present names without the encoder's prefix, blocks of ours apart."""
    found: dict[str, Piece] = {}
    for origin, tensor in state.items():
        name = origin.removeprefix(family.prefix)
        for old, new in _OLD_LEAVES.items():
            name = name.removesuffix(old) + new if name.endswith(f"LayerNorm{old}") else name
        if family.modules is None and ".attention.qkv." in name:
            for block, part in zip(SELF_BLOCKS, tensor.chunk(3), strict=True):
                found[name.replace("qkv", block)] = Piece(part, f"{origin} [{block}]")
        else:
            found[name] = Piece(tensor, origin)
    if family.head_bias in found:
        found.setdefault(family.name(DECODER_BIAS), found[family.head_bias])
    return found


def _same(found: Mapping[str, Piece], one: str, other: str) -> bool:
    """Whether the two are equal, or one of them is not stored."""
    return one not in found or other not in found or torch.equal(found[one].tensor, found[other].tensor)


def _shapes(config: HBertConfig, with_head: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of all pieces of an encoder."""
    with torch.device("meta"):
        model = HBertForMaskedLM(config) if with_head else HBertModel(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        name, shape = name.removeprefix("hbert."), tuple(tensor.shape)
        if ".attention.qkv." in name:
            third = (shape[0] // 3, *shape[1:])
            shapes |= {name.replace("qkv", block): third for block in SELF_BLOCKS}
        else:
            shapes[name] = shape
    return shapes


def _piece(found: Mapping[str, Piece], name: str, shape: tuple[int, ...], skipped: int) -> Piece:
    if name not in found:
        raise ValueError(f"tensor {name} is missing")
    piece, expected = found[name], (shape[0] + skipped, *shape[1:])
    if tuple(piece.tensor.shape) != expected:
        raise ValueError(f"tensor {piece.origin} has shape {tuple(piece.tensor.shape)}; expected {expected}")
    return Piece(piece.tensor[skipped:], piece.origin)


def _left_out(found: Mapping[str, Piece], pieces: Mapping[str, Piece], family: Family) -> dict[str, str]:
    used = {piece.origin for piece in pieces.values()}
    left = {name: piece.origin for name, piece in found.items() if piece.origin not in used}
    reasons = {origin: _reason(name, family) for name, origin in left.items()}
    if unknown := [origin for origin, reason in reasons.items() if reason is None]:
        raise ValueError(f"it has tensors that such an encoder has not: {', '.join(unknown[:3])}")
    return {origin: reason for origin, reason in reasons.items() if reason is not None}


def _reason(name: str, family: Family) -> str | None:
    if name in _BUFFERS:
        return "a constant"
    if family.head and name == family.name(DECODER):
        return "the same as the token embedding, which the decoder shares"
    if name == family.head_bias:
        return "a second name of the decoder's bias"
    if name.startswith("pooler."):
        return "HBERT has no pooler"
    for ending, reason in family.without_place.items():
        if name.endswith(ending):
            return reason
    if name.startswith(family.namespaces) or (family.head and name.startswith(family.head)):
        return None
    return "a head of another task"
