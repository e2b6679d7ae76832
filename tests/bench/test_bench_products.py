"""Floors: their products are those that a model's forward or training step makes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import hbert_kernels
from bench.device import Cpu
from bench.floor import ProductsFloor
from bench.ops import Gemm
from bench.peers import build
from bench.products import of_forward, of_training_step

BATCH, SEQ, MASKED = 3, 50, 20
TOKENS = BATCH * SEQ
WIDTH, FFN, VOCAB, HEADS = 128, 512, 30522, 2  # of the size tiny, with 2 layers
FEED_FORWARD = 3 * 2 * 2 * TOKENS * WIDTH * FFN
HEAD = 3 * 2 * MASKED * WIDTH * (WIDTH + VOCAB)
SQUARE = 3 * 2 * WIDTH * WIDTH  # a row's way through a square weight, forward and backward
SELF = TOKENS * 4 * SQUARE + BATCH * 7 * 2 * SEQ * SEQ * WIDTH
ADDITIVE = TOKENS * 2 * SQUARE + BATCH * (HEADS + 1) * SQUARE


def flops(peer, batch=BATCH, seq=SEQ):
    with torch.device("meta"):
        model = build(peer, "masked_lm", "tiny")
    return sum(gemm.flops for gemm in of_training_step(model, batch, seq, MASKED))


@pytest.mark.parametrize(
    "peer, layers", [("hbert-vanilla", 2 * SELF), ("hbert-v1", SELF + ADDITIVE), ("hbert-additive", 2 * ADDITIVE)]
)
def test_operations_by_hand(peer, layers):
    assert flops(peer) == 2 * FEED_FORWARD + HEAD + layers


def test_short_sequences_have_a_key_projection():
    assert flops("hbert-additive", 30, 5) == 2 * FEED_FORWARD + HEAD + 2 * 150 * 3 * SQUARE


def test_operations_are_those_that_torch_counts_in_a_step():
    model = build("hbert-vanilla", "masked_lm", "tiny").train()
    ids = torch.arange(5, 5 + TOKENS).view(BATCH, SEQ)
    labels = torch.full((TOKENS,), -100)
    labels[:: TOKENS // MASKED][:MASKED] = 7
    with hbert_kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=labels.view(BATCH, SEQ)).loss.backward()
    counted = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    linear = sum(count for op, count in counted.items() if op in ("aten.mm", "aten.addmm"))
    assert linear == flops("hbert-vanilla") - 2 * BATCH * 7 * 2 * SEQ * SEQ * WIDTH


def test_equal_products_are_one_product_many_times():
    with torch.device("meta"):
        gemms = of_training_step(build("hbert-vanilla", "masked_lm", "tiny"), BATCH, SEQ, MASKED)
    assert len({(gemm.m, gemm.k, gemm.n) for gemm in gemms}) == len(gemms)
    assert {gemm.times for gemm in gemms if (gemm.m, gemm.k) == (FFN, TOKENS)} == {2}


class Results(TorchDispatchMode):
    """The shapes of all two-dimensional results of products."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if any(name in str(operator) for name in ("linear", "mm")):
            self.shapes.append(tuple(result.shape))
        return result


LENGTHS = (50, 20, 7)
ROWS = sum(LENGTHS)
FORWARD_SELF = ROWS * 4 * 2 * WIDTH * WIDTH + 2 * 2 * sum(n * n for n in LENGTHS) * WIDTH
FORWARD_ADDITIVE = ROWS * 2 * 2 * WIDTH * WIDTH + len(LENGTHS) * (HEADS + 1) * 2 * WIDTH * WIDTH


@pytest.mark.parametrize(
    "peer, layers",
    [
        ("hbert-vanilla", 2 * FORWARD_SELF),
        ("hbert-v1", FORWARD_SELF + FORWARD_ADDITIVE),
        ("hbert-additive", 2 * FORWARD_ADDITIVE),
    ],
)
def test_operations_of_a_packed_forward_by_hand(peer, layers):
    with torch.device("meta"):
        gemms = of_forward(build(peer, "encoder", "tiny"), LENGTHS)
    found = sum(gemm.flops for gemm in gemms)
    # Attention's columns are whole numbers: the mean of n * n over the tokens is rounded.
    assert found == pytest.approx(2 * 2 * 2 * ROWS * WIDTH * FFN + layers, abs=2 * 2 * ROWS * WIDTH)
    assert {gemm.m for gemm in gemms} <= {ROWS, len(LENGTHS) * (HEADS + 1)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_the_floor_makes_all_products(dtype):
    floor = ProductsFloor([Gemm(4, 8, 16, 3), Gemm(16, 4, 8)], dtype, Cpu())
    with Results() as results:
        floor.step()
    assert results.shapes == 3 * [(4, 16)] + [(16, 8)]
    assert floor.traits()["backend"].endswith("products, 4.096e-06 GFLOP") and floor.traits()["gflop"] == "4.096e-06"
