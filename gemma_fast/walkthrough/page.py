"""Draws the pictures of the data and renders the page with its texts, templates/*.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gemma_fast.walkthrough import charts, maps
from gemma_fast.walkthrough.source import Sources, all_lines
from gemma_fast.walkthrough.theme import write_picture

TEMPLATES = Path(__file__).with_name("templates")
TITLES = {
    "tokens": "Tokens",
    "similarity": "Embedding similarity",
    "embedding-scale": "Embedding scale",
    "update-scale": "Update scale of the layers",
    "hidden-scale": "RMSNorm and the scale of the stream",
    "attention": "Attention maps",
    "rotary": "Rotary embedding",
    "mlp": "The MLP",
    "final-norm": "Final norm",
    "predictions": "The likeliest next tokens",
    "own": "What this model has of its own",
    "cost": "Where the time goes",
}
# Name of the picture's file → function that draws it. Some pictures need a part of data["own"].
PICTURES: dict[str, Any] = {
    "similarity": charts.similarity,
    "embedding-scale": charts.embedding_scale,
    "update-scale": charts.update_scale,
    "hidden-scale": charts.hidden_scale,
    "attention-maps": maps.attention_maps,
    "attention-map": maps.attention_map,
    "rotations": maps.rotations,
    "wavelengths": maps.wavelengths,
    "query-lengths": maps.query_lengths,
    "gelu": maps.gelu,
    "mlp-slice": maps.mlp_slice,
    **{f"mlp-{name.lower()}": maps.surface(name) for name in ("linear", "ReLU", "ReGLU", "GeGLU")},
    "final-norm": charts.final_norm,
    "windows": charts.windows,
    "qk-norm": charts.qk_norm,
    "soft-caps": charts.soft_caps,
    "post-norms": charts.post_norms,
    "cost": charts.cost,
}
NEEDS = {"qk-norm": "qk_norm", "soft-caps": "largest_scores", "post-norms": "post_norms"}


class Drawn(NamedTuple):
    alt: str
    width: int  # CSS pixels
    height: int


def applicable(data: dict[str, Any]) -> list[str]:
    """Returns the names of the pictures of this model."""
    return [name for name in PICTURES if name not in NEEDS or NEEDS[name] in data["own"]]


def draw(name: str, data: dict[str, Any], folder: Path) -> Drawn:
    """Writes the picture to the folder. Returns its description."""
    return Drawn(*write_picture(name, PICTURES[name], data, folder))


def write_pages(data: dict[str, Any], pictures: dict[str, Drawn], folder: Path) -> None:
    """Writes index.html, and reference.html with the source code that it shows."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shared = {
        "style": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        "largest": lambda values: values.index(max(values)),
    }
    page = environment.get_template("page.html").render(
        data=data, pictures=pictures, prompt=data["prompt"], titles=TITLES, source=Sources(),
        **shared,
    )  # fmt: skip
    (folder / "index.html").write_text(page, encoding="utf-8")
    source = environment.get_template("reference.html").render(lines=all_lines(), **shared)
    (folder / "reference.html").write_text(source, encoding="utf-8")
