"""Writes a walk-through of each kind of model: its pictures, and what the page says about it."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from justhtml import JustHTML
from tiny_checkpoint import write_tiny_checkpoint
from tiny_models import CONFIGS

from gemma_fast.walkthrough import theme
from gemma_fast.walkthrough.page import OWN_PICTURES, PICTURES
from gemma_fast.walkthrough.theme import Written
from gemma_fast.walkthrough.write import write_walkthrough

GEMMA3 = {"windows", "qk-norm", "post-norms"}
GEMMA4 = GEMMA3 | {"soft-caps", "layer-scalar"}
OWN = {
    "gemma-mqa": set(),
    "gemma2-gqa": {"windows", "soft-caps", "post-norms"},
    "gemma3-gqa": GEMMA3,
    "gemma4-k-eq-v": GEMMA4,
    "gemma4-shared": GEMMA4 | {"shared-kv", "per-layer"},
    "gemma4-per-layer": GEMMA4 | {"per-layer"},
    "gemma4-experts": GEMMA4 | {"experts"},
    "gemma4-all": GEMMA4 | {"shared-kv", "per-layer"},
}
GEMMA4_MODELS = {name for name in OWN if name.startswith("gemma4")}
OLDER = OWN.keys() - GEMMA4_MODELS
SHARED = {"gemma4-shared", "gemma4-all"}
PER_LAYER = SHARED | {"gemma4-per-layer"}
EXPERTS = {"gemma4-experts"}
K_EQ_V = {"gemma4-k-eq-v", "gemma4-all"} | EXPERTS
SENTENCES = {  # what the page says → the models of which it says so
    "multiplies each channel by 1 + a learned weight": OLDER,
    "multiplies each channel by a learned weight": GEMMA4_MODELS,
    "splits the 32 channels of each query and key into 16 pairs and rotates": OLDER,
    "into 16 pairs on layers with a window and 32 pairs on full layers and": GEMMA4_MODELS,
    "On full layers, only the first 8 pairs are rotated.": GEMMA4_MODELS,
    "adds two updates to it": OLDER | {"gemma4-k-eq-v"} | EXPERTS,
    "adds three updates to it": PER_LAYER,
    "88 channels each, gate and up (176 on the layers": SHARED,
    "2 on layers with a window, 4 on full layers, with 4 query heads": K_EQ_V,
    "Values from the projection of keys: on 2 full layers.": K_EQ_V,
    "The last 2 of the 5 layers have no projections": SHARED,
    "a second embedding with 16 channels for each of the 5 layers": PER_LAYER,
    "each layer has 6 experts. An expert is a small MLP with 40 channels": EXPERTS,
    "Beside the MLP there are experts.": EXPERTS,
    " for a token), computed in": EXPERTS,
}


def write(path: Path, name: str) -> Path:
    model = write_tiny_checkpoint(path / "model", name)
    return write_walkthrough("hello the world", model, path / "out", device="cpu").parent


@pytest.mark.parametrize("name", OWN)
def test_page_says_what_the_model_has(tmp_path, monkeypatch, name):
    def write_picture(name, draw, data, folder):
        if not name.startswith("mlp-"):  # these are slow, and the same for all models
            draw(data, theme.THEMES["light"])
        (folder / f"{name}.svg").touch()
        return Written("nothing", 10, 10)

    monkeypatch.setattr(theme, "write_picture", write_picture)
    monkeypatch.setattr("gemma_fast.walkthrough.cost.REPEATS", 1)
    folder = write(tmp_path, name)
    assert {x.stem for x in folder.glob("*.svg")} & OWN_PICTURES.keys() == OWN[name]
    html = (folder / "index.html").read_text(encoding="utf-8")
    document = JustHTML(html, strict=True, sanitize=False)
    text = re.sub(r"\s+", " ", document.to_text(separator="", strip=False))
    for sentence, models in SENTENCES.items():
        assert (sentence in text) == (name in models), sentence
    json.loads((folder / "data.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_all_pictures(tmp_path, name):
    folder = write(tmp_path, name)
    for picture in PICTURES:
        for end in (".svg", "-dark.svg"):
            file = folder / f"{picture}{end}"
            assert file.exists() == (picture not in OWN_PICTURES or picture in OWN[name])
            if file.exists():
                ElementTree.parse(file)
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert {x.name for x in folder.glob("*.svg")} == {*re.findall(r'src="([^"]*)"', html)}


def test_every_kind_of_gemma4_is_written():
    assert {x for x in CONFIGS if x.startswith("gemma4")} <= OWN.keys()
