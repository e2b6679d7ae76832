"""From a budget of time to a number of steps: once, by a calibration that looks for quiet moments."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import numpy as np

from hbert.processor import queue_wait

from .recipes import Recipe
from .schedule import BatchPlan

WARM_UP_STEPS = 5
CLEAN_STEPS = 30
MOST_STEPS = 90
FEWEST_CLEAN_STEPS = 3
# Of the budget, for all calibrations together. It is not taken off the budget.
CALIBRATION_SHARE = 0.25
# A step is clean if our threads stood ready, but without a core, for at most this share of it.
QUIET_SHARE = 0.04
_SECONDS = {"h": 3600, "m": 60, "s": 1}
# More is a slip of the pen, and its steps may be more than there is memory to plan.
_LONGEST_HOURS = 365 * 24


def parse_duration(text: str) -> float:
    """Returns the seconds of ``90s``, ``30m``, ``24h`` or sums such as ``1h30m``.

    Raises:
        ValueError: another form, no time at all, or more than a year.
    """
    if not re.fullmatch(r"([0-9]+(\.[0-9]+)?[hms])+", text):
        raise ValueError(f"{text!r} is not a duration; allowed: 90s, 30m, 24h, 1h30m")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in re.findall(r"([0-9.]+)([hms])", text))
    if seconds <= 0:
        raise ValueError(f"a duration of {text} is no time; it must be above 0")
    if seconds > _LONGEST_HOURS * _SECONDS["h"]:
        raise ValueError(f"a duration of {text} is longer than a year; it must be at most {_LONGEST_HOURS}h")
    return seconds


@dataclass(frozen=True)
class StepTime:
    """Median seconds of the clean steps, or of all where none was clean; how many were clean, of how many."""

    seconds: float
    clean: int
    measured: int

    @property
    def quiet(self) -> bool:
        """Whether enough of the steps were clean: a third."""
        return self.clean * MOST_STEPS >= self.measured * CLEAN_STEPS


def measure_step(run_step: Callable[[], None], agree: Callable[[bool], bool], patience: float) -> StepTime:
    """Times ``run_step()``, after a warm-up, until ``CLEAN_STEPS`` steps were clean or ``MOST_STEPS`` were timed.

    After ``patience`` seconds ``FEWEST_CLEAN_STEPS`` are enough, after twice as many one step is, clean or not.
    ``agree`` turns this process's wish to stop into a decision that all processes share.
    """
    began = time.perf_counter()
    for _ in range(WARM_UP_STEPS):
        run_step()
    samples: list[tuple[float, bool]] = []
    enough = False
    while not enough:
        samples.append(timed_step(run_step))
        clean = [seconds for seconds, quiet in samples if quiet]
        spent = time.perf_counter() - began
        needed = CLEAN_STEPS if spent < patience else FEWEST_CLEAN_STEPS
        enough = agree(len(clean) >= needed or len(samples) >= MOST_STEPS or spent >= 2 * patience)
    typical = median(clean or [seconds for seconds, _ in samples])
    return StepTime(typical, len(clean), len(samples))


def doubt_of(times: Iterable[StepTime]) -> str | None:
    """Says why the time of a step may not be that of a quiet machine: others were busy, or there was no time."""
    worst = min(times, key=lambda entry: (entry.quiet, entry.clean))
    if not worst.quiet:
        return (
            f"the machine is busy: only {worst.clean} of {worst.measured} calibration steps were undisturbed; "
            "the budget buys fewer steps than on a quiet machine, if these were slow"
        )
    if worst.clean < CLEAN_STEPS:
        return (
            f"the time of a step is the median of {worst.clean} in place of {CLEAN_STEPS}: budget or deadline are short"
        )
    return None


def timed_step(run_step: Callable[[], None]) -> tuple[float, bool]:
    """Returns the seconds of one step, and whether it was undisturbed (so far as the system tells)."""
    waited, began = queue_wait(), time.perf_counter()
    run_step()
    seconds, waited_after = time.perf_counter() - began, queue_wait()
    if waited is None or waited_after is None:
        return seconds, True
    return seconds, waited_after - waited <= QUIET_SHARE * seconds


def steps_in(budget: float, recipe: Recipe, full: float, smallest: float) -> int:
    """Returns the largest number of steps whose expected time is within ``budget`` seconds.

    Args:
        full, smallest: seconds of a step at ``batch_size`` and at ``ramp_start`` blocks; between them the
            time of a step is linear in its blocks.

    Raises:
        ValueError: not even one step fits.
    """
    first = smallest if recipe.ramp_start else full
    if budget < first:
        raise ValueError(f"a budget of {budget:g} s is shorter than one step, which takes {first:.3g} s")
    low, high = 1, int(budget / min(full, first)) + 2
    while high - low > 1:
        middle = (low + high) // 2
        if _expected(middle, recipe, full, smallest) <= budget:
            low = middle
        else:
            high = middle
    return low


def _expected(steps: int, recipe: Recipe, full: float, smallest: float) -> float:
    ramp = BatchPlan(recipe, steps).ramp_sizes()
    growth = (ramp - recipe.ramp_start) / max(recipe.batch_size - recipe.ramp_start, 1)
    return float(np.sum(smallest + (full - smallest) * growth)) + (steps - len(ramp)) * full
