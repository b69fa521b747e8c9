"""The web page in the system's Chromium, by mouse and keyboard, at desk and phone width."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import sync_playwright

from tests.conftest import Live, Start, copy_models
from tests.integration.gateway import Gateway
from tests.integration.random_lm import random_model
from tests.integration.scripted_upstream import ScriptedUpstream
from tests.integration.test_upstream import put

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), "")  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt install chromium"),
]
#: Where screenshots go, for people to look at.
PICTURES = os.environ.get("FOREBAY_SCREENSHOTS", "")
SECTIONS = ("ask", "documents", "search", "playground", "models", "usage")

NOTE = "Ümläute first. The garden is open from nine to five. Dogs must be kept on a lead.\n"


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    running = ScriptedUpstream()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def live(
    starters: Path,
    upstream: ScriptedUpstream,
    start: Start,
    tmp_path_factory: pytest.TempPathFactory,
) -> Live:
    root = tmp_path_factory.mktemp("models") / "models"
    copy_models(starters, root, *(p.name for p in starters.iterdir() if p.is_dir()))
    random_model(root)
    put(root, "far", {"base_url": upstream.url, "model": "scripted"})
    return start(root)


@pytest.fixture(scope="module")
def gateway(live: Live) -> Iterator[Gateway]:
    async def metrics() -> bytes:
        return live.server.metrics.exposition()

    running = Gateway(live, metrics)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as p:
        made = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    made = browser.new_page(viewport={"width": 1100, "height": 800})
    faults: list[str] = []
    made.on("pageerror", lambda e: faults.append(str(e)))
    made.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    yield made
    made.close()
    assert not faults


def picture(page: Any, name: str) -> None:
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"), full_page=True)


@pytest.fixture(scope="module")
def garden(gateway: Gateway) -> str:
    """A knowledge base with documents that are ready, one that failed, and a collection."""
    http = gateway.http
    if not any(
        b["name"] == "garden" for b in http.get("/api/v1/knowledge").json()["knowledge_bases"]
    ):
        made = {"knowledge_base": "garden", "config": {"language": "en"}}
        http.post("/api/v1/knowledge", json=made).raise_for_status()
    sent = [("files", ("garden.txt", NOTE.encode())), ("files", ("broken.json", b"{"))]
    sent += [("files", ("opening hours.md", b"# Winter\n\nIn winter the garden closes at four.\n"))]
    form = {"knowledge_base": "garden"}
    http.post("/api/v1/knowledge:upload", data=form, files=sent).raise_for_status()
    collection = {"embedding_model": "minilm", "text_fields": [{"path": "text", "language": "en"}]}
    http.post("/api/v1/collections", json={"collection": "notes", "config": collection})
    texts = ["The dog chases a ball.", "Rates were raised by the bank.", "Rain falls on the city."]
    points = [{"id": str(i), "payload": {"text": t, "year": 2020 + i}} for i, t in enumerate(texts)]
    http.post("/api/v1/collections/notes/points", json={"points": points}).raise_for_status()
    settled(http)
    return "garden"


def settled(http: httpx.Client) -> None:
    for _ in range(300):
        found = http.get("/api/v1/knowledge/garden/documents").json()["documents"]
        if all(d["status"].endswith(("READY", "FAILED")) for d in found):
            return
    raise AssertionError(found)


def test_upload_ask_and_follow_a_citation(gateway: Gateway, page: Any, tmp_path: Path) -> None:
    page.goto(gateway.url)
    page.get_by_role("link", name="Documents", exact=True).click()
    if not page.locator("#base-box").evaluate("e => e.open"):
        page.locator("#base-box summary").click()
    page.locator("#base-form").get_by_label("Name").fill("yard")
    page.get_by_role("button", name="Create").click()
    file = tmp_path / "yard.txt"
    file.write_text(NOTE)
    page.locator("#upload-form select option", has_text="yard").wait_for(state="attached")
    page.get_by_label("Files").set_input_files(str(file))
    page.get_by_role("button", name="Upload").click()
    page.locator("#document-rows tr", has_text="ready").wait_for(timeout=30_000)
    page.get_by_role("link", name="Ask").click()
    page.locator("#ask-form option", has_text="yard").wait_for(state="attached")
    page.locator("#ask-form").get_by_label("Knowledge base").select_option("yard")
    page.get_by_label("Question").fill("When is the garden open?")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Source 1: yard.txt, page 1").click()
    assert page.locator("#viewer mark").inner_text() == "The garden is open from nine to five."
    picture(page, "citation")
    page.keyboard.press("Escape")
    assert "Extracted" in page.locator(".turn .note").inner_text()
    page.get_by_label("Question").fill("Who wrote the ninth symphony?")
    page.keyboard.press("Enter")
    page.locator(".turn .note", has_text="Not in the documents").wait_for()
    page.on("dialog", lambda d: d.accept())
    page.get_by_role("link", name="Documents", exact=True).click()
    page.locator("#upload-form").get_by_label("Knowledge base").select_option("yard")
    page.get_by_role("button", name="Delete yard.txt").click()
    page.locator("#document-rows .empty").wait_for()
    page.get_by_role("button", name="Delete this knowledge base").click()
    page.locator("#upload-form option", has_text="yard").wait_for(state="detached")


def test_a_written_answer_shows_what_is_not_supported(
    gateway: Gateway, page: Any, garden: str, upstream: ScriptedUpstream
) -> None:
    upstream.script = lambda m: (
        'The garden is open "from nine to five" [1]. It has a famous lion. Dogs pay 20 euros [7].'
    )
    page.goto(f"{gateway.url}/ui/#ask")
    page.locator("#ask-form option", has_text="garden").wait_for(state="attached")
    page.locator("#ask-form").get_by_label("Knowledge base").select_option("garden")
    page.locator("#ask-form summary").click()
    page.get_by_label("Answer by").select_option("far")
    page.get_by_label("Question").fill("When is the garden open?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".turn .note", has_text="Written by a language model: far").wait_for()
    doubts = page.locator(".doubt").all_inner_texts()
    assert any("famous lion" in d for d in doubts) and any("[7]" in d for d in doubts)
    assert not any("nine to five" in d for d in doubts)
    page.get_by_role("button", name="Source 1: garden.txt, page 1").first.wait_for()
    picture(page, "written")


def test_documents_say_what_they_are(gateway: Gateway, page: Any, garden: str) -> None:
    page.goto(f"{gateway.url}/ui/#documents")
    page.locator("#upload-form").get_by_label("Knowledge base").select_option("garden")
    page.locator("#document-rows tr", has_text="it is no readable JSON").wait_for()
    page.get_by_role("button", name="Open garden.txt").click()
    page.locator("#viewer-text", has_text="Ümläute").wait_for()
    page.get_by_role("button", name="Close").click()
    picture(page, "documents")


def test_collections_are_searched(gateway: Gateway, page: Any, garden: str) -> None:
    page.goto(f"{gateway.url}/ui/#search")
    page.locator("#search-form option", has_text="notes").wait_for(state="attached")
    page.locator("#search-form").get_by_label("Text").fill("animals at play")
    page.keyboard.press("Enter")
    page.locator("#hits li").first.wait_for()
    assert "The dog chases a ball." in page.locator("#hits li").first.inner_text()
    picture(page, "search")


def test_the_playground_has_every_model(gateway: Gateway, page: Any) -> None:
    page.goto(f"{gateway.url}/ui/#playground")
    model = page.locator("#playground-model")
    model.locator("option[value=sentiment]").wait_for(state="attached")
    assert set(model.locator("option").all_inner_texts()) >= {
        "housing", "iris", "digits", "sentiment", "minilm", "minilm-int8", "random", "far",
    }  # fmt: skip
    model.select_option("sentiment")
    page.get_by_role("button", name="Classify").click()
    page.locator("#classify-out", has_text="positive").wait_for(timeout=30_000)
    picture(page, "playground-classify")
    model.select_option("minilm")
    page.get_by_role("button", name="Compare").click()
    page.locator("#rerank-out li").first.wait_for(timeout=30_000)
    assert "Vaccines" in page.locator("#rerank-out li").first.inner_text()
    model.select_option("housing")
    page.locator("#features label").first.wait_for()
    page.get_by_role("button", name="Predict").click()
    page.locator("#tabular-out .figure").wait_for(timeout=30_000)
    picture(page, "playground-tabular")
    model.select_option("iris")
    page.locator("#features label", has_text="petal").first.wait_for()
    page.get_by_role("button", name="Predict").click()
    page.locator("#tabular-out", has_text="%").wait_for(timeout=30_000)
    model.select_option("random")
    page.locator("#chat-form summary").click()
    page.get_by_label("Longest answer, tokens").fill("12")
    page.get_by_label("Message", exact=True).fill("Hello")
    page.keyboard.press("Enter")
    page.locator("#chat-turns .note", has_text="tokens/s").wait_for(timeout=30_000)
    picture(page, "playground-chat")


def test_models_metrics_usage_and_keys(gateway: Gateway, page: Any, garden: str) -> None:
    page.goto(f"{gateway.url}/ui/#models")
    page.locator("#model-rows tr", has_text="minilm").first.wait_for()
    picture(page, "models")
    page.get_by_role("button", name="load minilm-int8 version 1").click()
    page.get_by_role("button", name="unload minilm-int8 version 1").wait_for(timeout=30_000)
    page.get_by_role("button", name="unload minilm-int8 version 1").click()
    page.get_by_role("button", name="load minilm-int8 version 1").wait_for(timeout=30_000)
    page.goto(f"{gateway.url}/ui/#usage")
    page.locator("#metric-rows tr", has_text="ListModels").wait_for()
    page.locator(".tile", has_text="Calls a second").wait_for()
    page.locator("#make-key-form").get_by_label("Name").fill("shop")
    page.get_by_role("button", name="Make a key").click()
    page.locator("#new-key code").wait_for()
    page.locator("#key-rows tr", has_text="shop").first.wait_for()
    page.locator("#speed-line[points*=' ']").wait_for(state="attached", timeout=10_000)
    picture(page, "usage")
    page.on("dialog", lambda d: d.accept())
    page.get_by_role("button", name="Revoke shop").first.click()
    page.locator("#key-rows tr", has_text="shop").first.wait_for(state="detached")


def test_by_keyboard_alone(gateway: Gateway, page: Any, garden: str) -> None:
    page.goto(f"{gateway.url}/ui/")
    page.locator("#ask-form option", has_text="garden").wait_for(state="attached")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.hash") == "#ask"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#documents.shown").wait_for()
    page.keyboard.press("Shift+Tab")
    page.goto(f"{gateway.url}/ui/#ask")
    page.locator("#ask.shown").wait_for()
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "question":
            break
    page.keyboard.type("When is the garden open?")
    page.keyboard.press("Enter")
    cite = page.locator(".turn .cite").first
    cite.wait_for()
    cite.focus()
    page.keyboard.press("Enter")
    page.locator("#viewer mark").wait_for()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.className").startswith("cite")


NAMES = """
[...document.querySelectorAll('input,select,textarea,button,progress,meter,dialog,svg')]
  .filter(e => e.checkVisibility() && !e.labels?.length && !e.ariaLabel && !e.textContent.trim()
    && !e.getAttribute('aria-labelledby') && e.ariaHidden !== 'true').map(e => e.outerHTML)
"""
CONTRAST = """
() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (c) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.closest('.unseen,.skip,:disabled,option')) continue;
    let back = [0, 0, 0, 0];
    for (let at = e; at && back[3] < 255; at = at.parentElement) back = rgb(getComputedStyle(at).backgroundColor);
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${e.outerHTML.slice(0, 120)}`);
  }
  return found;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_nothing_overflows_all_is_named_and_readable(
    gateway: Gateway, browser: Any, garden: str, scheme: str, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 740}, color_scheme=scheme)
    for section in SECTIONS:
        page.goto(f"{gateway.url}/ui/#{section}")
        page.locator(f"#{section}.shown").wait_for()
        page.wait_for_load_state("networkidle") if section != "usage" else None
        if section == "documents":
            page.locator("#document-rows td").first.wait_for()
        if section == "ask":
            page.locator("#ask-form option", has_text="garden").wait_for(state="attached")
            page.get_by_label("Question").fill("When is the garden open?")
            page.get_by_label("Question").press("Enter")
            page.locator(".turn .note", has_text="first words").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, section
        assert page.evaluate(NAMES) == [], section
        assert page.evaluate(CONTRAST) == [], section
        picture(page, f"{section}-{width}-{scheme}")
    page.close()
