"""Every page's main action, done as a person does it, and seen at the server."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from server.registry.jobs import News, Point
from tests.console.console_browser import show
from tests.console.console_site import STORY, ConsoleSite

WATCH_ANSWER = """() => {
  window.lengths = new Set();
  const look = () => window.lengths.add(document.querySelector(".answer")?.textContent.length);
  new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def confirm(page: Page, verb: str, reason: str = "") -> None:
    dialog = page.get_by_role("dialog")
    if reason:
        dialog.get_by_label("Reason").fill(reason)
    dialog.get_by_role("button", name=verb).click()
    expect(dialog).to_be_hidden()


def stat(page: Page, label: str) -> str:
    return page.locator(".stat", has=page.get_by_text(label, exact=True)).locator(".value").inner_text()


def test_the_overview_shows_what_happened_and_goes_on_by_itself(page: Page, site: ConsoleSite) -> None:
    results = site.ask(20, seed=11)
    site.wait_recorded(results[-1]["interactionId"])
    show(page, "/")
    total = site.get("/v1/stats")["total"]
    assert stat(page, "Requests") == f"{int(total['requests']):,}"
    page.get_by_label("Time").select_option("1h")
    table = page.locator("figure", has_text="Provider").first
    table.locator("summary").click()
    counted = sum(int(text) for text in table.locator("tbody tr td:nth-child(3)").all_inner_texts())
    assert counted >= 20
    page.get_by_label("Skill", exact=True).select_option("skills/story")
    expect(page.get_by_text("Nothing was recorded in this time").or_(page.locator("figure").first)).to_be_visible()
    before = stat(page, "Requests")
    site.ask(20, seed=12)
    expect(page.locator(".stat .value").first).not_to_have_text(before)  # nobody reloaded


def test_a_rollout_is_promoted_held_resumed_and_rolled_back(page: Page, site: ConsoleSite) -> None:
    site.ask(20, seed=13)
    show(page, "/console/skills")
    page.get_by_role("link", name="support-intent").click()
    rollout = page.locator(".card", has=page.get_by_role("heading", name="Rollout"))
    expect(rollout.locator(".badge").first).to_have_text("shadow")
    page.get_by_role("button", name="Promote").click()
    page.get_by_role("dialog").get_by_role("button", name="Promote").click()
    expect(page.get_by_role("dialog")).to_be_visible()  # not without a reason
    assert site.rollout()["stage"] == "shadow"
    confirm(page, "Promote", "it looks good")
    expect(rollout.locator(".badge").first).to_have_text("canary 10 %")
    page.get_by_role("button", name="Hold").click()
    confirm(page, "Hold", "audit week")
    expect(rollout.get_by_text("held by a person")).to_be_visible()
    assert site.rollout()["paused"]
    page.get_by_role("button", name="Resume").click()
    confirm(page, "Resume", "audit is over")
    expect(rollout.get_by_text("held by a person")).to_be_hidden()
    page.get_by_role("button", name="Roll back").click()
    confirm(page, "Roll back", "enough for a test")
    events = page.get_by_role("table", name="Steps and alarms")
    expect(events.get_by_role("row", name=re.compile("rolled_back.*enough for a test"))).to_be_visible()
    expect(events.get_by_role("row", name=re.compile("canary 10.*it looks good"))).to_be_visible()
    assert site.rollout()["refused"] == ["1"]
    page.get_by_role("button", name="Promote").click()
    page.get_by_role("dialog").get_by_label("Version").fill("1")
    confirm(page, "Promote", "once more")
    assert site.wait_rollout(lambda now: now["student"] == "1")


def test_the_evidence_is_drawn_with_its_confidence_sequence(page: Page, site: ConsoleSite) -> None:
    site.wait_rollout(lambda now: now["student"] == "1")
    site.ask(20, seed=14)
    show(page, "/console/skills/support-intent")
    evidence = page.locator(".card", has=page.get_by_role("heading", name="Evidence"))
    picture = evidence.locator(".interval [role=img]")
    expect(picture).to_have_attribute("aria-label", re.compile(r"[\d.]+ % agreed; surely between [\d.]+ % and [\d.]+ %"))
    for seed in (15, 16):
        told = evidence.locator(".card-head .note").inner_text()
        site.ask(20, seed=seed)
        expect(evidence.locator(".card-head .note")).not_to_have_text(told)
    evidence.locator("summary").click()
    rows = evidence.locator("tbody tr").all_inner_texts()
    bounds = [[float(part.rstrip(" %")) for part in row.split("\t")[1:]] for row in rows]
    assert len(rows) >= 2
    assert all(lower <= agreed <= upper for upper, agreed, lower, _ in bounds)


def test_interactions_are_filtered_read_and_judged(page: Page, site: ConsoleSite) -> None:
    told = site.post("/v1/inference:generateText", {"skill": "story", "prompt": "tell me a story of filters"})["interactionId"]
    site.ask(20, seed=17)
    site.wait_recorded(told)
    show(page, "/console/interactions")
    rows = page.get_by_role("table", name="Interactions").locator("tbody tr")
    page.get_by_label("Skill", exact=True).select_option("skills/story")
    expect(rows.filter(has_text="support-intent")).to_have_count(0)
    expect(rows.filter(has_text="story of filters")).to_have_count(1)
    page.get_by_label("Answered by").select_option("ANSWERED_BY_NOBODY")
    expect(page.get_by_text("No interaction fits these filters")).to_be_visible()
    page.get_by_label("Answered by").select_option("ANSWERED_BY_PROVIDER")
    rows.filter(has_text="story of filters").get_by_role("link").click()
    expect(page.get_by_role("row", name=re.compile("loop.big.*delivered"))).to_be_visible()
    form = page.get_by_role("form", name="Give feedback")
    form.get_by_role("button", name="Not good").click()
    form.get_by_label("Rating").select_option("2")
    form.get_by_label("Correction").fill("Once there was a filter.")
    form.get_by_role("button", name="Send feedback").click()
    expect(page.get_by_text("Kept: disliked. Thank you.")).to_be_visible()
    expect(page.locator(".said li")).to_contain_text("disliked, 2 of 5, right would have been “Once there was a filter.”")
    kept = site.get("/v1/feedback", interactionId=told)["feedback"][0]
    assert (kept["rating"], kept["thumb"], kept["correction"]) == (2, "THUMB_DOWN", "Once there was a filter.")
    show(page, "/console/interactions")
    page.get_by_label("With feedback").check()
    expect(rows).to_have_count(1)


def test_a_job_is_started_and_cancelled(page: Page, site: ConsoleSite) -> None:
    site.wait_recorded(site.ask(40, seed=18)[-1]["interactionId"])
    show(page, "/console/jobs")
    page.get_by_role("button", name="Start a job").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Skill").select_option("skills/support-intent")
    dialog.get_by_label("Method").select_option("linear-head")
    dialog.get_by_role("button", name="Start").click()
    expect(page.get_by_role("heading", name="Job of support-intent")).to_be_visible()
    state = page.locator(".card", has=page.get_by_role("heading", name="State")).locator(".badge")
    expect(state).to_have_text("queued")
    page.get_by_role("button", name="Cancel the job").click()
    confirm(page, "Cancel the job")
    expect(state).to_have_text("cancelled")
    job = site.get(f"/v1/trainingJobs/{page.url.rsplit('/', 1)[1]}")["trainingJob"]
    assert (job["state"], job["method"]) == ("TRAINING_JOB_STATE_CANCELLED", "linear-head")


def test_a_running_jobs_lines_and_curves_come_as_they_are_said(page: Page, site: ConsoleSite) -> None:
    site.jobs.create("support-intent", "train", {"seed": 4})
    job = site.jobs.lease("a trainer", 60.0, max_attempts=3)
    assert job is not None
    site.jobs.beat(
        job.id, "a trainer", 60.0, News(lines=[(0, "begun")], points=[Point("head/loss", 0, 2.0, 0), Point("head/loss", 1, 1.5, 0)])
    )
    show(page, f"/console/jobs/{job.id}")
    log = page.get_by_role("log")
    expect(log).to_contain_text("begun")
    expect(page.get_by_role("heading", name="head/loss")).to_be_visible()
    site.jobs.beat(
        job.id, "a trainer", 60.0, News(lines=[(0, "half of it")], points=[Point("head/loss", 2, 0.25, 0)], progress={"fit": (1, 2)})
    )
    expect(log).to_contain_text("half of it")
    expect(page.locator(".stages")).to_contain_text("fit")
    expect(page.locator("figure", has_text="loss").locator(".legend b")).to_have_text("0.25")
    site.jobs.end(job.id, "a trainer", "rejected", report={"rejection": "no better than the present one"})
    expect(page.locator(".badge", has_text="rejected").first).to_be_visible()
    expect(page.get_by_text("2 lines")).to_be_visible()


def test_a_model_is_loaded_and_unloaded(page: Page, site: ConsoleSite) -> None:
    show(page, "/console/models")
    row = page.get_by_role("row", name=re.compile("^ranker"))
    expect(row).to_contain_text("unloaded")
    row.get_by_role("button", name="Load ranker version 1").click()
    expect(row).to_contain_text("ready")
    assert site.get("/v1/models/ranker/versions/1")["model"]["state"] == "MODEL_STATE_READY"
    row.get_by_role("button", name="Unload ranker version 1").click()
    confirm(page, "Unload")
    expect(row).to_contain_text("unloaded")
    page.get_by_role("link", name="embedder").click()
    adapter = page.get_by_role("table", name="Adapters of embedder").or_(page.get_by_text("This model has no adapters."))
    expect(adapter).to_be_visible()


def test_providers_and_budgets_show_their_use(page: Page, site: ConsoleSite) -> None:
    site.ask(10, seed=19)
    show(page, "/console/providers")
    expect(page.get_by_role("row", name=re.compile("^loop asked"))).to_be_visible()
    row = page.get_by_role("row", name=re.compile("^total day"))
    expect(row).to_contain_text("$5.00")
    spent = int(site.get("/v1/budget", scope="total")["budgets"][0]["spent"]["microUsd"])
    assert spent > 0
    expect(row.get_by_role("img")).to_have_attribute("aria-label", re.compile(r"^[\d.]+ % of the limit$"))


def test_the_playground_streams_and_tells_how_an_answer_came_about(page: Page, site: ConsoleSite) -> None:
    show(page, "/console/playground")
    page.get_by_label("Skill or model").select_option("local:scripted")
    page.get_by_label("Temperature").fill("0")  # so that the story goes on to the end
    page.get_by_label("Most tokens").fill("400")
    page.get_by_label("Input", exact=True).fill("tell")
    page.evaluate(WATCH_ANSWER)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".answer")).to_contain_text("me a story about Greta")
    expect(page.get_by_text(re.compile(r"400 written, [\d]+ a second"))).to_be_visible()
    assert page.evaluate("window.lengths.size") > 3  # it came in pieces
    page.get_by_label("Skill or model").select_option("story")
    page.get_by_label("Input", exact=True).fill("a story, please")
    page.get_by_label("Input", exact=True).press("Control+Enter")
    expect(page.locator(".answer")).to_have_text(STORY)
    expect(page.get_by_role("row", name=re.compile("loop.big.*delivered"))).to_be_visible()
    facts = page.locator(".card", has=page.get_by_role("heading", name="How it came about"))
    expect(facts).to_contain_text(re.compile(r"Cost\$0\.\d+"))
    page.get_by_role("button", name="Good", exact=True).click()
    expect(page.get_by_text("Kept: liked. Thank you.")).to_be_visible()
    interaction = facts.locator("code").inner_text()
    site.wait(lambda: site.get("/v1/feedback", interactionId=interaction)["feedback"], lambda found: len(found) == 1)
    page.get_by_label("Skill or model").select_option("support-intent")
    page.get_by_label("Input", exact=True).fill("money transfer late")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".answer")).to_have_text("transfer")


@pytest.mark.parametrize(("model", "says"), [("local:embedder", "A vector of 32 numbers"), ("local:classifier", "%")])
def test_the_playground_asks_other_models_too(page: Page, model: str, says: str) -> None:
    show(page, f"/console/playground/{model}")
    page.get_by_label("Input", exact=True).fill("where is my card ?")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".answer")).to_contain_text(says)


def test_keys_are_made_shown_once_and_revoked(page: Page, site: ConsoleSite) -> None:
    show(page, "/console/keys")
    page.get_by_role("button", name="Make a key").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("What it is for").fill("the shop")
    dialog.get_by_label("Role").select_option("ROLE_VIEWER")
    dialog.get_by_label("Calls a minute").fill("600")
    dialog.get_by_role("button", name="Make it").click()
    secret = dialog.locator(".secret").inner_text()
    assert secret.startswith("und_")
    dialog.get_by_role("button", name="I have kept it").click()
    row = page.get_by_role("table", name="Keys").get_by_role("row", name=re.compile("^the shop"))
    expect(row).to_contain_text("600 calls a minute")
    assert secret not in page.content()
    kept = next(one for one in site.get("/v1/apiKeys")["apiKeys"] if one["displayName"] == "the shop")
    assert (kept["role"], kept["requestsPerMinute"], kept["name"].removeprefix("apiKeys/")) == ("ROLE_VIEWER", 600, secret.split("_")[1])
    row.get_by_role("button", name="Revoke the shop").click()
    confirm(page, "Revoke")
    expect(row).to_contain_text("revoked")
    expect(page.get_by_role("table", name="Audit log")).to_contain_text("AdminService/RevokeApiKey")
