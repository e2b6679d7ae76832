"""Docstrings as mkdocstrings reads them: Markdown in place of Sphinx roles and math blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

# :func:`~package.name` and the other roles for names.
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`")
# .. math:: on one line, on the lines behind it, or both; it ends at an empty line.
_MATH = re.compile(r"^( *)\.\. math::((?:.*\n)(?: *\S.*(?:\n|$))*)", re.MULTILINE)


def as_markdown(docstring: str) -> str:
    """Roles as code, math as MathML, which browsers draw by themselves."""
    text = _ROLE.sub(lambda role: f"`{' '.join(role[1].split())}`", docstring)
    return _MATH.sub(lambda block: f"{block[1]}{convert(' '.join(block[2].split()), display='block')}\n", text)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
