"""Compare every kernel with the reference on this machine: ``python -m hbert_kernels.selftest [--device cuda]``."""

from __future__ import annotations

import argparse
import importlib
import math
import sys

import torch

from . import _dispatch, _library
from ._accuracy import Result, compare
from ._selftest_cases import Case, cases

_GPU_BACKENDS = ("cuda", "triton")
_MOST_TOLD = 5
Checked = list[tuple[Case, list[Result]]]
Key = tuple[str, str]


def run(device: str) -> tuple[dict[Key, Checked], dict[Key, str]]:
    """By op and backend: the results of the kernels that can run on ``device``, and why the others cannot.

    A kernel with a reason may have results too: those of the inputs that it serves.
    """
    results: dict[Key, Checked] = {}
    refusals: dict[Key, str] = {}
    for case in cases(device):
        for backend in _dispatch.BACKENDS[1:]:
            reason = case.refusal(backend)
            if reason is None:
                results.setdefault((case.op, backend), []).append((case, _checked(case, backend)))
            else:
                refusals.setdefault((case.op, backend), reason)
    return results, refusals


def _checked(case: Case, backend: str) -> list[Result]:
    """A kernel that raises has failed; the others are checked all the same."""
    try:
        return compare(case.function, case.inputs, backend)
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        return [Result(f"raised {type(error).__name__}: {said}", math.inf, 0.0)]


def _ratio(result: Result) -> float:
    """Error over bound; infinite for what is no number."""
    ratio = result.error / result.bound if result.bound > 0 else 0.0 if result.passed else math.inf
    return math.inf if math.isnan(ratio) else ratio


def _gpu_lines() -> list[str]:
    """What a result from a GPU cannot be read without."""
    architectures = ", ".join(_library.cuda_architectures())
    compiled = _library.cuda_load_failure() or f"loaded, compiled for {architectures}"
    runtime = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = "not installed"
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return [
        f"{torch.cuda.get_device_name()}, compute capability {capability}, {runtime}, triton {triton}",
        f"compiled CUDA kernels: {compiled}",
    ]


def _tell(op: str, backend: str, checked: Checked) -> int:
    """Prints the line of one kernel and its first failures, and returns how many there are."""
    worst = max(_ratio(result) for _, results in checked for result in results)
    failed = [(case, result) for case, results in checked for result in results if not result.passed]
    print(f"{op:24s} {backend:6s} {len(checked):4d} cases, {len(failed)} failed, worst error/bound {worst:.2f}")
    for case, r in failed[:_MOST_TOLD]:
        print(f"  FAILED {case.label}: {r.name} error {r.error:.3g} > bound {r.bound:.3g}")
    if len(failed) > _MOST_TOLD:
        print(f"  and {len(failed) - _MOST_TOLD} more")
    return len(failed)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: every kernel passes. 1: one does not, or there is no kernel for the device."""
    parser = argparse.ArgumentParser(prog="python -m hbert_kernels.selftest", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    device = parser.parse_args(arguments).device
    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("selftest: this torch sees no CUDA device")
        return 1
    print(f"torch {torch.__version__}, device {device}, cpu capability {_library.cpu_capability()}")
    for line in _gpu_lines() if on_gpu else ():
        print(line)
    results, refusals = run(device)
    if not results:
        print(
            f"selftest: no kernel runs on {device}\n{_dispatch.explain('layer_norm', torch.empty(1, 1, device=device))}"
        )
        return 1
    failures = sum(_tell(op, backend, checked) for (op, backend), checked in results.items())
    for (op, backend), reason in refusals.items():
        if on_gpu and backend in _GPU_BACKENDS and (op, backend) not in results:
            print(f"{op:24s} {backend:6s} not run: {reason}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
