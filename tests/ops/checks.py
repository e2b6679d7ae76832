"""What the tests of the reference ops share: problems, comparisons with the formulas, properties that hold for all."""

import torch
from torch._dynamo.testing import CompileCounter

from hbert_kernels._accuracy import error_bound, evaluate, max_error

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
RAGGED = [5, 0, 1, 7, 0, 3]  # empty sequences in the middle, one of one token
ODD_LENGTHS = [[1], [7], [37, 2], [129, 1, 30], RAGGED]
# lengths, H, h
PROBLEMS = [*((lengths, 64, 4) for lengths in ODD_LENGTHS), (RAGGED, 192, 12), ([37, 2], 1000, 8)]

# Float64 sums of up to 1000 terms lose about sqrt(1000) eps = 7e-15 of the largest value; a softmax or a norm between
# two sums, and the gradient through both, amplify that by the size of the logits, some tens. 1e-12 leaves a factor of
# ten, and no mistake in a formula is that small.
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


def assert_within_policy(draw, dtype, parameter_dtype=None, activations=1, rowwise=True):
    """Error of the op at ``dtype`` against the bound of the numerics policy.

    ``draw()`` gives the op, its formula and random inputs; the plain computation of the policy is the formula on the
    rounded inputs. Its largest error, taken alone, is a matter of luck: the worst of three draws is what counts. Inputs
    after the first ``activations`` are parameters: their gradients are sums over the rows. Without ``rowwise`` those of
    the activations are too, since a row acts on all others through a sum.
    """
    trials = [_trial(*draw(), dtype, parameter_dtype or dtype, activations) for _ in range(3)]
    for name in trials[0][2]:
        kind, _, index = name.partition(" ")
        sums = kind == "gradient" and (int(index) >= activations or not rowwise)
        summed = trials[0][0] if sums else 1
        worst = max(_relative_error(plain[name], exact[name]) for _, exact, plain, _ in trials)
        for _, exact, plain, actual in trials:
            scale = float(exact[name].abs().max())
            bound = error_bound(exact[name], worst * scale, actual[name].dtype, summed)
            error = max_error(actual[name], exact[name])
            assert actual[name].dtype == plain[name].dtype, name
            assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g}"


def _trial(op, formula, inputs, dtype, parameter_dtype, activations):
    rounded = [t.to(dtype if i < activations else parameter_dtype) for i, t in enumerate(inputs)]
    exact = evaluate(formula, [t.double() for t in rounded])
    return len(inputs[0]), exact, evaluate(formula, rounded), evaluate(op, rounded)


def _relative_error(value, exact):
    scale = float(exact.abs().max())
    return max_error(value, exact) / scale if scale else 0.0


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
