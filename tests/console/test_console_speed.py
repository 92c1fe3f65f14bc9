"""The console is small and there at once."""

from __future__ import annotations

from playwright.sync_api import Browser

from tests.console.console_browser import bundle_bytes, first_paint_s
from tests.console.console_site import ConsoleSite

MOST_BYTES = 120_000  # the bar is 300 kB; what is lean stays lean
MOST_PAINT_S = 1.0


def test_the_bundle_is_small_and_all_of_it_is_served_compressed(site: ConsoleSite) -> None:
    files = bundle_bytes()
    assert sum(files.values()) < MOST_BYTES, files
    page = site.http.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    scripts = [name for name in files if name.startswith("assets/")]
    assert scripts
    for name in scripts:
        with site.http.stream("GET", f"/console/{name}") as answered:
            sent = sum(len(piece) for piece in answered.iter_raw())
        assert answered.headers["content-encoding"] == "gzip"
        assert "immutable" in answered.headers["cache-control"]
        assert sent <= files[name] * 1.02 + 64


def test_the_first_paint_comes_within_a_second(browser: Browser, site: ConsoleSite) -> None:
    assert first_paint_s(browser, site.url, loads=5) < MOST_PAINT_S
