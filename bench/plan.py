"""From the command line to what each suite is asked for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence

from bench import machine
from bench.checkpoint import Checkpoint
from bench.client import HEAP_OURS
from bench.engines import not_installed
from bench.harness import Case, Failure
from bench.names import ENGINE_PEERS, LOADED, LOADED_OPTIMIZED, OPTIMIZE, computes_in
from bench.ops import NAMES, ON_CPU_ONLY
from bench.session import SuitePlan
from bench.suites import DEFAULT_SUITES, DEVICES, SUITES
from bench.suites.suite import Suite, Wanted

_NEEDS_CHECKPOINT = (LOADED, LOADED_OPTIMIZED)


def plan(options: argparse.Namespace) -> list[SuitePlan]:
    """What the command line asks for.

    Raises:
        ValueError: a flag does not fit a suite that was asked for.
    """
    names = options.suite or _default_suites(options)
    return [_suite_plan(SUITES[name], options) for name in names]


def _default_suites(options: argparse.Namespace) -> Sequence[str]:
    if options.checkpoint is None:
        return DEFAULT_SUITES
    return [name for name, suite in SUITES.items() if suite.takes_checkpoint]


def _default_ops(options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(name for name in NAMES if options.device == DEVICES[0] or name not in ON_CPU_ONLY)


def lacks_bf16(options: argparse.Namespace) -> bool:
    """Whether fp32 takes the place of the defaults. Models of base size then take so long that they get few tokens."""
    return options.dtype is None and options.device == DEVICES[0] and not machine.multiplies_bf16()


def _suite_plan(suite: Suite, options: argparse.Namespace) -> SuitePlan:
    _check_fit(suite, options)
    slow = lacks_bf16(options)
    wanted = Wanted(
        options.shapes,
        ("fp32",) if slow else options.dtype,
        options.ops or _default_ops(options),
        quick=options.quick or (slow and not suite.has_ops),
        sizes=options.size or (suite.default_sizes[:1] if options.quick else suite.default_sizes),
        checkpoint=options.checkpoint and options.checkpoint.folder,
    )
    cases: Iterable[Case] = suite.cases(wanted)
    candidates = options.models or _default_candidates(suite, options)
    baselines = options.peers or _default_baselines(suite, options)
    if not suite.has_ops:
        cases = [_with_peers(case, suite, candidates, baselines, options) for case in cases]
    return SuitePlan(suite, candidates, baselines, tuple(cases), min_time(suite, options))


def _default_candidates(suite: Suite, options: argparse.Namespace) -> tuple[str, ...]:
    """The optimized forms are those for a CPU."""
    if options.checkpoint is not None:
        return options.checkpoint.candidates[:1]
    if options.device == DEVICES[0]:
        return suite.default_candidates
    plain = (name.removesuffix(OPTIMIZE) for name in suite.default_candidates)
    return tuple(name for name in plain if name in suite.candidates)


def _default_baselines(suite: Suite, options: argparse.Namespace) -> tuple[str, ...]:
    wanted: Sequence[str] = suite.default_baselines
    if options.checkpoint is not None:
        wanted = [name for name in wanted if name in options.checkpoint.baselines] or options.checkpoint.baselines
    on_cpu = options.device == DEVICES[0]
    return tuple(name for name in wanted if on_cpu or name not in ENGINE_PEERS)


def _with_peers(
    case: Case, suite: Suite, candidates: Sequence[str], baselines: Sequence[str], options: argparse.Namespace
) -> Case:
    """The case with those that take part: who has its dtype, and is named or has a place in it by default."""
    ours, theirs = (
        [name for name in names if computes_in(name, case.dtype) and (named or suite.by_default(name, case))]
        for names, named in ((candidates, options.models), (baselines, options.peers))
    )
    if not ours:
        raise ValueError(f"--dtype {case.dtype}: none of {', '.join(candidates)} has it; those with {OPTIMIZE} do")
    floors = dict.fromkeys(filter(None, map(suite.floor_of, ours)))
    return dataclasses.replace(case, peers=(*theirs, *ours, *floors))


def _check_fit(suite: Suite, options: argparse.Namespace) -> None:
    candidates, baselines = _allowed(suite, options.checkpoint)
    named = (("--models", options.models, candidates), ("--peers", options.peers, baselines))
    for flag, names, allowed in named:
        unknown = ", ".join(name for name in names or () if name not in allowed)
        if unknown:
            where = f"the suite {suite.name}"
            if options.checkpoint is not None:
                where += f" on a checkpoint of a {options.checkpoint.kind}"
            hint = " (of a --checkpoint)" if set(names) & set(_NEEDS_CHECKPOINT) else ""
            raise ValueError(f"{flag}: {where} has no {unknown}{hint}; allowed: {', '.join(allowed)}")
    lacking = [dtype for dtype in options.dtype or () if dtype not in suite.dtypes]
    if lacking:
        raise ValueError(f"--dtype: the suite {suite.name} has no {', '.join(lacking)}")
    if options.ops and not suite.has_ops:
        raise ValueError(f"--ops: the suite {suite.name} measures models")
    if elsewhere := set(options.ops or ()) - set(_default_ops(options)):
        raise ValueError(f"--ops: {', '.join(sorted(elsewhere))} runs on CPUs only, not on --device {options.device}")
    if options.size and suite.has_ops:
        raise ValueError(f"--size: the suite {suite.name} measures ops, of one width")
    if options.heap == HEAP_OURS and suite.one_process:
        raise ValueError(f"--heap {HEAP_OURS}: all peers of the suite {suite.name} share a process")
    _check_lengths(suite, options)


def _allowed(suite: Suite, checkpoint: Checkpoint | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The candidates and baselines that can be asked for."""
    if checkpoint is not None:
        if not suite.takes_checkpoint:
            raise ValueError(f"--checkpoint: the suite {suite.name} takes none")
        return checkpoint.candidates, checkpoint.baselines
    candidates, baselines = (
        tuple(name for name in names if suite.has_ops or name not in _NEEDS_CHECKPOINT)
        for names in (suite.candidates, suite.baselines)
    )
    return candidates, baselines


def _check_lengths(suite: Suite, options: argparse.Namespace) -> None:
    whose, most = f"the suite {suite.name}", suite.max_seq
    if options.checkpoint is not None:
        if options.size:
            raise ValueError("--size: a checkpoint has its own")
        whose, most = "the checkpoint", min(most, options.checkpoint.positions)
    too_long = [seq for _, seq in options.shapes or () if seq > most]
    if too_long:
        raise ValueError(f"--shapes: {whose} takes at most {most} tokens, got {too_long[0]}")


def min_time(suite: Suite, options: argparse.Namespace) -> float:
    """Seconds of calls for each peer and case: --min-time, else the suite's default, or its short one for --quick."""
    return options.min_time or (suite.quick_min_time if options.quick else suite.min_time)


def installed(plans: Sequence[SuitePlan]) -> tuple[list[SuitePlan], list[Failure]]:
    """The plans without what their cases need and is not installed; those peers, each with the line that helps."""
    kept, left_out = [], {}
    for one in plans:
        wanted = {peer for case in one.cases for peer in case.peers}
        reasons = {peer: not_installed(peer) if peer in wanted else None for peer in one.baselines}
        left_out |= {
            (one.suite.name, peer): Failure(one.suite.name, "", "", peer, reason)
            for peer, reason in reasons.items()
            if reason is not None
        }
        present = tuple(peer for peer, reason in reasons.items() if reason is None)
        kept.append(dataclasses.replace(one, baselines=present))
    return kept, list(left_out.values())
