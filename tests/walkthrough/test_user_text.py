"""Tests that the user's text reaches the page, its pictures and data.json unchanged and escaped."""

import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from chat_checkpoint import write_chat_checkpoint
from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure

from gemma_fast.walkthrough import page, theme
from gemma_fast.walkthrough.example import mlp_example
from gemma_fast.walkthrough.theme import THEMES, label_tokens, settings
from gemma_fast.walkthrough.write import write_walkthrough

PROMPT = (
    "<b>&\"'</q><script>alert(1)</script> {{ prompt }} {% if %} $x$ \\alpha\x00\x01\x1b[0m\x7f\x85"
    "\ufffe \u2028 שלום \u202eabc 漢字 😀👩\u200d👩 e\u0301\t\n\r\n end"
)
WORDS = ["<i>&", '"onload="x', "$y$", "]]>", "\x01"]
WITH_TOKENS = ("attention-maps", "attention-map", "similarity", "final-norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A walk-through with the pictures that have the user's text in them."""
    write_picture = theme.write_picture

    def write_some(name, draw, data, folder):
        if name in WITH_TOKENS:
            return write_picture(name, draw, data, folder)
        return theme.Written("not drawn", 10, 10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theme, "write_picture", write_some)
        return write(tmp_path_factory.mktemp("text"))


def write(path: Path, family: str = "gemma3") -> Path:
    model = write_chat_checkpoint(path / "model", family)
    with pytest.warns(UserWarning, match="words of several tokens are left out"):
        return write_walkthrough(PROMPT, model, path / "out", words=WORDS, device="cpu").parent


def load(folder: Path):
    def refuse(number: str):
        raise AssertionError(f"{number} is not JSON")

    text = (folder / "data.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


class Reader(HTMLParser):
    """Collects the tags of a page, their attributes, and the text inside <bdi>."""

    def __init__(self, folder: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.names, self.alts, self.texts = [], set(), {}, {"bdi": []}
        with (folder / "index.html").open(encoding="utf-8", newline="") as file:
            self.feed(file.read())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.names |= {name for name, _ in attributes}
        if tag == "img":
            self.alts[dict(attributes)["src"]] = dict(attributes)["alt"]
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_data(self, text):
        for tag, texts in self.texts.items():
            if self.tags and self.tags[-1] == tag:
                texts[-1] += text

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")


def test_data_are_strict_json_with_the_prompt_unchanged(folder):
    data = load(folder)
    assert data["prompt"] == PROMPT
    assert [*data["similarity"]["left_out"]] == WORDS


def test_page_shows_the_prompt_as_text(folder):
    found = Reader(folder)
    assert found.texts["bdi"][0] == PROMPT
    assert not {"script", "b", "i"} & {*found.tags}
    assert not any(name.startswith("on") for name in found.names)
    names = load(folder)["tokens"]["names"]
    assert found.texts["bdi"][1 : len(names) + 1] == names
    page = (folder / "index.html").read_text(encoding="utf-8")
    for word in ("&lt;i&gt;&amp;", "&#34;onload=&#34;x", "$y$", "]]&gt;"):
        assert word in page


def test_names_of_tokens_are_printable(folder):
    data = load(folder)
    names = data["tokens"]["names"] + [y["token"] for x in data["predictions"] for y in x["next"]]
    assert all(name.isprintable() and name for name in names)


def test_pictures_are_well_formed(folder):
    """The title of a picture is its alternative text on the page."""
    alts = {name: alt for name, alt in Reader(folder).alts.items() if alt != "not drawn"}
    assert len(alts) == 2 * len(WITH_TOKENS)
    for name, alt in alts.items():
        root = ElementTree.parse(folder / name).getroot()
        titles = [x.text for x in root.iter() if x.tag.endswith("}title")]
        assert titles[0].strip() == alt
        assert not [x.tag for x in root.iter() if x.tag.endswith("}script")]


def test_settings_of_matplotlib_have_no_effect_and_stay(tmp_path):
    """A user may have a matplotlibrc, or draw other pictures in the same notebook."""
    draw, data = page.PICTURES["mlp-relu"], {"mlp": mlp_example()}
    odd = {
        "backend": "agg", "image.origin": "lower", "text.usetex": True, "svg.image_inline": False,
        "xtick.labelsize": 30, "savefig.bbox": "tight", "lines.linewidth": 9,
    }  # fmt: skip
    theme.write_picture("plain", draw, data, tmp_path)
    with rc_context(odd):
        before = dict(rcParams)
        theme.write_picture("odd", draw, data, tmp_path)
        assert dict(rcParams) == before
    assert (tmp_path / "odd.svg").read_bytes() == (tmp_path / "plain.svg").read_bytes()
    assert len([*tmp_path.iterdir()]) == 4


def test_pictures_label_each_token(folder):
    names = load(folder)["tokens"]["names"][-64:]
    root = ElementTree.parse(folder / "final-norm.svg").getroot()
    texts = [x.text for x in root.iter() if x.tag.endswith("}text")]
    short = [name if len(name) <= 14 else f"{name[:13]}…" for name in names]
    assert [text for text in texts if text in {*short}][: len(names)] == short


def test_a_token_with_dollars_is_no_formula(tmp_path):
    figure = Figure()
    label_tokens(figure.subplots().yaxis, ["$x^2$", r"$\frac{", "a" * 20])
    with rc_context(settings(THEMES["light"])):
        figure.savefig(tmp_path / "x.svg")
    root = ElementTree.parse(tmp_path / "x.svg").getroot()
    texts = [x.text for x in root.iter() if x.tag.endswith("}text")]
    assert texts[-3:] == ["$x^2$", r"$\frac{", "a" * 13 + "…"]
