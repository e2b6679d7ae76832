"""Models with and without the patch, and how they are held against each other."""

import copy

import torch
from convert_helpers import FAMILIES, VOCAB, small

from hbert.patching import patch

__all__ = ["FAMILIES", "MASKS", "VOCAB", "assert_equal_where_valid", "batch_of", "layers_of", "pair", "small", "values"]
MASKS = ("right", "left", "holes", "none")


def pair(family, masked_lm=False, kind=None, dtype=torch.float64, **fields):
    """A small model and its patched copy, with the same weights."""
    plain = small(family, masked_lm, kind, **fields).to(dtype)
    patched = copy.deepcopy(plain)
    patch(patched)
    return plain, patched


def batch_of(model, padding="right", rows=4, length=11):
    """Ids, token types, the mask of the padding that is named, and the id of padding under it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding in ("right", "left"):
        for row, valid in enumerate((length, 1, 6, 9)):
            mask[row, valid:] = 0
        mask = mask.flip(1) if padding == "left" else mask
    elif padding == "holes":
        mask = (torch.rand(rows, length, generator=generator) > 0.4).long()
        mask[0] = 1
    inputs = {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id), "attention_mask": mask}
    if padding == "none":
        del inputs["attention_mask"]
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.randint(2, (rows, length), generator=generator)
    return inputs


def values(output):
    """All tensors of an output."""
    found = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [t for value in found for t in (value if isinstance(value, tuple) else (value,))]


def assert_equal_where_valid(plain, patched, mask=None, tolerance=1e-12):
    """Two outputs: what has a row for each token is compared where the mask is 1, and 0 elsewhere."""
    expected, found = values(plain), values(patched)
    assert len(expected) == len(found)
    for e, f in zip(expected, found, strict=True):
        assert e.shape == f.shape and e.dtype == f.dtype
        if mask is not None and e.shape[:2] == mask.shape:
            assert not f[mask == 0].any()
            e, f = e[mask == 1], f[mask == 1]
        assert (e - f).abs().max() <= tolerance * e.abs().max()


def layers_of(model):
    """The layers of an encoder."""
    return (model.transformer if hasattr(model, "transformer") else model.encoder).layer
