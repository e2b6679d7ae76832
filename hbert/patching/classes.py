"""Objects change their class, and nothing else: a patched module is of a subclass of its own class.

So its parameters, buffers, hooks and names stay what and where they are, and taking the class back undoes it
all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from hbert.convert.families import FAMILIES, Family

from .encoder import Forward, embeddings_forward, encoder_forward, layer_forward
from .masked_lm import masked_lm_forward

_FORWARDS: dict[str, Callable[[Family, Forward], Forward]] = {
    "embeddings": embeddings_forward,
    "layer": layer_forward,
    "encoder": encoder_forward,
    "masked_lm": masked_lm_forward,
}


def patch_module(module: nn.Module, role: str, model_type: str) -> None:
    """Gives a module the packed forward of its role: embeddings, layer, encoder or masked_lm."""
    kind: Any = type(module)
    module.__class__ = _patched_class(kind, role, model_type)


def unpatch_module(module: nn.Module) -> bool:
    """Gives a module its class back; False: its class is not one that :func:`patch_module` made."""
    original = vars(type(module)).get("_hbert_original")
    if original is not None:
        module.__class__ = original
    return original is not None


@functools.cache
def _patched_class(original: Any, role: str, model_type: str) -> type[nn.Module]:
    """The subclass; it goes by the name of the original, which transformers writes into config.json."""
    packed_forward = _FORWARDS[role](FAMILIES[model_type], original.forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A wrapper that accelerate has put on the object may outlive the patch.
        current = packed_forward if isinstance(self, patched) else original.forward
        return current(self, *args, **kwargs)

    # Not functools.wraps: accelerate unwraps what has __wrapped__, down to the original.
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    forward.__doc__ = original.forward.__doc__

    def new(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        # type(model)(config) and type(model).from_pretrained(...): a new model, which nobody has patched.
        return original(*args, **kwargs) if args or kwargs else object.__new__(cls)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _revive, (original, role, model_type), vars(self)

    patched: type[nn.Module] = type(
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__new__": new,
            "__reduce_ex__": reduce,
            "_hbert_original": original,
            "forward": forward,
        },
    )
    return patched


def _revive(original: Any, role: str, model_type: str) -> nn.Module:
    """What copies and pickles of a patched module begin with."""
    return object.__new__(_patched_class(original, role, model_type))
