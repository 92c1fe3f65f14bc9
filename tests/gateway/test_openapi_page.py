"""The page at /docs in a real browser: every operation is there, one is found, read and sent, and nothing comes from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.console.console_browser import THEMES, axe_findings, chromium, watched
from tests.gateway.test_openapi_document import operations
from tests.gateway_process import GatewayProcess


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def test_an_operation_is_found_and_sent(browser: Browser, gateway: GatewayProcess) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    wrong = watched(page, gateway.url)
    page.goto(f"{gateway.url}/docs")
    entries = page.locator("details.operation")
    expect(entries).to_have_count(sum(1 for _ in operations()))
    page.get_by_label("Filter").fill("classify inference")
    expect(entries.filter(visible=True)).to_have_count(1)
    entry = page.locator("#InferenceService_Classify")
    entry.locator("summary").first.click()
    entry.get_by_label("Body", exact=True).fill('{"model": {"name": "classifier"}, "inputs": [{"text": "my card"}]}')
    entry.get_by_role("button", name="Send").click()
    expect(entry.get_by_label("Answer", exact=True)).to_contain_text('"labels"')
    expect(entry.get_by_role("status")).to_contain_text("200 OK")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not wrong
    page.close()


@pytest.mark.parametrize("theme", THEMES)
def test_the_page_is_accessible(browser: Browser, gateway: GatewayProcess, theme: str) -> None:
    page = browser.new_page(color_scheme="dark" if theme == "dark" else "light")
    page.goto(f"{gateway.url}/docs#ModelService_LoadModel")
    page.locator("details.operation[open] button").wait_for()
    assert not axe_findings(page)
    page.close()
