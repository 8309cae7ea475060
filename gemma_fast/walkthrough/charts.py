"""Line and bar charts: similarity, scales by layer, norms, costs, and parts of some models only."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma_fast.walkthrough.theme import (
    Picture,
    Theme,
    canvas,
    label_tokens,
    layer_axis,
    legend_above,
)

Data = dict[str, Any]
STEPS = {"attention": "o", "mlp": "s"}  # step → marker
NAMES = {"attention": "attention", "mlp": "MLP"}


def similarity(data: Data, theme: Theme) -> Picture:
    found = data["similarity"]
    names, cosines = found["names"], np.array(found["cosines"])
    figure, axes = canvas(4.6)
    image = axes.imshow(cosines, cmap=theme.cmap, vmin=min(0, cosines.min()), vmax=1)
    small = min(9, 150 / len(names))
    label_tokens(axes.xaxis, names, small)
    label_tokens(axes.yaxis, names, small)
    axes.tick_params("x", rotation=90)
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, shrink=0.6, label="cosine")
    others = cosines - 2 * np.eye(len(names))
    i, j = divmod(int(others.argmax()), len(names))
    closest = f"The closest pair is {names[i]} and {names[j]}, {cosines[i, j]:.2f}."
    if len(names) < 2:
        closest = ""
    return Picture(figure, f"Matrix of cosines between {len(names)} embeddings. {closest}".strip())


def embedding_scale(data: Data, theme: Theme) -> Picture:
    found = data["embedding_scale"]
    figure, axes = canvas(2.2)
    cases = ("without_factor", "with_factor")
    rows = np.arange(len(cases))
    for offset, part in ((0.19, "embedding"), (-0.19, "attention")):
        values = [found[case][part] for case in cases]
        label = "embedding" if part == "embedding" else "update of the first attention"
        bars = axes.barh(rows + offset, values, 0.36, label=label)
        axes.bar_label(bars, [f"{x:.3g}" for x in values], padding=3, color=theme.text)
    axes.set_yticks(rows, ["without factor", "with factor"])
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set_xlabel("standard deviation")
    legend_above(figure)
    return Picture(
        figure,
        "Bars of the scale of the embedding and of the first attention's update. "
        + " ".join(
            f"{case.replace('_', ' ').capitalize()}: embedding {x['embedding']:.3g}, update"
            f" {x['attention']:.3g}, update scale {x['update_scale']:.3f}."
            for case, x in ((case, found[case]) for case in cases)
        ),
    )


def update_scale(data: Data, theme: Theme) -> Picture:
    figure, axes = canvas(2.8)
    alt = "Update scale by layer."
    for name, marker in STEPS.items():
        values = data["updates"][name]
        axes.plot(values, marker=marker, linestyle=":", linewidth=0.8, label=NAMES[name])
        alt += f" {NAMES[name]}: largest {max(values):.2f} in layer {int(np.argmax(values))},"
        alt += f" smallest {min(values):.3f}."
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("update scale")
    layer_axis(axes)
    axes.legend()
    return Picture(figure, alt)


def hidden_scale(data: Data, theme: Theme) -> Picture:
    found = data["hiddens"]
    figure, axes = canvas(2.8)
    for name, marker in (("with_norms", "o"), ("without_norms", "s")):
        values = [np.nan if x is None else x for x in found[name]]
        places = np.arange(len(values)) / 2  # two points a layer: before attention, before the MLP
        axes.plot(places, values, marker=marker, markersize=3, label=name.replace("_", " "))
    axes.set_yscale("log")
    axes.set_ylabel("standard deviation")
    layer_axis(axes)
    axes.legend()
    finite = [x for x in found["without_norms"] if x is not None]
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
    figure, axes = canvas(0.9 + row * len(names))
    rows = np.arange(len(names))
    for name, marker in (("before", "o"), ("after", "s")):
        axes.plot(found[name], rows, marker, label=f"{name} the norm")
    label_tokens(axes.yaxis, names, min(9, 45 * row))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("RMS")
    legend_above(figure)
    first, last = found["before"][0], found["after"][0]
    return Picture(
        figure,
        f"RMS of each token on a log axis. {names[0]}: {first:.4g} before the norm, {last:.3g}"
        f" after. All tokens: {min(found['before']):.4g} to {max(found['before']):.4g} before,"
        f" {min(found['after']):.3g} to {max(found['after']):.3g} after.",
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
    alt = "Bars of each step's share of a new token."
    for i, (name, values) in enumerate(series.items()):
        shares = [100 * values[group] / sum(values.values()) for group in groups]
        bars = axes.barh(rows + 0.27 * (i - 1), shares, 0.25, label=name)
        axes.bar_label(bars, [f"{x:.0f} %" for x in shares], padding=2, size=7, color=theme.text)
        top = int(np.argmax(shares))
        alt += f" Largest of {name}: {groups[top]}, {shares[top]:.0f} %."
    axes.set_yticks(rows, groups)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("share of a token, %")
    legend_above(figure, 3)
    return Picture(figure, alt)


def windows(data: Data, theme: Theme) -> Picture:
    keys = data["own"]["keys_seen"]
    kinds = data["model"]["config"]["layer_types"]
    figure, axes = canvas(2.2)
    full = [kind == "full_attention" for kind in kinds]
    for name, chosen in (("sliding window", False), ("full attention", True)):
        layers = [i for i, x in enumerate(full) if x == chosen]
        axes.bar(layers, [keys[i] for i in layers], label=name)
    axes.set_yscale("log")
    axes.set_ylabel("keys")
    layer_axis(axes)
    legend_above(figure)
    return Picture(
        figure,
        f"Keys that the last token of a full context sees, by layer: {min(keys)} on"
        f" {full.count(False)} layers with a window, {max(keys)} on {full.count(True)} others.",
    )


def soft_caps(data: Data, theme: Theme) -> Picture:
    config, own = data["model"]["config"], data["own"]
    figure, axes = canvas(2.6)
    limit = config["attn_logit_softcapping"] or config["final_logit_softcapping"]
    found = own.get("largest_scores") or [own["largest_logit"]["before"]]
    x = np.linspace(0, max(2 * limit, *found), 100)
    axes.plot(x, limit * np.tanh(x / limit), label=f"soft cap {limit:g}")
    what = "score, by layer" if "largest_scores" in own else "logit"
    axes.plot(found, limit * np.tanh(np.array(found) / limit), "o", label=f"largest {what}")
    axes.set_xlabel("before the cap")
    axes.set_ylabel("after the cap")
    axes.legend()
    return Picture(figure, f"Curve of the soft cap of {limit:g}. Largest {what}: {max(found):.3g}.")


def qk_norm(data: Data, theme: Theme) -> Picture:
    return _before_after(data["own"]["qk_norm"], {"q": "q", "k": "k"}, "RMS")


def post_norms(data: Data, theme: Theme) -> Picture:
    return _before_after(data["own"]["post_norms"], NAMES, "standard deviation")


def _before_after(found: dict[str, list[float]], names: dict[str, str], unit: str) -> Picture:
    """Draws what a norm does to two tensors, by layer."""
    figure, axes = canvas(3)
    alt = f"{unit[0].upper()}{unit[1:]} by layer, on a log axis."
    for i, (key, name) in enumerate(names.items()):
        for when, line in (("before", ":"), ("after", "-")):
            values = found[f"{key}_{when}"]
            axes.plot(values, line, color=f"C{i}", marker=".", label=f"{name} {when} its norm")
            alt += f" {name} {when} its norm: {min(values):.3g} to {max(values):.3g}."
    axes.set_yscale("log")
    axes.set_ylabel(unit)
    layer_axis(axes)
    legend_above(figure)
    return Picture(figure, alt)
