"""How the modules are made: devices, dtypes, first values, what is refused."""

import pytest
import torch

from hbert_kernels import nn as hnn


@pytest.mark.parametrize(
    "build",
    [
        lambda **where: hnn.ConvLayerNorm(40, 3, **where),
        lambda **where: hnn.SubLNFeedForward(24, 50, **where),
        lambda **where: hnn.AdditiveAttention(24, 3, scorer="per_head", **where),
    ],
)
def test_modules_of_the_meta_device_can_be_initialized(build):
    torch.manual_seed(3)
    expected = build()
    module = build(device="meta").to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.detach().fill_(torch.nan)
    torch.manual_seed(3)
    for part in module.modules():
        if [*part.parameters(recurse=False)]:
            part.reset_parameters()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


def test_device_and_dtype_of_new_modules():
    modules = [
        hnn.AdditiveAttention(8, 2, scorer="per_head", device="meta", dtype=torch.bfloat16),
        hnn.AdditiveAttention(8, 2, device="meta", dtype=torch.bfloat16),
        hnn.SubLNFeedForward(8, 16, device="meta", dtype=torch.bfloat16),
        hnn.ConvLayerNorm(8, 3, device="meta", dtype=torch.bfloat16),
        hnn.AddLayerNorm(8, device="meta", dtype=torch.bfloat16),
    ]
    for parameter in (p for module in modules for p in module.parameters()):
        assert (parameter.device.type, parameter.dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: hnn.AdditiveAttention(8, 3), "hidden_size 8 is not divisible by num_heads 3"),
        (lambda: hnn.AdditiveAttention(8, 0), "hidden_size 8 is not divisible by num_heads 0"),
        (lambda: hnn.AdditiveAttention(8, 2, scorer="linear"), "unknown scorer 'linear'; allowed: dense, per_head"),
        (lambda: hnn.ConvLayerNorm(8, 2), "kernel_size must be a positive odd number, got 2"),
        (lambda: hnn.ConvLayerNorm(8, -1), "kernel_size must be a positive odd number, got -1"),
        (lambda: hnn.ActivationLayerNorm(8, activation="silu"), "unknown activation 'silu'; allowed: gelu"),
        (lambda: hnn.SubLNFeedForward(8, 8, activation="silu"), "unknown activation 'silu'; allowed: gelu"),
    ],
)
def test_bad_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()
