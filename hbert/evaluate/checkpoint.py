"""A masked-LM checkpoint with its own tokenizer: ours or anybody's, from a folder or the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

import hbert.modeling  # noqa: F401  registers HBERT with the Auto classes
from hbert.convert.files import has_tokenizer
from hbert.data.tokenizer import SPECIAL_TOKENS
from hbert.errors import HbertError


def load_masked_lm(name: str, device: str | torch.device = "cpu") -> PreTrainedModel:
    """Returns the model of a checkpoint folder or hub name, in float32 and evaluation mode, on the device.

    No code of the checkpoint is run.

    Raises:
        HbertError: no such folder or name, unreadable or incomplete weights, or no masked-LM head.
    """
    config = from_checkpoint(name, AutoConfig.from_pretrained)
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise HbertError(f"{name!r} is a {config.model_type} model: that has no masked-LM head")
    model, info = from_checkpoint(
        name, AutoModelForMaskedLM.from_pretrained, config=config, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        headless = not any(key.startswith(f"{model.base_model_prefix}.") for key in missing)
        reason = "it was saved without its masked-LM head" if headless else "its weights are incomplete"
        raise HbertError(f"{name!r}: {reason} ({len(missing)} tensors are missing, such as {missing[0]})")
    return model.to(device).eval()


def checkpoint_tokenizer(name: str) -> Tokenizer:
    """Returns a checkpoint's tokenizer with its special tokens named [PAD], [UNK], [CLS], [SEP], [MASK].

    It is fit to encode text as ``TokenCache.build`` does; its post-processor is dropped where names differ.

    Raises:
        HbertError: there is none, it is not a fast tokenizer, or it has no token for one of the five roles.
    """
    loaded = pretrained_tokenizer(name, ", or give one with --tokenizer")
    if not getattr(loaded, "is_fast", False):
        raise HbertError(f"{name!r} has no fast tokenizer (tokenizer.json); give one with --tokenizer")
    # The file itself where there is one: loading it may have changed its serialised form, which names the cache.
    file = Path(name) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else loaded.backend_tokenizer
    own = {token: getattr(loaded, f"{token.strip('[]').lower()}_token") for token in SPECIAL_TOKENS}
    return with_bert_names(tokenizer, own)


def pretrained_tokenizer(name: str, or_else: str = "") -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a checkpoint folder or hub name, as transformers loads it.

    Args:
        or_else: ends the message where there is none: what else the command takes.

    Raises:
        HbertError: there is none, or it cannot be loaded.
    """
    nothing = f"{name!r} has no tokenizer: save one into the folder (tokenizer.save_pretrained){or_else}"
    try:
        tokenizer: PreTrainedTokenizerBase = from_checkpoint(name, AutoTokenizer.from_pretrained)
    except HbertError as error:
        # Not asked before: some tokenizers have files of other names, or none.
        if (Path(name) / "config.json").is_file() and not has_tokenizer(Path(name)):
            raise HbertError(nothing) from error
        raise
    # transformers makes an empty tokenizer for some models without one.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise HbertError(nothing)
    return tokenizer


def with_bert_names(tokenizer: Tokenizer, own: Mapping[str, str | None]) -> Tokenizer:
    """Returns the tokenizer with special tokens renamed; ids and the encoding of text stay as they are.

    Args:
        own: the tokenizer's token for each of [PAD], [UNK], [CLS], [SEP], [MASK].

    Raises:
        HbertError: a role has no token, or two roles share one.
    """
    if missing := [role for role in SPECIAL_TOKENS if own.get(role) is None]:
        raise HbertError(f"the tokenizer has no token in the role of {', '.join(missing)}")
    if len(set(own.values())) < len(own):
        raise HbertError("the tokenizer has one token in two of the roles " + ", ".join(SPECIAL_TOKENS))
    if all(role == token for role, token in own.items()):
        return tokenizer
    # Both ways: an ordinary piece that looks like [CLS] takes the name that has become free.
    names = {str(token): role for role, token in own.items()} | {k: str(v) for k, v in own.items()}
    state = json.loads(tokenizer.to_str())
    state["model"] = _renamed_model(state["model"], names)
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    state["post_processor"] = None
    return Tokenizer.from_str(json.dumps(state))


def _renamed_model(model: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    vocabulary, unknown = model["vocab"], model.get("unk_token")
    if isinstance(vocabulary, dict):
        renamed: Any = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    else:
        renamed = [[names.get(piece, piece), score] for piece, score in vocabulary]
    return {**model, "vocab": renamed, **({"unk_token": names.get(unknown, unknown)} if unknown else {})}


def from_checkpoint(name: str, loader: Callable[..., Any], **options: Any) -> Any:
    """Returns what a ``from_pretrained`` makes of a folder or a name on the hub; no code of it is run.

    Raises:
        HbertError: there is no such folder or name, it is a file, or it cannot be loaded.
    """
    folder = Path(name)
    if folder.is_file():
        raise HbertError(f"{name} is a file; give its folder")
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise HbertError(f"no such folder: {name}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise HbertError(f"{name} is not a model folder: it has no config.json")
    try:
        return loader(name, trust_remote_code=False, **options)
    except Exception as error:
        # A dozen unrelated types are raised here: not found, offline, corrupt, unknown architecture.
        reason = " ".join(str(error).split("\n")[0].split())
        hint = "" if folder.is_dir() else " (there is no folder of this name either)"
        raise HbertError(f"{name!r} cannot be loaded{hint}: {reason}") from error
