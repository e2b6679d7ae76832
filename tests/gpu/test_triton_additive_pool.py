"""Triton pooling in the interpreter: numbers by the policy, properties, configurations, launches and bytes."""

import pytest
import torch
import triton_accuracy
import triton_ops
from ops import checks, formulas, kernel_checks
from ops.checks import BF16, F32, RAGGED, cu_of, randn

from hbert_kernels.triton import additive_pool

F16 = torch.float16
LONG = [5, 0, 270, 1, 150]  # one chunk, several, and several of the gradients
each_dtype = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
PAIRS = [("dense", "slice"), ("per_sequence", "full")]  # what additive attention needs
each_pair = pytest.mark.parametrize(("scorer", "output"), PAIRS)


def pool(x, scorer, cu_seqlens, num_heads, output="slice"):
    """The Triton functions as a differentiable op."""
    arguments = num_heads, output == "full", (x.shape[1] // num_heads) ** -0.5

    def backward(cotangents, results, tensors):
        return additive_pool.additive_pool_backward(*cotangents, *tensors, cu_seqlens, *results, *arguments)

    def forward(*tensors):
        return additive_pool.additive_pool(*tensors, cu_seqlens, *arguments)

    return triton_ops.differentiable(forward, backward)(x, scorer.float())


def shape_of(scorer, lengths, width, heads):
    return {
        "dense": (heads, width),
        "per_sequence": (len(lengths), heads, width),
        "per_head": (heads, width // heads),
        "per_head_and_sequence": (len(lengths), heads, width // heads),
    }[scorer]


def bind(lengths, heads, output):
    return lambda x, scorer: pool(x, scorer, cu_of(lengths), heads, output)


def problem(lengths, width, heads, scorer="dense", output="slice", logits=1.0):
    """The op, its formula and the inputs x, scorer; the logits of a token are about ``logits``."""
    shape = shape_of(scorer, lengths, width, heads)
    inputs = [randn(sum(lengths), width), randn(*shape, scale=logits * (width / heads / shape[-1]) ** 0.5)]
    formula = lambda x, s: formulas.additive_pool(x, s, cu_of(lengths), 0, heads, output=output)  # noqa: E731
    return bind(lengths, heads, output), formula, inputs


def assert_accurate(*arguments, dtype=F32, parameter=F32, **options):
    op, formula, (x, scorer) = problem(*arguments, **options)
    triton_accuracy.assert_accurate(op, formula, [x.to(dtype), scorer.to(parameter)], max(1, len(x)))


@each_dtype
@pytest.mark.parametrize(("scorer", "output"), [*PAIRS, ("per_head", "slice")])
def test_accurate_at_odd_sizes(scorer, output, dtype):
    assert_accurate([37, 2, 0], 40, 5, scorer, output, dtype=dtype)


@pytest.mark.parametrize(("scorer", "output"), [("dense", "full"), ("per_sequence", "slice"), ("per_head", "full")])
def test_every_scorer_with_every_output(scorer, output):
    assert_accurate([7, 0, 1], 40, 5, scorer, output)


@pytest.mark.parametrize(("scorer", "output", "dtype"), [("per_head", "slice", BF16), ("per_sequence", "full", F32)])
def test_accurate_over_several_chunks(scorer, output, dtype):
    assert_accurate(LONG, 24, 3, scorer, output, dtype=dtype)


@pytest.mark.parametrize(("width", "heads", "dtype"), [(768, 12, BF16), (1000, 8, F32), (1024, 16, F16)], ids=str)
def test_accurate_at_the_widths_of_models(width, heads, dtype):
    assert_accurate([17], width, heads, dtype=dtype)


@pytest.mark.parametrize(("width", "heads"), [(8, 1), (60, 60), (66, 33)])
@each_pair
def test_any_number_of_heads(width, heads, scorer, output):
    assert_accurate([9, 0, 20], width, heads, scorer, output)


def test_a_scorer_per_head_and_sequence():
    assert_accurate([9, 0, 30], 24, 3, "per_head_and_sequence")


@pytest.mark.parametrize("x", [F32, BF16], ids=str)
def test_a_scorer_of_another_dtype(x):
    assert_accurate([9, 20], 24, 3, dtype=x, parameter=BF16)


@each_dtype
@each_pair
def test_large_logits(scorer, output, dtype):
    # The exponentials overflow and underflow unless the maximum is taken off.
    assert_accurate([40, 1, 0, 30], 64, 4, scorer, output, dtype=dtype, logits=1e4)


def test_a_rising_maximum():
    # Each block of rows, and each chunk, finds a larger score than all before it.
    op, formula, (x, scorer) = problem([80], 24, 3)
    x = x.abs() * torch.linspace(1, 6, len(x))[:, None]
    triton_accuracy.assert_accurate(op, formula, [x.float(), scorer.abs().float()], len(x))


@pytest.mark.parametrize(("scorer", "dtype"), [("dense", BF16), ("per_sequence", F32), ("per_head", F16)])
def test_a_single_token_pools_to_itself(scorer, dtype):
    op, _, (x, vectors) = problem([1, 1], 64, 4, scorer, logits=1e4)
    x = x.to(dtype)
    values = checks.evaluate(op, [x, vectors.float()])
    assert torch.equal(values["output 0"], x.float())
    assert torch.equal(values["gradient 1"], torch.zeros_like(vectors.float()))


def test_statistics_of_the_softmax():
    lengths = [5, 0, 150]
    _, _, (x, scorer) = problem(lengths, 24, 3)
    cu = cu_of(lengths)
    _, softmax = additive_pool.additive_pool(x.float(), scorer.float(), cu, 3, False, 0.5)
    for b, rows in enumerate(formulas.sequences(cu)):
        scores = x[rows] @ scorer.t() / 2
        largest = scores.amax(0) if len(scores) else torch.zeros(3)
        torch.testing.assert_close(softmax[b, 0].double(), largest.double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(softmax[b, 1].double(), (scores - largest).exp().sum(0), rtol=1e-5, atol=0)


@each_pair
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_no_tokens(lengths, scorer, output):
    op, _, inputs = problem(lengths, 64, 4, scorer, output)
    shape = (len(lengths), 4, 64) if output == "full" else (len(lengths), 64)
    checks.assert_zero_gradients(op, [t.float() for t in inputs], shape)


@pytest.mark.parametrize(("scorer", "output", "dtype"), [(*PAIRS[0], BF16), (*PAIRS[1], F32)])
def test_dead_rows_are_inert(scorer, output, dtype):
    op, _, (x, vectors) = problem([3, 0, 70], 24, 3, scorer, output)
    checks.assert_dead_rows_are_inert(op, [x.to(dtype), vectors.float()], 1)


@each_pair
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_only_dead_rows(scorer, output, lengths):
    op, _, (_, vectors) = problem(lengths, 24, 3, scorer, output)
    shape = (len(lengths), 3, 24) if output == "full" else (len(lengths), 24)
    checks.assert_zero_gradients(op, [torch.full((3, 24), torch.nan), vectors.float()], shape)


@each_pair
def test_strides_do_not_matter(scorer, output):
    op, _, inputs = problem(RAGGED, 24, 3, scorer, output)
    checks.assert_strides_do_not_matter(op, [t.float() for t in inputs])


def test_neighbours_change_no_bit_of_a_sequence():
    lengths = [30, 0, 290, 7]
    _, _, (x, vectors) = problem(lengths, 24, 3, "per_sequence", "full")
    inputs = [x.float()], [vectors.float()]
    kernel_checks.assert_neighbours_change_no_bit(lambda n: bind(n, 3, "full"), lengths, *inputs)
    shared = [randn(3, 24).float()]
    kernel_checks.assert_neighbours_change_no_bit(lambda n: bind(n, 3, "slice"), lengths, [x.float()], [], shared)


def test_nan_stays_in_its_sequence():
    op, _, inputs = problem([3, 70, 5], 24, 3)
    kernel_checks.assert_nan_stays(op, [t.float() for t in inputs], 70, slice(1, 2), slice(3, 73))


@each_pair
def test_same_bits_in_any_order_of_programs(scorer, output):
    op, _, inputs = problem(LONG, 24, 3, scorer, output)
    values = []
    for seed in (1, 2):
        with triton_ops.checked(seed=seed):
            values.append(checks.evaluate(op, [t.float() for t in inputs]))
    kernel_checks.assert_same_values(*values)


def test_many_short_sequences():
    assert_accurate([1] * 48 + [0] * 20 + [3], 8, 2)


def test_configurations_fit_the_shape():
    assert additive_pool.config(768, BF16, False) == additive_pool.Config(64, 32, 64, 12, 8)
    assert additive_pool.config(768, F32, True) == additive_pool.Config(128, 16, 64, 12, 8)
    assert additive_pool.config(1024, BF16, True) == additive_pool.Config(128, 16, 64, 16, 8)
    assert additive_pool.config(60, F16, False) == additive_pool.Config(64, 16, 64, 1, 8)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("width", [8, 64, 192, 1000, 1024])
def test_tiles_cover_the_row_and_fit_shared_memory(width, dtype):
    c = additive_pool.config(width, dtype, False)
    assert c.cols * c.blocks >= width and c.chunk % c.rows == 0
    # The rows and the scorer, in three parts of 16 bits or one of 32, at 163 KB per block of an A100.
    vectors = 16 * (6 if dtype == BF16 else 4)
    assert c.cols * c.blocks * (c.rows * dtype.itemsize + vectors) <= 163 * 1024


def traffic(seqs, length, width, heads, scorer, dtype):
    """Inputs whose values do not matter."""
    lengths = [length] * seqs
    vectors = torch.zeros(shape_of(scorer, lengths, width, heads))
    return torch.zeros(seqs * length, width, dtype=dtype), vectors, cu_of(lengths)


def sizes(*tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("scorer", "output"), [*PAIRS, ("per_head", "slice")])
def test_a_forward_reads_rows_once_in_two_launches(scorer, output, dtype, launches):
    for seqs, length in ((4, 40), (1, 512)):
        x, vectors, cu = traffic(seqs, length, 192, 12, scorer, dtype)
        results = additive_pool.additive_pool(x, vectors, cu, 12, output == "full", 0.25)
        assert [launch.kernel for launch in launches] == ["pool_chunk", "merge_chunks"]
        assert launches[0].bytes["X"] == x.nbytes
        # Each program reads the scorer too, which stays in the cache.
        tables = launches[0].bytes["SCORER"] + launches[0].bytes["CU"] + launches[1].bytes["CU"]
        parts = sum(launch.bytes[f"PART_{name}"] for launch in launches for name in ("POOLED", "SOFTMAX"))
        assert launches.total_bytes - tables - parts <= 1.05 * sizes(x, *results)
        # A part is as large as the result of a sequence: written once and read once.
        assert parts <= 2 * -(-length // (128 if output == "full" else 64)) * sizes(*results) * (length > 64)
        launches.clear()


@pytest.mark.parametrize(("seqs", "length"), [(20, 10), (1, 512)])
@each_pair
def test_a_backward_moves_at_most_twice_the_bytes(scorer, output, seqs, length, launches):
    x, vectors, cu = traffic(seqs, length, 192, 4, scorer, BF16)
    pooled = torch.zeros(seqs, *((4, 192) if output == "full" else (192,)))
    saved = torch.zeros_like(pooled), torch.ones(seqs, 2, 4)
    results = additive_pool.additive_pool_backward(pooled, x, vectors, cu, *saved, 4, output == "full", 0.25)
    assert len(launches) == 3
    assert launches[0].bytes["X"] == launches[1].bytes["X"] == launches[1].bytes["DX"] == x.nbytes
    # Each program reads a shared scorer anew, which stays in the cache.
    tables = sum(launch.bytes["SCORER"] for launch in launches) if scorer == "dense" else 0
    assert launches.total_bytes - tables <= 2 * sizes(x, pooled, *saved, *results)
