"""What a run shows, on a terminal and in a file."""

import io

import pytest
from rich.console import Console

from hbert.pretrain import progress
from hbert.pretrain.engine import StepResult
from hbert.pretrain.progress import Display


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def shown(monkeypatch):
    """Opens a display on a terminal, or not on one; returns it and what it has written."""

    def make(terminal, silent=False):
        file = io.StringIO()

        def console(**options):
            assert options.pop("stderr")
            return Console(file=file, force_terminal=terminal, width=80, **options)

        monkeypatch.setattr(progress, "Console", console)
        return Display(silent), file

    return make


def result(loss, correct):
    return StepResult(loss=loss, correct=correct, masked=10, grad_norm=1.0, votes=())


def three_steps(display, clock, seconds):
    """An evaluation and three steps of 5 s and 640 tokens, ``seconds`` apart."""
    with display:
        display.start(2, 1000)
        display.evaluated(4.0, 0.125)
        for step, loss, correct in ((3, 3.0, 1), (4, 2.0, 2), (5, 1.0, 6)):
            clock.now += seconds
            display.stepped(step, result(loss, correct), tokens=640, seconds=5.0)


def test_lines_where_there_is_no_terminal(shown, clock):
    display, file = shown(terminal=False)
    three_steps(display, clock, seconds=5.0)
    # Ten seconds after the start: the means of the first two steps. 996 steps of 5 s are left.
    assert file.getvalue().splitlines() == [
        "step 4/1,000  1:23:00 left  128 tokens/s  loss 2.500  masked accuracy 0.1500  held out 4.000 0.1250"
    ]


def test_the_last_step_has_a_line(shown, clock):
    display, file = shown(terminal=False)
    with display:
        display.start(0, 1)
        display.stepped(1, result(0.5, 9), tokens=320, seconds=0.5)
    assert file.getvalue() == "step 1/1  0:00 left  640 tokens/s  loss 0.500  masked accuracy 0.9000\n"


def test_a_bar_on_a_terminal(shown, clock):
    display, file = shown(terminal=True)
    three_steps(display, clock, seconds=0.5)
    output = file.getvalue()
    # Every half second, each time the means since the last.
    for line in ("step 3/1,000  1:23:05 left  128 tokens/s", "step 5/1,000  1:22:55 left  128 tokens/s"):
        assert line in output
    for line in ("loss 3.000  masked accuracy 0.1000", "loss 1.000  masked accuracy 0.6000  held out 4.000 0.1250"):
        assert line in output
    assert "━" in output
    (task,) = display._bar.tasks
    assert (task.completed, task.total) == (5, 1000)


def test_a_bar_is_not_drawn_at_every_step(shown, clock):
    display, file = shown(terminal=True)
    three_steps(display, clock, seconds=0.25)
    assert "step 4/1,000" in file.getvalue() and "step 3/" not in file.getvalue() and "step 5/" not in file.getvalue()
    assert "loss 2.500" in file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_other_processes_are_silent(shown, clock, terminal):
    display, file = shown(terminal, silent=True)
    display.say("a line")
    three_steps(display, clock, seconds=20.0)
    assert file.getvalue() == ""
