import errno
import hashlib
import json
import os

import pytest
from data_helpers import write_text

from hbert.data import HbertError, load_corpus
from hbert.data.corpus import HELD_OUT_SHARE, is_held_out

LONG = "nobody knows whether winter will bring snow or only rain to the valley"


def documents(corpus):
    return [(document.source, document.text) for document in corpus.documents()]


def test_plain_text_documents(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\n\none\r\n  two \n \n\nthree")
    assert documents(load_corpus(text=[path])) == [(path.name, "one\ntwo"), (path.name, "three")]


def test_json_lines_documents(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one\\n\\ntwo", "id": 1}\n\n{"text": " "}\n{"text": "three"}\n')
    assert documents(load_corpus(text=[path])) == [(path.name, "one\ntwo"), (path.name, "three")]


def test_paragraphs_are_deduplicated_across_sources(tmp_path):
    first = write_text(tmp_path / "a.txt", [[LONG, "Yes."], [LONG.upper()]])
    second = write_text(tmp_path / "b.txt", [["Yes.", f"{LONG}!"], [f"{LONG} again"]])
    corpus = load_corpus(text=[first, second])
    texts = [text for _, text in documents(corpus)]
    assert texts == [f"{LONG}\nYes.", "Yes.", f"{LONG} again"]
    statistics = corpus.statistics()
    assert [(entry.documents, entry.paragraphs, entry.duplicate_paragraphs) for entry in statistics.values()] == [
        (1, 2, 1),
        (2, 2, 1),
    ]
    assert sum(entry.megabytes for entry in statistics.values()) == sum(map(len, texts)) / 1e6


def test_a_file_named_twice_counts_once(tmp_path):
    path = write_text(tmp_path / "a.txt", [["Yes."]])
    (tmp_path / "sub").mkdir()
    assert documents(load_corpus(text=[path, str(path), tmp_path / "sub" / ".." / "a.txt"])) == [("a.txt", "Yes.")]


def test_the_same_text_is_the_same_corpus_wherever_it_lies(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.txt", [["Yes."]])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved").mkdir()
    copy = write_text(tmp_path / "moved" / "a.txt", [["Yes."]])
    corpora = [load_corpus(text=[name]) for name in (path, "a.txt", "./a.txt", "moved/../a.txt", copy)]
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert load_corpus(text=[write_text(tmp_path / "b.txt", [["Yes."]])]).fingerprint != corpora[0].fingerprint


def test_files_of_one_name_are_told_apart_by_their_digests(tmp_path):
    paths = []
    for folder, text in (("one", "Yes."), ("two", "No.")):
        (tmp_path / folder).mkdir()
        paths.append(write_text(tmp_path / folder / "a.txt", [[text]]))
    paths.append(write_text(tmp_path / "b.txt", [["Perhaps."]]))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:8] for path in paths]
    names = [source for source, _ in documents(load_corpus(text=paths))]
    assert names == [f"a.txt-{digests[0]}", f"a.txt-{digests[1]}", "b.txt"]
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(HbertError, match=f"two sources of text are called 'a.txt-{digests[0]}'"):
        load_corpus(text=paths)


def test_split_is_the_hash_of_the_document_and_has_the_declared_share():
    share = sum(is_held_out([f"document {index}", "x"]) for index in range(20_000)) / 20_000
    assert abs(share - HELD_OUT_SHARE) < 0.005
    for index in range(300):
        digest = hashlib.blake2b(f"first\n{index}".encode(), digest_size=8).hexdigest()
        assert is_held_out(["first", str(index)]) == (int(digest, 16) / 2**64 < HELD_OUT_SHARE)


def test_split_hashes_the_document_before_deduplication(tmp_path):
    held_out = [[LONG, f"tail {index}"] for index in range(300) if is_held_out([LONG, f"tail {index}"])]
    path = write_text(tmp_path / "a.txt", [[LONG], *held_out])
    found = {document.text: document.held_out for document in load_corpus(text=[path]).documents()}
    assert found == {LONG: is_held_out([LONG]), **{tail: True for _, tail in held_out}}
    statistics = load_corpus(text=[path]).statistics()[path.name]
    assert statistics.held_out_documents == sum(found.values()) > 1


def test_split_does_not_depend_on_the_other_sources(corpus):
    alone = {d.text: d.held_out for file in corpus.files for d in load_corpus(text=[file.path]).documents()}
    together = {d.text: d.held_out for d in corpus.documents()}
    assert together == alone and any(together.values())
    assert set(corpus.train_texts()) == {text for text, held_out in together.items() if not held_out}


def test_fingerprint_follows_the_content(tmp_path):
    path = write_text(tmp_path / "a.txt", [["one"]])
    before = load_corpus(text=[path]).fingerprint
    assert load_corpus(text=[path]).fingerprint == before
    write_text(path, [["two"]])
    assert load_corpus(text=[path]).fingerprint != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"caf\xe9\n", "x.txt is not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"text": 5}', 'line 1: no string field "text"'),
        ("x.jsonl", b'["text"]', 'line 1: no string field "text"'),
        ("x.jsonl", b'{"text": "a"}\n{"text": "a \\ud800 b"}', 'x.jsonl, line 2: "text" is not Unicode text'),
    ],
)
def test_unreadable_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HbertError, match=message):
        documents(load_corpus(text=[tmp_path / name]))


def test_a_file_that_must_not_be_read(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    path = write_text(tmp_path / "x.txt", [["one"]])
    monkeypatch.setattr("hbert.data.corpus.sha256_file", denied)
    with pytest.raises(HbertError, match="x.txt cannot be read: Permission denied"):
        load_corpus(text=[path])


def test_nothing_and_missing_files_are_refused(tmp_path):
    with pytest.raises(HbertError, match="empty corpus"):
        load_corpus()
    with pytest.raises(HbertError, match="no such text file: .*nowhere.txt"):
        load_corpus(text=[tmp_path / "nowhere.txt"])


@pytest.fixture
def dataset_folder(tmp_path):
    folder = tmp_path / "my_set"
    folder.mkdir()
    rows = [{"text": "one\n\n two"}, {"text": ""}, {"text": "three"}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_dataset_folder_is_copied_and_copied_again_when_it_changes(dataset_folder):
    name = str(dataset_folder)
    assert documents(load_corpus(dataset=name)) == [("my_set", "one\ntwo"), ("my_set", "three")]
    (dataset_folder / "train.jsonl").write_text('{"text": "four"}')
    assert documents(load_corpus(dataset=name)) == [("my_set", "four")]


def test_a_dataset_of_the_name_of_another_source(dataset_folder, monkeypatch):
    monkeypatch.setattr("hbert.data.corpus.fetch_source", lambda source: pytest.fail("fetched"))
    folder = dataset_folder.rename(dataset_folder.with_name("imdb"))
    for dataset in ("imdb", str(folder)):
        with pytest.raises(HbertError, match="two sources of text are called 'imdb'; leave one out"):
            load_corpus("pypi", dataset=dataset)


def test_dataset_errors(dataset_folder, offline_cache):
    (dataset_folder / "train.jsonl").write_text('{"words": "one"}')
    with pytest.raises(HbertError, match="no text column of strings; its columns are: words"):
        load_corpus(dataset=str(dataset_folder))
    (dataset_folder / "train.jsonl").write_text('{"text": "a \\ud800 b"}')
    with pytest.raises(HbertError, match="data set .*my_set' cannot be read: .*surrogate"):
        load_corpus(dataset=str(dataset_folder))
    assert list((offline_cache / "datasets").iterdir()) == []
    with pytest.raises(HbertError, match="nowhere.* cannot be loaded"):
        load_corpus(dataset=str(dataset_folder / "nowhere"))
