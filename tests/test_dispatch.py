"""Backend choice: reasons, explicit requests, the one warning of a fallback."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

import hbert_kernels as hk
from hbert_kernels import _dispatch, _library, selftest

CU, TAPS, SQUARE = torch.tensor([0, 4], dtype=torch.int32), torch.randn(3, 8), torch.randn(8, 8)
# Every op as a function of its activations [4, 8].
CALLS = {
    "layer_norm": hk.layer_norm,
    "add_layer_norm": lambda x: hk.add_layer_norm(x, x)[0],
    "conv_layer_norm": lambda x: hk.conv_layer_norm(x, None, None, TAPS, CU),
    "activation_layer_norm": hk.activation_layer_norm,
    "gated_layer_norm": lambda x: hk.gated_layer_norm(x, SQUARE[:1], CU),
    "additive_pool": lambda x: hk.additive_pool(x, SQUARE[:2], CU, 4, 2),
    "additive_attention": lambda x: hk.additive_attention(x, x, SQUARE[:2], SQUARE, None, SQUARE[:2], CU, 4, 2),
    "attention": lambda x: hk.attention(x.repeat(1, 3), CU, 4, 2),
    "masked_lm_loss": lambda x: hk.masked_lm_loss(x, SQUARE, None, torch.arange(4))[0],
}
each_op = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture
def without_library(monkeypatch):
    """As if nothing had been compiled."""
    monkeypatch.setattr(_library, "load_failure", lambda: "not built: no C++ compiler (fix: install one)")
    monkeypatch.setattr(_dispatch, "_fallbacks_told", set())


def test_auto_takes_the_compiled_kernel_and_explains():
    x = torch.randn(2, 8)
    assert _dispatch.select("layer_norm", x) == "cpp"
    text = hk.explain("layer_norm", x)
    assert text.startswith("layer_norm: cpp runs")
    assert hk.cpu_capability() in text
    assert "triton: runs on CUDA and HIP devices, an input is on cpu" in text


def test_fallback_is_told_once_with_the_fix(without_library):
    x = torch.randn(2, 8)
    with pytest.warns(UserWarning, match="layer_norm runs on the reference path: cpp: not built: no C\\+\\+ compiler"):
        reference = hk.layer_norm(x)
    torch.testing.assert_close(reference, torch.nn.functional.layer_norm(x, (8,)))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hk.layer_norm(x)


def test_explicit_request_raises_with_every_reason(without_library):
    with pytest.raises(hk.BackendError) as error, hk.use_backend("cpp"):
        hk.layer_norm(torch.randn(2, 8))
    for part in ("'cpp' was requested", "not built: no C++ compiler", "triton: runs on CUDA and HIP devices"):
        assert part in str(error.value)


def test_a_kernel_that_does_not_exist_raises():
    with pytest.raises(hk.BackendError, match="cuda: no kernel is written for this op"), hk.use_backend("cuda"):
        CALLS["masked_lm_loss"](torch.randn(4, 8))


def test_every_op_is_covered():
    assert set(CALLS) == set(hk.OPS)


@each_op
def test_every_public_op_obeys_an_explicit_request(call):
    with pytest.raises(hk.BackendError), hk.use_backend("cuda"):
        call(torch.randn(4, 8))


@each_op
def test_without_gradients_the_same_bits_and_no_autograd(call, monkeypatch):
    x = torch.randn(4, 8)
    with hk.use_backend("cpp"):
        expected = call(x.clone().requires_grad_())
        monkeypatch.setattr(torch.autograd.Function, "apply", lambda *_: pytest.fail("autograd was called"))
        outputs = [call(x)]
        with torch.no_grad():
            outputs.append(call(x.requires_grad_()))
        with torch.inference_mode():
            outputs.append(call(x))
    assert expected.requires_grad
    assert all(torch.equal(output, expected) and not output.requires_grad for output in outputs)


@each_op
@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize(
    "transform",
    [
        lambda call, x: vmap(call)(x[None]),
        lambda call, x: grad(lambda y: call(y).sum())(x),
        lambda call, x: grad(lambda y: vmap(call)(y[None]).sum())(x),  # inside vmap no tensor requires a gradient
        lambda call, x: jvp(call, (x,), (x,)),
    ],
    ids=["vmap", "grad", "grad of vmap", "jvp"],
)
def test_functional_transforms_are_refused_not_ignored(call, transform, grad_mode):
    with hk.use_backend("cpp"), torch.set_grad_enabled(grad_mode), pytest.raises(RuntimeError, match="functorch"):
        transform(call, torch.randn(4, 8))


@each_op
@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_mode_is_refused_not_ignored(call, grad_mode):
    x = torch.randn(4, 8)
    with hk.use_backend("cpp"), torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="jvp"):
            call(forward_ad.make_dual(x, x))


def test_backends_nest_and_restore():
    assert _dispatch._requested == "auto"
    with hk.use_backend("cpp"):
        with hk.use_backend("reference"):
            assert _dispatch.select("layer_norm", torch.randn(1, 1)) == "reference"
        assert _dispatch._requested == "cpp"
    assert _dispatch._requested == "auto"


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown backend 'tpu'; allowed: auto, reference"), hk.use_backend("tpu"):
        pass
    with pytest.raises(ValueError, match="unknown op 'rms_norm'; known: layer_norm"):
        hk.explain("rms_norm")


def test_environment_variable_sets_the_backend():
    import os

    program = "import torch, hbert_kernels as hk; print(hk.explain('layer_norm', torch.ones(1, 1)))"
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"HBERT_BACKEND": "reference"}, capture_output=True, text=True
    )
    assert result.stdout.startswith("layer_norm: reference runs")
    assert "cpp: not requested" in result.stdout


def test_exported_programs_do_not_depend_on_the_library():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return hk.layer_norm(x)

    exported = torch.export.export(Norm(), (torch.randn(3, 8),))
    assert not [n for n in exported.graph.nodes if "hbert_kernels" in str(n.target)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", hk.OPS)
def test_fake_tensors_run_forward_and_backward(op, backend, monkeypatch):
    """They have shapes and no numbers: nothing may ask for cu_seqlens, labels or a gradient's value."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, hk.use_backend(backend):
        monkeypatch.setitem(globals(), "CU", mode.from_tensor(CU))
        x = mode.from_tensor(torch.randn(4, 8)).requires_grad_()
        CALLS[op](x).sum().backward()
        assert x.grad.shape == x.shape


def test_info_lists_every_op_and_the_build():
    from hbert_kernels.info import report

    text = report()
    for op in hk.OPS:
        assert f"{op}: " in text
    assert "CPU capability: " + hk.cpu_capability() in text


def test_selftest_fails_without_kernels(without_library, capsys):
    assert selftest.main([]) == 1
    assert "no kernel runs on cpu" in capsys.readouterr().out


def test_selftest_catches_a_wrong_kernel(monkeypatch, capsys):
    real = torch.ops.hbert_kernels

    def wrong(x, weight, bias, eps):
        y, mean, rstd = real.layer_norm(x, weight, bias, eps)
        return y * 1.001, mean, rstd

    class Ops:
        layer_norm = staticmethod(wrong)

        def __getattr__(self, name):
            return getattr(real, name)

    monkeypatch.setattr(torch.ops, "hbert_kernels", Ops())
    assert selftest.main([]) == 1
    assert "FAILED" in capsys.readouterr().out
