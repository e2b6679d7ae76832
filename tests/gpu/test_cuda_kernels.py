"""The CUDA kernels and their torch binding on a CPU, through the shim: numbers by the policy, and all promises."""

from functools import partial

import cuda_ops
import pytest
import torch
from ops import checks, formulas, kernel_checks
from ops.checks import BF16, F32, RAGGED, cu_of, randn

from hbert_kernels.ops.layer_norm import layer_norm_reference

F16 = torch.float16
each_dtype = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
each_row_op = pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm", "gelu", "gelu_tanh", "relu"])
each_pool = pytest.mark.parametrize(
    ("scorer", "output"),
    [(s, o) for s in ("dense", "per_sequence", "per_head", "per_sequence_and_head") for o in ("slice", "full")],
)


@pytest.fixture(autouse=True)
def cuda_kernels(monkeypatch):
    """torch.ops.hbert_kernels are the CUDA ops; few tensors are large enough for two threads."""
    cuda_ops.install(monkeypatch)
    torch.set_num_threads(1)


def bind_rows(module, name):
    if name in ("layer_norm", "add_layer_norm"):
        return getattr(module, name)
    return lambda x, w, b, c: module.activation_layer_norm(x, w, b, activation=name, input_bias=c)


def of_rows(name, rows, width, mean=0.0):
    """The op, its formula and its inputs in float64."""
    inputs = [randn(rows, width) * 2 + mean for _ in range(1 + (name == "add_layer_norm"))]
    inputs += [*checks.affine(width), *([randn(width)] if "layer_norm" not in name else [])]
    return bind_rows(cuda_ops, name), bind_rows(formulas, name), inputs


def bind_gated(module, lengths):
    cu = cu_of(lengths)
    return lambda x, gate, weight, bias: module.gated_layer_norm(x, gate, cu, weight, bias)


def of_gated(lengths, width):
    inputs = [randn(sum(lengths), width), randn(len(lengths), width), *checks.affine(width)]
    return bind_gated(cuda_ops, lengths), bind_gated(formulas, lengths), inputs


def bind_pool(module, lengths, heads, output):
    cu = cu_of(lengths)
    return lambda x, scorer: module.additive_pool(x, scorer, cu, max(lengths, default=0), heads, output=output)


def pool_formula(lengths, heads, output):
    """The formula, for a scorer per sequence and head too: block-diagonal dense ones."""
    formula = bind_pool(formulas, lengths, heads, output)

    def widened(x, scorer):
        if scorer.dim() == 2 or scorer.shape[2] == x.shape[1]:
            return formula(x, scorer)
        return formula(x, torch.stack([torch.block_diag(*(v[None] for v in own)) for own in scorer]))

    return widened


def of_pool(lengths, width, heads, scorer, output, logits=1.0):
    columns = width // heads if "head" in scorer else width
    shape = (len(lengths), heads, columns) if "sequence" in scorer else (heads, columns)
    inputs = [randn(sum(lengths), width), randn(*shape, scale=logits * (width / heads / columns) ** 0.5)]
    return bind_pool(cuda_ops, lengths, heads, output), pool_formula(lengths, heads, output), inputs


def rounded(problem, dtype):
    op, _, inputs = problem
    return op, [t.to(dtype) for t in inputs]


@each_row_op
@each_dtype
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 1000), (37, 192), (130, 5), (9, 768)])
def test_row_norms_are_accurate(rows, width, dtype, name):
    activations = 2 if name == "add_layer_norm" else 1
    checks.assert_within_policy(lambda: of_rows(name, rows, width), dtype, activations=activations)


@each_dtype
@pytest.mark.parametrize(("lengths", "width"), [([1], 64), ([37, 2], 768), ([129, 1, 30], 60), (RAGGED, 1000)], ids=str)
def test_gated_layer_norm_is_accurate(lengths, width, dtype):
    checks.assert_within_policy(lambda: of_gated(lengths, width), dtype, F32, rowwise=False)


@each_pool
@each_dtype
@pytest.mark.parametrize(
    ("lengths", "width", "heads"), [([1], 64, 4), ([129, 1, 30], 96, 12), (RAGGED, 60, 5), ([65, 64], 264, 3)], ids=str
)
def test_pooling_is_accurate(lengths, width, heads, dtype, scorer, output):
    checks.assert_within_policy(lambda: of_pool(lengths, width, heads, scorer, output), dtype, F32, rowwise=False)


def test_pooling_at_base_size():
    checks.assert_within_policy(lambda: of_pool([40, 5], 768, 12, "dense", "full"), BF16, F32, rowwise=False)


@pytest.mark.gpu_full
@pytest.mark.parametrize("heads", [1, 2, 3, 6, 60])
def test_any_number_of_heads(heads):
    for scorer in ("dense", "per_head"):
        for output in ("slice", "full"):
            draw = partial(of_pool, [9, 0, 70], 60, heads, scorer, output)
            checks.assert_within_policy(draw, F32, rowwise=False)


@each_dtype
@pytest.mark.parametrize("residual", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("parameter", [F32, F16, BF16], ids=str)
def test_mixed_dtypes(dtype, residual, parameter):
    op, formula, (x, stream, weight, bias) = of_rows("add_layer_norm", 11, 72)

    def mixed(function):
        return lambda x, s, w, b: function(x, s.to(residual), w, b)

    inputs = [x, stream.to(residual).double(), weight, bias]
    checks.assert_within_policy(lambda: (mixed(op), mixed(formula), inputs), dtype, parameter, activations=2)
    y, total = mixed(op)(x.to(dtype), stream, weight.to(parameter), bias.to(parameter))
    assert (y.dtype, total.dtype) == (dtype, torch.promote_types(dtype, residual))


@pytest.mark.parametrize("present", [(), ("weight",), ("bias",)], ids=str)
def test_optional_parameters(present):
    def named(module, *tensors):
        x, given = tensors[0], dict(zip(present, tensors[1:], strict=True))
        return torch.cat([module.layer_norm(x, **given), module.activation_layer_norm(x, **given)])

    inputs = [randn(5, 40), *(randn(40) for _ in present)]
    checks.assert_within_policy(lambda: (lambda *t: named(cuda_ops, *t), lambda *t: named(formulas, *t), inputs), F32)


def test_a_large_mean_does_not_cancel():
    # Against torch's own layer norm, whose saved mean is rounded to float32 too.
    def reference(x, weight, bias):
        return layer_norm_reference(x, weight, bias, 1e-5)

    def draw():
        op, _, inputs = of_rows("layer_norm", 5, 768, mean=1e4)
        return op, reference, inputs

    checks.assert_within_policy(draw, F32)


@each_pool
def test_large_logits(scorer, output):
    # Rounding of the scores is all there is, so the worst error is a matter of luck unless there are many sequences.
    checks.assert_within_policy(lambda: of_pool([30, 1, 0, 20] * 12, 64, 4, scorer, output, 1e2), F32, rowwise=False)
    op, inputs = rounded(of_pool([70, 1, 0, 30], 64, 4, scorer, output, 1e4), F32)
    assert all(v.isfinite().all() for v in checks.evaluate(op, inputs).values())


def test_one_token_pools_to_itself_and_has_no_score_gradient():
    x, scorer = torch.randn(1, 64, requires_grad=True), torch.randn(4, 64, requires_grad=True)
    pooled = cuda_ops.additive_pool(x, scorer, cu_of([1]), 1, 4)
    assert torch.equal(pooled, x)
    pooled.square().sum().backward()
    assert torch.equal(scorer.grad, torch.zeros_like(scorer))


@pytest.mark.parametrize("width", [64, 72])
def test_unaligned_rows(width):
    _, _, inputs = of_gated([37, 0, 20], width)
    shifted = [torch.cat([t.new_zeros(1), t.flatten()]).to(BF16)[1:].view(t.shape) for t in inputs]
    op = bind_gated(cuda_ops, [37, 0, 20])
    assert shifted[0].data_ptr() % 16 != 0
    kernel_checks.assert_same_values(checks.evaluate(op, shifted), checks.evaluate(op, [t.clone() for t in shifted]))


def test_strides_do_not_matter():
    def strided(t):
        return t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], 1)[:, 0]

    pool = of_pool([5, 4], 40, 4, "dense", "full")
    for op, _, inputs in (of_rows("add_layer_norm", 9, 40), of_gated([5, 4], 40), pool):
        inputs = [t.float() for t in inputs]
        expected = checks.evaluate(op, inputs)
        actual = checks.evaluate(lambda *t, op=op: op(*map(strided, t)), inputs)
        kernel_checks.assert_same_values(actual, expected)


def test_dead_rows_are_inert():
    for op, inputs in (
        rounded(of_gated([5, 0, 20], 64), F32),
        rounded(of_pool([5, 0, 70], 64, 4, "dense", "slice"), F32),
        rounded(of_pool([5, 0, 70], 64, 4, "per_sequence", "full"), BF16),
    ):
        kernel_checks.assert_gradients_of_dead_rows_are_not_read(op, inputs)
    checks.assert_dead_rows_are_inert(*rounded(of_gated([5, 0, 20], 64), F32), 1)


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_no_tokens(lengths):
    for op, _, inputs in (of_gated(lengths, 64), of_pool(lengths, 64, 4, "per_sequence", "full")):
        values = checks.evaluate(op, [t.float() for t in inputs])
        assert all(torch.equal(v, torch.zeros_like(v)) for v in values.values())
    op, _, inputs = of_rows("gelu", 0, 64)
    for name, value in checks.evaluate(op, [t.float() for t in inputs]).items():
        assert torch.equal(value, torch.zeros_like(value)), name


LENGTHS = [70, 0, 1, 130, 64]


def test_neighbours_change_no_bit():
    x, gate, weight, bias = (t.float() for t in of_gated(LENGTHS, 64)[2])
    kernel_checks.assert_neighbours_change_no_bit(
        lambda lengths: bind_gated(cuda_ops, lengths), LENGTHS, [x], [gate], [weight, bias]
    )
    _, _, (x, scorers) = of_pool(LENGTHS, 64, 4, "per_sequence", "slice")
    kernel_checks.assert_neighbours_change_no_bit(
        lambda lengths: bind_pool(cuda_ops, lengths, 4, "slice"), LENGTHS, [x.float()], [scorers.float()]
    )


def test_any_schedule_gives_the_same_bits():
    shim = cuda_ops.library()
    for op, _, inputs in (
        *(of_rows(name, 20, 600) for name in ("add_layer_norm", "gelu")),
        of_gated(LENGTHS, 300),
        of_pool(LENGTHS, 64, 4, "dense", "full"),
        of_pool(LENGTHS, 64, 4, "per_sequence_and_head", "slice"),
    ):
        inputs = [t.float() for t in inputs]
        values = []
        for seed in (1, 2, 3):
            shim.hbert_shim_seed(seed)
            values.append(checks.evaluate(op, inputs))
        for other in values[1:]:
            kernel_checks.assert_same_values(other, values[0])


def test_nan_stays_in_its_row():
    op, inputs = rounded(of_gated([5, 30, 2], 64), F32)
    kernel_checks.assert_nan_stays(op, inputs, 7, [7], [7])
    op, inputs = rounded(of_pool([5, 30, 2], 64, 4, "per_head", "full"), F32)
    kernel_checks.assert_nan_stays(op, inputs, 7, [1], slice(5, 35))


def test_relu_of_minus_infinity_is_zero_and_of_nan_nan():
    op, (x, *parameters) = rounded(of_rows("relu", 4, 64), F32)
    x[1, 5] = -1
    expected = checks.evaluate(op, [x, *parameters])
    x[1, 5] = -torch.inf
    kernel_checks.assert_same_values(checks.evaluate(op, [x, *parameters]), expected)
    x[2, 5], x[3, 5] = torch.inf, torch.nan
    assert op(x, *parameters).isnan().any(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize("size", [1e4, 1e12, 3e13])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu"])
def test_slopes_far_from_zero(name, size):
    def draw():
        op, formula, (x, *parameters) = of_rows(name, 4, 64)
        x[1, :3], x[2, :3] = -size, size
        return op, formula, [x, *parameters]

    checks.assert_within_policy(draw, F32)


def test_launches():
    def launches(call):
        before = cuda_ops.library().hbert_shim_launches()
        call()
        return cuda_ops.library().hbert_shim_launches() - before

    pool = of_pool([5, 4], 64, 4, "dense", "full")
    for problem, forward in ((of_rows("gelu", 9, 64), 1), (of_gated([5, 4], 64), 1), (pool, 2)):
        op, inputs = rounded(problem, F32)
        assert launches(lambda op=op, inputs=inputs: op(*inputs)) == forward
        assert launches(lambda op=op, inputs=inputs: checks.evaluate(op, inputs)) == forward + 2


def test_the_widest_row_and_a_wider_one():
    width = cuda_ops.library().hbert_cuda_max_row_width()
    checks.assert_within_policy(lambda: of_rows("gelu", 3, width), BF16)
    with pytest.raises(RuntimeError, match=f"layer_norm: .* rows of at most {width} values, got {width + 1}"):
        cuda_ops.layer_norm(torch.randn(1, width + 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cuda_ops.layer_norm(torch.randn(2, 8).double()), "x must be float32, float16 or bfloat16"),
        (lambda: cuda_ops.layer_norm(torch.randn(2, 8), torch.randn(7)), "weight must have 8 values"),
        (lambda: cuda_ops.add_layer_norm(torch.randn(2, 8), torch.randn(3, 8)), "residual must have the shape of x"),
        (
            lambda: cuda_ops.gated_layer_norm(torch.randn(2, 8), torch.randn(2, 8), cu_of([2])),
            r"gate must be \[B, width\]",
        ),
        (
            lambda: cuda_ops.gated_layer_norm(torch.randn(2, 8), torch.randn(1, 8), cu_of([2]).long()),
            r"cu_seqlens must be int32 \[B\+1\]",
        ),
        (lambda: cuda_ops.additive_pool(torch.randn(2, 130), torch.randn(65, 130), cu_of([2]), 2, 65), "at most 64"),
        (lambda: cuda_ops.additive_pool(torch.randn(2, 8), torch.randn(2, 7), cu_of([2]), 2, 2), "scorer must be"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.gpu_full
def test_more_than_65536_rows():
    def last(op, inputs, rows):
        leaves = [t.clone().requires_grad_() for t in inputs]
        output = op(*leaves)
        return output[-rows:], torch.autograd.grad(output, leaves[0], output.detach())[0][-rows:]

    op, inputs = rounded(of_rows("layer_norm", 70_000, 8), F32)
    few = [inputs[0][-5:], *inputs[1:]]
    assert all(map(torch.equal, last(op, inputs, 5), last(op, few, 5)))
    lengths = [70_000, 9]
    _, (x, gate, *affine) = rounded(of_gated(lengths, 8), F32)
    many = last(bind_gated(cuda_ops, lengths), [x, gate, *affine], 9)
    one = last(bind_gated(cuda_ops, [9]), [x[-9:], gate[1:], *affine], 9)
    assert all(map(torch.equal, many, one))
