"""The report in a browser: asks for nothing, fits a phone and paper, in light and dark."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert import verify_checkpoints
from gptoss_convert.show import report_page
from gptoss_convert.synth.synth import synth
from gptoss_convert.verify.result import VerifyOptions
from tests.browser import Tab, chromium, tab

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="needs Chromium in PATH to render the page"
)
LAYERS, EXPERTS = 36, 128
"""Of the largest released model."""

WIDER = """
[...document.querySelectorAll("main *")].filter(element =>
    !element.closest(".scroll table, svg") && element.getClientRects().length &&
    element.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
).map(element => element.outerHTML.slice(0, 80))
"""
"""Elements that reach beyond the page, but for what scrolls by itself and shapes of drawings."""
CUT = """
[...document.querySelectorAll("svg")].filter(svg => svg.getClientRects().length).flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].filter(text => {
        const box = text.getBoundingClientRect();
        return box.left < frame.left - 2 || box.right > frame.right + 2 ||
            box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
    }).map(text => text.textContent);
})
"""
"""Texts of drawings that are cut off at their edges."""
SHOWN = """
[...document.querySelectorAll("figure > div")].filter(one => one.getClientRects().length)
    .map(one => one.className)
"""
ROOT = "document.documentElement"
COLOUR = "getComputedStyle(document.body).backgroundColor"


def enlarged(summary: dict[str, Any]) -> dict[str, Any]:
    """The same findings at the size of the largest released model, with a long path."""
    found = copy.deepcopy(summary)
    values, logits = (level["numbers"] for level in found["levels"][1:])
    for layer in logits["layers"]:
        for side in ("source_hits", "target_hits"):
            layer[side] = [37 * n % 101 for n in range(EXPERTS)]
    logits["layers"] = [copy.deepcopy(logits["layers"][n % 2]) for n in range(LAYERS)]
    for n, layer in enumerate(logits["layers"]):
        for error in layer["errors"]:
            error["layer"] = n
    sqnr = values["statistics"]["sqnr"]
    for weight in sqnr:
        sqnr[weight] = [[18 + (n * m) % 7 for m in range(EXPERTS)] for n in range(LAYERS)]
    found["source"]["path"] = "/checkpoints/" + "gpt-oss-120b-with-a-long-name/" * 4
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two unlike models, as large as any."""
    folder = tmp_path_factory.mktemp("browser")
    synth(folder / "a", layers=2)
    synth(folder / "b", layers=2, seed=1)
    chosen = VerifyOptions(device="cpu", sample=1, statistics=True)
    summary = verify_checkpoints(folder / "a", folder / "b", chosen).summary()
    return report_page.write(enlarged(summary), folder / "report", "gptoss-convert verify a b")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with tab(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_asks_for_itself_alone_and_nothing_reaches_beyond_it(
    page: Path, browser: Tab, width: int, dark: bool
) -> None:
    browser.show(page, width, dark=dark)
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []
    assert browser.value("innerWidth") == width
    assert browser.value(f"{ROOT}.scrollWidth - {ROOT}.clientWidth") == 0
    assert browser.value(WIDER) == []
    assert browser.value(CUT) == []
    figures = browser.value(SHOWN)
    assert len(figures) == 6
    assert set(figures) == {"narrow" if width < 600 else "wide"}
    shade = [int(part) for part in browser.value(COLOUR)[4:-1].split(",")]
    assert (max(shade) < 64) == dark


def test_unfolded_tables_scroll_within_the_page(page: Path, browser: Tab) -> None:
    browser.show(page, 375)
    browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.value(f"{ROOT}.scrollWidth") == 375
    assert browser.value(WIDER) == []
    scroll = "[...document.querySelectorAll('.scroll')].some(one => one.scrollWidth > 375)"
    assert browser.value(scroll)


def test_it_prints_in_light_however_the_screen_is(page: Path, browser: Tab) -> None:
    browser.show(page, 1280, dark=True)
    theme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.call("Emulation.setEmulatedMedia", media="print", features=[theme])
    assert browser.value(COLOUR) == "rgb(255, 255, 255)"
    assert browser.value(WIDER) == []
    assert set(browser.value(SHOWN)) == {"wide"}
    assert browser.pdf().startswith(b"%PDF-")


def test_a_page_of_the_largest_model_stays_small(page: Path) -> None:
    assert page.stat().st_size < 2_000_000


def test_what_is_found_would_be_told(page: Path, browser: Tab, tmp_path: Path) -> None:
    """The checks above see a page that is wrong."""
    wrong = page.read_text(encoding="utf-8")
    wrong = wrong.replace("default-src 'none'; style-src 'unsafe-inline'", "img-src *")
    wrong = wrong.replace("</main>", "<p style='width:900px'><img src='other.png'></p></main>")
    (tmp_path / "wrong.html").write_text(wrong, encoding="utf-8")
    browser.show(tmp_path / "wrong.html", 375)
    assert [one.rpartition("/")[2] for one in browser.requests()] == ["wrong.html", "other.png"]
    assert browser.value(WIDER) != []
