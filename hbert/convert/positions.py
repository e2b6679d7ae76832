"""More positions than a checkpoint has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hbert.config import HBertConfig
from hbert.embeddings import sinusoidal_table


def interpolated(table: Tensor, length: int) -> Tensor:
    """The table stretched: the first and the last of its M rows stay first and last.

    Row i of the result is ``(1 - w) table[m] + w table[m + 1]`` with x = i (M - 1) / (N - 1), m = floor(x), w
    = x - m.

    Args:
        table: [M, H].
        length: N, at least 2.

    Returns:
        [N, H] in the dtype of the table; computed in float64.
    """
    place = torch.arange(length, dtype=torch.float64) * (len(table) - 1) / (length - 1)
    lower = place.floor().long()
    upper = (lower + 1).clamp(max=len(table) - 1)
    wide, share = table.double(), (place - lower)[:, None]
    return ((1 - share) * wide[lower] + share * wide[upper]).to(table.dtype)


def scaled_sinusoids(table: Tensor, length: int) -> Tensor:
    """The sinusoidal table S of :func:`hbert.embeddings.sinusoidal_table`, as large as the learned one.

    ``S * rms(table) / rms(S)``, where rms is the root of the mean square over all rows and columns. The
    learned rows themselves are gone.

    Args:
        table: [M, H].
        length: N.

    Returns:
        [N, H] in the dtype of the table; computed in float64.
    """
    fresh = sinusoidal_table(length, table.shape[1]).double()
    return (fresh * (_rms(table.double()) / _rms(fresh))).to(table.dtype)


def _rms(table: Tensor) -> Tensor:
    return table.square().mean().sqrt()


# How each is told in a report, and what makes it.
EXTENSIONS: dict[str, tuple[str, Callable[[Tensor, int], Tensor]]] = {
    "interpolate": ("interpolated from {} rows", interpolated),
    "sinusoidal": ("sinusoids of the RMS of {} learned rows", scaled_sinusoids),
}


def check_extension(name: str | None, there: HBertConfig, here: HBertConfig) -> None:
    """Checks that an extension is known and that there is something to extend.

    Raises:
        ValueError: it is not, or there is not.
    """
    if name is None:
        return
    if name not in EXTENSIONS:
        raise ValueError(f"unknown extension of positions {name!r}; allowed: {', '.join(EXTENSIONS)}")
    for config, whose in ((there, "the checkpoint's"), (here, "the model's")):
        if config.positions != "learned":
            raise ValueError(f"only learned positions are extended; {whose} are {config.positions}")
    if here.max_position_embeddings <= there.max_position_embeddings:
        raise ValueError(
            f"nothing to extend: the checkpoint has {there.max_position_embeddings} positions, the model "
            f"{here.max_position_embeddings}"
        )


def check_more_are_asked_for(name: str | None, there: HBertConfig, here: HBertConfig) -> None:
    """Checks that a model with more learned positions than the checkpoint comes with a word about how.

    Raises:
        ValueError: it does not.
    """
    learned = here.positions == there.positions == "learned"
    if name is None and learned and here.max_position_embeddings > there.max_position_embeddings:
        raise ValueError(
            f"the checkpoint has {there.max_position_embeddings} learned positions; how shall they become "
            f"{here.max_position_embeddings}? allowed: {', '.join(EXTENSIONS)}"
        )


def set_positions(config: HBertConfig, length: int) -> None:
    """Gives a configuration ``length`` positions.

    Raises:
        ValueError: not a positive number.
    """
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"the number of positions must be a positive integer, got {length!r}")
    config.max_position_embeddings = length
