"""The modules: drop-in LayerNorm, the sub-layer-norm blocks and AdditiveAttention."""

import copy
import io
import pickle

import pytest
import torch
from ops import formulas
from ops.checks import FLOAT64_BOUND, assert_equal_to_rounding, cu_of, randn
from torch import nn
from torch.nn import functional as F

import hbert_kernels as hk
from hbert_kernels import nn as hnn
from hbert_kernels._accuracy import evaluate


@pytest.fixture(autouse=True)
def one_thread():
    """Loops over tiny tensors only wait for a second thread."""
    torch.set_num_threads(1)


def randomized(module):
    """The module in float64 with random parameters everywhere, so that no weight is 1 and no bias 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1) * 0.5)
    return module.double()


def evaluate_module(function, module, *inputs):
    """Outputs and gradients of inputs and parameters."""

    def call(*leaves):
        parameters = dict(zip([n for n, _ in module.named_parameters()], leaves[len(inputs) :], strict=True))
        return function(parameters, *leaves[: len(inputs)])

    return evaluate(call, [*inputs, *module.parameters()])


def assert_module_is(module, formula, *inputs, bound=FLOAT64_BOUND):
    """``module(*inputs)`` and all its gradients are those of ``formula(parameters, *inputs)``."""

    def run(parameters, *tensors):
        return torch.func.functional_call(module, parameters, tensors)

    actual, expected = (evaluate_module(function, module, *inputs) for function in (run, formula))
    assert_equal_to_rounding(actual, expected, bound)


# ---- LayerNorm, AddLayerNorm, ActivationLayerNorm, ConvLayerNorm, SubLNFeedForward

LAYER_NORMS = [
    ((64,), {}),
    ((64,), {"eps": 1e-12}),
    (([3, 20],), {}),
    (([2, 3, 4],), {"bias": False}),
    ((7,), {"bias": False}),
    ((7,), {"elementwise_affine": False}),
    (([3, 20],), {"elementwise_affine": False}),
    ((64,), {"dtype": torch.float64}),
]


@pytest.mark.parametrize(("arguments", "options"), LAYER_NORMS, ids=str)
def test_layer_norm_is_a_drop_in(arguments, options):
    ours, theirs = hnn.LayerNorm(*arguments, **options), nn.LayerNorm(*arguments, **options)
    assert isinstance(ours, nn.LayerNorm)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    theirs.load_state_dict(randomized(ours).state_dict())
    for leading in [(), (5,), (2, 1, 3), (0,)]:
        x = randn(*leading, *theirs.normalized_shape)
        expected = evaluate_module(lambda p, x: torch.func.functional_call(theirs, p, (x,)), theirs.double(), x)
        actual = evaluate_module(lambda p, x: torch.func.functional_call(ours, p, (x,)), ours, x)
        assert_equal_to_rounding(actual, expected)


@pytest.mark.parametrize("shape", [(64,), (3, 20)], ids=str)
def test_layer_norm_has_the_bits_of_torch_on_the_reference_path(shape):
    ours, theirs, x = hnn.LayerNorm(shape), nn.LayerNorm(shape), torch.randn(37, *shape)
    with hk.use_backend("reference"):
        assert torch.equal(ours(x), theirs(x))


def test_layer_norm_of_a_strided_input():
    norm = randomized(hnn.LayerNorm([3, 20]))
    x = randn(20, 3, 5).permute(2, 1, 0)
    expected = F.layer_norm(x, [3, 20], norm.weight, norm.bias)
    assert_equal_to_rounding({"y": norm(x).detach()}, {"y": expected.detach()})


@pytest.mark.parametrize(("normalized", "shape"), [((64,), (5, 63)), ((3, 20), (60,)), ((3, 20), (5, 20, 3))], ids=str)
def test_layer_norm_refuses_other_shapes(normalized, shape):
    with pytest.raises(ValueError, match=r"LayerNorm: expected an input \[\*, .*got shape"):
        hnn.LayerNorm(normalized)(torch.randn(shape))


def test_add_layer_norm():
    norm = randomized(hnn.AddLayerNorm(40, eps=1e-3))
    assert_module_is(
        norm,
        lambda p, x, r: formulas.add_layer_norm(x, r, p["weight"], p["bias"], 1e-3),
        randn(2, 7, 40),
        randn(2, 7, 40),
    )
    x = randn(2, 7, 40)
    assert_module_is(norm, lambda p, x: (formulas.layer_norm(x, p["weight"], p["bias"], 1e-3), x), x)
    assert list(norm.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_activation_layer_norm(activation):
    norm = randomized(hnn.ActivationLayerNorm(40, eps=1e-3, activation=activation))
    assert_module_is(
        norm,
        lambda p, x: formulas.activation_layer_norm(x, p["weight"], p["bias"], 1e-3, activation=activation),
        randn(2, 7, 40),
    )
    assert repr(norm).startswith("ActivationLayerNorm((40,), eps=0.001") and f"activation='{activation}'" in repr(norm)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_conv_layer_norm(kernel_size):
    norm = randomized(hnn.ConvLayerNorm(40, kernel_size, 1e-3))

    def formula(p, x, cu):
        return formulas.conv_layer_norm(x, p["weight"], p["bias"], p["conv_weight"], cu, 1e-3)

    assert_module_is(norm, formula, randn(15, 40), cu_of([5, 0, 1, 7]))
    assert f"kernel_size={kernel_size}" in repr(norm)


def test_conv_layer_norm_starts_as_conv1d_would():
    torch.manual_seed(3)
    ours = hnn.ConvLayerNorm(4000, 3)
    reference = nn.Conv1d(4000, 4000, 3, groups=4000, bias=False).weight
    assert ours.conv_weight.shape == (3, 4000)
    bound = 3**-0.5  # fan-in of a depthwise convolution is k
    assert float(reference.detach().abs().max()) <= bound
    assert 0.99 * bound < float(ours.conv_weight.detach().abs().max()) <= bound
    assert abs(float((ours.conv_weight.std() / reference.std()).detach()) - 1) < 0.05
    assert torch.equal(ours.weight, torch.ones(4000)) and torch.equal(ours.bias, torch.zeros(4000))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_sub_ln_feed_forward(activation):
    module = randomized(hnn.SubLNFeedForward(24, 50, activation=activation, eps=1e-3))

    def formula(p, x):
        hidden = F.linear(x, p["fc1.weight"], p["fc1.bias"])
        normed = formulas.activation_layer_norm(hidden, p["norm.weight"], p["norm.bias"], 1e-3, activation=activation)
        return F.linear(normed, p["fc2.weight"], p["fc2.bias"])

    assert_module_is(module, formula, randn(2, 7, 24))
    assert list(dict(module.named_children())) == ["fc1", "norm", "fc2"]


def test_sub_ln_feed_forward_starts_as_linears_do():
    torch.manual_seed(3)
    module = hnn.SubLNFeedForward(24, 50)
    torch.manual_seed(3)
    for ours, theirs in zip((module.fc1, module.fc2), (nn.Linear(24, 50), nn.Linear(50, 24)), strict=True):
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


# ---- AdditiveAttention

HIDDEN, HEADS = 24, 4
each_scorer = pytest.mark.parametrize("scorer", ["dense", "per_head"])
each_sub_norm = pytest.mark.parametrize("sub_norm", [True, False])
MASKS = {  # True = padding
    "right": [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]],
    "left": [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]],
    "holes": [[0, 1, 0, 1, 0], [1, 0, 1, 0, 1], [0, 0, 1, 0, 0]],
    "empty rows": [[1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]],
    "nothing valid": [[1, 1, 1, 1, 1]] * 3,
    "no padding": [[0, 0, 0, 0, 0]] * 3,
}
each_mask = pytest.mark.parametrize("mask", [torch.tensor(m).bool() for m in MASKS.values()], ids=MASKS)


def additive(scorer="dense", sub_norm=True, **options):
    return randomized(hnn.AdditiveAttention(HIDDEN, HEADS, scorer=scorer, sub_norm=sub_norm, **options))


def fastformer(p, x, mask, eps=1e-12):
    """Official equations, one row of the batch at a time on its valid tokens; zeros at padding."""
    rows = []
    for row, padding in zip(x, mask, strict=True):
        tokens = row[~padding]
        query = F.linear(tokens, p["query.weight"], p["query.bias"])
        options = {name: p.get(f"{name[:-5]}.bias") for name in ("query_att_bias", "key_att_bias")}
        mixed = formulas.additive_attention(
            query, tokens, p["query_att.weight"], p["key.weight"], p["key.bias"], p["key_att.weight"],
            cu_of([len(tokens)]), len(tokens), HEADS, norm_weight=p.get("norm.weight"), norm_bias=p.get("norm.bias"),
            sub_norm="norm.weight" in p, eps=eps, **options,
        )  # fmt: skip
        out = F.linear(mixed, p["transform.weight"], p["transform.bias"]) + query
        rows.append(torch.zeros_like(row).masked_scatter(~padding[:, None], out))
    return torch.stack(rows)


@each_mask
@each_sub_norm
@each_scorer
def test_additive_attention_is_fastformer(scorer, sub_norm, mask):
    module = additive(scorer, sub_norm, eps=1e-3)
    x = randn(3, 5, HIDDEN)
    assert_module_is(module, lambda p, x, mask: fastformer(p, x, mask, 1e-3), x, mask, bound=10 * FLOAT64_BOUND)
    assert not module(x, mask)[mask].any()


@each_scorer
def test_long_rows_take_the_other_form(scorer):
    module = additive(scorer)
    x, mask = randn(2, 70, HIDDEN), torch.arange(70) >= torch.tensor([[70], [41]])
    assert_module_is(module, fastformer, x, mask, bound=10 * FLOAT64_BOUND)


@each_sub_norm
def test_no_mask_is_a_mask_without_padding(sub_norm):
    module, x = additive(sub_norm=sub_norm), randn(3, 5, HIDDEN)
    assert torch.equal(module(x), module(x, torch.zeros(3, 5, dtype=torch.bool)))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty_batches(shape):
    module, x = additive(), randn(*shape, HIDDEN).requires_grad_()
    for mask in (None, torch.zeros(shape, dtype=torch.bool)):
        out = module(x, mask)
        assert out.shape == (*shape, HIDDEN)
        gradients = torch.autograd.grad(out.sum(), [x, *module.parameters()])
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@each_mask
@each_scorer
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_garbage_under_the_mask_changes_no_bit(mask, scorer, garbage):
    module, x = additive(scorer), randn(3, 5, HIDDEN)
    dirty = torch.where(mask[..., None], garbage, x)
    run = [
        evaluate_module(lambda p, x: torch.func.functional_call(module, p, (x, mask)), module, i) for i in (x, dirty)
    ]
    for name, clean in run[0].items():
        assert clean.isfinite().all()
        assert torch.equal(run[1][name], clean), name
    assert not run[1]["gradient 0"][mask].any()


@each_mask
def test_a_row_alone_is_a_row_of_a_batch(mask):
    module, x = additive(), randn(3, 5, HIDDEN)
    alone = torch.cat([module(x[b : b + 1], mask[b : b + 1]) for b in range(3)])
    assert_equal_to_rounding({"out": alone.detach()}, {"out": module(x, mask).detach()})


def test_forward_packed_is_forward():
    module, x, mask = additive(), randn(3, 5, HIDDEN), torch.tensor(MASKS["holes"]).bool()
    packing = hk.Packing.from_mask(~mask)
    out = module.forward_packed(packing.pack(x), packing.cu_seqlens, packing.max_seqlen)
    assert torch.equal(packing.unpack(out), module(x, mask))


@each_sub_norm
@each_scorer
def test_names_and_shapes_of_the_parameters(scorer, sub_norm):
    columns, biases = (HIDDEN, True) if scorer == "dense" else (HIDDEN // HEADS, False)
    expected = {
        "query.weight": (HIDDEN, HIDDEN),
        "query.bias": (HIDDEN,),
        "query_att.weight": (HEADS, columns),
        **({"query_att.bias": (HEADS,)} if biases else {}),
        "key.weight": (HIDDEN, HIDDEN),
        "key.bias": (HIDDEN,),
        "key_att.weight": (HEADS, columns),
        **({"key_att.bias": (HEADS,)} if biases else {}),
        **({"norm.weight": (HIDDEN,), "norm.bias": (HIDDEN,)} if sub_norm else {}),
        "transform.weight": (HIDDEN, HIDDEN),
        "transform.bias": (HIDDEN,),
    }
    assert {n: tuple(p.shape) for n, p in additive(scorer, sub_norm).state_dict().items()} == expected


@each_scorer
def test_additive_attention_starts_as_linears_do(scorer):
    torch.manual_seed(3)
    module = hnn.AdditiveAttention(HIDDEN, HEADS, scorer=scorer)
    torch.manual_seed(3)
    for name in ("query", "query_att", "key", "key_att", "transform"):
        ours = getattr(module, name)
        if isinstance(ours, nn.Linear):
            theirs = nn.Linear(ours.in_features, ours.out_features)
            assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
        else:
            bound = (HIDDEN // HEADS) ** -0.5
            assert torch.equal(ours.weight, torch.empty(HEADS, HIDDEN // HEADS).uniform_(-bound, bound))


@each_scorer
def test_every_parameter_gets_a_gradient(scorer):
    module = additive(scorer)
    module(randn(2, 5, HIDDEN)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        constant = name in ("query_att.bias", "key_att.bias")
        assert bool(parameter.grad.any()) != constant, name


@pytest.mark.parametrize(("scorer", "masked"), [("dense", True), ("per_head", False)])
def test_compiles(scorer, masked):
    torch._dynamo.reset()
    module = additive(scorer)
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    for shape in [(2, 5), (3, 40)]:
        x, mask = randn(*shape, HIDDEN), (torch.rand(shape) < 0.4 if masked else None)
        if masked:
            mask[0] = True
        values = [evaluate(lambda x, call=call, mask=mask: call(x, mask), [x]) for call in (module, compiled)]
        assert_equal_to_rounding(values[1], values[0])


def test_autocast():
    module, x = hnn.AdditiveAttention(HIDDEN, HEADS), torch.randn(2, 5, HIDDEN)
    exact = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert float(((out.float() - exact).norm() / exact.norm()).detach()) < 2**-6  # a few roundings to 8 bits each
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


@each_sub_norm
@each_scorer
def test_copies(scorer, sub_norm):
    module, x = additive(scorer, sub_norm), randn(2, 5, HIDDEN)
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    loaded = hnn.AdditiveAttention(HIDDEN, HEADS, scorer=scorer, sub_norm=sub_norm, dtype=torch.float64)
    loaded.load_state_dict(torch.load(saved))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x), module(x))


@pytest.mark.parametrize(
    ("shape", "mask", "error", "message"),
    [
        ((2, 8), None, ValueError, r"x must be \[B, N, 24\], got \(2, 8\)"),
        ((2, 5, 23), None, ValueError, r"x must be \[B, N, 24\], got \(2, 5, 23\)"),
        ((2, 5, 24), torch.zeros(2, 5), TypeError, "key_padding_mask must be bool, got torch.float32"),
        ((2, 5, 24), torch.zeros(2, 5, dtype=torch.int64), TypeError, "key_padding_mask must be bool, got torch.int64"),
        ((2, 5, 24), torch.zeros(5, 2).bool(), ValueError, r"must have shape \(2, 5\), got \(5, 2\)"),
        ((2, 5, 24), torch.zeros(2, 1, 5).bool(), ValueError, r"must have shape \(2, 5\), got \(2, 1, 5\)"),
    ],
)
def test_bad_calls(shape, mask, error, message):
    with pytest.raises(error, match=f"AdditiveAttention: .*{message}"):
        additive()(randn(*shape), mask)


def test_float16_is_for_gpus():
    with pytest.raises(TypeError, match="float16 is for GPUs"):
        hnn.LayerNorm(8).half()(torch.randn(2, 8).half())
    with pytest.raises(TypeError, match="float16 is for GPUs"):
        additive().half()(randn(2, 5, HIDDEN).half())
