"""Muon in float32 against the polynomial of the singular values in float64, and against torch's own."""

import math

import pytest
import torch

from hbert.pretrain import muon as muon_module
from hbert.pretrain.muon import Float32Muon, muon, orthogonalized

SHAPES = [(1, 1), (1, 7), (33, 33), (33, 65), (33, 67), (13, 130), (130, 13), (48, 96), (97, 48)]


def by_singular_values(matrix):
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / max(1e-7, math.sqrt(s.square().sum()))
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def matrix_of(shape, kind):
    matrix = torch.randn(shape)
    if kind == "random":
        return matrix
    if kind == "rank one":
        return torch.randn(shape[0], 1) @ torch.randn(1, shape[1])
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ torch.diag(10.0 ** -torch.linspace(0, 8, len(s))) @ v


@pytest.mark.parametrize("kind", ["random", "rank one", "singular values from 1 to 1e-8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_go_through_the_polynomial(shape, kind):
    matrix = matrix_of(shape, kind)
    before = matrix.clone()
    result = orthogonalized(matrix)
    assert result.dtype == torch.float32 and result.shape == matrix.shape
    # What rounding leaves of singular values that are zero grows by 3.44 in each step.
    torch.testing.assert_close(result.double(), by_singular_values(matrix), rtol=0, atol=2e-3)
    if kind == "random":
        torch.testing.assert_close(result.double(), by_singular_values(matrix), rtol=0, atol=2e-5)
    assert torch.equal(matrix, before)


def test_no_gradient_no_direction():
    assert torch.equal(orthogonalized(torch.zeros(5, 40)), torch.zeros(5, 40))


def twins(kinds):
    """The same matrices, once for each kind of optimizer, which are returned with them."""
    torch.manual_seed(3)
    first = [torch.randn(33, 65) * 0.1, torch.randn(130, 17) * 0.1, torch.randn(24, 24) * 0.1]
    copies = [[torch.nn.Parameter(w.clone()) for w in first] for _ in kinds]
    made = [kind(weights, lr=0.02, weight_decay=0.5, momentum=0.9) for kind, weights in zip(kinds, copies, strict=True)]
    return first, copies, made


def advance(copies, optimizers, steps):
    for step in steps:
        for weights, optimizer in zip(copies, optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.param_groups[0]["lr"] = 0.02 / step
            optimizer.step()


def assert_as_close_as_bfloat16(first, ours, theirs):
    for start, mine, other in zip(first, ours, theirs, strict=True):
        moved = (other - start).norm()
        assert moved > 0.1 and (mine - other).norm() < 0.03 * moved


def test_steps_are_those_of_torch():
    first, copies, optimizers = twins((Float32Muon, torch.optim.Muon))
    advance(copies, optimizers, range(1, 6))
    assert_as_close_as_bfloat16(first, *copies)


@pytest.mark.parametrize("kinds", [(Float32Muon, torch.optim.Muon), (torch.optim.Muon, Float32Muon)])
def test_either_goes_on_from_the_state_of_the_other(kinds):
    first, copies, (before, throughout) = twins((kinds[0], kinds[1]))
    advance(copies, (before, throughout), range(1, 4))
    after = kinds[1](copies[0], lr=0.02, weight_decay=0.5, momentum=0.9)
    after.load_state_dict(before.state_dict())
    advance(copies, (after, throughout), range(4, 7))
    assert_as_close_as_bfloat16(first, *copies)


def test_a_matrix_without_gradient_stays():
    weights = [torch.nn.Parameter(torch.ones(4, 9)), torch.nn.Parameter(torch.ones(4, 9))]
    optimizer = Float32Muon(weights, lr=0.1, weight_decay=0.1, momentum=0.9)
    weights[1].grad = torch.randn(4, 9)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert torch.equal(weights[0], torch.ones(4, 9)) and not torch.equal(weights[1], torch.ones(4, 9))


@pytest.mark.parametrize(("fast", "kind"), [(True, torch.optim.Muon), (False, Float32Muon)])
def test_bfloat16_where_its_products_are_fast(monkeypatch, fast, kind):
    monkeypatch.setattr(muon_module, "native_bf16", lambda device: fast)
    optimizer = muon([torch.nn.Parameter(torch.ones(3, 3))], lr=0.3, weight_decay=0.2, momentum=0.8)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.3, 0.2, 0.8)
