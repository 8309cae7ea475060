"""Colors, sizes and axes that pictures share; writes each picture for light and for dark pages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cycler import cycler
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

WIDTH = 4.6  # inches; about the width of a phone's screen at the page's font size
DPI = 220  # of raster images inside a picture
Data = dict[str, Any]  # what data.py collects


class Theme(NamedTuple):
    background: str
    text: str
    muted: str  # axes and text of less weight
    grid: str
    colors: tuple[str, str, str]
    ramp: tuple[str, str, str]  # colors of 0, of the middle and of the largest value

    @property
    def cmap(self) -> LinearSegmentedColormap:
        return LinearSegmentedColormap.from_list("ramp", self.ramp)


THEMES = {
    "light": Theme(
        background="#ffffff", text="#1f2328", muted="#59636e", grid="#d1d9e0",
        colors=("#0969da", "#bc4c00", "#1a7f37"), ramp=("#eaf1f8", "#4493f8", "#0a3069"),
    ),
    "dark": Theme(
        background="#0d1117", text="#e6edf3", muted="#9198a1", grid="#3d444d",
        colors=("#4493f8", "#f0883e", "#3fb950"), ramp=("#19222d", "#316dca", "#cae8ff"),
    ),
}  # fmt: skip


class Picture(NamedTuple):
    figure: Figure
    alt: str  # what the picture shows, in words


class Written(NamedTuple):
    alt: str
    width: int  # CSS pixels
    height: int


def canvas(
    height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **options: Any
) -> tuple[Figure, Any]:
    """Returns a figure and its axes: one, or an array of rows * columns. Sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def gaps(values: list[float | None]) -> list[float]:
    """Returns values to draw, with a gap (NaN) where there is none."""
    return [math.nan if x is None else x for x in values]


def present(values: list[float | None]) -> list[float]:
    """Returns the values that there are."""
    return [x for x in values if x is not None]


def label_tokens(axis: Any, names: list[str], size: float = 9) -> None:
    """Labels an axis with tokens. Long names are cut; `$` starts no formula."""
    short = [name if len(name) <= 14 else f"{name[:13]}…" for name in names]
    axis.set_ticks(range(len(names)), short, parse_math=False)
    axis.set_tick_params(labelsize=size)


def legend_above(figure: Figure, columns: int = 2) -> None:
    """Places the legend above the plot, where it covers no data."""
    figure.legend(loc="outside upper center", ncols=columns)


def layer_axis(axes: Axes, layers: int) -> None:
    axes.set_xlabel("layer")
    axes.set_xlim(-0.5, layers - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def log_axis(axes: Axes, name: str, values: list[float]) -> None:
    """Makes the axis "x" or "y" logarithmic, with several labels for any range of the values. Does
    nothing if no value is positive."""
    positive = [value for value in values if value > 0]
    if not positive:
        return
    getattr(axes, f"set_{name}scale")("log")
    axis, ratio = getattr(axes, f"{name}axis"), max(positive) / min(positive)
    axis.set_minor_formatter(NullFormatter())
    if ratio < 100:
        subs = (1, 2, 5) if ratio > 5 else (1, 1.2, 1.5, 2, 3, 5, 7)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    getattr(axes, f"set_{name}margin")(0.1)


def settings(theme: Theme) -> dict[Any, Any]:
    """Returns matplotlib's settings for a theme."""
    return {
        "font.size": 9, "font.family": "sans-serif", "axes.titlesize": 9, "axes.grid": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "figure.facecolor": theme.background, "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background, "text.color": theme.text,
        "axes.labelcolor": theme.text, "axes.titlecolor": theme.text, "axes.edgecolor": theme.muted,
        "xtick.color": theme.muted, "ytick.color": theme.muted, "xtick.labelcolor": theme.text,
        "ytick.labelcolor": theme.text, "grid.color": theme.grid, "grid.linewidth": 0.5,
        "legend.frameon": False, "legend.labelcolor": theme.text,
        "axes.prop_cycle": cycler(color=theme.colors),
        "svg.fonttype": "none",  # text stays text: any script is drawn, and can be searched
        "svg.hashsalt": "gemma_fast",  # equal data give equal files
    }  # fmt: skip


def write_picture(
    name: str, draw: Callable[[Data, Theme], Picture], data: Data, folder: Path
) -> Written:
    """Writes NAME.svg and NAME-dark.svg to the folder."""
    for kind, theme in THEMES.items():
        # The user's settings of matplotlib have no effect here. Scripts that its own font lacks are
        # drawn by the browser.
        with style.context(settings(theme), after_reset=True), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure, alt = draw(data, theme)
            file = folder / f"{name}{'' if kind == 'light' else '-dark'}.svg"
            figure.savefig(file, dpi=DPI, metadata={"Date": None, "Title": alt})
    return Written(alt, *(round(96 * x) for x in figure.get_size_inches()))
