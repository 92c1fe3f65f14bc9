"""Schedules make jobs: one for each due time, whoever many trainers look, and rows count once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from server.config import Config, load_config
from server.errors import FailedPrecondition, InvalidArgument
from server.lake import table
from server.lake.ids import IdKey
from server.lake.log import Log
from server.lake.schema import INTERACTIONS
from server.registry.jobs import JobStore
from server.registry.registry import Registry
from server.registry.schedules import ScheduleStore
from trainer.schedule import COUNT_EVERY_S, Schedules

DAY_MS = 86_400_000


class Clock:
    def __init__(self) -> None:
        self.ms = 1_795_000_000_000

    def __call__(self) -> int:
        return self.ms

    def monotonic(self) -> float:
        return self.ms / 1000


@pytest.fixture
def config(registry_url: str, tmp_path: Path) -> Config:
    (tmp_path / "understudy.toml").write_text(f"""
[registry]
url = {json.dumps(registry_url)}
[lake]
path = {json.dumps(str(tmp_path / "lake"))}
[skills.timed-{tmp_path.name[-6:].strip("_").lower()}]
labels = ["a", "b"]
base = "embedder"
schedule = "daily at 02:30"
[skills.rows-{tmp_path.name[-6:].strip("_").lower()}]
labels = ["a", "b"]
base = "embedder"
schedule = "when 5 new good rows"
""")
    return load_config(tmp_path / "understudy.toml", environ={})


@pytest.fixture
def registry(config: Config) -> Iterator[Registry]:
    opened = Registry(config.registry)
    with opened.engine().begin() as connection:  # PostgreSQL is shared by the tests
        connection.exec_driver_sql("DELETE FROM schedules")
        connection.exec_driver_sql("UPDATE jobs SET state = 'cancelled' WHERE state IN ('queued', 'running')")
    yield opened
    opened.close()


def names(config: Config) -> tuple[str, str]:
    timed, rows = sorted(config.skills, reverse=True)
    return timed, rows


def fill(config: Config, skill: str, count: int, at_ms: int, **more: object) -> None:
    lake = Path(config.lake.path)
    key = IdKey.open(lake / "id.key")
    log = Log(table.log_folder(lake, INTERACTIONS))
    row = {
        "skill": skill,
        "input": "x",
        "input_kind": "text",
        "training_allowed": True,
        "source_model": "big",
        "teacher_label": "a",
        **more,
    }
    log.append([{**row, "time_ns": (at_ms + number) * 1_000_000, "interaction_id": key.new()} for number in range(count)])
    log.close()
    table.convert(lake, INTERACTIONS)


def test_a_due_time_makes_one_job_however_many_trainers_look(config: Config, registry: Registry) -> None:
    clock = Clock()
    timed, _ = names(config)
    trainers = [Schedules(config, registry, clock=clock, monotonic=clock.monotonic) for _ in range(6)]
    assert [trainer.look() for trainer in trainers] == [[]] * 6
    clock.ms += DAY_MS
    made: list[str] = []
    threads = [threading.Thread(target=lambda one=one: made.extend(one.look())) for one in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (job,) = made
    store = JobStore(registry)
    assert (store.get(job).skill, store.get(job).kind, store.get(job).spec) == (timed, "train", {})
    taken = store.lease("t", 60, max_attempts=3)
    assert taken is not None and store.end(taken.id, "t", "succeeded")
    clock.ms += 10 * DAY_MS  # nobody looked for ten days
    assert len(trainers[0].look()) == 1 and trainers[1].look() == []
    assert len(store.find(skill=timed, limit=10)) == 2


def test_a_job_that_still_waits_is_enough(config: Config, registry: Registry) -> None:
    clock = Clock()
    timed, _ = names(config)
    trainer = Schedules(config, registry, clock=clock, monotonic=clock.monotonic)
    waiting = JobStore(registry).create(timed, "train").id
    clock.ms += DAY_MS
    assert trainer.look() == [waiting]
    assert [job.id for job in JobStore(registry).find(skill=timed)] == [waiting]


def test_rows_are_counted_once_and_only_good_ones(config: Config, registry: Registry) -> None:
    clock = Clock()
    _, skill = names(config)
    one, other = (Schedules(config, registry, clock=clock, monotonic=clock.monotonic) for _ in range(2))
    assert one.look() == []
    fill(config, skill, 4, clock.ms)
    fill(config, skill, 9, clock.ms, training_allowed=False)
    fill(config, skill, 9, clock.ms, teacher_label=None)
    clock.ms += int(COUNT_EVERY_S * 1000)
    assert one.look() == []
    fill(config, skill, 1, clock.ms)
    clock.ms += int(COUNT_EVERY_S * 1000)
    (job,) = one.look()
    assert other.look() == [] and one.look() == []
    clock.ms += int(COUNT_EVERY_S * 1000)
    assert one.look() == other.look() == [], "those rows have had their job"
    store = JobStore(registry, clock=clock)
    taken = store.lease("t", 60, max_attempts=3)
    assert taken is not None and taken.id == job
    registry.add_dataset(job, 1, "f" * 64, [("i", False)])
    store.end(job, "t", "succeeded")
    fill(config, skill, 5, clock.ms + 1000)
    clock.ms += int(COUNT_EVERY_S * 1000)
    assert len(other.look()) == 1


def test_a_command_wins_over_the_configuration_until_it_is_taken_back(config: Config, registry: Registry) -> None:
    clock = Clock()
    timed, _ = names(config)
    store = ScheduleStore(registry, clock=clock)
    Schedules(config, registry, clock=clock)
    store.set(timed, "")
    Schedules(config, registry, clock=clock)
    clock.ms += 2 * DAY_MS
    assert Schedules(config, registry, clock=clock, monotonic=clock.monotonic).look() == []
    store.remove(timed, config.skills[timed].schedule)
    (found,) = [one for one in store.list() if one.skill == timed]
    assert (found.spec, found.origin) == ("daily at 02:30", "configuration") and found.next_ms is not None and found.next_ms > clock.ms
    with pytest.raises(FailedPrecondition, match="configuration"):
        store.remove(timed, config.skills[timed].schedule)
    store.adopt({timed: ""})
    assert timed not in {one.skill for one in store.list()}


def test_assessments_come_by_the_clock_once_there_is_something_to_assess(config: Config, registry: Registry) -> None:
    timed, _ = names(config)
    said = config.skills[timed].model_copy(update={"schedule": "", "assess_schedule": "weekly on sunday at 04:00"})
    config = config.model_copy(update={"skills": {timed: said}})
    clock = Clock()
    jobs = JobStore(registry, clock=clock)

    def trainer() -> Schedules:
        return Schedules(config, registry, clock=clock, monotonic=clock.monotonic)

    one, other = trainer(), trainer()
    clock.ms += 30 * DAY_MS
    assert one.look() == [], "nothing was ever trained"
    first = jobs.create(timed, "train")
    jobs.cancel(first.id)
    made: list[str] = []
    for _ in range(7 * 24):
        clock.ms += DAY_MS // 24
        made += one.look() + other.look()
    assert len(made) == 1, "one for both"
    job = jobs.get(made[0])
    assert job.kind == "assess" and job.skill == timed
    at = datetime.fromtimestamp(job.create_ms / 1000, UTC)
    assert at.weekday() == 6 and at.hour in (4, 5)
    clock.ms += 21 * DAY_MS
    assert trainer().look() == other.look() == [], "while it waits, another would read the same"
    assert jobs.lease("t", 60, max_attempts=3) is not None
    assert len(trainer().look() + other.look() + one.look()) == 1, "of three that passed one is made"


@pytest.mark.parametrize("words", ["when 5 new good rows", "sometimes"])
def test_an_assessment_without_a_time_is_refused(config: Config, registry: Registry, words: str) -> None:
    timed, _ = names(config)
    said = config.skills[timed].model_copy(update={"assess_schedule": words})
    with pytest.raises(InvalidArgument, match="weekly on DAY"):
        Schedules(config.model_copy(update={"skills": {timed: said}}), registry)
