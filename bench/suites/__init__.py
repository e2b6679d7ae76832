"""The suites: what each measures, in which cases, on which peers. No torch here: the coordinator needs none."""

from __future__ import annotations

from bench.corpus import masked_batches
from bench.names import BERT_OPTIMIZED, ENCODER_PEERS, ENCODERS, HBERTS, OPTIMIZE, PATCHED, TRAINED_PEERS
from bench.suites.kernel_suite import KernelSuite
from bench.suites.latency_suite import LatencySuite, VarlenSuite
from bench.suites.suite import Metric, Shapes
from bench.suites.training_suite import TrainingSuite

SIZES = ("base", "4x256", "tiny")
FLOATS = ("fp32", "bf16")
DEVICES = ("cpu", "cuda")

_KERNELS = ("hbert", "hbert-direct", "hbert-key-free")
_PLAIN = ("eager", "compile", "sdpa", "onednn")
# Of those with a fixed dtype the ones that have the case's take part.
_RUNTIMES = ("hf", "ort-fp32", "ort-int8", "ov-fp32", "ov-bf16", "ov-int8")

SUITES = {
    suite.name: suite
    for suite in (
        LatencySuite(
            name="latency",
            module="bench.suites.latency",
            metric=Metric("latency", "ms", scale=1e3),
            candidates=ENCODERS,
            baselines=ENCODER_PEERS,
            default_candidates=(f"hbert-v1{OPTIMIZE}", f"hbert-v2{OPTIMIZE}", BERT_OPTIMIZED),
            default_baselines=_RUNTIMES,
            default_dtypes=FLOATS,
            shapes=dict.fromkeys(SIZES, Shapes(((1, 128), (8, 128), (1, 512)), quick=((1, 128),))),
        ),
        VarlenSuite(
            name="varlen",
            module="bench.suites.latency",
            metric=Metric("latency", "ms", scale=1e3),
            candidates=ENCODERS,
            baselines=ENCODER_PEERS,
            default_candidates=(f"hbert-v1{OPTIMIZE}", BERT_OPTIMIZED),
            default_baselines=_RUNTIMES,
            default_dtypes=FLOATS,
            shapes=dict.fromkeys(SIZES, Shapes(((16, 128), (8, 512)), quick=((16, 128),))),
        ),
        TrainingSuite(
            name="throughput",
            module="bench.suites.throughput",
            metric=Metric("throughput", "tokens/s", per_second=True),
            candidates=(*HBERTS, PATCHED),
            baselines=TRAINED_PEERS,
            default_candidates=("hbert-v1", "hbert-vanilla"),
            default_baselines=("hf", "hf-compile"),
            default_dtypes=("bf16",),
            default_sizes=("4x256", "base"),
            shapes={
                # All models of a case are in memory at once: the default has to fit into 16 GiB.
                "base": Shapes(((8, 128),), ((2, 128),), only_named=("hbert-vanilla",)),
                "4x256": Shapes(((32, 128),), quick=((8, 128),)),
                "tiny": Shapes(((8, 128),), quick=((2, 128),)),
            },
            inputs=masked_batches,
        ),
        KernelSuite(
            name="kernels",
            module="bench.suites.kernels",
            metric=Metric("time", "ms", scale=1e3),
            candidates=_KERNELS,
            baselines=_PLAIN,
            default_candidates=_KERNELS,
            default_baselines=_PLAIN,
            default_dtypes=FLOATS,
        ),
    )
}
DEFAULT_SUITES = ("latency", "throughput")
