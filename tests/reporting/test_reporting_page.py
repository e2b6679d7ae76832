"""Parts of the HTML pages, read back by a parser."""

import pytest
from html_page import Page
from PIL import Image

from hbert.reporting import page

HOSTILE = "</td><script>alert(1)</script> \"'&amp; <b>\u00e9\u4e2d $x^{"


@pytest.fixture
def images(tmp_path):
    for name in ("light", "dark"):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in ("light", "dark")}


def whole(*parts):
    return Page(page.page("title", parts))


@pytest.mark.parametrize("part", [
    page.heading, page.subheading, page.paragraph, page.note,
    lambda text: page.bullets([text]), lambda text: page.facts({text: text}), lambda text: page.contents([text]),
    lambda text: page.details(text, []), lambda text: page.table([text], [[text], [page.Cell(text, "good")]]),
])  # fmt: skip
def test_text_stays_text(part):
    found = whole(part(HOSTILE))
    assert HOSTILE in found.text and "script" not in found.tags
    found.check_self_contained()


def test_text_stays_text_in_titles_and_figures(images):
    found = Page(page.page(HOSTILE, [page.figure(images, HOSTILE, HOSTILE)], HOSTILE))
    assert found.text.count(HOSTILE) == 5  # title, h1, lead, description, caption
    assert found.values("alt") == [HOSTILE]
    found.check_self_contained()
    found.check_figures()


def test_a_page_fits_phones_and_both_themes():
    found = whole(page.paragraph("text"))
    assert ("meta", "content", "width=device-width, initial-scale=1") in found.attributes
    (style,) = [text for tag, text in found.texts if tag == "style"]
    assert "prefers-color-scheme: dark" in style


def test_contents_lead_to_headings():
    titles = ["Better and worse", "Suite latency", "2 x 3"]
    found = whole(page.contents(titles), *map(page.heading, titles))
    assert [link.removeprefix("#") for link in found.values("href")] == found.values("id")


def test_numbers_stand_to_the_right_and_texts_to_the_left():
    rows = [["a", "1.5", "ms"], ["b", page.Cell("2", "bad"), "s"]]
    found = whole(page.table(["name", "speed", "unit"], rows, ("unit",)))
    assert found.rows == [["name", "speed", "unit"], ["a", "1.5", "ms"], ["b", "2", "s"]]
    cells = [value for tag, name, value in found.attributes if tag == "td" and name == "class"]
    assert cells == ["left", "left", "left", "bad", "left"]  # of a, ms, b, 2, s; 1.5 has no class
    (wrapper,) = [value for tag, name, value in found.attributes if tag == "div" and name == "class"]
    assert wrapper == "wide"


def test_both_themes_have_their_picture(images):
    Image.new("RGB", (2, 2), "white").save(images["dark"])
    found = whole(page.figure(images, "what it shows"))
    assert ("source", "media", "(prefers-color-scheme: dark)") in found.attributes
    assert found.values("src") != found.values("srcset")
