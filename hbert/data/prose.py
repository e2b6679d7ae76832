"""What counts as prose: cleaning, a paragraph filter, grouping of short turns, and exact deduplication."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

STOP_WORDS = frozenset(
    "the of and to a in that is was it for with as be on by not he she i you his her they at this which are "
    "or from have an but had were we all their has been would will one there more when who if can".split()
)
_PUNCTUATION = ".,;:!?\"'()"
_TO_ASCII = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u201e": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u2010": "-",
        "\u2011": "-",
        "\u2013": "-",
        "\u00ad": None,
        "\u200b": None,
        "\ufeff": None,
    }
)
_BLANKS = re.compile(r"\s+")
_NOT_LETTERS = re.compile(r"[\W\d_]+")


def clean(text: str) -> str:
    """Returns ``text`` in NFKC on one line, with typographic quotes and dashes in ASCII."""
    return _BLANKS.sub(" ", unicodedata.normalize("NFKC", text).translate(_TO_ASCII)).strip()


@dataclass(frozen=True)
class ProseRule:
    """Bounds that a cleaned paragraph must keep to count as English prose; shares are of its characters.

    ``min_letters`` counts letters and blanks; ``min_stop_words`` is a share of the words.
    """

    min_chars: int = 60
    max_chars: int = 20_000
    min_letters: float = 0.80
    max_upper: float = 0.25
    max_non_ascii: float = 0.02
    min_stop_words: float = 0.15
    min_word_length: float = 3.0
    max_word_length: float = 9.0

    def accepts(self, paragraph: str) -> bool:
        """Tells whether the paragraph is prose."""
        size = len(paragraph)
        if not self.min_chars <= size <= self.max_chars:
            return False
        if sum(map(str.isalpha, paragraph)) + paragraph.count(" ") < self.min_letters * size:
            return False
        if sum(map(str.isupper, paragraph)) >= self.max_upper * size:
            return False
        if size - len(paragraph.encode("ascii", "ignore")) >= self.max_non_ascii * size:
            return False
        return self._words_look_english(paragraph.lower().split(), size)

    def _words_look_english(self, words: list[str], size: int) -> bool:
        if not self.min_word_length < size / len(words) < self.max_word_length:
            return False
        stop_words = sum(word.strip(_PUNCTUATION) in STOP_WORDS for word in words)
        return stop_words >= self.min_stop_words * len(words)


def group_turns(paragraphs: Iterable[str], target_chars: int = 600) -> Iterator[str]:
    """Joins consecutive paragraphs (turns of a dialogue) until each group is longer than ``target_chars``."""
    group = ""
    for paragraph in paragraphs:
        group = f"{group} {paragraph}".strip()
        if len(group) > target_chars:
            yield group
            group = ""
    if group:
        yield group


class ParagraphDeduplicator:
    """Remembers paragraphs by their letters (case, digits, blanks and punctuation do not count).

    Paragraphs of fewer than ``min_letters`` letters are never duplicates: short lines repeat by nature.
    """

    def __init__(self, min_letters: int = 32) -> None:
        self._min_letters = min_letters
        self._seen: set[bytes] = set()

    def is_new(self, paragraph: str) -> bool:
        """Tells whether the paragraph was not seen before, and remembers it."""
        letters = _NOT_LETTERS.sub("", paragraph.lower())
        if len(letters) < self._min_letters:
            return True
        digest = hashlib.blake2b(letters.encode(), digest_size=8).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True
