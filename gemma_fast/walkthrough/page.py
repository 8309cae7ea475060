"""Lists the pictures, and renders the page with its texts, templates/*.html."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gemma_fast.walkthrough import charts, maps, own
from gemma_fast.walkthrough.source import Sources, all_files
from gemma_fast.walkthrough.theme import Data, Picture, Theme, Written

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
    "predictions": "The most likely next tokens",
    "own": "Where Gemma models differ",
    "cost": "Where the time goes",
}
# Name of the picture's file → function that draws it.
PICTURES: dict[str, Callable[[Data, Theme], Picture]] = {
    "similarity": maps.similarity,
    "embedding-scale": charts.embedding_scale,
    "update-scale": charts.update_scale,
    "hidden-scale": charts.hidden_scale,
    "attention-maps": maps.attention_maps,
    "attention-map": maps.attention_map,
    "rotations": maps.rotations,
    "wavelengths": maps.wavelengths,
    "query-lengths": maps.query_lengths,
    "gelu": charts.gelu,
    "mlp-slice": charts.mlp_slice,
    **{f"mlp-{name.lower()}": maps.surface(name) for name in ("linear", "ReLU", "ReGLU", "GeGLU")},
    "final-norm": charts.final_norm,
    "windows": own.windows,
    "qk-norm": own.qk_norm,
    "soft-caps": own.soft_caps,
    "post-norms": own.post_norms,
    "shared-kv": own.shared_kv,
    "per-layer": own.per_layer,
    "experts": own.experts,
    "layer-scalar": own.layer_scalar,
    "cost": charts.cost,
}
OWN_PICTURES = {  # pictures of some models only → keys of data["own"], of which they need one
    "windows": {"keys_seen"},
    "qk-norm": {"qk_norm"},
    "soft-caps": {"largest_scores", "largest_logit"},
    "post-norms": {"post_norms"},
    "shared-kv": {"kv_layers"},
    "per-layer": {"per_layer"},
    "experts": {"experts"},
    "layer-scalar": {"layer_scalars"},
}


def file_names() -> set[str]:
    """Returns the names of all files that a walk-through can have."""
    pictures = {f"{name}{kind}.svg" for name in PICTURES for kind in ("", "-dark")}
    return {"index.html", "reference.html", "data.json", *pictures}


def applicable(data: Data) -> list[str]:
    """Returns the names of the pictures of this model."""
    return [
        name
        for name in PICTURES
        if name not in OWN_PICTURES or OWN_PICTURES[name] & data["own"].keys()
    ]


def write_pages(data: Data, pictures: dict[str, Written], folder: Path) -> None:
    """Writes index.html, and reference.html with the source code that it shows."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "style": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        "kinds": maps.KINDS,
        "largest": lambda values: values.index(max(values)),
        "ratio": lambda x: f"{x['attention'] / x['embedding']:.3g}" if x["embedding"] else "∞",
        "size": lambda groups: _size(sum(groups.values())),
    }
    texts = {
        "index.html": environment.get_template("page.html").render(
            data=data,
            pictures=pictures,
            titles=TITLES,
            source=Sources(),
            own_pictures=[name for name in OWN_PICTURES if name in pictures],
        ),
        "reference.html": environment.get_template("reference.html").render(files=all_files()),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _size(count: int) -> str:
    """Returns the number of bytes as text, for example "0.54 GB"."""
    unit, scale = ("GB", 1e9) if count >= 1e8 else ("MB", 1e6)
    return f"{count / scale:.2f} {unit}"
