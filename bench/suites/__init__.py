"""The suites: what each measures, in which cases, on which peers. No torch here: the coordinator needs none."""

from __future__ import annotations

from bench.corpus import masked_batches
from bench.suites.kernel_suite import KernelSuite
from bench.suites.suite import Metric, Suite

HBERTS = ("hbert-v1", "hbert-v2", "hbert-v1c", "hbert-v2c", "hbert-additive", "hbert-additive-c", "hbert-vanilla")
PEERS = ("hf", "hf-compile")
DTYPES = ("fp32", "bf16")

_KERNELS = ("hbert", "hbert-direct", "hbert-key-free")
_PLAIN = ("eager", "compile", "sdpa")

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="latency",
            module="bench.suites.latency",
            metric=Metric("latency", "ms", scale=1e3),
            candidates=HBERTS, baselines=PEERS,
            default_candidates=("hbert-v1", "hbert-v2"), default_baselines=("hf",),
            default_shapes=((1, 128), (8, 128), (1, 512)), quick_shapes=((1, 128),),
            default_dtypes=DTYPES,
        ),
        Suite(
            name="throughput",
            module="bench.suites.throughput",
            metric=Metric("throughput", "tokens/s", per_second=True),
            candidates=HBERTS, baselines=PEERS,
            default_candidates=("hbert-v1", "hbert-v2"), default_baselines=("hf",),
            default_shapes=((8, 128),), quick_shapes=((2, 128),),
            default_dtypes=("bf16",),
            inputs=masked_batches,
        ),
        KernelSuite(
            name="kernels",
            module="bench.suites.kernels",
            metric=Metric("time", "ms", scale=1e3),
            candidates=_KERNELS, baselines=_PLAIN,
            default_candidates=_KERNELS, default_baselines=_PLAIN,
            default_shapes=(), quick_shapes=(),
            default_dtypes=DTYPES,
        ),
    )
}
DEFAULT_SUITES = ("latency", "throughput")
