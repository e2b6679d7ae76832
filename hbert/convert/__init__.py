"""Encoders that people already have, as HBERT: BERT, RoBERTa, XLM-R, DistilBERT, MiniLM, and HBERT's own.

>>> model, report = hbert.convert.from_pretrained("path/of/bert-base-uncased")
>>> target = HBertConfig.v1c("base", positions="learned")
>>> hybrid, report = hbert.convert.from_pretrained("path/of/bert-base-uncased", target)
>>> print(report)
"""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedModel

from hbert.config import HBertConfig
from hbert.modeling import HBertForMaskedLM, HBertModel

from .correspondence import check_fits, transfer
from .positions import check_extension, check_more_are_asked_for, set_positions
from .report import Move, Report
from .source import Source, read_source, read_state_dict

__all__ = ["Move", "Report", "Source", "build", "from_pretrained", "read_source", "read_state_dict", "transfer"]


def from_pretrained(
    checkpoint: PreTrainedModel | str | Path,
    target: HBertConfig | None = None,
    *,
    max_positions: int | None = None,
    extend_positions: str | None = None,
) -> tuple[HBertModel | HBertForMaskedLM, Report]:
    """Returns an HBERT encoder with the weights of ``checkpoint``, and what became of every tensor.

    Without ``target`` the encoder computes the same: self-attention in every layer, post-norm, the same
    sizes, dropout and activation. Positions count the valid tokens of a sequence, as in RoBERTa; BERT and
    DistilBERT of transformers count columns, which differs where padding stands on the left.

    Args:
        checkpoint: a BERT, RoBERTa, XLM-R, DistilBERT or HBERT model, or a folder with config.json and
            safetensors or PyTorch weights.
        target: another encoder of the same width and vocabulary, such as a hybrid. A parameter that
            corresponds to nothing keeps its first value, drawn from torch's generator;
            :mod:`hbert.convert.correspondence` says what corresponds.
        max_positions: the longest sequence that the encoder takes, instead of the target's.
        extend_positions: needed where the encoder has more learned positions than the checkpoint:
            ``"interpolate"`` stretches these over all of them, ``"sinusoidal"`` puts sinusoids of the same size in
            their place; see :mod:`hbert.convert.positions`. Either way the encoder does not compute the same any more.

    Returns:
        The model, HBertForMaskedLM if the checkpoint has a masked-LM head, else HBertModel: in float32, in
        evaluation mode, sharing no memory with the checkpoint; and the report.

    Raises:
        TypeError: neither a model of transformers nor a path.
        HbertError: the folder or one of its files is missing or cannot be read.
        ValueError: an architecture that HBERT cannot express; a tensor that is missing, unknown or of a
            wrong shape; a target of another width or vocabulary; more positions than the checkpoint has,
            without a word about how; nothing to extend.
    """
    source = read_source(checkpoint)
    return build(source, target, max_positions=max_positions, extend_positions=extend_positions)


def build(
    source: Source,
    target: HBertConfig | None = None,
    *,
    max_positions: int | None = None,
    extend_positions: str | None = None,
) -> tuple[HBertModel | HBertForMaskedLM, Report]:
    """Does the second half of :func:`from_pretrained`, for a checkpoint that has been read."""
    config = copy.deepcopy(source.config if target is None else target)
    if max_positions is not None:
        set_positions(config, max_positions)
    check_fits(source, config)
    check_more_are_asked_for(extend_positions, source.config, config)
    check_extension(extend_positions, source.config, config)
    model = HBertForMaskedLM(config) if source.has_head else HBertModel(config)
    report = transfer(source, model, extend_positions=extend_positions)
    return model.eval(), report
