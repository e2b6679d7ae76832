"""A result with figures that can be checked by hand, for the tests of report and command line."""

from bench.harness import Case, Gate, Result, Slice

SECONDS = {  # of each call, in three rounds
    "hf": [(0.4, 0.6), (0.5, 0.7), (0.4, 0.4)],
    "hbert-v1": [(0.25,), (0.2,), (0.4,)],
    "hf-compile": [(0.2,), (0.2,), (0.2,)],
}


def measured(suite="latency", peers=tuple(SECONDS), calls=SECONDS):
    case = Case(suite, "8x128", "bf16", 8, 128, work=1024)
    return Result(
        case,
        gates={peer: Gate(0.001 * i, 1.0) for i, peer in enumerate(peers)},
        traits={peer: {"isa": "avx2", "backend": f"backend of {peer}"} for peer in peers},
        rounds=[{peer: Slice(calls[peer][turn], 0.0) for peer in peers} for turn in range(len(calls[peers[0]]))],
        canary=[0.001] * 3,
        dropped=4,
    )
