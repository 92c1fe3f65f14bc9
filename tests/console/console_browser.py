"""Chromium as the machine has it, and what is measured of the console in it."""

from __future__ import annotations

import gzip
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.made import ROOT

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
AXE = ROOT / "console" / "node_modules" / "axe-core" / "axe.min.js"
BUILT = ROOT / "gateway" / "internal" / "web" / "dist"
PAGES = {
    "overview": "/",
    "skills": "/console/skills",
    "skill": "/console/skills/support-intent",
    "interactions": "/console/interactions",
    "jobs": "/console/jobs",
    "models": "/console/models",
    "model": "/console/models/embedder",
    "providers": "/console/providers",
    "playground": "/console/playground",
    "keys": "/console/keys",
    "nothing": "/console/keys/../skills/no-such-skill",
}
THEMES = ("light", "dark")
WAIT_MS = 15_000
# Milliseconds from the navigation's begin, as the Performance API has it, also where it has not happened yet.
FIRST_PAINT = """() => new Promise((done) => new PerformanceObserver((list) => {
  for (const one of list.getEntries()) if (one.name === "first-contentful-paint") done(one.startTime);
}).observe({type: "paint", buffered: true}))"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, headless."""
    assert os.path.exists(CHROMIUM), f"{CHROMIUM} is not there: `make {CHROMIUM}`, or set CHROMIUM to where it is"
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium's does not work for root
    expect.set_options(timeout=WAIT_MS)  # what is waited for is mostly the next look at the server
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=[*sandbox, "--disable-gpu"])
        yield running
        running.close()


def watched(page: Page, url: str) -> list[str]:
    """What goes wrong in a tab from now on: errors of scripts, of the console, and requests to another place than `url`."""
    found: list[str] = []
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda error: found.append(str(error)))
    # An answer that is an error is the page's to show; Chromium writes it down all the same.
    page.on(
        "console", lambda said: found.append(said.text) if said.type == "error" and "Failed to load resource" not in said.text else None
    )
    page.on("request", lambda request: None if request.url.startswith((url, "blob:")) else found.append(f"asks {request.url}"))
    return found


def show(page: Page, path: str) -> None:
    """Opens a page and waits until what it asks for has come."""
    page.goto(path)
    page.locator("main h1").wait_for()
    expect(page.locator(".loading")).to_have_count(0)


def axe_findings(page: Page) -> list[dict[str, Any]]:
    """What axe-core finds serious or critical in the page as it is: rule, help and the first places."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        {"rule": one["id"], "impact": one["impact"], "help": one["help"], "where": [node["html"][:200] for node in one["nodes"][:3]]}
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def axe_over_pages(browser: Browser, url: str, pages: dict[str, str] = PAGES) -> list[dict[str, Any]]:
    """`axe_findings` of every page in both themes, with its page and theme."""
    found: list[dict[str, Any]] = []
    context = browser.new_context(base_url=url)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    for name, path in pages.items():
        show(page, path)
        for theme in THEMES:
            page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
            found += [{"page": name, "theme": theme, **one} for one in axe_findings(page)]
    context.close()
    return found


def first_paints(browser: Browser, url: str, loads: int = 7) -> list[float]:
    """Seconds to the first contentful paint of the overview, each load in a new context, so with nothing cached."""
    found: list[float] = []
    for _ in range(loads):
        context = browser.new_context(base_url=url)
        page = context.new_page()
        page.goto("/")
        page.locator("main h1").wait_for()
        found.append(float(page.evaluate(FIRST_PAINT)) / 1000)
        context.close()
    return found


def first_paint_s(browser: Browser, url: str, loads: int = 7) -> float:
    """The median of `first_paints`."""
    return statistics.median(first_paints(browser, url, loads))


def bundle_bytes() -> dict[str, int]:
    """Bytes of each built file as it is sent, compressed by gzip."""
    return {
        str(path.relative_to(BUILT)): len(gzip.compress(path.read_bytes(), 9))
        for path in BUILT.rglob("*")
        if path.is_file() and path.stat().st_size
    }
