"""The page of a report in a real browser; run with `pytest -m browser`, needs Chromium and `pip install playwright`."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import patchattn
from patchattn.policy import Policy
from patchattn.report import GateReport, HeadShape, LayerCounts

pytestmark = pytest.mark.browser
CALIBRATION = Path(patchattn.__file__).parents[1] / "calibrations" / "patchattn-demo"
LAYERS, HEADS, PREFILL, DECODE = (1, 3), 6, 60, 4
OPEN = torch.rand(len(LAYERS), HEADS, PREFILL + DECODE, generator=torch.Generator().manual_seed(0)) < 0.3
OPEN[:, :, :8] = False
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>&amp;"
TEXTS = ["The", " far", " keys", "\n", HOSTILE, *(f" word{i}" for i in range(PREFILL + DECODE - 5))]


def report() -> GateReport:
    def counts(layer: int, part: slice) -> LayerCounts:
        opened = OPEN[layer, :, part]
        return LayerCounts(tuple(opened.sum(1).tolist()), opened.shape[1], 0, 3000, 9000, 1)

    prefill, decode = slice(0, PREFILL), slice(PREFILL, PREFILL + DECODE)
    steps = [("decode", OPEN[:, :, PREFILL + step : PREFILL + step + 1]) for step in range(DECODE)]
    return GateReport(
        Policy(sink_size=16, window_size=256, min_bulk=0, layers=LAYERS),
        "blockwise",
        {name: {"prefill": counts(i, prefill), "decode": counts(i, decode)} for i, name in enumerate(LAYERS)},
        {0: {"layer": 5}},
        {
            name: [(phase, part[i][None]) for phase, part in [("prefill", OPEN[:, :, prefill]), *steps]]
            for i, name in enumerate(LAYERS)
        },
        {name: HeadShape(32, 32, 3, 2) for name in LAYERS},
    )


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    if "browser" not in request.config.option.markexpr:
        pytest.skip("only with -m browser: needs Chromium and playwright, which the extra dev does not install")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.fail("-m browser asks for Chromium; none of chromium, chromium-browser, google-chrome is on the PATH")
    # Asked for by name, so a missing package is an error and not a skip.
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as run:
        started = run.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    calibration = patchattn.Calibration.from_pretrained(CALIBRATION)
    path = tmp_path_factory.mktemp("page") / "report.html"
    return report().to_html(path, tokens=TEXTS, calibration=calibration, title=HOSTILE).as_uri()


@pytest.fixture(params=["wide", "dark", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, saved: str) -> Iterator[Any]:
    """An open page; afterwards nothing may have gone wrong or been asked for."""
    sizes = {"wide": (1280, 900), "dark": (1280, 900), "phone": (390, 844)}
    width, height = sizes[request.param]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if request.param == "dark" else "light"
    )
    opened = context.new_page()
    problems: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    opened.on("request", lambda sent: asked.append(sent.url))
    opened.goto(saved)
    yield opened
    context.close()
    assert not problems
    assert asked == [saved]


def cell(page: Any, layer: int, head: int) -> Any:
    return page.locator(f'.cell[data-layer="{layer}"][data-head="{head}"]')


def token(page: Any, index: int) -> Any:
    return page.locator(f'#text [data-token="{index}"]')


def test_page_shows_the_numbers(page: Any) -> None:
    share = OPEN.float().mean()
    assert f"{100 * share:.1f}%" in page.inner_text("#tiles")
    assert page.locator(".cell").count() == len(LAYERS) * HEADS
    assert cell(page, 3, 2).inner_text() == f"{100 * OPEN[1, 2].float().mean():.0f}"
    assert '"window_size": 256' in page.inner_text("#policy")
    assert "the policy leaves out the layer" in page.inner_text("#dense")
    # Nothing reaches over the side of the screen.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_text_is_shown_as_it_is(page: Any) -> None:
    assert token(page, 4).inner_text() == HOSTILE
    assert page.inner_text("#title") == HOSTILE
    assert page.locator("img").count() == 0
    assert page.locator("#text").text_content() == "".join(TEXTS).replace("\n", "↵\n")


def test_pointing_at_a_head_shows_its_numbers(page: Any) -> None:
    cell(page, 3, 2).hover()
    told = page.inner_text("#tip")
    assert "Layer 3, head 2" in told
    assert f"{OPEN[1, 2].sum()} of {PREFILL + DECODE} queries" in told
    page.mouse.move(1, 1)
    assert page.locator("#tip").is_hidden()


def test_pointing_at_a_token_shows_which_heads_opened(page: Any) -> None:
    index = int(OPEN.sum((0, 1)).argmax())
    token(page, index).hover()
    told = page.inner_text("#tip")
    expected = {(LAYERS[i], head) for i, head in OPEN[:, :, index].nonzero().tolist()}
    assert f"{len(expected)} of {len(LAYERS) * HEADS} heads open" in told
    lit = page.eval_on_selector_all(".cell.lit", "cells => cells.map(c => [+c.dataset.layer, +c.dataset.head])")
    assert {(layer, head) for layer, head in lit} == expected
    for i, layer in enumerate(LAYERS):
        heads = OPEN[i, :, index].nonzero()[:, 0].tolist()
        if heads:
            assert f"layer {layer}: head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}" in told


def coloured(page: Any) -> list[bool]:
    return page.eval_on_selector_all("#text > span", "spans => spans.map(s => s.style.background !== '')")


def test_colour_follows_the_decisions_and_the_head_picked(page: Any) -> None:
    assert coloured(page) == OPEN.any(0).any(0).tolist()
    cell(page, 1, 5).click()
    assert coloured(page) == OPEN[0, 5].tolist()
    assert "layer 1, head 5" in page.inner_text("#text-heading")
    page.get_by_role("button", name="show all heads").click()
    assert coloured(page) == OPEN.any(0).any(0).tolist()


def test_phases_switch(page: Any) -> None:
    page.get_by_role("radio", name="Decode", exact=True).click()
    assert cell(page, 1, 0).inner_text() == f"{100 * OPEN[0, 0, PREFILL:].float().mean():.0f}"
    outside = page.eval_on_selector_all("#text > span.outside", "spans => spans.length")
    assert outside == PREFILL
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("radio", name="Prefill", exact=True).get_attribute("aria-checked") == "true"
    assert cell(page, 1, 0).inner_text() == f"{100 * OPEN[0, 0, :PREFILL].float().mean():.0f}"


def test_heads_can_be_reached_by_keyboard(page: Any) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.layer + ',' + document.activeElement.dataset.head") == "3,1"
    assert "Layer 3, head 1" in page.inner_text("#tip")
    page.keyboard.press("Enter")
    assert "layer 3, head 1" in page.inner_text("#text-heading")
    page.keyboard.press("Escape")
    assert page.inner_text("#text-heading") == "Where heads open"


def test_risk_curve_tells_its_points(page: Any) -> None:
    page.locator("#risk svg").hover()
    told = page.inner_text("#tip")
    assert "of pairs open" in told
    assert "of the attention missed" in told
    assert page.locator("#risk polyline").count() == 2


CONTRAST = """elements => elements.map(element => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = numbers(colour).map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = getComputedStyle(element);
  const [low, high] = [luminance(style.color), luminance(style.backgroundColor)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
})"""


def test_text_can_be_read_on_every_colour(page: Any) -> None:
    for selector in (".cell", "#text > span[style*=background]", ".tile"):
        found = page.eval_on_selector_all(selector, CONTRAST)
        assert found
        assert min(found) >= 4.5, selector
