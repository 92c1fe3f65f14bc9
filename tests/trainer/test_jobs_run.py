"""A job's run in this process: what it tells, how it ends, and what it leaves behind. The work itself is a function of the test's."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from server.config import Config, load_config
from server.errors import TooLittleData
from server.registry.jobs import Job, JobStore
from server.registry.registry import Adapter, Registry
from tests.trainer.trainer_process import TrainerProcess, make_site
from tests.trainer_lake import fill, texts
from trainer import work
from trainer.context import JobContext
from trainer.report import Report

Run = Callable[[Config, str, JobContext, Mapping[str, Any]], Report]


@pytest.fixture
def config(tmp_path: Path, small_models: Path) -> Config:
    return load_config(make_site(tmp_path, small_models) / "understudy.toml", environ={})


@pytest.fixture
def store(config: Config) -> Iterator[JobStore]:
    registry = Registry(config.registry)
    yield JobStore(registry)
    registry.close()


def leased(store: JobStore, spec: Mapping[str, Any] | None = None, lease_s: float = 3.0) -> Job:
    store.create("intent", "train", spec)
    job = store.lease("us", lease_s, max_attempts=3)
    assert job is not None
    return job


def run(
    config: Config, store: JobStore, job: Job, function: Run, monkeypatch: pytest.MonkeyPatch, stop: threading.Event | None = None
) -> work.Ended:
    monkeypatch.setattr(work, "_function", lambda kind: function)
    return work.run_job(config, store, job, stop or threading.Event())


def test_what_a_job_tells_is_in_the_registry_its_folder_and_on_its_page(
    config: Config, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    def teach(_: Config, skill: str, context: JobContext, spec: Mapping[str, Any]) -> Report:
        assert (context.seed, spec["seed"], context.folder.is_dir(), context.left_s() > 3000) == (5, 5, True, True)
        for step in range(20):
            context.metric("student/loss", step, 1 / (step + 1))
        context.metric("student/loss", 20, float("nan"))
        context.log("half \x00of it")
        context.progress("fit", 20, 20)
        tried = [{"method": "linear-head", "accuracy": 0.9}]
        details = {"confused": [{"label": "<script>", "taken_for": "b", "rows": 3}]}
        return Report(
            skill, context.job, "succeeded", version="2", metrics={"accuracy": 0.9}, tried=tried, details=details, dropped={"old": 4}
        )

    job = leased(store, {"seed": 5})
    ended = run(config, store, job, teach, monkeypatch)
    assert (ended.state, ended.error) == ("succeeded", None)
    kept = store.get(job.id)
    assert (kept.state, kept.report["version"], kept.progress) == ("succeeded", "2", {"fit": (20, 20)})
    assert [point[1:3] for point in store.metrics(job.id)] == [(step, 1 / (step + 1)) for step in range(20)]
    said = [line.text for line in store.logs(job.id)]
    assert said == ["begun by us", "student/loss is nan at step 20; such points are left out", "half of it", "succeeded: version 2"]
    folder = work.folder_of(config, job.id)
    page = (folder / "report.html").read_text()
    assert (
        page.count("<svg") >= 4
        and "&lt;script&gt;" in page
        and "<script" not in page
        and "http" not in page.replace("http://www.w3.org", "")
    )
    document = json.loads((folder / "report.json").read_text())
    assert document["curves"]["student/loss"][1] == [1, 0.5] and document["report"]["dropped"] == {"old": 4}
    (events,) = (folder / "tensorboard").iterdir()
    values = [value for event in EventFileLoader(str(events)).Load() for value in event.summary.value]
    assert len(values) == 20 and {value.tag for value in values} == {"student/loss"}


def test_errors_come_with_their_reason_and_without_anybodys_words(config: Config, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def poor(*_: object) -> Report:
        raise TooLittleData("12 rows; 100 are needed", count=12, minimum=100)

    job = leased(store)
    assert run(config, store, job, poor, monkeypatch).state == "failed"
    error = store.get(job.id).error
    assert error is not None and (error.reason, error.metadata["minimum"]) == ("TOO_LITTLE_DATA", "100")

    def broken(*_: object) -> Report:
        raise KeyError("what a customer said")

    job = leased(store)
    assert run(config, store, job, broken, monkeypatch).state == "failed"
    error = store.get(job.id).error
    assert error is not None and error.reason == "INTERNAL" and "customer" not in error.message and "test_jobs_run.py" in error.message


def waits_for_the_end(*given: Any) -> Report:
    """Works until it may not; then the test is told why."""
    context: JobContext = given[2]
    while True:
        context.check()
        context.progress("fit", 1, 2)


def test_a_job_ends_where_somebody_cancels_it(config: Config, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = leased(store)
    store.cancel(job.id)
    assert run(config, store, job, waits_for_the_end, monkeypatch).state == "cancelled"
    assert store.get(job.id).state == "cancelled"


def test_a_trainer_that_is_told_to_stop_gives_its_job_back(config: Config, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = leased(store)
    stop = threading.Event()
    stop.set()
    assert run(config, store, job, waits_for_the_end, monkeypatch, stop).state == "queued"
    again = store.lease("another", 3, max_attempts=3)
    assert again is not None and (again.id, again.attempt) == (job.id, 1)


def test_a_trainer_that_lost_its_job_ends_nothing_and_publishes_no_page(
    config: Config, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = leased(store, lease_s=-1)  # it was away for too long
    other = store.lease("another", 60, max_attempts=3)
    assert other is not None and other.id == job.id
    assert run(config, store, job, waits_for_the_end, monkeypatch).state == "lost"
    kept = store.get(job.id)
    assert (kept.state, kept.holder) == ("running", "another") and store.logs(job.id) == []
    assert not (work.folder_of(config, job.id) / "report.html").exists()


def test_points_that_a_killed_trainer_had_no_time_to_tell_are_told_by_the_next(
    config: Config, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = leased(store)
    folder = work.folder_of(config, job.id)
    folder.mkdir(parents=True)
    (folder / "points.jsonl").write_text('["loss", 1, 0.5, 10]\n["loss", 2, 0.25, 20]\n["loss", 2, 0.26, 30]\n["loss", 3, 0.')
    monkeypatch.setattr(work, "_DEFAULT_BUDGET_S", 1.0)
    (folder / "spent.json").write_text('{"seconds": 3500}')

    def goes_on(_: Config, skill: str, context: JobContext, spec: Mapping[str, Any]) -> Report:
        assert context.left_s() < 101, "what the killed one spent is of the same budget"
        context.metric("loss", 3, 0.125)
        return Report(skill, context.job, "rejected", reason="no better")

    assert run(config, store, job, goes_on, monkeypatch).state == "rejected"
    assert [point[:3] for point in store.metrics(job.id)] == [("loss", 1, 0.5), ("loss", 2, 0.26), ("loss", 3, 0.125)]


def test_a_trainer_that_died_after_it_published_is_taken_at_its_word(
    config: Config, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = leased(store, lease_s=-1)
    store.registry.add_adapter(Adapter("intent", "4", "lora", "embedder@1", "0" * 64, {"accuracy": 0.9}, job.id))
    again = store.lease("another", 60, max_attempts=3)
    assert again is not None and again.attempt == 2
    ended = run(config, store, again, waits_for_the_end, monkeypatch)
    assert ended.state == "succeeded" and store.get(job.id).report["version"] == "4"


def test_the_worker_does_what_waits_and_what_is_due(config: Config, store: JobStore, tmp_path: Path) -> None:
    """The process itself: a job of the queue, one of a schedule, one that cannot be done, and then its end by SIGTERM."""
    fill(Path(config.lake.path), texts(400, 1))
    queued = store.create("intent", "train", {"method": "linear-head"}).id
    poor = store.create("other", "train").id
    trainer = TrainerProcess(
        tmp_path, "--set", "skills.intent.schedule=when 300 new good rows", "--set", "skills.intent.method=linear-head"
    )
    ended = threading.Event()

    def done() -> list[Job]:
        return [job for job in store.find() if job.ended]

    while len(done()) < 3 and trainer.process.poll() is None:
        ended.wait(0.2)
    assert trainer.stop() == 0, trainer.lines
    assert (store.get(queued).state, store.get(queued).report["version"]) == ("succeeded", "1")
    error = store.get(poor).error
    assert error is not None and error.reason == "SKILL_NOT_FOUND"
    (scheduled,) = [job for job in done() if job.id not in (queued, poor)]
    assert scheduled.skill == "intent" and scheduled.state in ("succeeded", "rejected")
    assert (work.folder_of(config, queued) / "report.html").exists()
    assert not [line for line in trainer.lines if "Traceback" in line]
