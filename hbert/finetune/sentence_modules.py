"""How ``hbert embed`` makes a vector of a text by default: as sentence-transformers does with the same checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from hbert.convert.files import SENTENCE_MODULES
from hbert.data.storage import read_json
from hbert.errors import HbertError

from .inference import POOLINGS

_LIBRARY = "sentence_transformers."
_COMPUTED = ("Transformer", "Pooling", "Normalize")
# A truth value for each mode, before there was "pooling_mode".
_MODE_FLAG = re.compile("pooling_mode_(.+?)(_tokens?)?")
_REMEDY = "hbert.optimize takes such a model, and its encode computes all of it"


def pooling_and_normalize(name: str, pooling: str | None, normalize: bool | None) -> tuple[str, bool]:
    """Returns how to pool and whether to normalize: what is given, else what modules.json says.

    Without that file it is the mean, not normalized. Where both are given the file is not read.

    Args:
        name: a folder or a hub name.

    Raises:
        HbertError: the file says what embed does not compute, or it or the configuration of its pooling is damaged.
    """
    if pooling is not None and normalize is not None:
        return pooling, normalize
    try:
        modules = _read(name, SENTENCE_MODULES)
        if modules is None:
            return pooling or POOLINGS[0], bool(normalize)
        kinds = _kinds(name, modules)
        pooling = pooling or _pooling(name, _read(name, f"{modules[1]['path']}/config.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HbertError(f"{name!r}: {SENTENCE_MODULES} or the configuration of its pooling is damaged") from error
    return pooling, len(kinds) == len(_COMPUTED) if normalize is None else normalize


def _read(name: str, file: str) -> Any:
    """The content of a JSON file of the checkpoint; None: it has no such file."""
    try:
        path = cached_file(name, file)
    except OSError:
        return None
    return read_json(Path(str(path)))


def _kinds(name: str, modules: list[dict[str, str]]) -> list[str]:
    types = [module["type"] for module in modules]
    # A class of another package may share the name only.
    kinds = [kind.rpartition(".")[2] if kind.startswith(_LIBRARY) else kind for kind in types]
    if tuple(kinds) not in (_COMPUTED, _COMPUTED[:2]):
        raise HbertError(f"{name!r} is made of {', '.join(kinds)}; embed has only {', '.join(_COMPUTED)}: {_REMEDY}")
    return kinds


def _pooling(name: str, config: Mapping[str, Any]) -> str:
    flags = [match[1] for key, value in config.items() if value is True and (match := _MODE_FLAG.fullmatch(key))]
    found = config.get("pooling_mode") or flags or POOLINGS[0]
    modes = [found] if isinstance(found, str) else found
    if len(modes) > 1 or modes[0] not in POOLINGS:
        raise HbertError(f"{name!r} pools by {', '.join(modes)}; embed by one of {', '.join(POOLINGS)}: {_REMEDY}")
    return modes[0]
