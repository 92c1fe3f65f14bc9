"""The console for everybody: axe-core, the keyboard, a narrow screen, dark and light, roles and keys, and servers that do not answer."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.console.console_browser import PAGES, THEMES, WAIT_MS, axe_findings, axe_over_pages, show
from tests.console.console_site import ConsoleSite, LockedSite


def test_axe_finds_nothing_serious_on_any_page_in_either_theme(browser: Browser, site: ConsoleSite) -> None:
    told = site.ask(20, seed=21)[-1]["interactionId"]
    site.wait_recorded(told)
    job = site.jobs.create("support-intent", "assess", {"seed": 21})
    pages = {**PAGES, "interaction": f"/console/interactions/{told}", "job": f"/console/jobs/{job.id}"}
    found = axe_over_pages(browser, site.url, pages)
    site.jobs.cancel(job.id)
    assert not found, json.dumps(found, indent=1)


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing_serious_in_dialogs_and_answers(page: Page, theme: str) -> None:
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    for path, button in (("/console/keys", "Make a key"), ("/console/jobs", "Start a job"), ("/console/skills/support-intent", "Promote")):
        show(page, path)
        page.get_by_role("button", name=button).click()
        page.get_by_role("dialog").wait_for()
        assert not axe_findings(page), path
    show(page, "/console/playground/support-intent")
    page.get_by_label("Input", exact=True).fill("password reset")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("heading", name="How it came about")).to_be_visible()
    assert not axe_findings(page)


def test_the_keyboard_reaches_every_page_and_comes_back_from_dialogs(page: Page) -> None:
    show(page, "/")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Tab")  # the name of the program
    for name in (
        "Overview",
        "Skills and rollouts",
        "Interactions",
        "Training jobs",
        "Models and adapters",
        "Providers and budgets",
        "Playground",
    ):
        page.keyboard.press("Tab")
        expect(page.get_by_role("navigation").get_by_role("link", name=name)).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_have_text("Keys and audit")
    expect(heading).to_be_focused()  # where a screen reader goes on
    assert page.title() == "Keys and audit · Understudy"
    page.keyboard.press("Tab")
    button = page.get_by_role("button", name="Make a key")
    expect(button).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").get_by_label("What it is for")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(button).to_be_focused()
    page.go_back()
    expect(heading).to_have_text("Overview")


def test_nothing_is_wider_than_a_phone(browser: Browser, site: ConsoleSite) -> None:
    site.wait_recorded(site.ask(20, seed=22)[-1]["interactionId"])
    context = browser.new_context(base_url=site.url, viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    for name, path in PAGES.items():
        show(page, path)
        wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1], (name, wide)
    menu = page.get_by_role("button", name="Menu")
    expect(page.get_by_role("navigation")).to_be_hidden()
    menu.click()
    page.get_by_role("link", name="Models and adapters").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Models and adapters")
    expect(page.get_by_role("navigation")).to_be_hidden()
    context.close()


def test_colours_follow_the_system_until_somebody_chooses(page: Page) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    page.emulate_media(color_scheme="dark")
    show(page, "/")
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert dark != light
    page.get_by_role("button", name="Colours: System").click()
    page.get_by_role("button", name="Colours: Light").click()
    assert page.evaluate(ground) == dark
    show(page, "/console/models")
    assert page.evaluate(ground) == dark


def test_a_server_with_keys_asks_for_one_and_a_viewer_reads_why_not(browser: Browser, locked: LockedSite) -> None:
    context = browser.new_context(base_url=locked.url)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)

    def enter(key: str, button: str) -> None:
        page.get_by_role("button", name=button).click()
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()

    page.goto("/console/models")
    expect(page.get_by_text("This server asks for a key.")).to_be_visible()
    enter("und_aaaaaaaa_wrong", "Enter a key")
    expect(page.get_by_text("The server does not take this key")).to_be_visible()
    enter(locked.viewer, "Enter a key")
    mine = page.get_by_role("button", name="Key of this tab")
    expect(mine).to_contain_text("viewer")
    load = page.get_by_role("button", name="Load embedder version 1")
    expect(load).to_have_attribute("aria-disabled", "true")
    expect(load).to_have_attribute("title", "This takes the role operator; your key has the role viewer.")
    load.dispatch_event("click")
    expect(page.get_by_role("row", name=re.compile("^embedder"))).to_contain_text("unloaded")
    page.get_by_role("link", name="Interactions").click()
    expect(page.get_by_role("alert")).to_contain_text("PERMISSION_DENIED")
    page.get_by_role("link", name="Keys and audit").click()
    expect(page.locator(".empty")).to_have_text("This takes the role admin; your key has the role viewer.")
    assert locked.viewer not in page.evaluate("JSON.stringify(localStorage)") + page.content()
    enter(locked.admin, "Key of this tab")
    expect(mine).to_contain_text("admin")
    page.get_by_role("button", name="Make a key").click()
    expect(page.get_by_role("dialog").get_by_label("Role")).to_be_visible()
    page.keyboard.press("Escape")
    mine.click()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_text("This server asks for a key.")).to_be_visible()
    context.close()


def test_an_older_server_and_a_silent_gateway_are_said_in_words(page: Page) -> None:
    def older(route: Route) -> None:
        error = {"code": 501, "status": "UNIMPLEMENTED", "reason": "UNIMPLEMENTED", "message": "unknown method"}
        route.fulfill(status=501, content_type="application/json", body=json.dumps({"error": error}))

    page.route(re.compile("/v1/timeline"), older)
    show(page, "/")
    expect(page.get_by_text("The server is older than this page and does not know the timeline.")).to_be_visible()
    expect(page.locator(".stat").first).to_be_visible()
    page.route(re.compile("/v1/models"), lambda route: route.abort())
    show(page, "/console/models")
    expect(page.get_by_role("alert")).to_contain_text("The gateway does not answer.")
    page.unroute(re.compile("/v1/models"))
    expect(page.get_by_role("row", name=re.compile("^embedder"))).to_be_visible()  # by itself
    expect(page.get_by_role("alert")).to_have_count(0)


def test_texts_of_users_are_shown_and_never_run(page: Page, site: ConsoleSite) -> None:
    text = "<img src=x onerror=alert(1)><script>alert(2)</script> a story"
    told = site.post("/v1/inference:generateText", {"skill": "story", "prompt": text})["interactionId"]
    site.wait_recorded(told)
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    show(page, f"/console/interactions/{told}")
    expect(page.locator("pre.text").first).to_have_text(text)
    show(page, f"/console/interactions/{text.replace('/', '%2F')}")
    assert not dialogs
