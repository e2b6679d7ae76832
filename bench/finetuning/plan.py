"""What is run: tasks, models, learning rates, seeds."""

from __future__ import annotations

from dataclasses import dataclass

from bench.pretraining.plan import FINE_TUNED, LAST_SEED

# Model -> the pretraining run whose weights it starts from: 20 minutes each, and an hour.
MODELS = {name: f"main-{name}-{LAST_SEED}" for name in FINE_TUNED}
HOUR_MODELS = {"b60": "hour-b-0", "g60": "hour-g-0"}


@dataclass(frozen=True)
class Task:
    """How a task is trained: at most so many epochs, in float32 ("fp32") or under autocast to bfloat16 ("bf16")."""

    epochs: int
    dtype: str = "bf16"
    models: tuple[str, ...] = tuple(MODELS)


# Epochs of the paper, where intents of hwu64, which MASSIVE was drawn from, stand in for MASSIVE. All models of a task
# in one dtype: bfloat16 takes under half the time where the processor multiplies it; hwu64 was begun where none did.
# r52 and rotten are not the paper's; they are for whoever has no files of the other two: BERT and one hybrid do.
TASKS = {
    "emotion": Task(10),
    "hwu64": Task(15, "fp32", (*MODELS, *HOUR_MODELS)),
    "r52": Task(10, models=("b", "g")),
    "rotten": Task(10, models=("b", "g")),
}
PAPERS_RATE = 5e-5
# And larger ones: these models are small and were trained for 20 minutes.
LEARNING_RATES = (PAPERS_RATE, 2e-4, 5e-4)
SEEDS = (0, 1, 2)
# Epochs without a better score on the validation split after which a run ends.
PATIENCE = 3


@dataclass(frozen=True)
class Run:
    """One fine-tuning; `lr` None: the best on the validation split of those that seed 0 tried."""

    task: str
    model: str
    seed: int
    lr: float | None = None

    @property
    def name(self) -> str:
        """Its name, a folder's too."""
        return f"{self.task}-{self.model}-{self.seed if self.lr is None else f'{self.lr:g}'}"


def models(task: str) -> tuple[str, ...]:
    """The models that are fine-tuned on a task."""
    return TASKS[task].models


def pretrained(model: str) -> str:
    """The pretraining run whose weights a model starts from."""
    return (MODELS | HOUR_MODELS)[model]


def baseline(model: str) -> str:
    """What a model is compared with: BERT in this kit, pretrained as long."""
    return "b60" if model in HOUR_MODELS else "b"


def sweep_run(task: str, model: str, lr: float) -> Run:
    """A run that tries a learning rate, with the first seed."""
    return Run(task, model, SEEDS[0], lr)


def runs(tasks: tuple[str, ...]) -> list[Run]:
    """All runs behind the sweeps, whose best is that of the first seed, in the order in which they are worth having."""
    return [Run(task, model, seed) for seed in SEEDS[1:] for task in tasks for model in models(task)]
