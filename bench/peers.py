"""How each named model is built, and what all workers have in common. Imported by workers only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

import hbert_kernels
from bench.device import Device
from bench.lengths import spread_lengths
from bench.runtime import DTYPES, SEED, chosen_backend, hbert_traits, torch_traits
from bench.suites import PATCHED, PEERS
from hbert import HBertConfig, HBertForMaskedLM, HBertModel
from hbert.patching import is_patched, patch, unpatch

VOCAB_SIZE = 30522

Dimensions = dict[str, Any]
SIZES: dict[str, Dimensions] = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512},
    "4x256": {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}


def plain_torch() -> AbstractContextManager[None]:
    """A context in which hbert's ops run their plain-torch reference; nothing changes for the other peers."""
    return hbert_kernels.use_backend("reference")


def _hbert(preset: str, head: str, size: Dimensions) -> nn.Module:
    config = getattr(HBertConfig, preset)(vocab_size=VOCAB_SIZE, **size)
    return HBertModel(config) if head == "encoder" else HBertForMaskedLM(config)


def _bert(head: str, size: Dimensions) -> nn.Module:
    config = BertConfig(vocab_size=VOCAB_SIZE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **size)
    return BertModel(config, add_pooling_layer=False) if head == "encoder" else BertForMaskedLM(config)


def _patched(head: str, size: Dimensions) -> nn.Module:
    model = _bert(head, size)
    patch(model)
    return model


_BUILDERS: dict[str, Callable[[str, Dimensions], nn.Module]] = {
    **dict.fromkeys(PEERS, _bert),
    PATCHED: _patched,
    **{
        f"hbert-{preset.replace('_', '-')}": partial(_hbert, preset)
        for preset in ("v1", "v2", "v1c", "v2c", "additive", "additive_c", "vanilla")
    },
}


def build(peer: str, head: str, size: str) -> nn.Module:
    """The fp32 model of a peer with random weights (the same at every call); `head` is "encoder" or "masked_lm"."""
    torch.manual_seed(SEED)
    return _BUILDERS[peer](head, SIZES[size])


def dtype_of(peer: str, case_dtype: str) -> torch.dtype:
    """The dtype that a peer computes in: that of the case, or float32 for a peer that ends in "-fp32"."""
    return torch.float32 if peer.endswith("-fp32") else DTYPES[case_dtype]


def compiled(peer: str, model: nn.Module) -> Any:
    """What is called: the model itself, or, for a peer that ends in "-compile", its torch.compile."""
    return torch.compile(model, dynamic=False) if peer.endswith("-compile") else model


def dense_copy(model: Any, dtype: torch.dtype) -> Any:
    """A copy with the same weights in `dtype` that computes attention in plain torch: the oracle of the gate."""
    double = copy.deepcopy(model).to(dtype)
    if is_patched(double):
        unpatch(double)
    double.set_attn_implementation("eager")
    return double


def ids_and_mask(batch: int, seq: int, device: Device, padded: bool = False) -> dict[str, torch.Tensor]:
    """Random token ids int64 [batch, seq] and a mask of ones: nothing is padding, and the model is not told so.

    No mask on a GPU: the models read its values on the host, and then their forward cannot be captured in a graph.
    `padded`: sequences of the lengths of `spread_lengths`, with padding on the right and a mask on any device.
    """
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(5, VOCAB_SIZE, (batch, seq), generator=generator).to(device.place)
    mask = torch.ones_like(ids)
    if padded:
        mask = (torch.arange(seq) < torch.tensor(spread_lengths(batch, seq))[:, None]).long().to(device.place)
    elif device.place.type != "cpu":
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": mask}


def traits(peer: str, dtype: torch.dtype, device: Device) -> dict[str, str]:
    """`isa` and `backend` of a peer's kernels: torch's own, or those that hbert_kernels chooses for this dtype."""
    if peer in PEERS:
        return torch_traits(device)
    probe = torch.empty(1, SIZES["base"]["hidden_size"], dtype=dtype, device=device.place)
    used = {chosen_backend(hbert_kernels.explain(op, probe)) for op in hbert_kernels.OPS}
    return hbert_traits(device, "+".join(sorted(used)))
