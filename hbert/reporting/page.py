"""Self-contained HTML pages: images inline, no network, no scripts, light and dark, narrow screens."""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #24292f; --soft: #5b646e; --faint: #d8dde3;
  --card: #f5f7f9; --note: #fff4d6; --link: #005a94; --good: #00684b; --bad: #b03a00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181d; --ink: #d7dce2; --soft: #99a2ad; --faint: #363b44;
    --card: #1e2128; --note: #3a3218; --link: #6fc3f2; --good: #4fd3a8; --bad: #ff9a66; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
a { color: var(--link); }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 2.75rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--faint); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p, ul { max-width: 46rem; margin: .6rem 0; }
ul { padding-left: 1.25rem; }
.lead { color: var(--soft); margin-top: 0; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1.25rem; margin: 1rem 0;
  padding: .9rem 1rem; background: var(--card); border-radius: .5rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow: auto; max-height: 30rem; width: fit-content; max-width: 100%; margin: .75rem 0;
  border: 1px solid var(--faint); border-radius: .5rem; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--faint); text-align: right; white-space: nowrap; }
th { color: var(--soft); background: var(--paper); font-weight: 600; vertical-align: bottom; position: sticky; top: 0; }
tr:last-child td { border-bottom: 0; }
.left { text-align: left; }
.good { color: var(--good); } .bad { color: var(--bad); } .good, .bad { font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem 2rem;
  align-items: start; }
figure { margin: .75rem 0; max-width: 45rem; } figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: .4rem; } figcaption b { color: var(--ink); }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--link); }
.note { background: var(--note); padding: .55rem .9rem; border-radius: .5rem; }
@media (max-width: 36rem) {
  h1 { font-size: 1.45rem; } dl { grid-template-columns: 5.2rem minmax(0, 1fr); column-gap: .75rem; }
  table { font-size: .8rem; } th, td { padding: .3rem .45rem; }
}
"""


@dataclass(frozen=True)
class Cell:
    """A table's cell that is ``"good"`` or ``"bad"`` news; other cells are plain strings."""

    text: str
    tone: str


def page(title: str, parts: Sequence[str], lead: str = "") -> str:
    """Returns an HTML document; ``parts`` are HTML made by the functions below, ``lead`` a line under the title."""
    below = [f'<p class="lead">{escape(lead)}</p>'] if lead else []
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join([*below, *parts])
        + "\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """A section's heading, which `contents` can lead to."""
    return f'<h2 id="{_anchor(text)}">{escape(text)}</h2>'


def subheading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(text)}</h3>"


def contents(headings: Sequence[str]) -> str:
    """Links to sections of the page."""
    links = "\n".join(f'<a href="#{_anchor(text)}">{escape(text)}</a>' for text in headings)
    return f"<nav>\n{links}\n</nav>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    """A paragraph that the reader must not miss."""
    return f'<p class="note">{escape(text)}</p>'


def bullets(texts: Sequence[str]) -> str:
    """A list of plain texts."""
    return "<ul>\n" + "\n".join(f"<li>{escape(text)}</li>" for text in texts) + "\n</ul>"


def facts(values: Mapping[str, str]) -> str:
    """Names and what they are."""
    entries = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in values.items())
    return f"<dl>\n{entries}\n</dl>"


def details(summary: str, parts: Sequence[str]) -> str:
    """Parts that are folded away under a line of text."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n" + "\n".join(parts) + "\n</details>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str | Cell]], texts: Collection[str] = ()) -> str:
    """A table; it scrolls where it is too wide.

    The first column and those named in ``texts`` stand to the left, the others, numbers, to the right.
    """
    left = {index for index, column in enumerate(columns) if not index or column in texts}
    head = "".join(
        f'<th scope="col"{_classes(index in left)}>{escape(name)}</th>' for index, name in enumerate(columns)
    )
    body = "\n".join(
        "<tr>" + "".join(_cell(cell, index in left) for index, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return (
        '<div class="wide" role="region" aria-label="table" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def figure(images: Mapping[str, Path], description: str, caption: str = "") -> str:
    """A PNG, inline, as the reader's theme asks: ``images`` has the keys "light" and "dark".

    ``description`` stands for it where it cannot be seen; with a ``caption`` both stand below it.
    """
    light, dark = (_data_uri(images[theme]) for theme in ("light", "dark"))
    below = f"<figcaption><b>{escape(description)}.</b> {escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(description)}"></picture>{below}</figure>'
    )


def figures(parts: Sequence[str]) -> str:
    """Figures side by side where the screen is wide enough."""
    return '<div class="figures">\n' + "\n".join(parts) + "\n</div>"


def _cell(cell: str | Cell, left: bool) -> str:
    text, tone = (cell, "") if isinstance(cell, str) else (cell.text, cell.tone)
    return f"<td{_classes(left, tone)}>{escape(text)}</td>"


def _classes(left: bool, tone: str = "") -> str:
    names = " ".join(filter(None, ("left" if left else "", tone)))
    return f' class="{names}"' if names else ""


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
