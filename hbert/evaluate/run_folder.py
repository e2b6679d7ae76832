"""What a training run left in its folder: ``run.json`` and ``metrics.jsonl``, read and checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbert.data.corpus import Corpus, load_corpus
from hbert.data.storage import read_json
from hbert.errors import HbertError


@dataclass(frozen=True)
class RunInfo:
    """What a report needs of run.json.

    ``settings`` are those that the run was asked for; ``status`` is whether and how it ended. ``step_seconds`` is the
    time of a step: that of the calibration, or the median of a run without a budget, None while that is not finished;
    ``ramp_seconds`` is the calibrated time of a first step under a batch ramp.
    ``length`` is that of the held-out blocks, ``corpus`` the fingerprint of the text, ``tokenizer`` the
    SHA-256 of the tokenizer, ``token_cache`` where the tokens were.
    """

    settings: dict[str, Any]
    status: str
    parameters: int
    max_steps: int
    step_seconds: float | None
    ramp_seconds: float | None
    length: int
    corpus: str
    tokenizer: str
    token_cache: str

    def clock(self, step: int, tokens: int) -> float | None:
        """Seconds on a clock of steps, which other load on the machine changes through step_seconds alone.

        step x step_seconds; under a batch ramp the time of a step is linear in its blocks, as in the budget.
        """
        if self.step_seconds is None or self.ramp_seconds is None:
            return None if self.step_seconds is None else step * self.step_seconds
        first, full = self.settings["ramp_start"], self.settings["batch_size"]
        grown = tokens / self.settings["block_size"] - step * first
        slope = (self.step_seconds - self.ramp_seconds) / max(full - first, 1)
        return step * self.ramp_seconds + slope * grown

    def load_corpus(self) -> Corpus:
        """Returns the corpus that the settings name.

        Raises:
            HbertError: it cannot be loaded.
        """
        recipe = self.settings["recipe_corpus"]
        return load_corpus([recipe] if recipe else [], text=self.settings["data"])


@dataclass(frozen=True)
class Evaluation:
    """One held-out evaluation: ``loss`` in nats; ``train_seconds`` of optimizer steps alone until then."""

    step: int
    tokens: int
    loss: float
    accuracy: float
    num_masked: int
    per_source: dict[str, dict[str, float]]
    train_seconds: float


@dataclass(frozen=True)
class Run:
    """One run: ``label`` tells it from the other runs of a report, ``info`` its settings.

    One that has just begun has no evaluations.
    """

    path: Path
    label: str
    info: RunInfo
    evaluations: list[Evaluation]

    @property
    def last(self) -> Evaluation:
        """The newest evaluation."""
        return self.evaluations[-1]

    @property
    def finished(self) -> bool:
        """Whether the newest evaluation is that of the last step."""
        return self.last.step >= self.info.max_steps

    @property
    def text_key(self) -> tuple[str, str]:
        """Names the tokens that the run was trained and evaluated on: corpus and tokenizer."""
        return self.info.corpus, self.info.tokenizer

    def clock(self, evaluation: Evaluation) -> float | None:
        """Seconds on the clock of steps at an evaluation, None where a run has no such clock yet."""
        return self.info.clock(evaluation.step, evaluation.tokens)

    def escape(self, mark: float) -> Evaluation | None:
        """The first evaluation whose accuracy is above ``mark``, or None."""
        return next((found for found in self.evaluations if found.accuracy > mark), None)


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Reads run folders and gives them labels: folder names, or whole paths where two names are the same.

    Raises:
        HbertError: not a run folder, an unreadable file, or a run given twice.
    """
    folders = [Path(path) for path in paths]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise HbertError("a run is given twice")
    names = [folder.resolve().name for folder in folders]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    return [_read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def read_info(folder: Path) -> RunInfo:
    """Reads ``run.json``.

    Raises:
        HbertError: there is none, or it is not one of hbert pretrain.
    """
    file = folder / "run.json"
    if not file.is_file():
        raise HbertError(f"{folder} is not a run folder: it has no run.json")
    try:
        content = read_json(file)
        return RunInfo(
            settings=content["settings"],
            status=content["status"],
            parameters=content["parameters"]["total"],
            max_steps=content["max_steps"],
            step_seconds=content["step_seconds"],
            ramp_seconds=((content["plan"]["calibration"] or {}).get("ramp_start") or {}).get("seconds"),
            length=content["eval"]["length"],
            corpus=content["corpus"]["fingerprint"],
            tokenizer=content["tokenizer"]["sha256"],
            token_cache=content["token_cache"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HbertError(f"{file} is not from hbert pretrain: {error!r}") from error


def model_folder(name: str) -> tuple[str, RunInfo | None]:
    """Returns the folder of the model that is meant by a name, and the run that it is of, None where it is of no run.

    A run that has not ended has its model in its newest checkpoint.

    Raises:
        HbertError: a run.json is not one of hbert pretrain, or the run has not ended and no model.
    """
    folder = Path(name).resolve()
    if (folder / "run.json").is_file():
        info = read_info(folder)
        return _newest_model(name, info), info
    run = folder.parent.parent
    if not (run / "run.json").is_file():
        return name, None
    from hbert.pretrain.checkpoint import CHECKPOINTS

    return name, read_info(run) if folder.parent.name == CHECKPOINTS else None


def _newest_model(name: str, info: RunInfo) -> str:
    from hbert.pretrain.checkpoint import checkpoints
    from hbert.pretrain.loop import DEADLINE, FINISHED

    run = Path(name)
    exported = (run / "config.json").is_file()
    if exported and info.status in (FINISHED, DEADLINE):
        return name
    # Checkpoints were weights alone once.
    models = [saved for saved in checkpoints(run) if (saved / "config.json").is_file()]
    if models:
        return str(models[-1])
    if exported:
        return name
    raise HbertError(f"{name} has not ended, and none of its checkpoints is a model; go on with --resume")


def _read_run(folder: Path, label: str) -> Run:
    info = read_info(folder)
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    # What stands behind the last line end is being written, or was cut off when the run was killed.
    entries = [_entry(file, number, line) for number, line in enumerate(lines[:-1], 1)]
    return Run(folder, label, info, [evaluation for evaluation in entries if evaluation is not None])


def _entry(file: Path, number: int, line: str) -> Evaluation | None:
    try:
        values = json.loads(line)
        if values["kind"] != "eval":
            return None
        return Evaluation(**{name: values[name] for name in Evaluation.__dataclass_fields__})
    except (ValueError, KeyError, TypeError) as error:
        raise HbertError(f"{file}, line {number} is not a metrics line: {error!r}") from error
