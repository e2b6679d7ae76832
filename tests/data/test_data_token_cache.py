import json

import numpy as np
import pytest
from data_helpers import write_text
from tokenizers import Tokenizer, models, pre_tokenizers

from hbert.data import HbertError, TokenCache, load_corpus, token_cache
from hbert.data.tokenizer import SPECIAL_TOKENS


@pytest.fixture
def cache(corpus, tokenizer):
    return TokenCache.build(corpus, tokenizer)


def expected_stream(corpus, tokenizer, held_out, source=None):
    stream = []
    for document in corpus.documents():
        if document.held_out == held_out and source in (None, document.source):
            stream += tokenizer.encode(document.text).ids
    return stream


def test_streams_are_the_encoded_documents(corpus, tokenizer, cache, monkeypatch):
    assert cache.train.tokens.dtype == np.uint16
    assert cache.train.tokens.tolist() == expected_stream(corpus, tokenizer, False)
    assert cache.held_out.tokens.tolist() == expected_stream(corpus, tokenizer, True)


def test_batching_changes_nothing(corpus, tokenizer, cache, monkeypatch, tmp_path):
    monkeypatch.setattr(token_cache, "_BATCH_CHARS", 50)
    monkeypatch.setenv("HBERT_CACHE", str(tmp_path / "other"))
    assert np.array_equal(TokenCache.build(corpus, tokenizer).train.tokens, cache.train.tokens)


def test_documents_are_delimited(corpus, cache):
    texts = [document for document in corpus.documents() if document.held_out]
    assert len(cache.held_out) == len(texts) > 1
    for index in range(len(cache.held_out)):
        document = cache.held_out.document(index)
        assert document[0] == 2 and document[-1] == 3 and not np.isin(document[1:-1], range(5)).any()
    assert np.array_equal(cache.held_out.document(-1), cache.held_out.document(len(texts) - 1))
    with pytest.raises(IndexError):
        cache.held_out.document(len(texts))


def test_sources_partition_the_stream(corpus, tokenizer, cache):
    first, second = (file.name for file in corpus.files)
    parts = [cache.train.source(first).tokens, cache.train.source(second).tokens]
    assert np.array_equal(np.concatenate(parts), cache.train.tokens)
    view = cache.train.source(second)
    assert view.tokens.tolist() == expected_stream(corpus, tokenizer, False, second)
    assert np.concatenate([view.document(i) for i in range(len(view))]).tolist() == view.tokens.tolist()
    assert cache.source_tokens("train", second) == len(view.tokens)
    assert cache.source_tokens("train", "nothing") == 0
    with pytest.raises(HbertError, match="no source 'nothing'"):
        cache.train.source("nothing")


@pytest.mark.parametrize("length", [1, 7, 128])
def test_blocks_cover_the_stream(cache, length):
    blocks = cache.train.blocks(length)
    tokens = cache.train.tokens
    assert len(blocks) == len(tokens) // length
    assert np.concatenate(list(blocks)).tolist() == tokens[: len(blocks) * length].tolist()
    assert blocks[0].dtype == np.int32 and blocks[0].shape == (length,)
    assert np.array_equal(blocks[-1], blocks[len(blocks) - 1])
    assert np.array_equal(blocks[np.array([2, 0])], np.stack([blocks[2], blocks[0]]))
    assert np.array_equal(blocks[1:3], np.stack([blocks[1], blocks[2]]))
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_blocks_longer_than_the_text_and_bad_lengths(cache):
    assert len(cache.train.blocks(10**9)) == 0
    with pytest.raises(HbertError, match="at least one token, not 0"):
        cache.train.blocks(0)


def test_cache_is_found_again_and_follows_corpus_and_tokenizer(corpus, tokenizer, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_encode_corpus", lambda *_: pytest.fail("encoded again"))
        assert TokenCache.build(corpus, tokenizer).path == cache.path
    other = load_corpus(text=[corpus.files[0].path])
    assert TokenCache.build(other, tokenizer).path != cache.path
    tokenizer.add_tokens(["quick brown"])
    assert TokenCache.build(corpus, tokenizer).path != cache.path


def test_a_cut_off_build_leaves_nothing(corpus, tokenizer, offline_cache, monkeypatch):
    monkeypatch.setattr(token_cache, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        TokenCache.build(corpus, tokenizer)
    assert list((offline_cache / "tokens").iterdir()) == []


def test_meta_file(corpus, cache):
    meta = json.loads((cache.path / "meta.json").read_text())
    assert meta["sources"] == {file.name: file.sha256 for file in corpus.files}
    assert meta["splits"]["train"]["tokens"] == len(cache.train.tokens)
    assert sorted(path.name for path in cache.path.iterdir()) == [
        "held_out.npy",
        "held_out.offsets.npy",
        "meta.json",
        "train.npy",
        "train.offsets.npy",
    ]
    assert (cache.vocab_size, cache.mask_id) == (meta["vocab_size"], 4)


def test_special_tokens_in_the_text_are_text(tmp_path, tokenizer):
    path = write_text(tmp_path / "x.txt", [["a [MASK] of [SEP] stone"], ["the dog"]])
    cache = TokenCache.build(load_corpus(text=[path]), tokenizer)
    assert not np.isin(cache.train.document(0)[1:-1], [0, 2, 3, 4]).any()


def test_truncation_and_padding_of_the_tokenizer_do_not_apply(corpus, tokenizer, cache, monkeypatch, tmp_path):
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=16)
    assert np.array_equal(TokenCache.build(corpus, tokenizer).train.tokens, cache.train.tokens)


def test_large_vocabularies_are_stored_in_32_bits(tmp_path):
    pieces = [*SPECIAL_TOKENS, *(f"w{index}" for index in range(70_000))]
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = write_text(tmp_path / "x.txt", [["w0 w65530 w69999"]])
    cache = TokenCache.build(load_corpus(text=[path]), tokenizer)
    assert cache.train.tokens.dtype == np.int32
    assert cache.train.tokens.tolist() == [2, 5, 65535, 70004, 3]
    assert len(cache.held_out) == len(cache.held_out.tokens) == len(cache.held_out.blocks(4)) == 0


def test_errors(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(HbertError, match="no training document"):
        TokenCache.build(load_corpus(text=[tmp_path / "x.txt"]), tokenizer)
    with pytest.raises(HbertError, match="is not a token cache"):
        TokenCache(tmp_path)
