"""Reads the lines of reference.py that the page shows, and the whole file as a page of its own."""

from __future__ import annotations

import inspect
import textwrap
from operator import attrgetter
from typing import NamedTuple

from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from gemma_fast import reference


class Source(NamedTuple):
    line: int  # number of the first line in reference.py
    html: Markup  # empty if the page has shown these lines already


class Sources:
    """Returns the source of a function of reference.py, highlighted. Shows each function once."""

    def __init__(self) -> None:
        self.shown: set[str] = set()

    def __call__(self, name: str) -> Source:
        """name: for example "embed" or "Reference.layer"."""
        lines, first = inspect.getsourcelines(attrgetter(name)(reference))
        html = "" if name in self.shown else _highlighted(textwrap.dedent("".join(lines)))
        self.shown.add(name)
        return Source(first, Markup(html))


def _highlighted(code: str) -> str:
    return highlight(code, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip()


def all_lines() -> Markup:
    """Returns the whole file, highlighted; line n has the anchor "line-n"."""
    formatter = HtmlFormatter(
        linenos="inline", lineanchors="line", anchorlinenos=True, wrapcode=True
    )
    return Markup(highlight(inspect.getsource(reference), PythonLexer(), formatter))
