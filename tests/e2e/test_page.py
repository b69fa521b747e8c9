"""The web page in the system's Chromium: upload, ask, follow a citation, at desk and phone width."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Live
from tests.integration.test_gateway import Gateway

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), "")  # fmt: skip
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
#: Where screenshots go, for people to look at.
PICTURES = os.environ.get("FOREBAY_SCREENSHOTS", "")

NOTE = "Ümläute first. The garden is open from nine to five. Dogs must be kept on a lead.\n"


@pytest.fixture(scope="module")
def gateway(live: Live) -> Iterator[Gateway]:
    running = Gateway(live.target)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        made = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def picture(page: Any, name: str) -> None:
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"), full_page=True)


@pytest.mark.slow
def test_upload_ask_and_follow_a_citation(gateway: Gateway, browser, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    faults: list[str] = []
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.goto(gateway.url)
    page.get_by_role("link", name="Documents").click()
    page.get_by_label("New knowledge base").fill("garden")
    page.get_by_role("button", name="Create").click()
    file = tmp_path / "garden.txt"
    file.write_text(NOTE)
    page.locator("#upload-form select option", has_text="garden").wait_for(state="attached")
    page.get_by_label("Files").set_input_files(str(file))
    page.get_by_role("button", name="Upload").click()
    page.locator("#document-rows tr", has_text="ready").wait_for(timeout=30_000)
    picture(page, "documents")
    page.get_by_role("link", name="Ask").click()
    page.locator("#ask-form option", has_text="garden").wait_for(state="attached")
    page.get_by_label("Question").fill("When is the garden open?")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Source 1: garden.txt, page 1").click()
    assert page.locator("#viewer mark").inner_text() == "The garden is open from nine to five."
    picture(page, "citation")
    page.keyboard.press("Escape")
    assert "Extracted" in page.locator(".turn .note").inner_text()
    page.get_by_label("Question").fill("Who wrote the ninth symphony?")
    page.keyboard.press("Enter")
    page.locator(".turn .note", has_text="Not in the documents").wait_for()
    picture(page, "ask")
    assert not faults
    page.close()


@pytest.mark.slow
def test_the_playground_answers(gateway: Gateway, browser) -> None:
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.goto(f"{gateway.url}/ui/#playground")
    page.locator("#classify-form option").first.wait_for(state="attached")
    page.get_by_role("button", name="Classify").click()
    page.locator("#classify-out", has_text="positive").wait_for(timeout=30_000)
    page.get_by_role("button", name="Compare").click()
    page.locator("#rerank-out", has_text="Vaccines").wait_for(timeout=30_000)
    page.locator("#tabular-form select[name=model]").select_option("iris")
    page.locator("#features label").first.wait_for()
    page.get_by_role("button", name="Predict").click()
    page.locator("#tabular-out", has_text="%").wait_for(timeout=30_000)
    picture(page, "playground")
    for section in ("models", "usage"):
        page.goto(f"{gateway.url}/ui/#{section}")
        page.locator(f"#{section} tbody tr").first.wait_for()
        picture(page, section)
    assert not faults
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_at_phone_width(gateway: Gateway, browser, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    for section in ("ask", "documents", "search", "playground", "models", "usage"):
        page.goto(f"{gateway.url}/ui/#{section}")
        page.locator(f"#{section}.shown").wait_for()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360, section
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input,select,textarea')]"
            ".filter(e => !e.labels?.length && !e.ariaLabel).length"
        )
        assert unnamed == 0
        if section in ("ask", "playground"):
            picture(page, f"phone-{section}-{scheme}")
    page.close()
