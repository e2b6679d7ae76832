import json
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from pretrain_helpers import files_of
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hbert.data import HbertError
from hbert.data.tokenizer import SPECIAL_TOKENS, tokenizer_from_vocabulary
from hbert.pretrain.checkpoint import (
    checkpoints,
    complete_folder,
    load_weights,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)
from hbert.pretrain.folder import remove_remains
from hbert.pretrain.models import build_model, model_config
from hbert.pretrain.optimizers import Optimizers
from hbert.pretrain.recipes import Recipe

RECIPE = Recipe(optimizer="muon")
SMALL, LARGE = (
    tokenizer_from_vocabulary([*SPECIAL_TOKENS, *(f"piece{index}" for index in range(count))]) for count in (45, 9000)
)


def trained(steps, width=32):
    model = build_model(model_config("AS", f"2x{width}x2", {}, RECIPE, 50), seed=0)
    optimizers = Optimizers(model, RECIPE)
    for step in range(steps):
        advance(model, optimizers, step)
    return model, optimizers


def advance(model, optimizers, step):
    torch.manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizers.step(0.5)


def save(out, steps, keep=2, tokenizer=SMALL):
    model, optimizers = trained(steps)
    return save_checkpoint(out, steps, model, tokenizer, optimizers, {"run": "r", "note": [1, 2]}, keep)


@contextmanager
def full_disk(limit):
    """Files cannot grow beyond the limit, as on a disk without room: writes fail in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_step_after_loading_is_the_one_after_saving(tmp_path):
    saved = save(tmp_path, 3)
    expected, optimizers = trained(3)
    advance(expected, optimizers, 3)
    model, optimizers = trained(1)
    load_weights(saved, model, optimizers)
    advance(model, optimizers, 3)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    state = read_state(saved, dict)
    assert state["step"] == 3 and state["run"] == "r" and state["note"] == [1, 2]


def test_the_last_ones_are_kept(tmp_path):
    for step in (1, 20, 3):
        save(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000020"]
    assert newest_checkpoint(tmp_path).name == "step-00000020"


def test_a_checkpoint_is_a_model_folder(tmp_path):
    saved, (expected, _) = save(tmp_path, 1), trained(1)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    assert tokenizer.convert_ids_to_tokens([4, 5]) == ["[MASK]", "piece0"]
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(HbertError, match="tokenizer.json is not what was written"):
        read_state(saved, dict)


@pytest.mark.parametrize(("limit", "tokenizer"), [(100, SMALL), (40_000, SMALL), (120_000, LARGE), (120_000, SMALL)])
def test_a_full_disk_leaves_the_one_before(tmp_path, limit, tokenizer):
    # Room for nothing; for a part of the model; for the model and a part of the tokenizer, or of the optimizers.
    saved = save(tmp_path, 1)
    before = files_of(tmp_path)
    assert 40_000 < (saved / "model.safetensors").stat().st_size < 120_000 < (saved / "optimizers.pt").stat().st_size
    with full_disk(limit), pytest.raises(HbertError, match="step 2 could not be written: .*step-00000001 is intact"):
        save(tmp_path, 2, keep=1, tokenizer=tokenizer)
    assert files_of(tmp_path) == before
    assert newest_checkpoint(tmp_path).name == "step-00000001"


def test_no_checkpoint(tmp_path):
    with pytest.raises(HbertError, match=f"no checkpoint in .*checkpoints; start again .* or remove {tmp_path}$"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "state", "no state", "other state"])
def test_corrupt_checkpoints(tmp_path, damage):
    saved = save(tmp_path, 1)
    model, state = saved / "model.safetensors", saved / "state.json"
    content = model.read_bytes()
    if damage == "cut":
        model.write_bytes(content[:-1])
    elif damage == "changed":
        model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        (saved / "optimizers.pt").unlink()
    elif damage == "state":
        state.write_text("{")
    elif damage == "no state":
        state.unlink()
    else:
        state.write_text(json.dumps({"step": 1}))
    with pytest.raises(HbertError, match=f"step-00000001 is corrupt .*none before it: .*, or remove {tmp_path}$"):
        read_state(saved, dict)


def test_a_corrupt_checkpoint_with_one_before_it(tmp_path):
    save(tmp_path, 1)
    saved = save(tmp_path, 2)
    (saved / "state.json").unlink()
    with pytest.raises(HbertError, match="step-00000002 is corrupt .*; remove it to go on from the one before it$"):
        read_state(saved, dict)


def test_weights_of_another_model(tmp_path):
    saved = save(tmp_path, 1)
    with pytest.raises(HbertError, match="does not fit this model"):
        load_weights(saved, *trained(0, width=64))


def test_remains_are_removed_and_do_not_count(tmp_path):
    saved = save(tmp_path, 1)
    shutil.copytree(saved, saved.with_name(".step-00000002.0123abcd.tmp"))
    (tmp_path / ".run.json.0123abcd.tmp").write_text("{")
    assert checkpoints(tmp_path) == [saved]
    remove_remains(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [saved] and list(tmp_path.iterdir()) == [saved.parent]


def test_a_folder_is_complete_or_not_there(tmp_path):
    with pytest.raises(KeyError), complete_folder(tmp_path / "folder") as temporary:
        (temporary / "file").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())
