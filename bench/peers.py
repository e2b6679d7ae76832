"""How each named model of torch is built, and what all workers with torch have in common."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, BertForMaskedLM, BertModel

import hbert_kernels
from bench.device import Device
from bench.lengths import buckets, spread_lengths
from bench.names import HBERTS, LOADED, OPTIMIZE, PATCHED, TORCH_PEERS, fixed_dtype
from bench.runtime import DTYPES, SEED, chosen_backend, hbert_traits, torch_traits
from hbert import HBertConfig, HBertForMaskedLM, HBertModel, optimize
from hbert.patching import is_patched, patch, unpatch

VOCAB_SIZE = 30522
FROZEN = ("hf-compile-freeze", "torchao-int8")  # compiled with their weights as constants
POSITIONS = 512  # of a model with random weights; more where a case has longer sequences

Dimensions = dict[str, Any]
Inputs = dict[str, torch.Tensor]
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


_HBERT_BUILDERS: dict[str, Callable[[str, Dimensions], nn.Module]] = {
    name: partial(_hbert, name.removeprefix("hbert-").replace("-", "_")) for name in HBERTS
}


def source(peer: str, head: str, size: str, seq: int = POSITIONS) -> Any:
    """The fp32 model of a peer as its users build it, with random weights, the same at every call.

    `head` is "encoder" or "masked_lm"; a `size` that is none of `SIZES` is the folder of a checkpoint.
    """
    if size not in SIZES:
        return _loaded(peer, size)
    torch.manual_seed(SEED)
    build_one = _HBERT_BUILDERS.get(peer.removesuffix(OPTIMIZE), _bert)
    return build_one(head, {**SIZES[size], "max_position_embeddings": max(POSITIONS, seq)})


def _loaded(peer: str, folder: str) -> Any:
    ours = AutoConfig.from_pretrained(folder).model_type == "hbert"
    if ours != (peer.removesuffix(OPTIMIZE) == LOADED):
        raise ValueError(f"{Path(folder).name} is {'an' if ours else 'no'} HBERT: {peer} cannot be had of it")
    return AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def build(peer: str, head: str, size: str, seq: int = POSITIONS) -> Any:
    """The fp32 model of a peer (`source`), patched where it is the patched one."""
    model = source(peer, head, size, seq)
    if peer == PATCHED:
        patch(model)
    return model


def serving(peer: str, model: Any, case_dtype: str, device: Device) -> Any:
    """The encoder in the form that is timed: converted, quantized, compiled or optimized, as the name says."""
    model = model.eval()
    if peer.endswith(OPTIMIZE):
        return _optimized(model, case_dtype)
    model.to(device.place, DTYPES[dtype_name(peer, case_dtype, default="fp32")])
    if peer == "torchao-int8":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return compiled(peer, model)


def _optimized(model: Any, dtype: str) -> Any:
    """From a folder, as a server has it and as the other runtimes get theirs."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return optimize(folder, dtype)


def dtype_name(peer: str, case_dtype: str, default: str | None = None) -> str:
    """The name of the dtype that a peer computes in: its own, or the case's. `default`: instead of int8."""
    name = fixed_dtype(peer) or case_dtype
    return default if default is not None and name == "int8" else name


def compiled(peer: str, model: nn.Module) -> Any:
    """What is called: the model itself, or its torch.compile, with weights as constants where they do not train.

    The compiled one raises where dynamo would go on without compiling.
    """
    if peer not in (*FROZEN, "hf-compile"):
        return model
    # Not "import torch...": that would make torch a name of this function.
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    dynamo.fail_on_recompile_limit_hit = True
    if peer in FROZEN:
        inductor.freezing = True
    return torch.compile(model, dynamic=False)


def dense_copy(model: Any, dtype: torch.dtype) -> Any:
    """A copy with the same weights in `dtype` that computes attention in plain torch: the oracle of the gate."""
    double = copy.deepcopy(model).to(dtype)
    if is_patched(double):
        unpatch(double)
    double.set_attn_implementation("eager")
    return double


def batches(batch: int, seq: int, device: Device, params: dict[str, Any], vocab: int, together: bool) -> list[Inputs]:
    """The calls of a case: one, or of a padded case in `params["buckets"]` parts by length, unless `together`."""
    whole = ids_and_mask(batch, seq, device, params.get("padded", False), vocab)
    if together or "buckets" not in params:
        return [whole]
    parts = buckets(spread_lengths(batch, seq), params["buckets"])
    return [{name: value[rows, :longest].contiguous() for name, value in whole.items()} for rows, longest in parts]


def ids_and_mask(batch: int, seq: int, device: Device, padded: bool = False, vocab: int = VOCAB_SIZE) -> Inputs:
    """Random token ids int64 [batch, seq] and a mask of ones: nothing is padding, and the model is not told so.

    No mask on a GPU: the models read its values on the host, and then their forward cannot be captured in a graph.
    `padded`: sequences of the lengths of `spread_lengths`, with padding on the right and a mask on any device.
    """
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(5, vocab, (batch, seq), generator=generator).to(device.place)
    mask = torch.ones_like(ids)
    if padded:
        mask = (torch.arange(seq) < torch.tensor(spread_lengths(batch, seq))[:, None]).long().to(device.place)
    elif device.place.type != "cpu":
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": mask}


def traits(peer: str, dtype: torch.dtype, device: Device) -> dict[str, str]:
    """`isa` and `backend` of a peer's kernels: torch's own, or those that hbert_kernels chooses for this dtype."""
    if peer in TORCH_PEERS:
        quantized = {"backend": f"torchao {version('torchao')}"} if peer == "torchao-int8" else {}
        return {**torch_traits(device), **quantized}
    probe = torch.empty(1, SIZES["base"]["hidden_size"], dtype=dtype, device=device.place)
    used = {chosen_backend(hbert_kernels.explain(op, probe)) for op in hbert_kernels.OPS}
    return hbert_traits(device, "+".join(sorted(used)))
