"""The page of `lastcall receipt --html` in a real browser, by daylight and at night."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from lastcall.supervisor.picture.page import page, section_of
from lastcall.supervisor.picture.reading import check
from lastcall.supervisor.picture.timeline import lay_out
from tests.support.left_out import CHROMIUM
from tests.support.receipts import HOSTILE, cut_stop

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium of the system, driven by playwright, whose types need not be installed."""
    sync_api: Any = pytest.importorskip("playwright.sync_api")
    import shutil

    with sync_api.sync_playwright() as playwright:
        # Root has no sandbox, and a container has a small /dev/shm.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=shutil.which(CHROMIUM), args=arguments)
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_the_stop(browser: Any, tmp_path: Path, scheme: Literal["light", "dark"]) -> None:
    """Each phase and job is a bar with its words; the console is silent, and nothing is requested."""
    file = tmp_path / "stop.html"
    file.write_text(page("A stop", [section_of(lay_out(check(cut_stop(), "a receipt")))]), encoding="utf-8")
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1000, "height": 900})
    tab = context.new_page()
    said: list[str] = []
    requested: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: requested.append(request.url))
    tab.goto(file.as_uri())
    assert tab.locator("rect.phase").count() == 4
    assert tab.locator("rect.job").count() == 4
    assert tab.locator("line.deadline").count() == 1
    drawn = tab.locator("svg").text_content()
    for words in ("draining", "r0", "finished, 20 s", "cut, 2 min"):
        assert words in drawn
    widths = tab.locator("rect.job").evaluate_all("all => all.map(e => e.getBoundingClientRect().width)")
    assert min(widths) > 0
    assert tab.get_by_text(HOSTILE).count() > 0, "a room's name is text and no markup"
    assert tab.evaluate("window.harmed") is None
    backgrounds = {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == backgrounds[scheme]
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no scrolling sideways"
    tab.set_viewport_size(
        {"width": 390, "height": 844}
    )  # a phone: tables and drawing are moved in their place
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    fates = tab.locator(".jobs td:nth-child(2)").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().x)"
    )
    assert len(fates) == 4 and max(fates) < 300, "the fate is seen without moving the table"
    assert said == []
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
    tab.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
    context.close()
