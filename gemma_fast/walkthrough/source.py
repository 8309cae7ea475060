"""Reads the lines of the reference that the page shows, and its whole files for another page."""

from __future__ import annotations

import inspect
import textwrap
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from gemma_fast import reference, reference_steps

MODULES = {Path(inspect.getfile(module)).name: module for module in (reference, reference_steps)}


class Source(NamedTuple):
    file: str  # for example "reference_steps.py"
    line: int  # number of the first line in the file
    html: Markup  # empty if the page has shown these lines already


class Sources:
    """Returns the source of a function of the reference, highlighted. Shows each function once."""

    def __init__(self) -> None:
        self.shown: set[str] = set()

    def __call__(self, name: str) -> Source:
        """name: for example "embed" or "Reference.layer"."""
        function = inspect.unwrap(attrgetter(name)(reference))
        lines, first = inspect.getsourcelines(function)
        html = "" if name in self.shown else _highlighted(textwrap.dedent("".join(lines)))
        self.shown.add(name)
        return Source(Path(inspect.getfile(function)).name, first, Markup(html))


def _highlighted(code: str) -> str:
    return highlight(code, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip()


def all_files() -> dict[str, Markup]:
    """Returns each whole file by its name, highlighted; line n has the anchor "NAME-n"."""
    files = {}
    for name, module in MODULES.items():
        formatter = HtmlFormatter(
            linenos="inline", lineanchors=name, anchorlinenos=True, wrapcode=True
        )
        files[name] = Markup(highlight(inspect.getsource(module), PythonLexer(), formatter))
    return files
