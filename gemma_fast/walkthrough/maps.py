"""Matrices of tokens, attention maps, rotations and wavelengths, and the surfaces of small MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.patches import Circle, Rectangle
from matplotlib.ticker import MaxNLocator

from gemma_fast.walkthrough.theme import (
    WIDTH,
    Data,
    Picture,
    Theme,
    canvas,
    gaps,
    label_tokens,
    legend_above,
    log_axis,
    present,
)

KINDS = {"sliding_attention": "layers with a window", "full_attention": "full layers"}
WEIGHTS = PowerNorm(0.5, 0, 1)  # color of an attention weight: its square root


def token_matrix(
    values: Any, names: list[str], theme: Theme, norm: Normalize, label: str
) -> tuple[Any, Any]:
    """Returns a figure and its axes: a square matrix with the tokens on both sides."""
    size = max(WIDTH, 0.13 * len(names))  # inches
    figure, axes = canvas(0.9 * size, width=size)
    image = axes.imshow(values, cmap=theme.cmap, norm=norm, interpolation="none")
    for axis in (axes.xaxis, axes.yaxis):
        label_tokens(axis, names, min(9, max(6, 200 / len(names))))
    axes.tick_params("x", rotation=90)
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, shrink=0.6, label=label)
    return figure, axes


def similarity(data: Data, theme: Theme) -> Picture:
    names, cosines = data["similarity"]["names"], np.array(data["similarity"]["cosines"])
    norm = Normalize(min(0, cosines.min()), 1)
    figure, _ = token_matrix(cosines, names, theme, norm, "cosine")
    alt = f"Cosines between the embeddings of {', '.join(names)}."
    if len(names) > 1:
        i, j = divmod(int((cosines - 3 * np.eye(len(names))).argmax()), len(names))
        alt += f" The closest pair is {names[i]} and {names[j]}, {cosines[i, j]:.2f}."
    return Picture(figure, alt)


def attention_maps(data: Data, theme: Theme) -> Picture:
    """Draws the maps of all heads in one image: a column per layer, flat heads at the top."""
    found = data["attention"]
    maps = np.array(found["maps"], dtype=float)  # NaN where the query does not see the key
    layers, heads, t, _ = maps.shape
    maps = np.stack([x[order] for x, order in zip(maps, found["order"], strict=True)])
    gap = max(1, t // 6)
    step = t + gap
    padded = np.pad(maps, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    image = padded.transpose(1, 2, 0, 3).reshape(heads * step, layers * step)
    cell = 0.47 + 0.3 * t / 64  # inches
    figure, axes = canvas(0.7 + cell * heads, width=max(WIDTH, 0.7 + cell * layers))
    axes.imshow(image, cmap=theme.cmap, norm=WEIGHTS, interpolation="none")
    layer, head = found["enlarged"]["layer"], found["enlarged"]["head"]
    corner = (
        layer * step - 0.5 - gap / 2,
        found["order"][layer].index(head) * step - 0.5 - gap / 2,
    )
    edge = theme.colors[1]
    axes.add_patch(Rectangle(corner, step, step, fill=False, edgecolor=edge, clip_on=False))
    axes.set_xticks((t - 1) / 2 + step * np.arange(layers), range(layers))
    ends = ["flat", "spiky"] if heads > 1 else ["one head"]
    axes.set_yticks([(t - 1) / 2 + step * (heads - 1) * i for i in range(len(ends))], ends)
    axes.tick_params(length=0, pad=6)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    return Picture(
        figure,
        f"Attention maps of {heads} heads in each of {layers} layers, for {t} tokens. Rows are"
        " queries, columns are keys. In each layer the heads go from flat (top) to spiky (bottom)."
        f" A frame marks layer {layer}, head {head}.",
    )


def attention_map(data: Data, theme: Theme) -> Picture:
    """Draws the map of one head with the tokens on its axes."""
    shown, enlarged = data["tokens"]["shown"], data["attention"]["enlarged"]
    names = data["tokens"]["names"][-shown:]
    layer, head = enlarged["layer"], enlarged["head"]
    weights = np.array(data["attention"]["maps"][layer][head], dtype=float)
    figure, axes = token_matrix(weights, names, theme, WEIGHTS, "weight")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(f"layer {layer}, head {head}")
    best = ", ".join(
        f"{names[i]} → {names[int(np.nanargmax(row))]} {np.nanmax(row):.2f}"
        for i, row in list(enumerate(weights))[-5:]
    )
    alt = f"Attention map of layer {layer}, head {head}. Key with the largest weight for each of"
    alt += f" the last queries: {best}."
    return Picture(figure, alt)


def rotations(data: Data, theme: Theme) -> Picture:
    found = data["rotary"]["rotations"]
    figure, every = canvas(2.4, 1, len(found["pairs"]), squeeze=False)
    turns = []
    for axes, pair, vectors in zip(every[0], found["pairs"], found["vectors"], strict=True):
        axes.add_patch(Circle((0, 0), 1, fill=False, color=theme.grid))
        for position, (x, y) in enumerate(vectors):
            arrow = {"arrowstyle": "-|>", "color": theme.colors[0], "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (x, y), (0, 0), arrowprops=arrow)
            axes.text(1.2 * x, 1.2 * y, str(position), ha="center", va="center")
        axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", title=f"channel pair {pair}")
        axes.set_axis_off()
        turn = np.degrees(np.arctan2(*vectors[1][::-1]))
        turns.append(f"Channel pair {pair} turns by {turn:.1f} degrees a position.")
    last = len(vectors) - 1
    return Picture(
        figure, f"The vector (1, 0) at positions 0 to {last}, as arrows. {' '.join(turns)}"
    )


def wavelengths(data: Data, theme: Theme) -> Picture:
    context = data["model"]["config"]["max_position_embeddings"]
    figure, axes = canvas(2.8)
    alt = "Wavelength of each channel pair, on a log axis."
    for (kind, values), line in zip(
        data["rotary"]["wavelengths"].items(), ("-", "--"), strict=False
    ):
        axes.plot(gaps(values), line, label=KINDS[kind])
        turning = present(values)
        alt += f" {KINDS[kind].capitalize()}: {min(turning):.3g} to {max(turning):.3g} positions"
        unmoved = len(values) - len(turning)
        alt += f"; {unmoved} pairs are not rotated." if unmoved else "."
    axes.axhline(context, color=theme.muted, linestyle=":", label=f"context, {context}")
    log_axis(axes, "y", turning)
    axes.set_xlabel("channel pair")
    axes.set_ylabel("wavelength, positions")
    legend_above(figure)
    return Picture(figure, f"{alt} A line marks the context of {context}.")


def query_lengths(data: Data, theme: Theme) -> Picture:
    found = data["rotary"]["query_lengths"]
    heads = len(found[0]["lengths"])
    figure, every = canvas(0.5 + (0.7 + 0.15 * heads) * len(found), len(found), squeeze=False)
    for axes, x in zip(every[:, 0], found, strict=True):
        image = axes.imshow(
            x["lengths"], cmap=theme.cmap, aspect="auto", vmin=0, interpolation="none"
        )
        waves = data["rotary"]["wavelengths"][x["type"]]
        ticks = np.linspace(0, len(waves) - 1, 5).astype(int)
        axes.set_xticks(ticks, ["∞" if waves[i] is None else f"{waves[i]:.0f}" for i in ticks])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        axes.set_ylabel("head")
        axes.grid(visible=False)
        axes.set_title(f"layer {x['layer']}, one of the {KINDS[x['type']]}")
        figure.colorbar(image, ax=axes, label="length")
    every[-1, 0].set_xlabel("wavelength, positions")
    layers = ", ".join(str(x["layer"]) for x in found)
    alt = f"Length of the query in each channel pair, by head, in layers {layers}. Short"
    return Picture(figure, f"{alt} wavelengths are at the left.")


def surface(name: str) -> Callable[[Data, Theme], Picture]:
    """Returns the function that draws the surface of one of the four functions."""

    def draw(data: Data, theme: Theme) -> Picture:
        found = data["mlp"]
        line, values = np.array(found["inputs"]), np.array(found["surfaces"][name])
        figure, axes = canvas(2.9, width=0.7 * WIDTH, subplot_kw={"projection": "3d"})
        axes.plot_surface(
            *np.meshgrid(line, line), values, cmap=theme.cmap, rcount=len(line), ccount=len(line),
            linewidth=0.1, edgecolor=theme.muted, rasterized=True,
        )  # fmt: skip
        axes.view_init(elev=32, azim=-122)
        axes.set_xlabel("x₀", labelpad=-8)
        axes.set_ylabel("x₁", labelpad=-8)
        axes.tick_params(pad=-3)
        for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
            axis.set_pane_color(theme.background)
            axis.set_major_locator(MaxNLocator(4))
        axes.set_title(name)
        low, high = values.min(), values.max()
        alt = f"Surface of the {name} function over two inputs from -2 to 2; its values go from"
        return Picture(figure, f"{alt} {low:.2f} to {high:.2f}.")

    return draw
