"""The pictures of docs/console.md: `python -m tests.console.pictures [minutes]` lets callers ask a site for a while, then takes them."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, expect

from tests.console.console_browser import chromium, show
from tests.console.console_site import ConsoleSite
from tests.made import ROOT
from tests.small_models import build_repository

OUT = ROOT / "docs" / "images"
SHOTS = {
    "console_overview": ("/", 1280, 1060, "light"),
    "console_rollout": ("/console/skills/support-intent", 1280, 900, "light"),
    "console_interactions": ("/console/interactions", 1280, 760, "light"),
    "console_job": ("", 1280, 900, "light"),
    "console_playground": ("/console/playground/story", 1280, 860, "dark"),
    "console_phone": ("/console/skills/support-intent", 360, 780, "dark"),
}


def ask_for(site: ConsoleSite, seconds: float) -> None:
    """Callers at an uneven pace, some of whom say what they think."""
    end = time.monotonic() + seconds
    turn = 100
    while time.monotonic() < end:
        found = site.ask(6 + turn % 5 * 4, seed=turn)
        if turn % 3 == 0:
            site.post("/v1/inference:generateText", {"skill": "story", "prompt": "tell me a story of a card"})
            thumb = "THUMB_DOWN" if turn % 9 == 0 else "THUMB_UP"
            site.post("/v1/feedback", {"interactionId": found[0]["interactionId"], "thumb": thumb})
        if turn == 112:
            site.post("/v1/skills/support-intent:promoteRollout", {"reason": "a week of shadow looks well"})
        if turn == 124:
            site.post("/v1/skills/support-intent:promoteRollout", {"reason": "the canary keeps the promise"})
        turn += 1
        time.sleep(1.5)


def train(site: ConsoleSite) -> str:
    """A real job by a real trainer; its page."""
    import os
    import subprocess

    body = {"skill": "skills/support-intent", "method": "linear-head", "seed": 7}
    job = str(site.post("/v1/trainingJobs", body)["trainingJob"]["name"]).removeprefix("trainingJobs/")
    config = site.folder / "server" / "understudy.toml"
    command = [sys.executable, "-m", "trainer", "work", "--once", "--config", str(config), "--set", f"models.path={site.models}"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])
    environment = {**os.environ, "PYTHONPATH": paths, "LOOP_KEY": "sk-loop", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=site.folder, env=environment, check=False)
    return f"/console/jobs/{job}"


def take(browser: Browser, site: ConsoleSite, job: str) -> None:
    for name, (path, width, height, theme) in SHOTS.items():
        context = browser.new_context(
            base_url=site.url, viewport={"width": width, "height": height}, color_scheme="dark" if theme == "dark" else "light"
        )
        page = context.new_page()
        show(page, path or job)
        if path == "/":
            page.get_by_label("Time").select_option("1h")
            page.locator("figure").first.wait_for()
        if "playground" in path:
            page.get_by_label("Input", exact=True).fill("Tell me a story of a card that was lost.")
            page.get_by_role("button", name="Ask", exact=True).click()
            page.get_by_role("heading", name="How it came about").wait_for()
        if "skills/" in path:  # two more looks at the evidence
            for seed in (901, 902, 903):
                note = page.locator(".card", has=page.get_by_role("heading", name="Evidence")).locator(".card-head .note")
                told = note.inner_text()
                site.ask(40, seed=seed, batch=4)
                expect(note).not_to_have_text(told)
        page.wait_for_timeout(500)  # meters move for a moment
        page.screenshot(path=OUT / f"{name}.png")
        context.close()


def main(minutes: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        small = build_repository(Path(folder) / "small").root
        site = ConsoleSite(Path(folder) / "site", small)
        try:
            ask_for(site, minutes * 60)
            job = train(site)
            with chromium() as browser:
                take(browser, site, job)
        finally:
            site.close()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 3.0)
