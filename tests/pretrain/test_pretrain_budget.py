import math

import pytest

from hbert.pretrain import budget
from hbert.pretrain.recipes import Recipe


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("24h", 86400), ("1h30m", 5400), ("1.5m", 90), ("8760h", 31_536_000)],
)
def test_durations(text, seconds):
    assert budget.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "-5m", "5 m", "1d", "0s", "0h0m", "5ms", "1e3s", "\u0663s"])
def test_no_durations(text):
    with pytest.raises(ValueError, match="allowed: 90s|no time"):
        budget.parse_duration(text)


@pytest.mark.parametrize("text", ["8760h1s", "9" * 400 + "h"])
def test_durations_beyond_a_year(text):
    with pytest.raises(ValueError, match=f"a duration of {text} is longer than a year; it must be at most 8760h"):
        budget.parse_duration(text)


def test_steps_in_a_budget():
    assert budget.steps_in(10.0, Recipe(), full=0.25, smallest=0.25) == 40
    assert budget.steps_in(10.2, Recipe(), full=0.25, smallest=0.25) == 40
    with pytest.raises(ValueError, match="a budget of 0.2 s is shorter than one step, which takes 0.25 s"):
        budget.steps_in(0.2, Recipe(), full=0.25, smallest=0.25)


@pytest.mark.parametrize("total", [0.7, 3.0, 11.1, 100.0])
def test_steps_in_a_budget_with_a_ramp(total):
    recipe = Recipe(batch_size=20, ramp_start=4, ramp_fraction=0.4)

    def expected(steps):
        """Each step's time by itself: .1 s for 4 blocks, .5 s for 20, linear between."""
        ramp = round(0.4 * steps)
        sizes = [4 + 16 * step // ramp if step < ramp else 20 for step in range(steps)]
        return sum(0.1 + 0.4 * (size - 4) / 16 for size in sizes)

    found = budget.steps_in(total, recipe, full=0.5, smallest=0.1)
    assert expected(found) <= total + 1e-9 < expected(found + 1) + 1e-9


class Steps:
    """A step that takes `seconds[i]` and waits `waits[i]` for a core, on a clock of its own."""

    def __init__(self, monkeypatch, seconds, waits):
        self.seconds, self.waits, self.count = seconds, waits, 0
        self.now = self.waited = 0.0
        monkeypatch.setattr(budget.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(budget, "queue_wait", lambda: self.waited)

    def __call__(self):
        self.now += self.seconds(self.count)
        self.waited += self.waits(self.count)
        self.count += 1


def test_disturbed_and_first_steps_do_not_count(monkeypatch):
    # The warm-up is slow; every second step is disturbed and takes five times as long.
    steps = Steps(
        monkeypatch,
        lambda i: 9.0 if i < budget.WARM_UP_STEPS else 0.5 if i % 2 else 0.1,
        lambda i: 0.4 if i % 2 else 0.001,
    )
    found = budget.measure_step(steps, lambda wish: wish, math.inf)
    assert found.seconds == pytest.approx(0.1) and found.clean == budget.CLEAN_STEPS and found.quiet
    assert found.measured == 2 * budget.CLEAN_STEPS


def test_a_machine_that_is_never_quiet(monkeypatch):
    steps = Steps(monkeypatch, lambda i: 0.2, lambda i: 0.1)
    found = budget.measure_step(steps, lambda wish: wish, math.inf)
    assert found.seconds == pytest.approx(0.2) and found.clean == 0 and not found.quiet
    assert found.measured == budget.MOST_STEPS


def test_the_decision_to_stop_is_shared(monkeypatch):
    steps = Steps(monkeypatch, lambda i: 0.1, lambda i: 0.0)
    wishes = []

    def second_process(wish):
        wishes.append(wish)
        return len(wishes) == 50

    assert budget.measure_step(steps, second_process, math.inf).measured == 50
    assert wishes == [False] * 29 + [True] * 21


@pytest.mark.parametrize(
    ("patience", "clean_from", "measured"),
    # The warm-up takes 50 s, and every step 10.
    [(65.0, 0, 3), (95.0, 0, 5), (95.0, 4, 7), (65.0, 99, 8), (20.0, 0, 1), (math.inf, 0, budget.CLEAN_STEPS)],
)
def test_large_steps_are_timed_for_a_share_of_the_budget(monkeypatch, patience, clean_from, measured):
    steps = Steps(monkeypatch, lambda i: 10.0, lambda i: 5.0 * (i < budget.WARM_UP_STEPS + clean_from))
    found = budget.measure_step(steps, lambda wish: wish, patience)
    assert found == budget.StepTime(10.0, max(measured - clean_from, 0), measured)
    assert found.quiet == (clean_from < 99)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([budget.StepTime(1.0, 30, 90)], None),
        ([budget.StepTime(1.0, 31, 31), budget.StepTime(1.0, 30, 40)], None),
        ([budget.StepTime(1.0, 3, 3), budget.StepTime(1.0, 30, 30)], "the median of 3 in place of 30"),
        ([budget.StepTime(1.0, 30, 30), budget.StepTime(1.0, 29, 89)], "only 29 of 89 calibration steps"),
        ([budget.StepTime(1.0, 5, 5), budget.StepTime(1.0, 7, 80)], "only 7 of 80 calibration steps"),
    ],
)
def test_why_a_step_time_may_be_wrong(times, message):
    said = budget.doubt_of(times)
    assert said is None if message is None else message in said
