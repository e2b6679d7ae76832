"""A made-up result of bench/run.py with something of everything: for the tests of the report, and to look at it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

COLUMNS = (
    "suite",
    "case",
    "candidate",
    "baseline",
    "dtype",
    "batch",
    "seq",
    "metric",
    "unit",
    "median",
    "p10",
    "p90",
    "p99",
    "median_lo",
    "median_hi",
    "ratio",
    "ratio_lo",
    "ratio_hi",
    "verdict",
    "max_err",
    "rounds",
    "dropped",
    "canary_ms",
    "canary_drift",
    "device",
    "threads",
    "heap_kept",
    "isa",
    "backend",
    "torch",
    "cpu",
    "git",
    "date",
)
_RUN = {
    "rounds": 7,
    "device": "cpu",
    "threads": 2,
    "heap_kept": "all",
    "isa": "avx2",
    "torch": "2.13.0",
    "cpu": "A processor that does not exist",
    "git": "0123456789ab-dirty",
    "date": "2026-01-02T03:04:05+00:00",
}
# Milliseconds for each token, and for each token and 1000 others.
_MODELS = {
    "hbert-v1": (0.50, 0.20),
    "hbert-v2": (0.48, 0.14),
    "hbert-additive": (0.45, 0.0),
    "hbert-vanilla": (0.42, 0.42),
    "hbert-v1+optimize": (0.36, 0.19),
}
_PEERS = {"hf": (0.66, 0.55), "hf-compile": (0.52, 0.50), "ort-fp32": (0.40, 0.50), "ov-int8": (0.30, 0.45)}
_FLOOR = {"hbert-v1": 0.8, "hbert-v2": 0.8}  # of the time
_OPS = {"layer_norm.plain": 0.9, "layer_norm.residual": 0.8, "attention.full": 0.7}
_KERNEL_PEERS = {"eager": 1.9, "compile": 1.0}


def _row(case, pair, metric, unit, median, ratio=None, **cells):
    """A row whose calls spread by 4% and whose ratio's interval by 3% on either side."""
    (suite, name, dtype, batch, seq), (candidate, baseline) = case, pair
    row = {
        "suite": suite,
        "case": name,
        "candidate": candidate,
        "baseline": baseline,
        "dtype": dtype,
        "batch": batch,
        "seq": seq,
        "metric": metric,
        "unit": unit,
        "median": median,
        "p10": median * 0.97,
        "p90": median * 1.05,
    }
    if metric != "peak_memory":
        row |= {"median_lo": median * 0.99, "median_hi": median * 1.02}
    if ratio is not None:
        low, high = (ratio, ratio) if candidate == baseline or metric == "peak_memory" else (ratio * 0.97, ratio * 1.03)
        verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
        row |= {"ratio": ratio, "ratio_lo": low, "ratio_hi": high, "max_err": 1.5e-6}
        has_verdict = candidate != baseline and metric not in ("peak_memory", "floor_ratio")
        row |= {"verdict": verdict if has_verdict else ""}
    row |= {"dropped": 3 if "512" in name else 0, "canary_ms": 2.5, "canary_drift": 0.03, "backend": "cpp"}
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in (_RUN | row | cells).items()}


def _compared(case, metric, unit, values, peers, rate=False):
    """Each peer by itself, then each candidate against every peer."""
    for peer in peers:
        yield _row(case, (peer, peer), metric, unit, values[peer], 1.0)
    for ours in (name for name in values if name not in peers):
        for peer in peers:
            ratio = values[ours] / values[peer] if rate else values[peer] / values[ours]
            yield _row(case, (ours, peer), metric, unit, values[ours], ratio)


def _floors(case, metric, unit, values, scale):
    """The floor of each candidate that has one, and how far the candidate is from it."""
    for name, share in _FLOOR.items():
        yield _row(case, (f"floor-{name}", ""), metric, unit, values[name] * share**scale)
        yield _row(case, (name, f"floor-{name}"), "floor_ratio", "x floor", 1 / share, share)


def _latency():
    for batch, lengths in ((1, (64, 128, 512, 2048)), (8, (128,))):
        for seq in lengths:
            case = ("latency", f"base/{batch}x{seq}", "fp32", batch, seq)
            cost = (_MODELS | _PEERS).items()
            values = {name: batch * seq * (each + pair * seq / 1000) for name, (each, pair) in cost}
            yield from _compared(case, "latency", "ms", values, _PEERS)
            yield from _floors(case, "latency", "ms", values, 1)
            for name, rate in {"hbert-v1": 60.0, "floor-hbert-v1": 75.0}.items():
                yield _row(case, (name, ""), "flop_rate", "GFLOP/s", rate)


def _throughput():
    case = ("throughput", "base/8x128", "bf16", 8, 128)
    values = {"hbert-v1": 910.5, "hbert-v2": 1010.0, "hf": 505.0, "hf-compile": 1000.0}
    peers = ("hf", "hf-compile")
    yield from _compared(case, "throughput", "tokens/s", values, peers, rate=True)
    yield from _floors(case, "throughput", "tokens/s", values, -1)
    peak = ("throughput", "base/8x128/peak", "bf16", 8, 128)
    memory = {"hbert-v1": 402.0, "hbert-v2": 395.0, "hf": 1210.0, "hf-compile": 1105.0}
    for row in _compared(peak, "peak_memory", "MiB", memory, peers):
        yield row | {"p10": row["median"], "p90": row["median"], "rounds": 1, "dropped": 0, "max_err": ""}


def _kernels():
    for op, share in _OPS.items():
        for shape, seq, place in (("1x128", 128, "cache"), ("8x512", 512, "dram")):
            for step in ("fwd", "bwd"):
                case = ("kernels", f"{op}/{shape}/{step}/{place}", "fp32", int(shape[0]), seq)
                floor = seq / (4000 if place == "cache" else 900)
                values = {"hbert": floor / share} | {name: floor * times for name, times in _KERNEL_PEERS.items()}
                yield from _compared(case, "time", "ms", values, tuple(_KERNEL_PEERS))
                yield _row(case, ("floor", ""), "time", "ms", floor)
                work, metric, unit = (40, "flop_rate", "GFLOP/s") if "attention" in op else (6, "bandwidth", "GB/s")
                for name, time in (values | {"floor": floor}).items():
                    yield _row(case, (name, ""), metric, unit, work * seq / 512 / time)
                for name, time in values.items():
                    yield _row(case, (name, "floor"), "floor_ratio", "x floor", time / floor, floor / time)


def sample_rows() -> list[dict[str, object]]:
    """The rows of all suites; what a row does not have is missing."""
    return [*_latency(), *_throughput(), *_kernels()]


def write_rows(path: Path, rows: list[dict[str, object]], columns: tuple[str, ...] = COLUMNS) -> Path:
    """Writes rows as a CSV, and returns its path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_record(path: Path, **entries: object) -> None:
    """Writes the JSON file that stands beside a CSV."""
    failure = {"suite": "latency", "case": "base/1x64", "dtype": "fp32", "peer": "ct2-int8", "reason": "wrong"}
    record = {
        "about": {"cpu": _RUN["cpu"], "cores": 2, "system": "Linux", "command": "python bench/run.py --size 'base'"},
        "failures": [failure],
        "left_out": [failure | {"case": "", "dtype": "", "peer": "torchao-int8", "reason": "pip install torchao"}],
        "disturbances": ["21 of 200 slices were disturbed by other load"],
    }
    path.write_text(json.dumps(record | entries), encoding="utf-8")


def write_sample(folder: Path) -> Path:
    """Writes sample.csv and sample.json, and returns the path of the first."""
    write_record(folder / "sample.json")
    return write_rows(folder / "sample.csv", sample_rows())
