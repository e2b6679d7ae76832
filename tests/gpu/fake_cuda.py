"""Runs ops and models on fake CUDA tensors and prints, as JSON, which operators each of them reached.

A program of its own, because it gives a torch without CUDA an empty device guard (argv[1]: the compiled
fake_cuda_guard.cpp), which cannot be taken back.
"""

import ctypes
import json
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ctypes.CDLL(sys.argv[1])

import hbert_kernels as hk  # noqa: E402
from hbert import HBertConfig, HBertForMaskedLM  # noqa: E402

WIDTH, HEADS, ROWS = 64, 4, 32


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(str(operator).removesuffix(".default"))
        return operator(*args, **(kwargs or {}))


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_()


def calls():
    """Every public op on packed tokens."""
    x, qkv, gate, scorer = leaf(ROWS, WIDTH), leaf(ROWS, 3 * WIDTH), leaf(2, WIDTH), leaf(HEADS, WIDTH)
    square, cu = leaf(WIDTH, WIDTH), torch.tensor([0, 20, ROWS], dtype=torch.int32)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    return {
        "layer_norm": lambda: hk.layer_norm(x),
        "add_layer_norm": lambda: hk.add_layer_norm(x, x)[0],
        "conv_layer_norm": lambda: hk.conv_layer_norm(x, None, None, leaf(3, WIDTH), cu),
        "activation_layer_norm": lambda: hk.activation_layer_norm(x),
        "gated_layer_norm": lambda: hk.gated_layer_norm(x, gate, cu),
        "additive_pool": lambda: hk.additive_pool(x, scorer, cu, 20, HEADS),
        "additive_attention": lambda: hk.additive_attention(x, x, scorer, square, None, scorer, cu, 20, HEADS),
        "attention": lambda: hk.attention(qkv, cu, 20, HEADS),
        "masked_lm_loss": lambda: hk.masked_lm_loss(x, square, None, labels)[0],
    }


def train(arch):
    """The loss of a masked language model.

    Not by its own forward: an eager model asks the device where the masked tokens are, and a fake one cannot say.
    """
    torch.set_default_dtype(torch.bfloat16)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": HEADS, "intermediate_size": 128}
    model = HBertForMaskedLM(getattr(HBertConfig, arch)(vocab_size=100, **sizes))
    torch.set_default_dtype(torch.float32)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    hidden = model.head.transform(model.hbert(ids).last_hidden_state.flatten(0, 1))
    decoder = model.head.decoder
    return hk.masked_lm_loss(hidden, decoder.weight, decoder.bias, ids.flatten())[0]


def differentiate(node, gradients):
    """The gradients that a node sends along its edges, and these edges."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        given = [
            torch.zeros(of.shape, dtype=of.dtype) if gradient is None else gradient
            for gradient, of in zip(gradients, node._input_metadata, strict=True)
        ]
        sent = node.apply(*given)
        sent = sent if isinstance(sent, tuple) else (sent,)
        wanted = [gradient for gradient, needs in zip(sent, node.needs_input_grad, strict=True) if needs]
        return wanted, [edge for edge in node.next_functions if edge[0] is not None]
    sent = node(*gradients)
    return sent if isinstance(sent, tuple) else (sent,), node.next_functions


def backward(loss):
    """Walks the graph as autograd's engine does; that one insists on a real device."""
    waiting = {loss.grad_fn: [torch.ones_like(loss)]}
    while waiting:
        node = max(waiting, key=lambda each: each._sequence_nr())
        for gradient, (following, index) in zip(*differentiate(node, waiting.pop(node)), strict=True):
            if following is None or gradient is None or following.name() == "torch::autograd::AccumulateGrad":
                continue
            expected = following._input_metadata
            gradient = gradient.sum_to_size(expected[index].shape)
            slots = waiting.setdefault(following, [None] * len(expected))
            slots[index] = gradient if slots[index] is None else slots[index] + gradient


def reached(function):
    with Recorder() as recorder:
        backward(function().sum())
    return sorted(recorder.names)


with FakeTensorMode(), torch.device("cuda"):
    report = {name: reached(call) for name, call in calls().items()}
    report |= {arch: reached(lambda arch=arch: train(arch)) for arch in sys.argv[2:]}
print(json.dumps(report))
