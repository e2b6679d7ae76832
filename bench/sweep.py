"""Learning rates to choose from, of the pretraining and of the fine-tuning experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MOST_RATES = 5


def with_edges(rates: Sequence[float], best: Callable[[Sequence[float]], float | None]) -> list[float]:
    """The rates of a sweep, as far as they are known.

    While the best one is the lowest or the highest, the next one by a factor of two is tried, up to ``MOST_RATES``.

    Args:
        rates: to begin with; none: no sweep.
        best: the best of some rates, None before all of them were tried.
    """
    found = list(rates)
    while 0 < len(found) < MOST_RATES and (chosen := best(found)) in (lowest := min(found), max(found)):
        found.append(lowest / 2 if chosen == lowest else 2 * max(found))
    return found
