import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbert.data.prose import ParagraphDeduplicator, ProseRule, clean, group_turns

SENTENCE = "It was the best of times, and it was the worst of times that they had ever seen in the city."


def test_clean_maps_typography_and_blanks():
    assert clean("\u201cA\u201d\u2019s\u00a0 b\u2013c\u00ad\u200b \n d\ufb01 ") == '"A"\'s b-c dfi'


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        (SENTENCE[:59], {"min_chars": 59}),
        (" ".join([SENTENCE] * 250), {"max_chars": 10**6}),
        ("the 1234 of 5678 and 9012 to 3456 in 7890 that 1234 is 5678 was 9012 it 3456 for", {"min_letters": 0}),
        (SENTENCE.upper(), {"max_upper": 1}),
        ("Copper zinc nickel cobalt titanium vanadium chromium manganese scandium gallium", {"min_stop_words": 0}),
        ("the internationalization of counterrevolutionaries and institutionalization", {"max_word_length": 99}),
        ("a b of it c d to e f in g h is i j to k l he m n it o p as q r on s t by u v we w x", {"min_word_length": 0}),
        (SENTENCE.replace("e", "\u00e9"), {"max_non_ascii": 1}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_prose_fails_exactly_one_bound(text, bound):
    assert not ProseRule().accepts(text)
    assert ProseRule(**bound).accepts(text)


def test_prose_is_accepted():
    assert ProseRule().accepts(SENTENCE)


def test_each_bound_is_a_share_of_the_characters():
    text = SENTENCE + " 123"
    letters = sum(character.isalpha() or character == " " for character in text) / len(text)
    assert ProseRule(min_letters=letters - 1e-6).accepts(text)
    assert not ProseRule(min_letters=letters + 1e-6).accepts(text)


def test_group_turns_joins_until_the_target_is_exceeded():
    assert list(group_turns(["aa", "bb", "cccc", "d"], target_chars=4)) == ["aa bb", "cccc d"]
    assert list(group_turns(["aa", "b"], target_chars=4)) == ["aa b"]
    assert list(group_turns([])) == []


@given(st.lists(st.text("ab c", max_size=12), max_size=30), st.integers(1, 20))
def test_grouping_loses_no_word(turns, target):
    joined = " ".join(group_turns(turns, target))
    assert joined.split() == " ".join(turns).split()


def test_deduplication_ignores_case_digits_and_punctuation():
    seen = ParagraphDeduplicator()
    assert seen.is_new(SENTENCE)
    assert not seen.is_new(SENTENCE.upper().replace(",", " 12;"))
    assert seen.is_new(SENTENCE + " More")


def test_short_lines_and_other_scripts_are_kept_apart():
    seen = ParagraphDeduplicator()
    assert seen.is_new("Yes, sir.") and seen.is_new("Yes, sir.")
    russian = "Все счастливые семьи похожи друг на друга, каждая несчастливая"
    assert seen.is_new(russian) and seen.is_new(russian.replace("семьи", "люди")) and not seen.is_new(russian)
