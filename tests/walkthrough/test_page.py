"""Looks at the page of pictures as a reader does: in a browser, on a phone and on a desktop, light,
dark and printed. Without Chromium, only the HTML is validated.

One page is of a tiny Gemma 2 and a prompt of more than 64 tokens with HTML in it. The others, in
slow tests, are of a tiny Gemma 4 and of the real weights.
"""

import os
import re
import shutil
from itertools import product
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from chat_checkpoint import write_chat_checkpoint
from justhtml import JustHTML
from playwright.sync_api import sync_playwright
from tiny_checkpoint import write_tiny_checkpoint

from gemma_fast.walkthrough.page import TITLES
from gemma_fast.walkthrough.theme import THEMES
from gemma_fast.walkthrough.write import write_walkthrough

PROMPT = "<script>alert('a')</script> \"$x$\" hello the שלום 漢字 é\n" * 3
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
WIDTHS, SCHEMES = (390, 1280), ("light", "dark")  # CSS pixels
FILES = ("index.html", "reference.html")
# An audit takes seconds, so only some combinations have one.
AUDITED = [
    ("index.html", 390, "light"),
    ("index.html", 1280, "dark"),
    ("reference.html", 390, "dark"),
]
AA, AA_GRAPHICS = 4.5, 3.0  # contrast ratios of WCAG 2.2


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma4", "demo")]


@pytest.fixture(scope="module", params=["tiny", *SLOW])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "demo":
        model, prompt = request.getfixturevalue("demo_gguf"), "I want to move"
    elif request.param == "gemma4":
        model, prompt = write_tiny_checkpoint(path / "model", "gemma4-all"), "hello the world"
    else:
        model, prompt = write_chat_checkpoint(path / "model", "gemma2"), PROMPT
    return write_walkthrough(prompt, model, path / "out").parent


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses root otherwise
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(request, browser, folder):
    """Opens a page, and fails the test if the browser reports an error or loads another file."""
    name, width, scheme = request.param
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    page, said, loaded = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.on("request", lambda request: loaded.append(request.url))
    page.goto((folder / name).as_uri(), wait_until="load")
    yield page
    context.close()
    assert not said
    assert all(url.startswith(folder.as_uri()) for url in loaded)


@needs_browser
@pytest.mark.parametrize("page", [*product(FILES, WIDTHS, SCHEMES)], indirect=True, ids=str)
def test_page_fits_the_screen_and_draws_every_picture(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    pictures = page.evaluate(
        "[...document.images].map(x => [x.getAttribute('src'), x.complete && x.naturalWidth,"
        " x.getBoundingClientRect().width, x.alt])"
    )
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    for name, drawn, width, alt in pictures:
        assert drawn and len(alt) > 20, name
        assert (width > 100) == (name.endswith("-dark.svg") == dark), f"{name} is {width} wide"
    assert len(pictures) >= 30 or page.url.endswith("reference.html")


@needs_browser
@pytest.mark.parametrize("page", AUDITED, indirect=True, ids=str)
def test_page_is_accessible(page):
    """axe-core checks contrast, alternative texts, names of regions, order of headings."""
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]})
    assert not found.response["violations"], found.generate_report()
    assert any(x["id"] == "color-contrast" for x in found.response["passes"])


@needs_browser
def test_printed_page_is_light(browser, folder):
    page = browser.new_page(color_scheme="dark")
    page.goto((folder / "index.html").as_uri())
    page.emulate_media(media="print")
    shown = page.evaluate(
        "[...document.images].filter(x => x.getClientRects().length).map(x => x.src)"
    )
    assert shown and not any(name.endswith("-dark.svg") for name in shown)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@needs_browser
def test_every_link_leads_somewhere(browser, folder):
    page = browser.new_page()
    page.goto((folder / "index.html").as_uri())
    links = page.evaluate("[...document.links].map(x => x.href)")
    local = sorted(link.partition("#")[::2] for link in links if not link.startswith("https://"))
    assert {anchor for file, anchor in local if file == page.url} == {*TITLES}
    assert len([file for file, _ in local if file.endswith("/reference.html")]) > len(TITLES)
    for file, anchor in local:
        if page.url != file:
            page.goto(file)
        assert not anchor or page.locator(f"[id='{anchor}']").count() == 1, (file, anchor)


@needs_browser
def test_lines_shown_are_those_of_the_source(browser, folder):
    page = browser.new_page()
    page.goto((folder / "index.html").as_uri())
    package, files = Path(__file__).parents[2] / "gemma_fast", set()
    shown = page.locator("pre[aria-label^='Source of']")
    assert shown.count() >= 12
    for block in shown.all():
        text = [line.strip() for line in block.inner_text().splitlines()]
        name = block.get_attribute("aria-label").split()[-1]
        title = block.locator("xpath=preceding-sibling::p[1]")
        file, first = re.search(r"(\w+\.py), line (\d+)", title.inner_text()).groups()
        link = title.locator("a").get_attribute("href")
        assert link == f"reference.html#{file}-{first}"
        lines = [line.strip() for line in (package / file).read_text("utf-8").splitlines()]
        assert lines[int(first) - 1 :][: len(text)] == text, name
        files.add(file)
    assert files == {"reference.py", "reference_steps.py"}


@pytest.mark.parametrize("name", FILES)
def test_html_is_valid(folder, name):
    document = JustHTML((folder / name).read_text("utf-8"), strict=True, sanitize=False)
    ids = [x.attrs["id"] for x in document.query("[id]")]
    assert len(ids) == len({*ids})
    images = document.query("img")
    assert all(x.attrs["alt"] and (folder / x.attrs["src"]).exists() for x in images)
    assert not document.query("script") and not document.query("[onerror]")
    for link in (x.attrs["href"] for x in document.query("a[href^='#']")):
        assert link[1:] in ids


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_colors_of_pictures_have_contrast(theme):
    def contrast(color):
        high, low = sorted(map(luminance, (color, theme.background)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert min(contrast(theme.text), contrast(theme.muted)) >= AA
    assert min(map(contrast, theme.colors)) >= AA_GRAPHICS
