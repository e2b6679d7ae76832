"""On CUDA tensors every op, and every model made of them, reaches the GPU's kernels and never the reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hbert_kernels as hk
from hbert_kernels import _dispatch, _gpu
from hbert_kernels.gpu import attention as gpu_attention

HERE = Path(__file__).parent
MODELS = ("v1", "v2c", "additive_c", "vanilla")
READS_OF_THE_DEVICE = {"aten._local_scalar_dense", "aten.nonzero", "aten.item", "aten.equal"}


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """The device guard of fake_cuda_guard.cpp, compiled."""
    library, root = tmp_path_factory.mktemp("guard") / "guard.so", Path(torch.__file__).parent
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-shared", "-fPIC", HERE / "fake_cuda_guard.cpp"]
    subprocess.run([*command, "-I", root / "include", "-L", root / "lib", "-lc10", "-o", library], check=True)
    return library


def operators(guard, *models, backend="auto"):
    """The operators that each call of fake_cuda.py reached."""
    done = subprocess.run(
        [sys.executable, HERE / "fake_cuda.py", guard, *models],
        env=os.environ | {"HBERT_BACKEND": backend, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {name: set(names) for name, names in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def reached(guard):
    return operators(guard, *MODELS)


def expected(op):
    return {f"hbert_kernels.{name}" for name in _gpu.operators(op)}


def kernels(names):
    return {name for name in names if name.startswith("hbert_kernels.")}


@pytest.mark.parametrize("op", hk.OPS)
def test_an_op_reaches_its_kernels_and_nothing_else_that_computes(reached, op):
    assert kernels(reached[op]) == expected(op)
    surroundings = {"expand", "ones_like", "sum", "detach", "_to_copy", "zeros", "randn", "mul_.Tensor"}
    assert reached[op] - expected(op) - {"prim.device"} <= {f"aten.{name}" for name in surroundings}


@pytest.mark.parametrize(
    "model, ops",
    {
        "v1": ["additive_attention", "attention"],
        "v2c": ["additive_attention", "attention", "conv_layer_norm", "layer_norm"],
        "additive_c": ["additive_attention", "conv_layer_norm"],
        "vanilla": ["attention", "layer_norm"],
    }.items(),
)
def test_a_model_reaches_the_kernels_forward_and_backward(reached, model, ops):
    everywhere = ["add_layer_norm", "activation_layer_norm", "masked_lm_loss"]
    wanted = set().union(*map(expected, [*ops, *everywhere]))
    assert wanted <= kernels(reached[model])
    assert not any("softmax" in name or "scaled_dot_product" in name for name in reached[model])


@pytest.mark.parametrize("call", (*hk.OPS, *MODELS))
def test_nothing_is_read_from_the_device(reached, call):
    assert not reached[call] & READS_OF_THE_DEVICE


def test_the_reference_would_have_been_noticed(guard):
    assert not any(map(kernels, operators(guard, backend="reference").values()))


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says that it is on a GPU."""

    is_cuda, is_cpu = True, False
    device = torch.device("cuda", 0)


def on_cuda(t):
    return t.as_subclass(OnCuda)


class Router:
    """A router whose backends only say that they were reached."""

    def __init__(self, monkeypatch, chosen):
        self.calls = []
        monkeypatch.setattr(_dispatch, "select", lambda op, *tensors: chosen)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(
            _gpu, "implementation", lambda *names: lambda *arguments: self.calls.append((*names, arguments))
        )


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_router_calls_the_chosen_backend(monkeypatch, backend):
    router = Router(monkeypatch, backend)
    tensor = type("OnCuda", (), {"device": torch.device("cuda", 0)})()
    _gpu.router("layer_norm", "layer_norm_backward")(tensor, 3)
    assert router.calls == [(backend, "layer_norm", "layer_norm_backward", (tensor, 3))]


def test_the_router_refuses_what_no_gpu_kernel_serves(monkeypatch):
    Router(monkeypatch, "reference")
    with pytest.raises(hk.BackendError, match="no GPU kernel can run: attention: "):
        _gpu.router("attention", "attention")(torch.zeros(1))


@pytest.fixture
def only_triton(monkeypatch):
    """As if on a GPU with Triton alone."""
    monkeypatch.setattr(_dispatch, "_fallbacks_told", set())
    monkeypatch.setattr(_gpu, "_HAS_TRITON", True)
    monkeypatch.setattr(_gpu._library, "cuda_load_failure", lambda: "not built: no CUDA compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_the_reference_requested_after_the_forward_pass_changes_nothing(only_triton, monkeypatch):
    reached = []
    monkeypatch.setattr(_gpu, "implementation", lambda *names: lambda *arguments: reached.append(names))
    with hk.use_backend("reference"):
        _gpu.router("layer_norm", "layer_norm_backward")(on_cuda(torch.zeros(4, 64)))
        with pytest.raises(hk.BackendError, match="no GPU kernel can run"):
            _gpu.router("layer_norm", "layer_norm_backward")(on_cuda(torch.zeros(4, 9000)))
    assert reached == [("triton", "layer_norm", "layer_norm_backward")]


@pytest.mark.parametrize(
    "width, heads, dtype, dropout, reason",
    [
        (3 * 64, 4, torch.bfloat16, 0.0, None),
        (3 * 64, 4, torch.float32, 0.0, "float16 or bfloat16, got torch.float32"),
        (3 * 36, 3, torch.float16, 0.0, "a multiple of 8 up to 256 numbers, got 12"),
        (3 * 512, 1, torch.float16, 0.0, "got 512"),
        (3 * 64, 4, torch.float16, 0.1, "dropout_p is 0.1"),
    ],
)
def test_flash_attention_takes_what_it_can(width, heads, dtype, dropout, reason):
    given = _gpu.attention_refusal(on_cuda(torch.empty(4, width, dtype=dtype)), dropout, heads)
    assert given is reason is None or reason in given


@pytest.mark.parametrize(
    "capability, built, hip, reason",
    [
        ((8, 0), True, None, None),
        ((12, 0), True, None, None),
        ((7, 5), True, None, "compute capability 8.0 and newer, this device has 7.5"),
        ((9, 0), False, None, "this torch is built without it"),
        ((7, 0), True, "7.0", None),
    ],
)
def test_flash_attention_runs_on_some_devices(monkeypatch, capability, built, hip, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(_gpu, "flash_refusal", _gpu.flash_refusal.__wrapped__)
    given = _gpu.attention_refusal(on_cuda(torch.empty(4, 3 * 64, dtype=torch.bfloat16)), 0.0, 4)
    assert given is reason is None or reason in given


def test_attention_of_no_sequences():
    qkv, cu_seqlens = torch.full((3, 48), torch.nan, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)
    results = gpu_attention.attention(qkv, cu_seqlens, 0, 2)
    gradient = gpu_attention.attention_backward(results[0], qkv, *results, cu_seqlens, 0, 2)
    meta = [t.to("meta") for t in (qkv, cu_seqlens)]
    fakes = torch.ops.hbert_kernels.attention(*meta, 0, 2)
    for given, expected in zip((*results, gradient), (*fakes, qkv), strict=True):
        assert (given.shape, given.dtype) == (expected.shape, expected.dtype)
        assert not given.any()


def test_flash_attention_is_given_dense_rows_and_bounds(monkeypatch):
    given = []

    def forward(*arguments):
        given.append(arguments[:5])
        return torch.zeros(arguments[0].shape), torch.zeros(2, 6)

    def backward(dout, *arguments):
        given.append((*arguments[:3], *arguments[5:7]))
        return [torch.zeros(t.shape) for t in arguments[:3]]

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    qkv, cu_seqlens = torch.randn(48, 6).t(), torch.tensor([[0, 9], [4, 9], [6, 9]], dtype=torch.int32)[:, 0]
    results = gpu_attention.attention(qkv, cu_seqlens, 4, 2)
    gpu_attention.attention_backward(results[0], qkv, *results, cu_seqlens, 4, 2)
    expected = *qkv.unflatten(1, (3, 2, 8)).unbind(1), cu_seqlens, cu_seqlens
    for tensors in given:
        assert all(torch.equal(t, e) and t.stride(-1) == 1 for t, e in zip(tensors, expected, strict=True))
    assert len(given) == 2


@pytest.mark.parametrize("backend, op", [(b, op) for b, ops in _gpu._IMPLEMENTATIONS.items() for op in ops])
def test_every_implementation_exists(backend, op):
    for name in _gpu.operators(op):
        assert callable(_gpu.implementation(backend, op, name))


@pytest.mark.parametrize(
    "capability, refused",
    [((8, 0), False), ((8, 9), False), ((9, 0), False), ((10, 3), False), ((12, 0), False), ((7, 5), True)],
)
def test_compiled_kernels_run_on_their_own_architectures_and_newer_ones(monkeypatch, capability, refused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(_gpu._library, "cuda_architectures", lambda: ["80", "90", "100"])
    reason = _gpu.architecture_refusal.__wrapped__(0)
    assert (reason is not None) == refused
    if refused:
        assert "compute capabilities 8.0, 9.0, 10.0 and newer, this device has 7.5" in reason


@pytest.mark.parametrize("kib, refused", [(163, False), (99, True)])
def test_the_triton_pool_needs_shared_memory(monkeypatch, kib, refused):
    properties = type("Properties", (), {"shared_memory_per_block_optin": kib << 10})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    reason = _gpu.pool_memory_refusal.__wrapped__(0)
    assert reason == ("needs 132 KiB of shared memory, this device has 99" if refused else None)


@pytest.mark.parametrize("op", ["additive_pool", "additive_attention"])
def test_a_graph_whose_pool_has_too_little_shared_memory_fails_with_the_reason(only_triton, monkeypatch, op):
    properties = type("Properties", (), {"shared_memory_per_block_optin": 99 << 10})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(_gpu, "pool_memory_refusal", _gpu.pool_memory_refusal.__wrapped__)
    with pytest.raises(hk.BackendError, match="triton: needs 132 KiB of shared memory, this device has 99"):
        _gpu.router(op, op)(on_cuda(torch.zeros(4, 64)))


@pytest.mark.parametrize(
    "refusal, shapes, reason",
    [
        ("_triton_rows", [(4, 8192)], None),
        ("_triton_rows", [(4, 8193)], "at most 8192 wide"),
        ("_triton_conv", [(4, 4096), (4096,), (4096,), (5, 4096)], None),
        ("_triton_conv", [(4, 4097), (4097,), (4097,), (3, 4097)], "got 4097 and 3"),
        ("_triton_pool", [(4, 1024), (64, 1024)], None),
        ("_triton_pool", [(4, 1032), (12, 1032)], "at most 1024 wide"),
        ("_triton_pool", [(4, 768), (4, 768), (96, 768)], "at most 64 heads"),
        ("_cuda_rows", [(4, 4096)], None),
        ("_cuda_rows", [(4, 4097)], "at most 4096 wide"),
        ("_cuda_pool", [(4, 4096), (64, 4096)], None),
        ("_cuda_pool", [(4, 768), (65, 768)], "at most 64 heads"),
    ],
)
def test_kernels_say_what_is_too_large(monkeypatch, refusal, shapes, reason):
    monkeypatch.setattr(_gpu._library, "cuda_load_failure", lambda: None)
    given = getattr(_gpu, refusal)(*(on_cuda(torch.empty(shape)) for shape in shapes))
    assert given is reason is None or reason in given
