"""Programs: recorded ops give what they give when called, and bad code is an error."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch

from hbert_kernels import add_layer_norm, cpu_capability
from hbert_kernels._program import Program, Recorder, _index

pytestmark = pytest.mark.skipif(cpu_capability() == "none", reason="programs are run by the compiled library")
WIDTH = 24


@pytest.fixture
def rows():
    return torch.randn(5, WIDTH)


@pytest.fixture
def bounds():
    return torch.tensor([0, 2, 5], dtype=torch.int32)


def recorded(bounds: torch.Tensor, weight: torch.Tensor) -> Program:
    recorder = Recorder(bounds)
    normalized, total, *_ = recorder.op("add_layer_norm", recorder.x, recorder.x, weight, None, 1e-5)
    return recorder.program([normalized * total, total])


def test_a_program_keeps_its_constants_and_frees_them(rows, bounds):
    weight = torch.randn(WIDTH)
    expected = add_layer_norm(rows, rows, weight, None, 1e-5)
    program = recorded(bounds, weight.clone())
    gc.collect()
    product, total = program(rows, bounds)
    assert torch.equal(product, expected[0] * expected[1]) and torch.equal(total, expected[1])
    number = program._number
    del program
    gc.collect()
    with pytest.raises(RuntimeError, match=f"there is no program {number}"):
        torch.ops.hbert_kernels.run_program(number, rows, bounds)


def test_the_end_of_a_program_may_free_another(rows, bounds):
    weight = torch.randn(WIDTH)
    weight.owner = recorded(bounds, torch.randn(WIDTH))
    program = recorded(bounds, weight)
    numbers = [weight.owner._number, program._number]
    del weight, program
    gc.collect()
    for number in numbers:
        with pytest.raises(RuntimeError, match=f"there is no program {number}"):
            torch.ops.hbert_kernels.run_program(number, rows, bounds)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
def test_there_is_one_of_each(copied, bounds):
    """A copy would be of a program that the end of the first one frees."""
    with pytest.raises(TypeError, match="a program cannot be copied or pickled: record it again"):
        copied(recorded(bounds, torch.randn(WIDTH)))


def test_gradients_are_refused_where_they_could_be_asked_for(rows, bounds):
    program = recorded(bounds, torch.randn(WIDTH))
    with pytest.raises(RuntimeError, match="a program has no gradient: call it under"):
        program(rows.requires_grad_(), bounds)
    with torch.no_grad():
        program(rows, bounds)


def test_an_error_of_an_op_reaches_the_caller(bounds):
    with pytest.raises(RuntimeError, match=r"add_layer_norm: a parameter must have \d+ values"):
        recorded(bounds, torch.randn(WIDTH))(torch.randn(5, WIDTH + 1), bounds)


def test_what_cannot_be_recorded(bounds):
    recorder = Recorder(bounds)
    with pytest.raises(KeyError, match="no step softmax"):
        recorder.step("softmax", recorder.x)


ADD = None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ([10_000], "there is no step 10000"),
        ([-1], "there is no step -1"),
        ([ADD, 0], "the code ends within a step"),
        ([ADD, 0, 2], "register 2 is read before it is written"),
        ([ADD, 0, ~3], "there is no constant 3"),
        ([ADD, 0, 0, 9, 0], "there is no register 9"),
    ],
)
def test_damaged_code_is_an_error(code, message, rows, bounds):
    code = [_index("add") if number is ADD else number for number in code]
    number = torch.ops.hbert_kernels.load_program([rows], code, 3, [0])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hbert_kernels.run_program(number, rows, bounds)


HEADS = torch.randn(2, 3, 6)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gated_scorers", (torch.randn(2, 6).double(), torch.randn(3, 6)), "must be float32 and contiguous"),
        ("gated_scorers", (torch.randn(2, 6), torch.randn(6, 3).t()), "must be float32 and contiguous"),
        ("gated_scorers", (torch.randn(2, 6), torch.randn(3, 5)), r"scorers must be \[3, 6\]"),
        ("own_slices", (HEADS.bfloat16(),), "must be float32 and contiguous"),
        ("own_slices", (HEADS.transpose(0, 1),), "must be float32 and contiguous"),
        ("own_slices", (torch.randn(2, 4, 6),), "a multiple of the heads"),
        ("own_slices", (HEADS[0],), r"must be \[sequences, heads, width\]"),
        ("rows_of_heads", (HEADS[0], torch.float32), r"must be \[sequences, heads, width\]"),
        ("heads_of_rows", (torch.randn(7, 6), 3), r"must be \[sequences \* heads, width\]"),
        ("heads_of_rows", (torch.randn(7, 6), 0), r"must be \[sequences \* heads, width\]"),
    ],
)
def test_steps_between_the_ops_look_at_their_inputs(name, arguments, message, rows, bounds):
    recorder = Recorder(bounds)
    program = recorder.program(recorder.step(name, *arguments))
    with pytest.raises(RuntimeError, match=message):
        program(rows, bounds)
