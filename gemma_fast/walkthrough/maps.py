"""Attention maps, rotations and wavelengths, and the surfaces of the small MLP."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator

from gemma_fast.walkthrough.theme import WIDTH, Picture, Theme, canvas, label_tokens

Data = dict[str, Any]
TYPES = {"sliding_attention": "layers with a window", "full_attention": "full layers"}


def attention_maps(data: Data, theme: Theme) -> Picture:
    """Draws the maps of all heads in one image: a column per layer, flat heads at the top."""
    found = data["attention"]
    maps = np.array(found["maps"])  # [layers, heads, t, s]
    layers, heads, t, _ = maps.shape
    maps = np.stack([x[order] for x, order in zip(maps, found["order"], strict=True)])
    maps = np.where(np.tri(t, dtype=bool), maps, np.nan)
    gap = max(1, t // 6)
    padded = np.pad(maps, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    image = padded.transpose(1, 2, 0, 3).reshape(heads * (t + gap), layers * (t + gap))
    width = 2 * WIDTH
    figure, axes = canvas(0.7 + (width - 0.7) * heads / layers, width=width)
    axes.imshow(image, cmap=theme.cmap, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    middle = (t - 1) / 2
    axes.set_xticks(middle + (t + gap) * np.arange(layers), range(layers))
    axes.set_yticks([middle, middle + (t + gap) * (heads - 1)], ["flat", "spiky"])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    return Picture(
        figure,
        f"Attention maps of {heads} heads in each of {layers} layers, {t} tokens each. Rows are"
        " queries, columns are keys; a dark cell is a large weight on a light page, a bright one on"
        " a dark page. Heads go from flat (top) to spiky (bottom).",
    )


def attention_map(data: Data, theme: Theme) -> Picture:
    """Draws the map of one head with the tokens on its axes."""
    found, shown = data["attention"], data["tokens"]["shown"]
    names = data["tokens"]["names"][-shown:]
    layer, head = found["enlarged"]["layer"], found["enlarged"]["head"]
    weights = np.array(found["maps"][layer][head])
    figure, axes = canvas(4.2)
    masked = np.where(np.tri(shown, dtype=bool), weights, np.nan)
    image = axes.imshow(masked, cmap=theme.cmap, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    small = min(9, 220 / shown)
    label_tokens(axes.xaxis, names, small)
    label_tokens(axes.yaxis, names, small)
    axes.tick_params("x", rotation=90)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.grid(visible=False)
    axes.set_title(f"layer {layer}, head {head}")
    figure.colorbar(image, ax=axes, shrink=0.6, label="weight")
    best = ", ".join(
        f"{names[i]} → {names[int(row.argmax())]} {row.max():.2f}"
        for i, row in list(enumerate(weights))[-5:]
    )
    return Picture(
        figure, f"Attention map of layer {layer}, head {head}. Largest weights of the last queries:"
        f" {best}.",
    )  # fmt: skip


def rotations(data: Data, theme: Theme) -> Picture:
    found = data["rotary"]["rotations"]
    figure, both = canvas(2.5, 1, 2)
    for axes, pair, vectors in zip(both, found["pairs"], found["vectors"], strict=True):
        for position, (x, y) in enumerate(vectors):
            arrow = {"arrowstyle": "-|>", "color": theme.colors[0], "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (x, y), (0, 0), arrowprops=arrow)
            axes.text(1.2 * x, 1.2 * y, str(position), ha="center", va="center")
        axes.set_xlim(-1.4, 1.4)
        axes.set_ylim(-1.4, 1.4)
        axes.set_aspect("equal")
        axes.set_title(f"channel pair {pair}")
        axes.set_xticks([])
        axes.set_yticks([])
    angles = [np.degrees(np.arctan2(y, x)) for (x, y) in (v[1] for v in found["vectors"])]
    return Picture(
        figure,
        f"The vector (1, 0) at positions 0 to {len(found['vectors'][0]) - 1}, as arrows. "
        + ". ".join(
            f"Channel pair {pair} turns by {angle:.1f} degrees a position"
            for pair, angle in zip(found["pairs"], angles, strict=True)
        )
        + ".",
    )


def wavelengths(data: Data, theme: Theme) -> Picture:
    context = data["model"]["config"]["max_position_embeddings"]
    figure, axes = canvas(2.8)
    alt = "Wavelength of each channel pair, on a log axis."
    for kind, values in data["rotary"]["wavelengths"].items():
        axes.plot(values, label=TYPES[kind])
        alt += f" {TYPES[kind].capitalize()}: {min(values):.3g} to {max(values):.3g} positions."
    axes.axhline(context, color=theme.muted, linestyle="--", label=f"context, {context}")
    axes.set_yscale("log")
    axes.set_xlabel("channel pair")
    axes.set_ylabel("wavelength, positions")
    axes.legend()
    return Picture(figure, f"{alt} A line marks the context of {context}.")


def query_lengths(data: Data, theme: Theme) -> Picture:
    found = data["rotary"]["query_lengths"]
    figure, every = canvas(0.5 + 1.3 * len(found), len(found), squeeze=False)
    for axes, x in zip(every[:, 0], found, strict=True):
        lengths = np.array(x["lengths"])  # [heads, pairs]
        axes.imshow(
            lengths, cmap=theme.cmap, aspect="auto", vmin=0, interpolation="nearest",
            vmax=np.quantile(lengths, 0.995),
        )  # fmt: skip
        waves = data["rotary"]["wavelengths"][x["type"]]
        ticks = np.linspace(0, len(waves) - 1, 5).astype(int)
        axes.set_xticks(ticks, [f"{waves[i]:.0f}" for i in ticks])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        axes.set_ylabel("head")
        axes.grid(visible=False)
        axes.set_title(f"layer {x['layer']}, one of the {TYPES[x['type']]}")
    every[-1, 0].set_xlabel("wavelength, positions")
    layers = ", ".join(str(x["layer"]) for x in found)
    return Picture(
        figure, f"Length of the query in each channel pair, by head, in layers {layers}. Short"
        " wavelengths are at the left.",
    )  # fmt: skip


def gelu(data: Data, theme: Theme) -> Picture:
    found = data["mlp"]["gelu"]
    figure, axes = canvas(2.4)
    axes.plot(found["x"], found["gelu"], label="GELU")
    axes.plot(found["x"], found["relu"], "--", label="ReLU")
    axes.set_xlabel("x")
    axes.legend()
    lowest = min(found["gelu"])
    alt = f"GELU and ReLU from -4 to 4. GELU is smooth; its minimum is {lowest:.2f}."
    return Picture(figure, alt)


def surface(name: str) -> Any:
    """Returns the function that draws the surface of one of the four functions."""

    def draw(data: Data, theme: Theme) -> Picture:
        found = data["mlp"]
        line, values = np.array(found["inputs"]), np.array(found["surfaces"][name])
        figure, axes = canvas(2.9, width=0.7 * WIDTH, subplot_kw={"projection": "3d"})
        x, y = np.meshgrid(line, line)
        axes.plot_surface(
            x, y, values, cmap=theme.cmap, rcount=len(line), ccount=len(line), linewidth=0.1,
            edgecolor=theme.muted, rasterized=True,
        )  # fmt: skip
        axes.view_init(elev=32, azim=-122)
        axes.set_xlabel("x₀", labelpad=-8)
        axes.set_ylabel("x₁", labelpad=-8)
        axes.tick_params(pad=-3, labelsize=7)
        for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
            axis.set_pane_color(theme.background)
            axis.set_major_locator(MaxNLocator(4))
        axes.set_title(name)
        return Picture(
            figure, f"Surface of the {name} function over two inputs from -2 to 2; its values go"
            f" from {values.min():.2f} to {values.max():.2f}.",
        )  # fmt: skip

    return draw


def mlp_slice(data: Data, theme: Theme) -> Picture:
    found = data["mlp"]
    figure, every = canvas(3.6, 2, 2, sharex=True)
    for axes, (name, values) in zip(every.flat, found["slices"].items(), strict=True):
        axes.plot(found["inputs"], values)
        axes.set_title(name)
    for axes in every[1]:
        axes.set_xlabel("x₀")
    return Picture(
        figure,
        f"The four functions at x₁ = {found['slice_at']:g}: linear is a straight line, ReLU has"
        " corners, ReGLU has corners between curves, GeGLU is smooth.",
    )
