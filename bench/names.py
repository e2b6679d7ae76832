"""The names of models and peers, and what a name says of its dtype. No torch here: the coordinator needs none."""

from __future__ import annotations

DTYPES = ("fp32", "bf16", "int8")

OPTIMIZE = "+optimize"
HBERTS = ("hbert-v1", "hbert-v2", "hbert-v1c", "hbert-v2c", "hbert-additive", "hbert-additive-c", "hbert-vanilla")
PATCHED = "bert+patch"
BERT_OPTIMIZED = f"bert{OPTIMIZE}"
LOADED = "hbert"  # the model of a checkpoint of ours
LOADED_OPTIMIZED = f"{LOADED}{OPTIMIZE}"
ENCODERS = (*HBERTS, *(name + OPTIMIZE for name in HBERTS), PATCHED, BERT_OPTIMIZED, LOADED_OPTIMIZED)

TRAINED_PEERS = ("hf", "hf-compile", "hf-fp32")
TORCH_PEERS = (*TRAINED_PEERS, "hf-bf16", "hf-compile-freeze", "torchao-int8")
ENGINE_PEERS = ("ort-fp32", "ort-int8", "ov-fp32", "ov-bf16", "ov-int8", "ct2-int8")
ENCODER_PEERS = (*TORCH_PEERS, *ENGINE_PEERS, LOADED)


def fixed_dtype(peer: str) -> str | None:
    """The dtype that a peer computes in whatever the case: its name ends in it. None: that of the case."""
    ending = peer.rpartition("-")[2]
    return ending if ending in DTYPES else None


def computes_in(peer: str, dtype: str) -> bool:
    """Whether a peer has a place in cases of `dtype`: int8 is only for optimized models and peers of a fixed dtype."""
    return dtype != "int8" or peer.endswith(OPTIMIZE) or fixed_dtype(peer) is not None


def is_packed(peer: str) -> bool:
    """Whether a peer takes the padding out itself, so that sorting by length is nothing to it."""
    return peer.startswith(("hbert", "bert+"))
