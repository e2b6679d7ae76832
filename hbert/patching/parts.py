"""The modules of an encoder by HBERT's names, looked up in the model at each call.

They are not kept: PEFT, quantization and resizing put other modules in their place, and those have to be
called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hbert.convert.families import ACTIVATIONS, Family
from hbert_kernels import activation_layer_norm, add_layer_norm
from hbert_kernels.nn import weight_says_all

Getter = Callable[[nn.Module], Any]


def getter(family: Family, module: str, inside: str = "", absent: Any = None) -> Getter:
    """What finds one of HBERT's modules below a module of theirs.

    Args:
        inside: HBERT's name of the module to start from, with a dot at its end; empty: the encoder.
        absent: what is found where such encoders do not have it.
    """
    path = family.path(module)
    if path is None:
        return lambda _: absent
    return _follow(path.removeprefix(_theirs(family, inside)))


def _follow(path: str) -> Getter:
    """operator.attrgetter(path), which torch.compile cannot trace."""
    names = path.split(".")

    def find(module: Any) -> Any:
        for name in names:
            module = getattr(module, name)
        return module

    return find


def _theirs(family: Family, inside: str) -> str:
    """Their name of what HBERT calls ``embeddings.`` or ``layers.*.``."""
    if not inside:
        return ""
    inner = {"embeddings.": "embeddings.norm", "layers.*.": "layers.*.ffn.fc1"}[inside]
    path = family.path(inner)
    assert path is not None
    return path[: path.index("*.") + 2] if "*." in path else path[: path.index(".") + 1]


def layers_of(family: Family) -> Getter:
    """What finds the list of layers in an encoder."""
    return _follow(_theirs(family, "layers.*.").removesuffix(".*."))


def identity(x: Tensor) -> Tensor:
    """Stands for a dropout that an encoder does not have."""
    return x


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether it is torch's LayerNorm, to be read, and not what an adapter or a hook put in its place."""
    return weight_says_all(norm, nn.LayerNorm) and "forward" not in vars(norm)


def add_norm(norm: Any, stream: Tensor, branch: Tensor) -> Tensor:
    """``LN(stream + branch)``, [..., H], in the dtype of the stream: the wider one under autocast."""
    if not is_plain_norm(norm):
        return norm(stream + branch)
    return add_layer_norm(stream, branch, norm.weight, norm.bias, norm.eps)[0]


def activation_norm(norm: Any, x: Tensor, name: Any, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """``LN(act(x))``, [..., H]; ``name`` is the one that the configuration has for ``activation``."""
    if name not in ACTIVATIONS or not is_plain_norm(norm):
        return norm(activation(x))
    return activation_layer_norm(x, norm.weight, norm.bias, norm.eps, activation=ACTIVATIONS[name])


def plain_gelu(_: nn.Module) -> Callable[[Tensor], Tensor]:
    """Finds the activation of a head that calls gelu as a function."""
    return F.gelu
