"""Registers the models with the Auto classes of transformers, when these are loaded and not before.

So ``import hbert`` costs nothing where no model is used, and ``AutoModel.from_pretrained`` knows HBERT whichever
of the two packages was imported first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_LAYERS = "transformers.modeling_layers"
# Their module -> ours, which registers with it when it is loaded.
_REGISTERED_BY = {
    "transformers.models.auto.configuration_auto": "hbert.config",
    "transformers.models.auto.modeling_auto": "hbert.modeling",
    # It imports modeling_auto before it has the class that our layers extend: then ours come after it.
    _LAYERS: "hbert.modeling",
}


class _AfterImport(MetaPathFinder):
    """Imports ``ours`` as soon as ``theirs`` has been imported."""

    def __init__(self, theirs: str, ours: str):
        self.theirs, self.ours = theirs, ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self.theirs == _LAYERS or not _is_loading(_LAYERS):
                import_module(self.ours)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _is_loading(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return getattr(spec, "_initializing", False)


def register_with_transformers() -> None:
    """Registers what transformers has loaded, and sees to the rest when it does."""
    for theirs, ours in _REGISTERED_BY.items():
        if theirs in sys.modules:
            import_module(ours)
        else:
            sys.meta_path.insert(0, _AfterImport(theirs, ours))
