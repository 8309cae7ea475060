"""Charts of parts that only some models have: windows, soft caps, norms of heads and of updates,
shared keys and values, per-layer embeddings, experts, scalars of layers."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import MaxNLocator

from gemma_fast.walkthrough.charts import NAMES
from gemma_fast.walkthrough.maps import KINDS
from gemma_fast.walkthrough.theme import (
    Data,
    Picture,
    Theme,
    canvas,
    gaps,
    layer_axis,
    legend_above,
    log_axis,
    present,
)


def windows(data: Data, theme: Theme) -> Picture:
    keys, kinds = data["own"]["keys_seen"], data["model"]["config"]["layer_types"]
    figure, axes = canvas(2.2)
    full = [kind == "full_attention" for kind in kinds]
    for name, marker, chosen in (("with a window", "o", False), ("full layers", "s", True)):
        layers = [i for i, x in enumerate(full) if x == chosen]
        axes.plot(layers, [keys[i] for i in layers], marker, label=name)
    log_axis(axes, "y", keys)
    axes.set_ylabel("keys")
    layer_axis(axes, len(keys))
    legend_above(figure)
    return Picture(
        figure,
        f"Keys that the last token of a full context sees, by layer: {min(keys)} on"
        f" {full.count(False)} layers with a window, {max(keys)} on {full.count(True)} full ones.",
    )


def soft_caps(data: Data, theme: Theme) -> Picture:
    """Draws the soft cap of the scores, or that of the logits if the scores have none."""
    config, own = data["model"]["config"], data["own"]
    figure, axes = canvas(2.6)
    limit = config["attn_logit_softcapping"] or config["final_logit_softcapping"]
    found = own.get("largest_scores") or [own["largest_logit"]["before"]]
    x = np.linspace(0, 1.1 * max(limit, *found), 100)
    axes.plot(x, limit * np.tanh(x / limit), label=f"soft cap {limit:g}")
    what = "score of each layer" if "largest_scores" in own else "logit"
    axes.plot(found, limit * np.tanh(np.array(found) / limit), "o", label=f"largest {what}")
    axes.set_xlabel("before the cap")
    axes.set_ylabel("after the cap")
    legend_above(figure)
    alt = f"Curve of the soft cap of {limit:g}. Largest {what}: up to {max(found):.3g}."
    return Picture(figure, alt)


def qk_norm(data: Data, theme: Theme) -> Picture:
    return _before_after(data["own"]["qk_norm"], {"q": "q", "k": "k", "v": "v"}, "RMS")


def post_norms(data: Data, theme: Theme) -> Picture:
    names = NAMES | {"per_layer": "per-layer"}  # short enough for the legend
    return _before_after(data["own"]["post_norms"], names, "standard deviation")


def _before_after(
    found: dict[str, list[float | None]], names: dict[str, str], unit: str
) -> Picture:
    """Draws tensors before and after their norm, by layer.

    found: before and after of some of the names, for example "q_before" → [layers], with None for
    a layer without this norm
    """
    figure, axes = canvas(3)
    alt = f"{unit[0].upper()}{unit[1:]} by layer, on a log axis."
    for i, key in enumerate(key for key in names if f"{key}_before" in found):
        for when, line in (("before", ":"), ("after", "-")):
            values, label = found[f"{key}_{when}"], f"{names[key]} {when} its norm"
            axes.plot(gaps(values), line, color=f"C{i}", marker=".", label=label)
            alt += f" {label}: {min(present(values)):.3g} to {max(present(values)):.3g}."
    log_axis(axes, "y", [x for values in found.values() for x in present(values)])
    axes.set_ylabel(unit)
    layer_axis(axes, len(values))
    legend_above(figure)
    return Picture(figure, alt)


def shared_kv(data: Data, theme: Theme) -> Picture:
    """Draws for each layer the layer whose keys and values it reads."""
    read, kinds = data["own"]["kv_layers"], data["model"]["config"]["layer_types"]
    figure, axes = canvas(2.6)
    alt = "The layer whose keys and values each layer reads."
    for (kind, name), marker in zip(KINDS.items(), "os", strict=True):
        layers = [i for i, x in enumerate(kinds) if x == kind]
        axes.plot(layers, [read[i] for i in layers], marker, fillstyle="none", label=name)
        later = [i for i in layers if read[i] != i]
        if later:
            alt += f" {len(later)} of the {name} read those of layer {read[later[0]]}."
    axes.set_ylabel("keys and values of layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    layer_axis(axes, len(read))
    legend_above(figure)
    own = [i for i, layer in enumerate(read) if layer == i]
    return Picture(figure, f"{alt} Layers {own[0]} to {own[-1]} read their own.")


def per_layer(data: Data, theme: Theme) -> Picture:
    """Draws the sizes of the per-layer inputs before and after the gate, and the open gates."""
    found = data["own"]["per_layer"]
    figure, (sizes, gates) = canvas(4, 2, sharex=True)
    alt = "RMS of the per-layer inputs by layer, on a log axis."
    for (name, label), line in zip(
        {"inputs": "before the gate", "gated": "after the gate"}.items(), (":", "-"), strict=True
    ):
        sizes.plot(found[name], line, marker=".", label=label)
        alt += f" {label.capitalize()}: {min(found[name]):.3g} to {max(found[name]):.3g}."
    log_axis(sizes, "y", found["inputs"] + found["gated"])
    sizes.set_ylabel("RMS")
    shares = [100 * x for x in found["open_gates"]]
    gates.plot(shares, marker=".", color=theme.colors[2])
    gates.set_ylim(0, 100)
    gates.set_ylabel("gates above 0, %")
    layer_axis(gates, len(shares))
    legend_above(figure)
    alt += f" Gates above 0: {min(shares):.0f} to {max(shares):.0f} %."
    return Picture(figure, alt)


def experts(data: Data, theme: Theme) -> Picture:
    """Draws the weights of the experts that the last token uses: a row for each layer."""
    found, count = data["own"]["experts"], data["model"]["config"]["num_experts"]
    image = np.full((len(found["chosen"]), count), np.nan)  # [layers, experts]
    for row, chosen, weights in zip(image, found["chosen"], found["weights"], strict=True):
        row[chosen] = weights
    figure, axes = canvas(1.2 + 0.14 * len(image))
    shown = axes.imshow(image, cmap=theme.cmap, aspect="auto", vmin=0, interpolation="none")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False)
    figure.colorbar(shown, ax=axes, label="weight")
    layer, expert = divmod(int(np.nanargmax(image)), count)
    return Picture(
        figure,
        f"Weights of the experts that the last token uses: {len(found['chosen'][0])} of {count} in"
        f" each of {len(image)} layers. The largest weight is {image[layer, expert]:.2f}, of expert"
        f" {expert} in layer {layer}.",
    )


def layer_scalar(data: Data, theme: Theme) -> Picture:
    values = data["own"]["layer_scalars"]
    figure, axes = canvas(2.2)
    axes.axhline(1, color=theme.muted, linestyle=":", label="1: the stream stays as it is")
    axes.plot(values, "o", label="scalar of the layer")
    axes.set_ylim(min(0, *values), 1.1 * max(1, *values))
    layer_axis(axes, len(values))
    legend_above(figure)
    low, high = int(np.argmin(values)), int(np.argmax(values))
    return Picture(
        figure,
        f"Scalar of each layer: smallest {values[low]:.3g} in layer {low}, largest"
        f" {values[high]:.3g} in layer {high}.",
    )
