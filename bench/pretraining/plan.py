"""What is run: arms, sizes, budgets, seeds. Everything else about a run is the recipe of `hbert pretrain`."""

from __future__ import annotations

from dataclasses import dataclass

SIZE = "6x256x4"
BUDGET_SECONDS = 20 * 60
HOUR_SECONDS = 60 * 60
SWEEP_SHARE = 0.1
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
# The same tokens in every step: blocks of 512 as in the paper, of 128 as a second row.
BLOCKS = {"512": ("--block-size", "512", "--batch-size", "4"), "128": ("--block-size", "128", "--batch-size", "16")}
_ALWAYS = ("--dtype", "fp32", "--eval-blocks", "256", "--optimizer", "adamw")
COMMON = ("--size", SIZE, "--vocab-size", "8192", *_ALWAYS)
# The second group: one model, the size of a checkpoint whose weights and vocabulary it may take.
MINILM = "runs/minilm"
_COMMON_OF_INIT = ("--arch", "v1c", "--size", "6x384x12", *_ALWAYS, "--set", "initializer_range=0.02")


@dataclass(frozen=True)
class Arm:
    """One model and how it is trained; `lr`: no sweep, this one; its step takes `slower` times that of `timed_as`.

    Arms of one group are compared with each other, and timed together.
    """

    name: str
    what: str
    flags: tuple[str, ...]
    lr: float | None = None
    timed_as: str | None = None
    slower: float = 1.0
    common: tuple[str, ...] = COMMON
    group: str = "arms"


def _start(name: str, what: str, *flags: str) -> Arm:
    timed_as = None if name == "normal" else "normal"
    return Arm(name, what, flags, 1e-3, timed_as, common=_COMMON_OF_INIT, group="start")


def _with_muon(name: str, lr: float, slower: float, *flags: str, timed_as: str | None = None) -> Arm:
    # At Muon's default rate, and the arm's own for what AdamW trains. What a step costs more was measured on the kind
    # of machine that the calibration is of, where Muon's products are float32's: docs/results-pretraining.md.
    return Arm(f"{name}m", f"{name} with Muon", (*flags, "--optimizer", "muon"), lr, timed_as or name, slower=slower)


# BERT's own layout in our kit: the recipe stays the one of all other arms.
_POST_NORM = ("--set", "norm_style=post_ln")
_STOCK = ("--arch", "bert", "--recipe", "vanilla", "--compile")
_BERTS_INIT = ("--set", "initializer_range=0.02")
# Found behind the calibration: the steps of h, which has two layers of self-attention, cost more than its own.
_LAST = ("--arch", "AAAAAS", "--set", "conv_kernel_size=3")
_BRANCH = ("--set", "conv_kernel_size=3", "--set", "conv_placement=branch")

ARMS = {
    arm.name: arm
    for arm in (
        Arm("a", "BERT of transformers, compiled, its own recipe", _STOCK, lr=1e-4),
        Arm("b", "vanilla BERT in this kit", ("--arch", "vanilla", *_POST_NORM)),
        Arm("c", "HBERT-v1", ("--arch", "v1")),
        Arm("d", "HBERT-v2", ("--arch", "v2")),
        Arm("e", "additive only", ("--arch", "additive")),
        Arm("f", "control: self-attention only, sub-layer norm", ("--arch", "vanilla")),
        Arm("g", "HBERT-v1c", ("--arch", "v1c")),
        Arm("h", "HBERT-v2c", ("--arch", "v2c")),
        Arm("i", "control: f with the short convolution as a branch of every layer", ("--arch", "vanilla", *_BRANCH)),
        Arm("j", "additive only, with the short convolution", ("--arch", "additive-c")),
        Arm("k", "hybrid whose last layer alone is self-attention, with the convolution", _LAST, timed_as="h"),
        Arm("b02", "b from BERT's own N(0, .02)", ("--arch", "vanilla", *_POST_NORM, *_BERTS_INIT), timed_as="b"),
        # Whether a sweep of two minutes, at whose end no rate has left the plateau, finds the right rate for b.
        Arm("b5", "b at 5e-4, twice the rate of its sweep", ("--arch", "vanilla", *_POST_NORM), 5e-4, timed_as="b"),
        Arm("g02", "g from BERT's own N(0, .02)", ("--arch", "v1c", *_BERTS_INIT), timed_as="g"),
        _with_muon("g", 2e-3, 1.27, "--arch", "v1c"),
        _with_muon("b", 2.5e-4, 1.21, "--arch", "vanilla", *_POST_NORM),
        _with_muon("k", 2e-3, 1.19, *_LAST, timed_as="h"),
        _with_muon("i", 1e-3, 1.19, "--arch", "vanilla", *_BRANCH),
        _with_muon("j", 2e-3, 1.28, "--arch", "additive-c"),
        _start("normal", "from N(0, .02)", "--tokenizer", MINILM),
        _start("magneto", "from Magneto's gains", "--tokenizer", MINILM, "--set", "init=magneto"),
        _start("embeddings", "from MiniLM's token embeddings", "--init-from", MINILM, "--init-parts", "embeddings"),
        _start("all", "from all of MiniLM that corresponds", "--init-from", MINILM, "--init-parts", "all"),
    )
}  # fmt: skip
PAIRED = ("k", "j", "g", "b", "i")  # three seeds each
COMPARED = (*PAIRED, "a")  # in the table of differences; b - a is what recipe and engineering make of BERT's layers
BY_SOURCE = ("j", "k", "g", "i", "b", "a")
# The lines of README's table: what the layers are, the arm without the short convolution, the one with it.
IN_BRIEF = (
    ("BERT as transformers ships it, compiled", "a", ""),
    ("vanilla BERT in our kit", "b", ""),
    ("the same from BERT's own initialization", "b02", ""),
    ("self-attention only, sub-layer norm", "f", "i"),
    ("HBERT-v1, the paper's", "c", "g"),
    ("HBERT-v2, the paper's", "d", "h"),
    ("five additive layers, then one of self-attention", "", "k"),
    ("additive layers only", "e", "j"),
)
# Fine-tuned by bench.finetuning, with their last seed; the others are compared with the first one.
FINE_TUNED = ("b", "c", "d", "g", "a")
LAST_SEED = 2
SHORT = ("b", "g", "i")  # with blocks of 128, too
LONG = ("b", "g", "j", "k")  # an hour each
FIRST = ("k", "j", "g", "b", "i", "f", "b02", "a")  # what the headline needs


@dataclass(frozen=True)
class Run:
    """One training run; its steps are `seconds` of the arm's calibrated step time. `lr` None: the best of a sweep."""

    name: str
    arm: Arm
    blocks: str
    seconds: float
    seed: int = 0
    lr: float | None = None


def sweep_run(arm: Arm, lr: float) -> Run:
    """A run that tries a learning rate."""
    return Run(f"sweep-{arm.name}-{lr:g}", arm, "512", SWEEP_SHARE * BUDGET_SECONDS, lr=lr)


def runs() -> list[Run]:
    """All runs but those of the sweeps, in the order in which they are worth having."""
    main = {arm.name: Run(f"main-{arm.name}-0", arm, "512", BUDGET_SECONDS, lr=arm.lr) for arm in ARMS.values()}
    order = dict.fromkeys((*FIRST, *ARMS))
    arms = [main[name] for name in order]
    again = [*((name, 1) for name in PAIRED), *((name, LAST_SEED) for name in dict.fromkeys((*PAIRED, *FINE_TUNED)))]
    seeds = [Run(f"main-{name}-{seed}", ARMS[name], "512", BUDGET_SECONDS, seed, ARMS[name].lr) for name, seed in again]
    short = [Run(f"block128-{name}-0", ARMS[name], "128", BUDGET_SECONDS) for name in SHORT]
    hour = [Run(f"hour-{name}-0", ARMS[name], "512", HOUR_SECONDS) for name in LONG]
    return [*arms, *seeds, *short, *hour]
