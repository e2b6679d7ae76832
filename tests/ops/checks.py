"""What the tests of the reference ops share: problems, comparisons with the formulas, and properties that hold for all."""

import torch
from torch._dynamo.testing import CompileCounter

from hbert_kernels._accuracy import error_bound, evaluate, max_error

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SIZES = [(64, 4), (192, 12), (1000, 8)]  # H, h
RAGGED = [5, 0, 1, 7, 0, 3]  # empty sequences in the middle, one of one token
ODD_LENGTHS = [[1], [7], [37, 2], [129, 1, 30], RAGGED]

# Float64 sums of up to 1000 terms lose about sqrt(1000) eps = 7e-15 of the largest value; a softmax or a norm between two
# sums, and the gradient through both, amplify that by the size of the logits, some tens. 1e-12 leaves a factor of ten,
# and no mistake in a formula is that small.
FLOAT64_BOUND = 1e-12


def cu_of(lengths):
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def randn(*shape, scale=1.0):
    """Normal numbers in float64: the other dtypes are roundings of the same problem."""
    return torch.randn(shape, dtype=torch.float64) * scale


def affine(width):
    """Weight around 1 and bias of a norm."""
    return [1 + randn(width, scale=0.25), randn(width)]


def assert_equal_to_rounding(actual, expected, bound=FLOAT64_BOUND):
    """Every tensor within ``bound`` of the largest magnitude of its expected value (of 1 for tiny ones)."""
    for name, exact in expected.items():
        scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
        assert actual[name].shape == exact.shape, name
        assert max_error(actual[name], exact) <= bound * scale, name


def assert_exact(op, formula, inputs, bound=FLOAT64_BOUND):
    """Outputs and all gradients of ``op`` in float64 are those of the formula; every input has a gradient."""
    doubled = [t.double() for t in inputs]
    assert_equal_to_rounding(evaluate(op, doubled), evaluate(formula, doubled), bound)


def assert_within_policy(op, formula, inputs, dtype, parameter_dtype=None, activations=1):
    """Error of ``op`` at ``dtype`` against the bound of the numerics policy.

    The plain computation is the formula on the rounded inputs. Those after the first ``activations`` are parameters:
    their gradients are sums over the rows.
    """
    dtypes = [dtype] * activations + [parameter_dtype or dtype] * (len(inputs) - activations)
    rounded = [t.to(d) for t, d in zip(inputs, dtypes, strict=True)]
    exact = evaluate(formula, [t.double() for t in rounded])
    actual = evaluate(op, rounded)
    plain = evaluate(formula, rounded)
    for name, value in actual.items():
        kind, _, index = name.partition(" ")
        summed = len(inputs[0]) if kind == "gradient" and int(index) >= activations else 1
        bound = error_bound(exact[name], max_error(plain[name], exact[name]), value.dtype, summed)
        error = max_error(value, exact[name])
        assert value.dtype == plain[name].dtype
        assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g}"


def assert_dead_rows_are_inert(op, inputs, packed):
    """Three rows behind the last sequence in the first ``packed`` inputs: they come back as zeros with zero gradients,
    the rest is as without them, and NaN in them changes no bit of anything."""
    tokens = len(inputs[0])

    def extended(fill):
        return [torch.cat([t, t.new_full((3, t.shape[1]), fill)]) if i < packed else t for i, t in enumerate(inputs)]

    plain, ones, poisoned = (evaluate(op, problem) for problem in (inputs, extended(1.0), extended(torch.nan)))
    for name, value in poisoned.items():
        assert torch.equal(value, ones[name]), name
        if len(value) == tokens + 3:
            assert torch.equal(value[tokens:], torch.zeros_like(value[tokens:])), name
        if name.startswith("output"):
            assert_equal_to_rounding({name: value[: len(plain[name])]}, {name: plain[name]})


def assert_strides_do_not_matter(op, inputs):
    """Transposed memory behind every matrix, every second element of every vector: the same outputs and gradients."""

    def strided(*leaves):
        return op(*[_strided(t) for t in leaves])

    assert_equal_to_rounding(evaluate(strided, inputs), evaluate(op, inputs))


def _strided(t):
    if t.dim() == 1:
        return torch.stack([t, torch.zeros_like(t)], 1)[:, 0]
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def assert_gradcheck(op, inputs):
    """Analytic gradients of a tiny float64 problem against finite differences."""
    assert torch.autograd.gradcheck(op, [t.clone().requires_grad_() for t in inputs])


def assert_zero_gradients(op, inputs, *shapes):
    """On a problem without tokens: outputs of these shapes, all zero, and gradients that are zeros, not None."""
    values = evaluate(op, inputs)
    assert [tuple(v.shape) for n, v in values.items() if n.startswith("output")] == list(shapes)
    for name, value in values.items():
        assert torch.equal(value, torch.zeros_like(value)), name


def assert_compiles(function, calls):
    """One graph without breaks for all argument lists in ``calls``, with the eager values and gradients."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for tensors, rest in calls:
        expected = evaluate(lambda *t, rest=rest: function(*t, *rest), tensors)
        actual = evaluate(lambda *t, rest=rest: compiled(*t, *rest), tensors)
        assert_equal_to_rounding(actual, expected)
    assert counter.frame_count == 1
