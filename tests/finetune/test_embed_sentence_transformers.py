"""`hbert embed` of a folder of sentence-transformers: the vectors of its `encode`, or an error."""

import json
import shutil

import numpy as np
import pytest
from finetune_helpers import toy_rows
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer

from hbert.errors import HbertError
from hbert.finetune.sentence_modules import pooling_and_normalize

TEXTS = [text for _, text in toy_rows(9, seed=5)]


@pytest.fixture(scope="module")
def encoder(bert_folder):
    return Transformer(str(bert_folder))


@pytest.fixture(scope="module")
def cls_folder(encoder, tmp_path_factory):
    """A checkpoint of three modules that pools by the first token."""
    model = SentenceTransformer(modules=[encoder, Pooling(32, "cls"), Normalize()], device="cpu")
    model.save_pretrained(str(folder := tmp_path_factory.mktemp("cls")), create_model_card=False)
    return folder


@pytest.fixture
def changed(cls_folder, tmp_path):
    """Changes the JSON of a file of a copy; returns the copy's name."""

    def change(file, update):
        folder = shutil.copytree(cls_folder, tmp_path / "changed")
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(update(content)))
        return str(folder)

    return change


@pytest.mark.parametrize(("mode", "more"), [("cls", [Normalize()]), ("mean", [])])
def test_vectors_are_those_of_encode(hbert, encoder, tmp_path, mode, more):
    model = SentenceTransformer(modules=[encoder, Pooling(32, mode), *more], device="cpu")
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    words = ["--model", tmp_path / "model", "--input", tmp_path / "texts.txt", "--dtype", "fp32"]
    status, _, stderr = hbert("embed", *words, "--out", tmp_path / "a.npy")
    assert status == 0, stderr
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), model.encode(TEXTS), atol=1e-5)


def test_flags_come_first(cls_folder, hbert_folder):
    assert pooling_and_normalize(str(cls_folder), None, None) == ("cls", True)
    assert pooling_and_normalize(str(cls_folder), "mean", None) == ("mean", True)
    assert pooling_and_normalize(str(cls_folder), None, False) == ("cls", False)
    assert pooling_and_normalize(str(hbert_folder), None, None) == ("mean", False)


def test_a_configuration_of_earlier_versions(changed):
    flags = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    assert pooling_and_normalize(changed("1_Pooling/config.json", lambda _: flags), None, None) == ("cls", True)


@pytest.mark.parametrize(
    ("file", "update", "message"),
    [
        (
            "modules.json",
            lambda modules: [*modules, {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}],
            "is made of Transformer, Pooling, Normalize, Dense; embed has only Transformer, Pooling, Normalize: "
            "hbert.optimize takes",
        ),
        ("modules.json", lambda modules: [{**modules[0], "type": "my.Transformer"}, *modules[1:]], "of my.Transformer"),
        ("modules.json", lambda modules: {"modules": modules}, "modules.json or the configuration of its pooling is"),
        ("1_Pooling/config.json", lambda _: {"pooling_mode": "max"}, "pools by max; embed by one of mean, cls"),
        ("1_Pooling/config.json", lambda _: {"pooling_mode": ["cls", "mean"]}, "pools by cls, mean; embed"),
        (
            "1_Pooling/config.json",
            lambda _: {"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_cls_token": False},
            "pools by mean_sqrt_len; embed",
        ),
    ],
)
def test_what_embed_does_not_compute_is_refused(changed, file, update, message):
    folder = changed(file, update)
    with pytest.raises(HbertError, match=message):
        pooling_and_normalize(folder, None, None)
    assert pooling_and_normalize(folder, "mean", False) == ("mean", False)
