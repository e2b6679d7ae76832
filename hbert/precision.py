"""In what numbers a command runs a checkpoint: ``--dtype`` of the model as it is, or ``--optimize`` for serving."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def add_precision_arguments(group: Any) -> None:
    """Adds the two flags, of which one may be given."""
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="autocast; auto (default): bf16 where the device computes it natively",
    )
    either.add_argument(
        "--optimize", choices=("fp32", "bf16", "int8"), help="run what hbert.optimize makes of the model in this dtype"
    )


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(args: argparse.Namespace) -> torch.device:
    """Where the model has to be: int8 runs on CPUs."""
    import torch

    return torch.device("cpu") if args.optimize == "int8" else device()


def prepared(model: PreTrainedModel, args: argparse.Namespace) -> tuple[Any, str, str]:
    """Returns the model to run, the dtype of autocast ("fp32": none), and a word for both.

    Raises:
        ValueError: the model cannot be optimized, or is not where :func:`device_of` says.
    """
    import hbert
    from hbert.pretrain.machine import resolve_dtype

    if args.optimize is not None:
        return hbert.optimize(model, args.optimize), "fp32", f"optimized for {args.optimize}"
    dtype = resolve_dtype(args.dtype, next(model.parameters()).device)
    return model, dtype, dtype
