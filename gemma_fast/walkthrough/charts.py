"""Line and bar charts: scales by layer, norms, costs, functions of one input."""

from __future__ import annotations

import numpy as np

from gemma_fast.walkthrough.theme import (
    Data,
    Picture,
    Theme,
    canvas,
    gaps,
    label_tokens,
    layer_axis,
    legend_above,
    log_axis,
    present,
)

NAMES = {"attention": "attention", "mlp": "MLP", "per_layer": "per-layer embeddings"}


def embedding_scale(data: Data, theme: Theme) -> Picture:
    found = data["embedding_scale"]
    figure, axes = canvas(2.1)
    cases = {case: found[case] for case in ("with_factor", "without_factor")}
    labels = [case.replace("_", " ") for case in cases]
    parts = {"embedding": "o", "attention": "s", "mlp": "^"}  # part → marker
    for part, marker in parts.items():
        values = [x[part] for x in cases.values()]
        label = "embedding" if part == "embedding" else f"update of the first {NAMES[part]}"
        axes.plot(values, labels, marker, label=label)
        for value, name in zip(values, labels, strict=True):
            above = 6 if part != "mlp" else -13  # points; the two updates can be close together
            axes.annotate(f"{value:.3g}", (value, name), (0, above), textcoords="offset points")
    log_axis(axes, "x", [x[part] for x in cases.values() for part in parts])
    axes.margins(x=0.15, y=0.5)
    axes.invert_yaxis()
    axes.set_xlabel("standard deviation")
    legend_above(figure, 1)
    alt = "Standard deviations of the embedding and of the updates of layer 0."
    for name, x in zip(labels, cases.values(), strict=True):
        alt += f" {name.capitalize()}: embedding {x['embedding']:.3g}, attention"
        alt += f" {x['attention']:.3g}, MLP {x['mlp']:.3g}."
    return Picture(figure, alt)


def update_scale(data: Data, theme: Theme) -> Picture:
    figure, axes = canvas(2.8)
    alt = "Update scale by layer."
    for (name, values), marker in zip(data["updates"].items(), "os^", strict=False):
        axes.plot(values, f":{marker}", linewidth=0.8, fillstyle="none", label=NAMES[name])
        alt += f" {NAMES[name]}: largest {max(values):.2f} in layer {int(np.argmax(values))},"
        alt += f" smallest {min(values):.3f}."
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("update scale")
    layer_axis(axes, len(values))
    legend_above(figure)
    return Picture(figure, alt)


def hidden_scale(data: Data, theme: Theme) -> Picture:
    found = data["hiddens"]
    figure, axes = canvas(2.8)
    for name, marker in (("with_norms", "o"), ("without_norms", "s")):
        values = gaps(found[name])
        places = np.arange(len(values)) / 2  # layer i begins at i; its MLP begins at i + 0.5
        axes.plot(places, values, marker=marker, markersize=3, label=name.replace("_", " "))
    finite = present(found["without_norms"])
    log_axis(axes, "y", finite + found["with_norms"])
    axes.set_ylabel("standard deviation")
    layer_axis(axes, len(values) // 2 + 1)
    axes.set_xlabel("layers so far")
    legend_above(figure)
    end = f"it reaches {finite[-1]:.1e}"
    if len(finite) < len(found["without_norms"]):
        end += f" and overflows in layer {(len(finite) - 1) // 2}"
    return Picture(
        figure,
        "Standard deviation of the residual stream by layer, on a log axis. With norms it goes from"
        f" {found['with_norms'][0]:.3g} to {found['with_norms'][-1]:.4g}; without norms {end}.",
    )


def final_norm(data: Data, theme: Theme) -> Picture:
    names = data["tokens"]["names"][-data["tokens"]["shown"] :]
    found = data["final_norm"]
    row = min(0.22, 8 / len(names))  # inches
    figure, axes = canvas(1 + row * len(names))
    for name, marker in (("before", "o"), ("after", "s")):
        axes.plot(found[name], range(len(names)), marker, label=f"{name} the norm")
    label_tokens(axes.yaxis, names, min(9, 45 * row))
    axes.set_ylim(len(names) - 0.4, -0.6)
    log_axis(axes, "x", found["before"] + found["after"])
    axes.set_xlabel("RMS")
    legend_above(figure)
    return Picture(
        figure,
        f"RMS of each token on a log axis. {names[0]}: {found['before'][0]:.4g} before the norm,"
        f" {found['after'][0]:.3g} after. All tokens: {min(found['before']):.4g} to"
        f" {max(found['before']):.4g} before, {min(found['after']):.3g} to"
        f" {max(found['after']):.3g} after.",
    )


def cost(data: Data, theme: Theme) -> Picture:
    found = data["cost"]
    groups = list(found["time"])
    series = {
        "time here": found["time"],
        "bytes, this prompt": found["bytes"]["prompt"],
        "bytes, long context": found["bytes"]["long"],
    }
    figure, axes = canvas(4.2)
    rows = np.arange(len(groups))
    alt = "Each step's share of the time and of the bytes of one new token."
    for i, (name, values) in enumerate(series.items()):
        shares = [100 * values[group] / sum(values.values()) for group in groups]
        bars = axes.barh(rows + 0.27 * (i - 1), shares, 0.25, label=name)
        labels = [f"{x:.0f} %" if x >= 0.5 else "" for x in shares]
        axes.bar_label(bars, labels, padding=2, size=7, color=theme.text)
        top = int(np.argmax(shares))
        alt += f" Largest of {name}: {groups[top]}, {shares[top]:.0f} %."
    axes.set_yticks(rows, groups)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("share of a token, %")
    legend_above(figure, 3)
    return Picture(figure, alt)


def gelu(data: Data, theme: Theme) -> Picture:
    found = data["mlp"]["gelu"]
    figure, axes = canvas(2.4)
    axes.plot(found["x"], found["gelu"], label="GELU")
    axes.plot(found["x"], found["relu"], "--", label="ReLU")
    axes.set_xlabel("x")
    legend_above(figure)
    alt = f"GELU and ReLU from -4 to 4. GELU is smooth; its minimum is {min(found['gelu']):.2f}."
    return Picture(figure, alt)


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
