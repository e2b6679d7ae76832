"""The tools of triton_interpreter: arithmetic as on a GPU, and injected faults that must be caught."""

import re

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton_interpreter import checked


@triton.jit
def copy(X, Y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < N, other=0.0).to(Y.dtype.element_ty), mask=i < N)


@triton.jit
def copy_with_unmasked_load(X, Y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i), mask=i < N)


@triton.jit
def copy_with_unmasked_store(X, Y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < N, other=0.0))


@triton.jit
def copy_overlapping_tiles(X, Y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < N, other=0.0), mask=i < N)


@triton.jit
def copy_shifted_in_place(X, Y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(Y + i + 1, mask=i + 1 < N, other=0.0), mask=i < N)


@triton.jit
def sum_into_one(X, Y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y, tl.load(Y) + tl.sum(tl.load(X + i, mask=i < N, other=0.0), 0))


@triton.jit
def store_all_to_one(X, Y, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i * 0, tl.load(X + i))


@triton.jit
def copy_row_with_narrow_offset(X, Y, stride, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + tl.program_id(0) * BLOCK + i, tl.load(X + tl.program_id(0) * stride + i))


@triton.jit
def sum_by_ticket(X, PARTIAL, TICKET, Y, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, SEM: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(PARTIAL + pid, tl.sum(tl.load(X + pid * BLOCK + tl.arange(0, BLOCK)), 0))
    if tl.atomic_add(TICKET, 1, sem=SEM) == PROGRAMS - 1:
        tl.store(Y, tl.sum(tl.load(PARTIAL + tl.arange(0, PROGRAMS)), 0))


@triton.jit
def copy_if(X, Y, wanted, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=(i < N) & (wanted > 0), other=-1.0), mask=i < N)


@triton.jit
def multiply_add(A, B, Y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(A + i) * tl.load(B + i) + tl.load(A + i))


@triton.jit
def sum_in_storage_dtype(X, Y, BLOCK: tl.constexpr):
    tl.store(Y, tl.reduce(tl.load(X + tl.arange(0, BLOCK)), 0, _maximum))


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def product(A, B, Y, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(Y + i, tl.dot(tl.load(A + i), tl.load(B + i), input_precision=PRECISION))


def test_a_right_kernel_passes_and_its_bytes_are_counted(launches):
    x, y = torch.randn(1000), torch.empty(1000, dtype=torch.bfloat16)
    copy[(4,)](x, y, 1000, BLOCK=256)
    assert torch.equal(y, x.bfloat16())
    (launch,) = launches
    assert (launch.kernel, launch.grid) == ("copy", (4,))
    assert (launch.loaded, launch.stored) == ({"X": 4000}, {"Y": 2000})
    assert launches.total_bytes == 6000


def test_a_sample_of_the_programs_stands_for_all():
    x, y = torch.ones(1024), torch.zeros(1024)
    with checked(seed=3, programs=4) as launches:
        copy[(64,)](x, y, 1024, BLOCK=16)
    assert y.sum() == 64
    assert launches.total_bytes == x.nbytes + y.nbytes
    assert launches[0].grid == (64,)


@pytest.mark.parametrize(
    ("kernel", "size", "message"),
    [
        (copy_with_unmasked_load, 1000, "load of 4 bytes outside all tensors"),
        (copy_with_unmasked_store, 1000, "store of 4 bytes outside all tensors"),
        (copy_overlapping_tiles, 1000, "race: program .* writes Y, which program number . wrote"),
        (copy_shifted_in_place, 1000, "race: program .* Y, which program number ."),
        (sum_into_one, 1, "race: program .* loads Y, which program number . wrote"),
        (store_all_to_one, 1000, "stores twice to one address of Y"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_fault_is_caught_in_every_order(kernel, size, message, seed):
    with checked(seed), pytest.raises(InterpreterError, match=message):
        kernel[(4,)](torch.randn(1000), torch.zeros(size), 1000, BLOCK=256)


def test_an_offset_that_overflows_32_bits_is_caught():
    x, y = torch.randn(8, 64), torch.empty(8, 64)
    copy_row_with_narrow_offset[(8,)](x, y, 64, 64, BLOCK=64)
    assert torch.equal(x, y)
    with pytest.raises(InterpreterError, match="overflow|outside all tensors"):
        copy_row_with_narrow_offset[(8,)](x, y, 2**29, 64, BLOCK=64)


def test_the_gap_behind_a_view_is_outside():
    view, y = torch.randn(8, 100)[:, :64][7], torch.empty(64)
    copy[(1,)](view, y, 64, BLOCK=64)
    with pytest.raises(InterpreterError, match="outside all tensors by program .*: 256 bytes from the start of X"):
        copy[(1,)](view, torch.empty(65), 65, BLOCK=128)


def test_a_ticket_orders_programs_only_if_it_acquires_and_releases():
    def launch(semantics):
        partial, ticket, y = torch.empty(4), torch.zeros(1, dtype=torch.int32), torch.empty(1)
        sum_by_ticket[(4,)](x, partial, ticket, y, PROGRAMS=4, BLOCK=16, SEM=semantics)
        return y

    x = torch.arange(64.0)
    assert launch("acq_rel") == x.sum()
    with pytest.raises(InterpreterError, match="race: program .* loads PARTIAL"):
        launch("relaxed")


def test_the_order_of_programs_depends_on_the_seed():
    def order(seed):
        ticket, order = torch.zeros(1, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
        with checked(seed):
            draw_number[(2, 4)](ticket, order)
        return order.tolist()

    orders = [order(seed) for seed in range(4)]
    assert orders[0] == order(0)
    assert len({tuple(o) for o in orders}) > 1
    assert all(sorted(o) == list(range(8)) for o in orders)


@triton.jit
def draw_number(TICKET, ORDER):
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(ORDER + place, tl.atomic_add(TICKET, 1))


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_scalar_comparison_combines_with_a_mask(wanted):
    x, y = torch.randn(50), torch.empty(50)
    copy_if[(1,)](x, y, wanted, 50, BLOCK=64)
    assert torch.equal(y, x if wanted else torch.full_like(x, -1.0))


def test_casts_to_bfloat16_round_to_nearest_even():
    special = [1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.9999999, 7.9999995, torch.inf, -torch.inf, 3.4e38, 1e-39, torch.nan]
    x = torch.cat([torch.randn(100_000), torch.tensor(special)])
    y = torch.empty(len(x), dtype=torch.bfloat16)
    copy[(1,)](x, y, len(x), BLOCK=2**17)
    assert torch.equal(y[:-1], x.bfloat16()[:-1])
    assert y[-1].isnan()


def test_bfloat16_arithmetic_rounds_every_step():
    a, b, y = (torch.randn(256).bfloat16() for _ in range(3))
    multiply_add[(1,)](a, b, y, BLOCK=256)
    assert torch.equal(y, a * b + a)


def test_a_reduction_in_bfloat16_is_refused():
    sum_in_storage_dtype[(1,)](torch.randn(64), torch.empty(1), BLOCK=64)
    with pytest.raises(InterpreterError, match=re.escape("reduction or scan in bfloat16")):
        sum_in_storage_dtype[(1,)](torch.randn(64).bfloat16(), torch.empty(1, dtype=torch.bfloat16), BLOCK=64)


@pytest.mark.parametrize(
    ("dtype", "precision", "low", "high"),
    [
        (torch.float32, "ieee", 0.0, 5e-5),
        (torch.float32, "tf32", 1e-4, 1e-1),
        (torch.bfloat16, "ieee", 0.0, 5e-5),
        (torch.float16, "ieee", 0.0, 5e-5),
    ],
    ids=str,
)
def test_dot_has_the_precision_of_a_tensor_core(dtype, precision, low, high):
    a, b = torch.randn(64, 64).to(dtype), torch.randn(64, 64).to(dtype)
    y = torch.empty(64, 64)
    product[(1,)](a, b, y, SIZE=64, PRECISION=precision)
    error = float((y.double() - a.double() @ b.double()).abs().max())
    assert low <= error <= high
