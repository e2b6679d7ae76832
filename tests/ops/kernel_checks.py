"""What the tests of the compiled CPU kernels share: sizes, and properties that hold for every kernel."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hbert_kernels as hk
from hbert_kernels._accuracy import compare, evaluate

from . import checks
from .checks import BF16, F32, F64

SIZES = [(8, 2), (24, 3), (64, 4), (192, 12), (768, 12), (1000, 8), (1024, 16)]  # H, h
LENGTHS = [[1], [7], [37], [129], [1000]]
DTYPES = [F32, BF16, F64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def compiled_kernels():
    """In a module that imports it, no test passes on the reference path."""
    with hk.use_backend("cpp"):
        yield


def cast(inputs, dtype, parameter=None, activations=1):
    """The first ``activations`` inputs in ``dtype``, the others in ``parameter`` (default: the same)."""
    return [t.to(dtype if i < activations else parameter or dtype) for i, t in enumerate(inputs)]


def assert_accurate(op, inputs, float64_bound=checks.FLOAT64_BOUND):
    """The compiled kernel obeys the numerics policy in all outputs and gradients.

    For float64 there is nothing more exact to compare with: kernel and reference then agree to a few roundings.
    """
    if inputs[0].dtype == F64:
        with hk.use_backend("reference"):
            expected = evaluate(op, inputs)
        return checks.assert_equal_to_rounding(evaluate(op, inputs), expected, float64_bound)
    failed = [result for result in compare(op, inputs, "cpp") if not result.passed]
    assert not failed, failed


def assert_same_values(actual, expected):
    """The same bits in everything that ``evaluate`` returns."""
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def assert_same_bits_for_any_threads_and_run(op, inputs):
    """Outputs and gradients of two runs with two threads and one with a single thread."""
    two = evaluate(op, inputs)
    assert_same_values(evaluate(op, inputs), two)
    torch.set_num_threads(1)
    assert_same_values(evaluate(op, inputs), two)


def assert_neighbours_change_no_bit(bind, lengths, tokens, own=(), shared=()):
    """Each sequence alone gives the outputs and the gradients of its tokens that it has among the others.

    ``bind(lengths)`` is the op as a function of ``tokens`` [T, ...], what each sequence has of its ``own`` [B, ...],
    and what all have in common.
    """
    together = _outputs_and_gradients(bind(lengths), [*tokens, *own], shared)
    start = 0
    for b, length in enumerate(lengths):
        rows = slice(start, start + length)
        inputs = [t[rows] for t in tokens] + [t[b : b + 1] for t in own]
        for one, many in zip(_outputs_and_gradients(bind([length]), inputs, shared), together, strict=True):
            assert torch.equal(one, many[rows if len(many) == sum(lengths) else slice(b, b + 1)])
        start += length


def _outputs_and_gradients(op, inputs, shared):
    leaves = [t.clone().requires_grad_() for t in inputs]
    output = op(*leaves, *shared)
    return [output, *torch.autograd.grad(output, leaves, output.detach())]


def assert_nan_stays(op, inputs, row, outputs, gradients):
    """NaN in one feature of one row of the first input reaches these rows of the output, and at most these of its
    gradient; no bit changes elsewhere."""
    clean = evaluate(op, inputs)
    inputs[0][row, 3] = torch.nan
    poisoned = evaluate(op, inputs)
    for name, reached in (("output 0", outputs), ("gradient 0", gradients)):
        kept = torch.ones(len(clean[name]), dtype=torch.bool)
        kept[reached] = False
        assert torch.equal(poisoned[name][kept], clean[name][kept]), name
    assert poisoned["output 0"][outputs].isnan().flatten(1).any(1).all()


def assert_gradients_of_dead_rows_are_not_read(op, inputs, packed=1, dead=3):
    """NaN in dead rows of the first ``packed`` inputs and of the output's gradient leaves no trace in any gradient."""
    tokens = len(inputs[0])
    padded = [torch.cat([t, t.new_full((dead, t.shape[1]), torch.nan)]) for t in inputs[:packed]] + inputs[packed:]
    gradients = []
    for problem, fill in ((inputs, None), (padded, 0.0), (padded, torch.nan)):
        leaves = [t.clone().requires_grad_() for t in problem]
        output = op(*leaves)
        cotangent = torch.ones_like(output)
        if fill is not None:
            cotangent[tokens:] = fill
        gradients.append(torch.autograd.grad(output, leaves, cotangent))
    for index, (plain, zero, nan) in enumerate(zip(*gradients, strict=True)):
        assert torch.equal(zero, nan)
        assert torch.equal(nan[: len(plain)], plain)
        assert index >= packed or torch.equal(nan[tokens:], torch.zeros_like(nan[tokens:]))


def assert_compiles_with_inductor(op, inputs):
    """One graph, forward and backward, with the bits of eager mode."""
    torch._dynamo.reset()
    assert_same_values(evaluate(torch.compile(op, fullgraph=True), inputs), evaluate(op, inputs))


def assert_compiles_given_a_tensor_twice(op, inputs):
    """One graph, forward and backward, of an ``op`` that hands one of its inputs to a kernel more than once."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    checks.assert_equal_to_rounding(evaluate(compiled, inputs), evaluate(op, inputs))


def assert_checkpointing_under_autocast_changes_no_bit(block, parameters, tokens, width, output_dtype):
    """``block`` [tokens, width] -> Tensor, run as it is and recomputed in the backward pass."""
    gradients = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        x = torch.linspace(-1, 1, tokens * width).view(tokens, width).requires_grad_()
        with torch.autocast("cpu", dtype=BF16):
            output = run(x)
        assert output.dtype == output_dtype
        gradients.append(torch.autograd.grad(output.float().square().mean(), [x, *parameters]))
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)
        assert one.isfinite().all()
        assert one.any()


def assert_op_refuses(op, arguments, change, message):
    """torch.ops.hbert_kernels.<op> itself, without the public function's checks, raises on the changed arguments."""
    getattr(torch.ops.hbert_kernels, op)(**arguments)
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.hbert_kernels, op)(**arguments | change(arguments))
