"""The console in a real browser, before a real gateway and server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.console.console_browser import chromium, watched
from tests.console.console_site import ConsoleSite, LockedSite
from tests.gateway_process import BINARY
from tests.made import built


@pytest.fixture(scope="session")
def console_gateway() -> Path:
    """The gateway with the console in it, built once."""
    built("console", "gateway")
    return BINARY


@pytest.fixture(scope="session")
def site(console_gateway: Path, small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsoleSite]:
    """One site for all: tests change what is theirs, and find their own rows."""
    running = ConsoleSite(tmp_path_factory.mktemp("console"), small_models)
    yield running
    running.close()


@pytest.fixture
def locked(console_gateway: Path, small_models: Path, tmp_path: Path) -> Iterator[LockedSite]:
    running = LockedSite(tmp_path, small_models)
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Browser, site: ConsoleSite) -> Iterator[Page]:
    """A tab of its own at the console; a script error, a refusal of the content policy or a request to elsewhere fails the test."""
    context = browser.new_context(base_url=site.url, viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    complaints = watched(tab, site.url)
    yield tab
    context.close()
    assert not complaints, complaints
