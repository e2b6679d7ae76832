"""The CUDA ops on CPU tensors with the signatures of the public functions, through binding and autograd.

The public functions themselves refuse float16 on a CPU.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from cuda_shim_build import torch_library

from hbert_kernels.ops.activation_layer_norm import ACTIVATIONS, _ActivationLayerNorm
from hbert_kernels.ops.additive_pool import _AdditivePool
from hbert_kernels.ops.gated_layer_norm import _GatedLayerNorm
from hbert_kernels.ops.layer_norm import _AddLayerNorm, _LayerNorm

NAMES = (
    "layer_norm", "add_layer_norm", "layer_norm_backward", "activation_layer_norm", "activation_layer_norm_backward",
    "gated_layer_norm", "gated_layer_norm_backward", "additive_pool", "additive_pool_backward",
)  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """The library, built and loaded."""
    path = str(torch_library())
    torch.ops.load_library(path)
    shim = ctypes.CDLL(path)
    shim.hbert_shim_seed.argtypes = [ctypes.c_uint64]
    shim.hbert_shim_launches.restype = ctypes.c_uint64
    return shim


def install(monkeypatch):
    """Let torch.ops.hbert_kernels be the CUDA ops."""
    library()
    for name in NAMES:
        monkeypatch.setattr(torch.ops.hbert_kernels, name, getattr(torch.ops.hbert_kernels_cuda, name))


def layer_norm(x, weight=None, bias=None, eps=1e-5):
    return _LayerNorm.apply(x, weight, bias, eps)


def add_layer_norm(x, residual, weight=None, bias=None, eps=1e-5):
    return _AddLayerNorm.apply(x, residual, weight, bias, eps)


def activation_layer_norm(x, weight=None, bias=None, eps=1e-5, *, activation="gelu", input_bias=None):
    return _ActivationLayerNorm.apply(x, weight, bias, eps, list(ACTIVATIONS).index(activation), input_bias)


def gated_layer_norm(x, gate, cu_seqlens, weight=None, bias=None, eps=1e-5):
    return _GatedLayerNorm.apply(x, gate.float(), cu_seqlens, weight, bias, eps)


def additive_pool(x, scorer, cu_seqlens, max_seqlen, num_heads, *, output="slice"):
    scale = (x.shape[1] // num_heads) ** -0.5
    return _AdditivePool.apply(x, scorer.float(), cu_seqlens, num_heads, output == "full", scale)
