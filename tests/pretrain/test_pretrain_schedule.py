import math

import pytest

from hbert.pretrain.recipes import Recipe, recipe
from hbert.pretrain.schedule import BatchPlan, lr_factor


def factors(steps, **options):
    return [lr_factor(step, steps, Recipe(**options)) for step in range(steps)]


def test_linear_by_hand():
    assert factors(10, warmup=0.3) == pytest.approx([1 / 4, 2 / 4, 3 / 4, *(k / 7 for k in range(7, 0, -1))])
    assert factors(4, warmup=0.0) == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4])


def test_cosine_by_hand():
    half = math.sqrt(0.5)
    expected = [1 / 3, 2 / 3, 1, (1 + half) / 2, 1 / 2, (1 - half) / 2]
    assert factors(6, warmup=0.33, schedule="cosine") == pytest.approx(expected)


def test_wsd_by_hand():
    expected = [1 / 3, 2 / 3, *[1] * 5, 1, 2 / 3, 1 / 3]
    assert factors(10, warmup=0.2, schedule="wsd", decay=0.3) == pytest.approx(expected)
    assert factors(5, warmup=0.0, schedule="wsd", decay=0.0) == [1.0] * 5


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 1.0])
def test_every_step_learns_and_none_exceeds_the_peak(schedule, warmup):
    for steps in (1, 2, 37, 100):
        assert all(0 < factor <= 1 for factor in factors(steps, warmup=warmup, schedule=schedule))


def test_the_ramp_covers_the_stream_without_gaps():
    plan = BatchPlan(Recipe(batch_size=16, ramp_start=4, ramp_fraction=0.5), max_steps=24)
    sizes = [plan.size(step) for step in range(24)]
    assert sizes == [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, *[16] * 12]
    assert [plan.start(step) for step in range(25)] == [sum(sizes[:step]) for step in range(25)]


def test_without_a_ramp():
    plan = BatchPlan(Recipe(batch_size=3), max_steps=5)
    assert [(plan.size(step), plan.start(step)) for step in range(3)] == [(3, 0), (3, 3), (3, 6)]


def test_recipes_are_what_their_sources_say():
    paper, vanilla = recipe("paper", 768), recipe("vanilla", 768)
    assert (paper.lr, paper.batch_size, paper.block_size, paper.dropout) == (1e-5, 48, 512, 0.05)
    assert (vanilla.lr, vanilla.dropout, vanilla.beta2, vanilla.weight_decay) == (1e-4, 0.1, 0.999, 0.01)
    assert vanilla.model["norm_style"] == "post_ln" and vanilla.model["positions"] == "learned"
    assert recipe("budget", 256).lr > recipe("budget", 768).lr
    with pytest.raises(ValueError, match="unknown recipe 'fast'; allowed: budget, paper, vanilla"):
        recipe("fast", 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"masking_rate": 0.0}, r"masking_rate is 0.0; allowed is \(0, 1\]"),
        ({"mask_replace": 0.9, "random_replace": 0.2}, "above 1"),
        ({"beta2": 1.0}, r"beta2 is 1.0; allowed is \[0, 1\)"),
        ({"warmup": 1.5}, r"warmup is 1.5; allowed is \[0, 1\]"),
        ({"schedule": "step"}, "schedule is 'step'; allowed: linear, cosine, wsd"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; allowed: adamw, muon"),
        ({"ramp_start": 4}, "needs both ramp_start and ramp_fraction"),
        ({"ramp_start": 40, "ramp_fraction": 0.1}, "ramp_start is 40"),
        ({"accumulate": 17}, "accumulate is 17, but a batch has only 16 blocks"),
    ],
)
def test_bad_recipes(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)
