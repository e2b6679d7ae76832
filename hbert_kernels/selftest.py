"""Compare every kernel with the reference on this machine: ``python -m hbert_kernels.selftest [--device cuda]``."""

from __future__ import annotations

import argparse
import sys

import torch

from . import _dispatch, _library
from ._accuracy import Result, compare
from ._selftest_cases import Case, cases


def run(device: str) -> dict[tuple[str, str], list[tuple[Case, list[Result]]]]:
    """Results per (op, backend) for the kernels that can run on ``device``."""
    results: dict[tuple[str, str], list[tuple[Case, list[Result]]]] = {}
    for case in cases(device):
        for backend in _dispatch.BACKENDS[1:]:
            if _dispatch.refusal(case.op, backend, *case.inputs) is None:
                entry = results.setdefault((case.op, backend), [])
                entry.append((case, compare(case.function, case.inputs, backend)))
    return results


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: every kernel passes. 1: one does not, or there is no kernel for the device."""
    parser = argparse.ArgumentParser(prog="python -m hbert_kernels.selftest", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    device = parser.parse_args(arguments).device
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("selftest: this torch sees no CUDA device")
        return 1
    print(f"torch {torch.__version__}, device {device}, cpu capability {_library.cpu_capability()}")
    results = run(device)
    if not results:
        print(
            f"selftest: no kernel runs on {device}\n{_dispatch.explain('layer_norm', torch.empty(1, 1, device=device))}"
        )
        return 1
    failures = 0
    for (op, backend), checked in results.items():
        worst = max(r.error / r.bound for _, rs in checked for r in rs if r.bound > 0)
        failed = [(case, r) for case, rs in checked for r in rs if not r.passed]
        failures += len(failed)
        print(f"{op:24s} {backend:6s} {len(checked):4d} cases, {len(failed)} failed, worst error/bound {worst:.2f}")
        for case, r in failed:
            print(f"  FAILED {case.label}: {r.name} error {r.error:.3g} > bound {r.bound:.3g}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
