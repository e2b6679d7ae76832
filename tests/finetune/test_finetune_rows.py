"""Files as rows: formats, and errors that name the line."""

import itertools

import datasets
import pytest

from hbert.errors import HbertError
from hbert.finetune.examples import Columns, LabelSet, read_examples
from hbert.finetune.rows import DatasetRows, check_column, open_rows


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def cells(path, names=None):
    return [(row.line, dict(row.cells)) for row in open_rows(path, names)]


def test_csv_with_quotes_line_breaks_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path, "a.csv", '\ufefftext,label\n"a, b",x\n\n"two\nlines ""q""",NA\n')
    assert cells(path) == [(2, {"text": "a, b", "label": "x"}), (4, {"text": 'two\nlines "q"', "label": "NA"})]


def test_tsv_takes_quotes_as_letters(tmp_path):
    path = write(tmp_path, "a.tsv", 'x\t"a\ny\tb "c\u2028 d\n')
    assert cells(path, ["label", "text"]) == [
        (1, {"label": "x", "text": '"a'}),
        (2, {"label": "y", "text": 'b "c\u2028 d'}),
    ]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_blank_line_is_a_row_of_a_table_with_one_column(tmp_path, suffix):
    path = write(tmp_path, f"a.{suffix}", "\ntext\none\n\ntwo\n\n")
    assert cells(path) == [(3, {"text": "one"}), (4, {"text": ""}), (5, {"text": "two"}), (6, {"text": ""})]
    assert cells(path, ["text"])[:3] == [(1, {"text": ""}), (2, {"text": "text"}), (3, {"text": "one"})]


def test_json_lines_and_plain_lines(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a\\nb", "n": 1}\n\n{"text": ""}\n')
    assert cells(path) == [(1, {"text": "a\nb", "n": 1}), (3, {"text": ""})]
    assert cells(write(tmp_path, "a.txt", "one\r\n\ntwo")) == [
        (1, {"text": "one"}),
        (2, {"text": ""}),
        (3, {"text": "two"}),
    ]


def test_suffixes_in_capitals(tmp_path):
    assert cells(write(tmp_path, "a.CSV", 'text\n"a, b"\n')) == [(2, {"text": "a, b"})]
    assert cells(write(tmp_path, "a.JsonL", '{"text": "a"}\n')) == [(1, {"text": "a"})]


def test_columns_that_are_not_read_may_share_a_name(tmp_path):
    found = read_examples(open_rows(write(tmp_path, "a.csv", "n,text,n,label\n1,a,2,x\n")), Columns())
    assert (found.texts, found.labels) == (["a"], [("x",)])


def test_a_long_cell(tmp_path):
    path = write(tmp_path, "a.csv", f"text\n{'a' * 200_000}\n")
    assert len(cells(path)[0][1]["text"]) == 200_000


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A local data set in Parquet, whose labels are numbers with names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=["neg", "unused", "pos"]),
        tags=datasets.List(datasets.ClassLabel(names=["a", "b"])),
    )
    folder = tmp_path / "data"
    folder.mkdir()
    for split, text in {"train": "one two", "test": "three"}.items():
        rows = {"text": text.split(), "label": [2, 0][: len(text.split())]}
        rows["tags"] = [[0, 1]] * len(rows["text"])
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
    return folder


def test_a_data_set_with_named_labels(dataset):
    rows = DatasetRows(str(dataset), None, "train")
    assert rows.columns() == ["text", "label", "tags"]
    assert [(row.line, dict(row.cells)) for row in rows] == [
        (1, {"text": "one", "label": "pos", "tags": ["a", "b"]}),
        (2, {"text": "two", "label": "neg", "tags": ["a", "b"]}),
    ]
    assert rows.declared_labels("label") == ["neg", "unused", "pos"]
    assert rows.declared_labels("tags") == ["a", "b"] and rows.declared_labels("text") is None


def test_a_split_or_data_set_that_does_not_exist(dataset):
    with pytest.raises(HbertError, match="no split 'dev'; it has: train, test"):
        DatasetRows(str(dataset), None, "dev")
    with pytest.raises(HbertError, match="cannot be loaded"):
        DatasetRows(str(dataset.parent / "nothing"), None, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,x\nb\n", r"line 3: 1 cell, but the header has 2 columns \('text', 'label'\)"),
        ("a.csv", 'text,label\na,x\n"b,y\n', "line 3: unexpected end of data"),
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label,text\n", "a.csv has 2 columns 'text'"),
        ("a.csv", b"text,label\n\xff,x\n", "UTF-8"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n[1]\n', "line 2: not a JSON object"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": 5, "label": "x"}\n', "line 2: 'text' is not a text"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n\n{"label": "x"}\n', "line 3: no 'text'"),
        (
            "a.jsonl",
            '\n{"text": "a \\ud83d b", "label": "x"}\n',
            r"line 2: 'text' has '\\ud83d', half of a surrogate pair",
        ),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', "line 2: no 'label'"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', "line 1: no 'label'"),
        ("a.jsonl", '{"text": "a", "label": -Infinity}\n', "line 1: no 'label'"),
        ("a.jsonl", '{"text": "a", "label": 1.5}\n', "line 1: the label is 1.5, but labels are classes, not numbers"),
        ("a.jsonl", '{"text": "a", "label": ["x"]}\n', "line 1: 'label' is a list.*--multi-label"),
        ("a.jsonl", '{"text": "a", "label": {}}\n', "line 1: the label must be a name"),
        ("a.csv", 'text,label\na,"x\ty"\n', "line 2: the label must be a name in one line"),
        ("a.csv", "text,label\na,\n", "line 2: the label must be a name"),
        ("a.csv", "text,label\na,x\n ,x\nb,x\n,x\n", "line 3: 2 empty texts, the first"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "a, text\n1,2\n", "no column 'text'; it has: 'a', ' text' .*--columns"),
        ("a.xlsx", "", "suffix must be one of .csv, .tsv, .jsonl, .txt"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(HbertError, match=message):
        read_examples(open_rows(write(tmp_path, name, content)), Columns())


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(HbertError, match="no such file"):
        open_rows(tmp_path / "a.csv")
    with pytest.raises(HbertError, match="--columns names the columns of CSV and TSV"):
        open_rows(write(tmp_path, "a.txt", "a"), ["text"])
    with pytest.raises(HbertError, match="no column 'c'; it has: 'text'"):
        check_column(open_rows(write(tmp_path, "b.txt", "a")), "c", "--text-column")


def test_labels_of_every_kind(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a", "label": 10}\n{"text": "b", "label": 9}\n')
    labels = LabelSet.collect(read_examples(open_rows(path), Columns()), None, False)
    assert labels.names == ("9", "10")
    lines = [f'{{"text": "a", "label": {value}}}\n' for value in ("1", "1.0", '"1"', "true")]
    same = write(tmp_path, "d.jsonl", "".join(lines))
    assert read_examples(open_rows(same), Columns()).labels == [("1",), ("1",), ("1",), ("true",)]
    for names in itertools.permutations(["3", "nan", "10", "-inf", "b"]):
        path = write(tmp_path, "c.csv", "text,label\n" + "".join(f"a,{name}\n" for name in names))
        labels = LabelSet.collect(read_examples(open_rows(path), Columns()), None, False)
        assert labels.names == ("3", "10", "-inf", "b", "nan")
    path = write(tmp_path, "b.csv", "text,label\na,b;a;b\nc,\nd,c\n")
    columns = Columns(separator=";")
    several = LabelSet.collect(read_examples(open_rows(path), columns), None, True)
    assert several.names == ("a", "b", "c")
    assert several.encode(read_examples(open_rows(path), columns)).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_labels_that_do_not_fit(tmp_path):
    train = read_examples(open_rows(write(tmp_path, "a.csv", "text,label\na,x\nb,y\n")), Columns())
    other = read_examples(open_rows(write(tmp_path, "b.csv", "text,label\na,x\nb,z\n")), Columns())
    labels = LabelSet.collect(train, None, False)
    with pytest.raises(HbertError, match="b.csv, line 3: the label 'z' is not one of the training split: x, y"):
        labels.encode(other)
    one = read_examples(open_rows(write(tmp_path, "c.csv", "text,label\na,x\n")), Columns())
    with pytest.raises(HbertError, match="only the label 'x': there is nothing to tell apart"):
        LabelSet.collect(one, None, False)
    with pytest.raises(HbertError, match="line 1: the label must be a name in one line, or an integer, not nan"):
        read_examples(open_rows(write(tmp_path, "e.jsonl", '{"text": "a", "label": [NaN]}\n')), Columns(separator=","))
    listed = write(tmp_path, "d.jsonl", '{"text": "a", "label": ["x,y"]}\n')
    with pytest.raises(HbertError, match="line 1: a label contains ','; choose another --label-separator"):
        read_examples(open_rows(listed), Columns(separator=","))


def test_pairs(tmp_path):
    path = write(tmp_path, "a.csv", "one,two,label\na,b,x\n")
    found = read_examples(open_rows(path), Columns("one", "two"))
    assert (found.texts, found.pairs) == (["a"], ["b"])
    with pytest.raises(HbertError, match="no column 'three'.*--text-pair-column"):
        read_examples(open_rows(path), Columns("one", "three"))
    with pytest.raises(HbertError, match="line 2: an empty text"):
        read_examples(open_rows(write(tmp_path, "b.csv", "one,two,label\na,,x\n")), Columns("one", "two"))
