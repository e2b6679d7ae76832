"""Step times of a group of arms from one interleaved calibration: what turns a budget of time into steps."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path
from statistics import median

from accelerate import Accelerator
from rich.console import Console

from bench.harness import order_of
from bench.pretraining import minilm, plan, store
from hbert.data.storage import write_json
from hbert.pretrain import machine
from hbert.pretrain.budget import CLEAN_STEPS, timed_step
from hbert.pretrain.options import add_arguments, given_options
from hbert.pretrain.settings import Settings, resolve
from hbert.pretrain.text import prepare_text
from hbert.pretrain.trainer import build_batches, build_engine
from hbert_kernels.memory import keep_heap

_WARM_UP = 3
_MOST_ROUNDS = 60


def calibrate(group: str, console: Console) -> None:
    """Times one step of every arm in turn until each has enough undisturbed ones, and keeps the medians."""
    keep_heap()
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    arms = [arm for arm in plan.ARMS.values() if arm.group == group]
    cases = {f"{arm.name}-512": _stepper(arm, "512", accelerator) for arm in arms if arm.timed_as is None}
    cases |= {f"{arm.name}-128": _stepper(arm, "128", accelerator) for arm in arms if arm.name in plan.SHORT}
    samples: dict[str, list[tuple[float, bool]]] = {name: [] for name in cases}
    for name, step in cases.items():
        console.print(f"warming up {name}")
        for _ in range(_WARM_UP):
            step()
    for turn in range(_MOST_ROUNDS):
        for name in order_of(list(cases), turn):
            samples[name].append(timed_step(cases[name]))
        if all(sum(quiet for _, quiet in taken) >= CLEAN_STEPS for taken in samples.values()):
            break
    results = {name: _summary(taken) for name, taken in samples.items()}
    for name, result in results.items():
        clean = f"{result['clean']} of {result['measured']} steps clean"
        console.print(f"{name:8} {result['median'] * 1e3:7.1f} ms, {clean}")
    store.RESULTS.mkdir(parents=True, exist_ok=True)
    record = {"date": datetime.date.today().isoformat(), "machine": machine.describe(accelerator.device)}
    write_json(store.calibration(group), {**record, "software": machine.software(), "step_seconds": results})


def _settings(arm: plan.Arm, blocks: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [*arm.common, *arm.flags, *plan.BLOCKS[blocks], "--max-steps", "1"]
    return resolve(given_options(parser.parse_args(words)))


def _stepper(arm: plan.Arm, blocks: str, accelerator: Accelerator) -> Callable[[], None]:
    if plan.MINILM in arm.flags:
        minilm.unpack(Path(plan.MINILM))
    settings = _settings(arm, blocks)
    cache = prepare_text(settings, lambda line: None).cache
    engine = build_engine(settings, cache, accelerator, settings.dtype)
    batches = build_batches(settings, cache, accelerator)
    size = settings.recipe.batch_size

    def step() -> None:
        # A small rate: many steps on one batch must not run away.
        engine.step(0, batches.at(0, 0, size), 1e-3)

    return step


def _summary(taken: list[tuple[float, bool]]) -> dict[str, float]:
    clean = [seconds for seconds, quiet in taken if quiet]
    return {"median": median(clean or [seconds for seconds, _ in taken]), "clean": len(clean), "measured": len(taken)}
