"""Hosted fine-tuning against a vendor on loopback: what is sent, what it costs, who agreed, and how a killed trainer goes on."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from server.config import Config, load_config
from server.errors import (
    BudgetExceeded,
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    ProviderUnavailable,
    SkillNotFound,
    TooLittleData,
    UnderstudyError,
)
from server.lake import table
from server.lake.ids import IdKey
from server.lake.log import Log
from server.lake.schema import INTERACTIONS
from server.registry.jobs import JobStore
from server.registry.registry import Registry
from server.registry.schema import MODELS
from tests.trainer.hosted_vendor import KEY, Vendor, vendor
from trainer.context import JobContext
from trainer.hosted.offers import offer_of
from trainer.hosted.run import Around, State, finetune
from trainer.report import Report

ROOT = Path(__file__).resolve().parents[2]
SKILL = "intent"
MODEL = "gpt-4.1-mini-2025-04-14"
BEFORE = datetime(2026, 11, 28, tzinfo=UTC)
LOGGERS = ("", "openai", "httpx2", "httpcore2", "httpcore", "asyncio")


@pytest.fixture
def paid() -> Iterator[Vendor]:
    with vendor() as told:
        yield told


@pytest.fixture
def logs() -> Iterator[io.StringIO]:
    """Everything that is logged at DEBUG, the libraries' own included."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)
    yield written
    logging.getLogger().removeHandler(handler)
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def config_of(folder: Path, url: str, more: str = "", min_rows: int = 20) -> Config:
    (folder / "key").write_text(KEY)
    (folder / "understudy.toml").write_text(f"""
[lake]
path = {json.dumps(str(folder / "lake"))}
[registry]
url = {json.dumps(f"sqlite:///{folder / 'registry.db'}")}
[providers.openai]
kind = "openai"
base_url = {json.dumps(url)}
api_key_file = {json.dumps(str(folder / "key"))}
training_allowed = true
timeout_s = 10
[providers.claude]
kind = "anthropic"
base_url = "http://127.0.0.1:1"
[skills.{SKILL}]
instruction = "Which intent?"
labels = ["card", "pin"]
teacher = "openai/gpt-4.1"
min_rows = {min_rows}
{more}
""")
    return load_config(folder / "understudy.toml", environ={})


def fill(config: Config, rows: int = 60) -> None:
    """Rows of the teacher's; one in ten may not be trained on."""
    path = Path(config.lake.path)
    path.mkdir(parents=True, exist_ok=True)
    key, log = IdKey.open(path / "id.key"), Log(table.log_folder(path, INTERACTIONS))
    for n in range(rows):
        label = "card" if n % 2 else "pin"
        text = f"{'where is my card' if n % 2 else 'how do I change my pin'} {_word(n)} {_word(n * 7 + 3)}" + (
            " ann@example.com" if n % 3 == 0 else ""
        )
        row = {"interaction_id": key.new(), "time_ns": time.time_ns(), "skill": SKILL, "input_kind": "text", "input": text}
        more = {"teacher_label": label, "source_model": "openai/gpt-4.1", "training_allowed": n % 10 != 9, "task": "text-classification"}
        log.append([row | more])
    log.close()
    table.convert(path, INTERACTIONS)


def _word(number: int) -> str:
    return "".join("bcdfghklmnprstvz"[number * 31 + k & 15] + "aeiou"[(number // (k + 1)) % 5] for k in range(4))


class Trial:
    """A job as the worker would run it; `run` may be called again, as by the next trainer."""

    def __init__(self, config: Config, **spec: object) -> None:
        self.config = config
        self.registry = Registry(config.registry)
        self.spec: dict[str, Any] = {"provider": "openai", "model": MODEL, "max_cost_usd": 5.0, **spec}
        self.job = JobStore(self.registry).begin(SKILL, "finetune", self.spec, "trainer", 60).id
        self.lines: list[str] = []
        self.points: list[tuple[str, int, float]] = []
        self.folder = Path(config.lake.path).parent / "jobs" / self.job
        self.folder.mkdir(parents=True)
        self.stop = threading.Event()

    def run(self, now: datetime = BEFORE) -> Report:
        context = JobContext(
            self.job, self.folder, log=self.lines.append, metric=lambda *point: self.points.append(point), is_cancelled=self.stop.is_set
        )
        return finetune(self.config, SKILL, context, self.spec, around=Around(now=lambda: now, poll_s=(0.01, 0.02)))

    def models(self) -> list[Any]:
        with self.registry.engine().connect() as connection:
            return list(connection.execute(select(MODELS)))


def test_rows_become_a_model_of_the_vendor(paid: Vendor, tmp_path: Path) -> None:
    config = config_of(tmp_path, paid.url)
    fill(config)
    trial = Trial(config, epochs=2, seed=7)
    report = trial.run()
    assert (report.state, report.method, report.base) == ("succeeded", "hosted", f"openai/{MODEL}")
    assert report.version == "ft:gpt-4.1-mini-2025-04-14:org:intent:1"

    lines = [json.loads(line)["messages"] for line in next(iter(paid.files.values())).decode().splitlines()]
    assert len(lines) == report.train_rows and 30 < len(lines) < 54  # a fifth is held out, a tenth is not allowed
    assert {talk[-1]["content"] for talk in lines} == {"card", "pin"} and all("Which intent?" in talk[0]["content"] for talk in lines)
    # The words are those that the server asks a model with.
    assert all("Answer with exactly one of these labels" in talk[0]["content"] for talk in lines)
    sent = paid.jobs["ftjob-1"]
    assert (sent["seed"], sent["hyperparameters"], sent["metadata"]) == (7, {"n_epochs": 2}, {"understudy_job": trial.job})

    (model,) = trial.models()
    assert (model.name, model.kind, model.skill, model.base) == (f"openai/{report.version}", "provider", SKILL, f"openai/{MODEL}")
    assert model.job_id == trial.job and json.loads(model.metrics)["trained_tokens"] == sent["trained_tokens"]
    assert report.metrics["cost_usd"] == pytest.approx(sent["trained_tokens"] * 5e-6, abs=1e-6)
    # The events of more than a page, each once, oldest first, and the key in none.
    assert [point[1] for point in trial.points] == list(range(paid.events))
    assert not any(KEY in line for line in trial.lines) and any("note:" in line for line in trial.lines)


def test_what_may_not_be_sent_is_not(paid: Vendor, tmp_path: Path) -> None:
    config = config_of(tmp_path, paid.url)
    fill(config)
    report = Trial(config).run()
    assert sum(count for why, count in report.dropped.items() if "training_allowed" in why) == 6
    assert report.held_out_rows > 0


def test_personal_data_stays_here_whatever_is_configured(paid: Vendor, tmp_path: Path) -> None:
    config = config_of(tmp_path, paid.url, '[curation]\npii = "off"')
    fill(config)
    Trial(config).run()
    (sent,) = paid.files.values()
    assert b"ann@example.com" not in sent and b"EMAIL_ADDRESS" in sent


@pytest.mark.parametrize(
    ("day", "told"),
    [
        (datetime(2027, 1, 5, 23, 59, tzinfo=UTC), ""),
        (datetime(2027, 1, 6, tzinfo=UTC), "no new fine-tuning jobs since 2027-01-06"),
        (datetime(2027, 2, 1, tzinfo=UTC), "no new fine-tuning jobs since 2027-01-06"),
    ],
)
def test_the_offer_ends(paid: Vendor, tmp_path: Path, day: datetime, told: str) -> None:
    config = config_of(tmp_path, paid.url)
    fill(config)
    trial = Trial(config)
    if told:
        with pytest.raises(FailedPrecondition, match=told):
            trial.run(day)
        assert not paid.requests
    else:
        assert trial.run(day).state == "succeeded"
        notes = " ".join(line for line in trial.lines if line.startswith("note:"))
        assert "2027-01-06" in notes and "2027-01-14" in notes and "2026-05-07" in notes


def test_a_model_that_has_ended_is_refused() -> None:
    offer = offer_of("openai")
    with pytest.raises(FailedPrecondition, match="2027-01-06"):
        offer.warnings(MODEL, datetime(2027, 1, 14, tzinfo=UTC))
    assert offer_of("compatible").warnings("anything", datetime(2030, 1, 1, tzinfo=UTC)) == []


def test_nothing_is_spent_unless_somebody_agreed(paid: Vendor, tmp_path: Path) -> None:
    config = config_of(tmp_path, paid.url)
    fill(config)
    with pytest.raises(FailedPrecondition, match="nobody agreed"):
        Trial(config, max_cost_usd=None).run()
    with pytest.raises(FailedPrecondition, match=r"0\.0001 were allowed"):
        Trial(config, max_cost_usd=0.0001).run()
    with pytest.raises(InvalidArgument, match="no price of fine-tuning"):
        Trial(config, model="gpt-9").run()
    assert not paid.requests


def test_budgets_hold(paid: Vendor, tmp_path: Path) -> None:
    config = config_of(tmp_path, paid.url, "[budget.total]\nday_usd = 0.01")
    fill(config)
    with pytest.raises(BudgetExceeded):
        Trial(config, max_cost_usd=None).run()
    assert not paid.requests
    config = config_of(tmp_path, paid.url, "[budget.providers.openai]\nday_usd = 5.0")
    trial = Trial(config, max_cost_usd=None)
    report = trial.run()
    from server.registry.schema import BUDGET_WINDOWS

    with trial.registry.engine().connect() as connection:
        rows = [row for row in connection.execute(select(BUDGET_WINDOWS)) if row.scope == "provider:openai"]
    assert sum(row.spent for row in rows) == pytest.approx(report.metrics["cost_usd"] * 1e6, abs=1)
    assert not sum(row.reserved for row in rows)


def test_a_killed_trainer_goes_on_and_begins_nothing_twice(paid: Vendor, tmp_path: Path) -> None:
    config = config_of(tmp_path, paid.url)
    fill(config)
    trial = Trial(config)
    paid.hold.clear()
    failed: list[BaseException] = []

    def first() -> None:
        try:
            trial.run()
        except BaseException as error:
            failed.append(error)

    one = threading.Thread(target=first)
    one.start()
    assert paid.running.wait(20)
    trial.stop.set()  # its lease is lost: nobody asked for an end
    one.join(20)
    assert isinstance(failed[0], Cancelled) and not paid.count("POST /fine_tuning/jobs/*/cancel")

    trial.stop.clear()
    paid.hold.set()
    assert trial.run().state == "succeeded"
    assert (paid.count("POST /files"), paid.count("POST /fine_tuning/jobs"), len(trial.models())) == (1, 1, 1)
    # Once more, as if it had been killed after the last line was written.
    assert trial.run().state == "succeeded" and len(trial.models()) == 1
    steps = [point[1] for point in trial.points]
    assert steps == list(range(paid.events))


def test_a_creation_whose_answer_was_lost_is_found_again(paid: Vendor, tmp_path: Path) -> None:
    config = config_of(tmp_path, paid.url)
    fill(config)
    paid.faults["POST /fine_tuning/jobs"] = ["drop"]
    assert Trial(config).run().state == "succeeded"
    assert paid.count("POST /fine_tuning/jobs") == 1 == len(paid.jobs)


def test_a_trainer_that_died_while_it_asked_finds_its_job(paid: Vendor, tmp_path: Path) -> None:
    config = config_of(tmp_path, paid.url)
    fill(config)
    trial = Trial(config)
    assert trial.run().state == "succeeded"
    state = State.read(trial.folder)
    state.job, state.event = "", ""
    state.write(trial.folder)
    assert trial.run().version == "ft:gpt-4.1-mini-2025-04-14:org:intent:1"
    assert paid.count("POST /fine_tuning/jobs") == 1


def test_a_cancelled_job_is_cancelled_there(paid: Vendor, tmp_path: Path) -> None:
    config = config_of(tmp_path, paid.url)
    fill(config)
    trial = Trial(config)
    paid.hold.clear()
    ended: list[BaseException] = []

    def work() -> None:
        try:
            trial.run()
        except BaseException as error:
            ended.append(error)

    one = threading.Thread(target=work)
    one.start()
    assert paid.running.wait(20)
    JobStore(trial.registry).cancel(trial.job)
    trial.stop.set()
    one.join(20)
    assert isinstance(ended[0], Cancelled)
    assert paid.jobs["ftjob-1"]["status"] == "cancelled"


def test_a_failed_job_says_why(paid: Vendor, tmp_path: Path) -> None:
    config = config_of(tmp_path, paid.url)
    fill(config)
    paid.states = ["validating_files", "failed"]
    paid.error = {"code": "exceeded_quota", "message": f"words of users, {KEY}", "param": None}
    trial = Trial(config)
    with pytest.raises(ProviderUnavailable, match="exceeded_quota") as caught:
        trial.run()
    assert "words of users" not in caught.value.message and not trial.models()


ERROR = {"error": {"message": f"key {KEY}", "type": "x", "code": "c"}}


@pytest.mark.parametrize(
    ("where", "fault", "kind", "told"),
    [
        ("POST /files", (401, ERROR, {}), ProviderUnavailable, "Look at the key"),
        ("POST /files", (403, ERROR, {}), FailedPrecondition, "closed it to organisations"),
        ("POST /fine_tuning/jobs", (403, ERROR, {}), FailedPrecondition, "--provider local"),
        ("POST /fine_tuning/jobs", (400, ERROR, {}), InvalidArgument, "HTTP status 400, c"),
        ("GET /fine_tuning/jobs/*", (429, ERROR, {"retry-after-ms": "1"}), None, ""),
        ("POST /files", (429, ERROR, {"retry-after-ms": "1"}), None, ""),
        ("POST /fine_tuning/jobs", (500, ERROR, {}), None, ""),
        ("GET /fine_tuning/jobs/*", (503, ERROR, {}), None, ""),
        ("GET /fine_tuning/jobs/*/events", (500, ERROR, {}), None, ""),
        ("GET /fine_tuning/jobs/*", "drop", None, ""),
    ],
)
def test_refusals_are_told_apart_and_the_key_is_in_none(
    paid: Vendor, tmp_path: Path, logs: io.StringIO, where: str, fault: Any, kind: type[UnderstudyError] | None, told: str
) -> None:
    config = config_of(tmp_path, paid.url)
    fill(config)
    paid.events = 3
    paid.faults[where] = [fault]
    trial = Trial(config)
    if kind is None:
        assert trial.run().state == "succeeded" and len(paid.jobs) == 1
    else:
        with pytest.raises(kind, match=told) as caught:
            trial.run()
        assert KEY not in "".join(traceback.format_exception(caught.value)) and KEY not in repr(caught.value.metadata)
    assert KEY not in logs.getvalue() and not any(KEY in line for line in trial.lines)
    assert KEY not in (trial.folder / "hosted.json").read_text()


def test_what_cannot_be_fine_tuned_is_refused_before_anything_is_sent(paid: Vendor, tmp_path: Path) -> None:
    config = config_of(tmp_path, paid.url, '[skills.tags]\ntask = "token-classification"\nteacher = "openai/gpt-4.1"', min_rows=500)
    fill(config)
    with pytest.raises(TooLittleData) as caught:
        Trial(config).run()
    assert caught.value.metadata["minimum"] == "500" and int(caught.value.metadata["rows"]) < 54
    with pytest.raises(InvalidArgument, match="no provider"):
        Trial(config, provider="opnai").run()
    with pytest.raises(InvalidArgument, match="no fine-tuning that is known"):
        Trial(config, provider="claude", model="m").run()
    context = JobContext("j", tmp_path / "j")
    with pytest.raises(SkillNotFound):
        finetune(config, "other", context, {"provider": "openai"})
    assert not paid.requests


def test_the_command_tells_the_cost_and_wants_a_yes(paid: Vendor, tmp_path: Path) -> None:
    config = config_of(tmp_path, paid.url)
    fill(config)
    paid.events = 2
    command = [sys.executable, "-m", "server.cli", "finetune", SKILL, "--provider", "openai", "--config", str(tmp_path / "understudy.toml")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])}
    ask: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    refused = subprocess.run(command, **ask)
    assert refused.returncode == 1 and "US dollars" in refused.stderr and "--yes" in refused.stderr and not paid.requests
    done = subprocess.run([*command, "--yes", "--json", str(tmp_path / "report.json")], **ask)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["version"].startswith("ft:gpt-4.1-mini")
    assert KEY not in done.stdout + done.stderr
