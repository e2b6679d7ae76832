"""The suites: what each measures, in which cases, on which peers. No torch here: the coordinator needs none."""

from __future__ import annotations

from bench.corpus import masked_batches
from bench.suites.kernel_suite import KernelSuite
from bench.suites.suite import Metric, Shapes, Suite
from bench.suites.training_suite import TrainingSuite
from bench.suites.varlen_suite import VarlenSuite

HBERTS = ("hbert-v1", "hbert-v2", "hbert-v1c", "hbert-v2c", "hbert-additive", "hbert-additive-c", "hbert-vanilla")
PATCHED = "bert+patch"
PEERS = ("hf", "hf-compile", "hf-fp32")
SIZES = ("base", "4x256", "tiny")
DTYPES = ("fp32", "bf16")
DEVICES = ("cpu", "cuda")

_KERNELS = ("hbert", "hbert-direct", "hbert-key-free")
_PLAIN = ("eager", "compile", "sdpa")

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="latency",
            module="bench.suites.latency",
            metric=Metric("latency", "ms", scale=1e3),
            candidates=(*HBERTS, PATCHED), baselines=PEERS,
            default_candidates=("hbert-v1", "hbert-v2"), default_baselines=("hf",),
            default_dtypes=DTYPES,
            shapes=dict.fromkeys(SIZES, Shapes(((1, 128), (8, 128), (1, 512)), quick=((1, 128),))),
        ),
        VarlenSuite(
            name="varlen",
            module="bench.suites.latency",
            metric=Metric("latency", "ms", scale=1e3),
            candidates=(*HBERTS, PATCHED), baselines=PEERS,
            default_candidates=("hbert-v1", PATCHED), default_baselines=("hf",),
            default_dtypes=DTYPES,
            shapes=dict.fromkeys(SIZES, Shapes(((8, 128), (8, 512)), quick=((8, 128),))),
        ),
        TrainingSuite(
            name="throughput",
            module="bench.suites.throughput",
            metric=Metric("throughput", "tokens/s", per_second=True),
            candidates=(*HBERTS, PATCHED), baselines=PEERS,
            default_candidates=("hbert-v1", "hbert-v2"), default_baselines=("hf",),
            default_dtypes=("bf16",),
            shapes={
                "base": Shapes(((8, 128),), quick=((2, 128),)),
                "4x256": Shapes(((32, 128),), quick=((8, 128),)),
                "tiny": Shapes(((8, 128),), quick=((2, 128),)),
            },
            inputs=masked_batches,
        ),
        KernelSuite(
            name="kernels",
            module="bench.suites.kernels",
            metric=Metric("time", "ms", scale=1e3),
            candidates=_KERNELS, baselines=_PLAIN,
            default_candidates=_KERNELS, default_baselines=_PLAIN,
            default_dtypes=DTYPES,
        ),
    )
}
DEFAULT_SUITES = ("latency", "throughput")
