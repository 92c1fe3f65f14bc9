"""Jobs under a clock of our own, on SQLite and PostgreSQL: who gets which, who loses it, and what a trainer that was too slow may write."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator

import pytest

from server.errors import AlreadyExists, JobNotFound
from server.registry.jobs import Held, JobError, JobStore, News, Point
from server.registry.registry import Registry
from server.settings import RegistryConfig

LEASE_S = 10.0


class Clock:
    """Milliseconds that pass when a test says so."""

    def __init__(self) -> None:
        self.ms = 1_000_000

    def __call__(self) -> int:
        return self.ms

    def pass_s(self, seconds: float) -> None:
        self.ms += int(seconds * 1000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(registry_url: str, clock: Clock) -> Iterator[JobStore]:
    registry = Registry(RegistryConfig(url=registry_url))
    made = JobStore(registry, clock=clock)
    with registry.engine().begin() as connection:  # PostgreSQL is shared by the tests
        connection.exec_driver_sql("UPDATE jobs SET state = 'cancelled' WHERE state IN ('queued', 'running')")
    yield made
    registry.close()


@pytest.fixture
def skill() -> str:
    return f"skill-{uuid.uuid4().hex[:12]}"


def take(store: JobStore, holder: str, *, max_attempts: int = 3) -> str | None:
    job = store.lease(holder, LEASE_S, max_attempts=max_attempts)
    return job.id if job is not None else None


def test_jobs_are_taken_in_the_order_of_their_making_and_each_by_one(store: JobStore, skill: str, clock: Clock) -> None:
    made = []
    for method in ("lora", "full"):
        made.append(store.create(skill, "train", {"method": method}).id)
        clock.pass_s(1)
    assert [take(store, "a"), take(store, "b"), take(store, "c")] == [*made, None]
    first = store.get(made[0])
    assert (first.state, first.holder, first.attempt, first.spec) == ("running", "a", 1, {"method": "lora"})
    assert store.end(made[0], "a", "succeeded", report={"version": "3"})
    ended = store.get(made[0])
    assert (ended.state, ended.report, ended.ended, ended.holder) == ("succeeded", {"version": "3"}, True, "")


def test_repeating_a_request_gives_the_same_job_and_another_that_asks_for_the_same_is_refused(store: JobStore, skill: str) -> None:
    request = uuid.uuid4().hex
    job = store.create(skill, "train", {"seed": 1}, request_id=request)
    assert store.create(skill, "train", {"seed": 1}, request_id=request).id == job.id
    with pytest.raises(AlreadyExists, match="something else"):
        store.create(skill, "train", {"seed": 2}, request_id=request)
    with pytest.raises(AlreadyExists) as caught:
        store.create(skill, "train", {"seed": 1})
    assert caught.value.metadata["job"] == job.id
    assert take(store, "a") == job.id
    later = store.create(skill, "train", {"seed": 1})
    assert later.id != job.id, "one that runs has read its rows; the next will read newer ones"
    assert store.create(skill, "train", {"seed": 1}, request_id=request).id == job.id


def test_a_job_whose_trainer_is_silent_goes_to_the_next_and_the_slow_one_writes_nothing(store: JobStore, skill: str, clock: Clock) -> None:
    job = store.create(skill, "train").id
    assert take(store, "slow") == job
    clock.pass_s(LEASE_S - 1)
    assert take(store, "next") is None
    assert store.beat(job, "slow", LEASE_S, News([(clock.ms, "one")], [Point("loss", 1, 0.5, clock.ms)], {"fit": (1, 9)})) is Held.YES
    clock.pass_s(LEASE_S - 1)
    assert take(store, "next") is None, "the beat renewed the lease"
    clock.pass_s(2)
    taken = store.lease("next", LEASE_S, max_attempts=3)
    assert taken is not None and (taken.id, taken.attempt, taken.progress) == (job, 2, {"fit": (1, 9)})
    assert store.beat(job, "slow", LEASE_S, News([(clock.ms, "ghost")], [Point("loss", 1, 9.9, clock.ms)])) is Held.LOST
    assert not store.end(job, "slow", "failed") and not store.release(job, "slow")
    assert store.beat(job, "next", LEASE_S, News([(clock.ms, "two")], [Point("loss", 1, 0.4, clock.ms)])) is Held.YES
    assert [(line.number, line.text) for line in store.logs(job)] == [(1, "one"), (2, "two")]
    assert [point[:3] for point in store.metrics(job)] == [("loss", 1, 0.4)], "a repeated step is written over"
    assert store.get(job).start_ms == 1_000_000


def test_a_job_that_kills_its_trainers_fails_and_says_so(store: JobStore, skill: str, clock: Clock) -> None:
    job = store.create(skill, "train").id
    for attempt in range(3):
        assert take(store, f"t{attempt}") == job
        clock.pass_s(LEASE_S + 1)
    assert take(store, "t3") is None
    failed = store.get(job)
    assert failed.state == "failed" and failed.error is not None
    assert failed.error.metadata == {"attempts": "3"} and "max_attempts" in failed.error.message


def test_a_job_that_is_given_back_loses_no_attempt(store: JobStore, skill: str, clock: Clock) -> None:
    job = store.create(skill, "train").id
    for number in range(5):
        assert take(store, f"t{number}", max_attempts=1) == job
        assert store.get(job).attempt == 1
        assert store.release(job, f"t{number}")
        clock.pass_s(1)
    assert store.get(job).state == "queued"
    other = store.create(skill, "train").id
    assert other != job, "one that has begun does not keep new ones out"


def test_cancelling(store: JobStore, skill: str, clock: Clock) -> None:
    waiting = store.create(skill, "train").id
    assert store.cancel(waiting).state == "cancelled" and take(store, "a") is None
    running = store.create(skill, "train").id
    assert take(store, "a") == running
    told = store.cancel(running)
    assert (told.state, told.cancel) == ("running", True)
    assert store.beat(running, "a", LEASE_S) is Held.CANCELLED
    assert store.end(running, "a", "cancelled")
    assert store.cancel(running).state == "cancelled"
    dead = store.create(skill, "train").id
    assert take(store, "b") == dead
    clock.pass_s(1)
    store.cancel(dead)
    clock.pass_s(LEASE_S + 1)
    assert take(store, "c") is None
    assert store.get(dead).state == "cancelled", "its trainer died before it could stop"
    with pytest.raises(JobNotFound):
        store.cancel("nothing")


def test_errors_keep_their_reason(store: JobStore, skill: str) -> None:
    job = store.create(skill, "train").id
    take(store, "a")
    error = JobError("TOO_LITTLE_DATA", "12 rows; 100 are needed", {"count": "12", "minimum": "100"})
    store.end(job, "a", "failed", error=error)
    assert store.get(job).error == error


def test_pages_of_jobs_miss_none_and_repeat_none(store: JobStore, skill: str, clock: Clock) -> None:
    made = []
    for number in range(7):
        made.append(store.create(skill, "train", {"seed": number}).id)
        clock.pass_s(number % 2)  # some are of the same millisecond
    seen: list[str] = []
    before = None
    while page := store.find(skill=skill, limit=3, before=before):
        seen += [job.id for job in page]
        before = (page[-1].create_ms, page[-1].id)
    assert sorted(seen) == sorted(made) and len(seen) == 7
    assert store.find(skill=skill, states=["running"]) == [] and len(store.find(skill=skill, states=["queued"])) == 7


def test_many_trainers_run_each_job_once(registry_url: str, store: JobStore, skill: str) -> None:
    """Processes that lease and end jobs as fast as they can: whoever gets one, no other does."""
    registry = Registry(RegistryConfig(url=registry_url))
    now = JobStore(registry)
    jobs = {now.create(skill, "assess", {"seed": number}).id for number in range(40)}
    script = """
import sys
from server.settings import RegistryConfig
from server.registry.jobs import JobStore, News
from server.registry.registry import Registry
registry = Registry(RegistryConfig(url=sys.argv[1]))
store = JobStore(registry)
while (job := store.lease(sys.argv[2], 600, max_attempts=3, kinds=["assess"])) is not None:
    assert job.holder == sys.argv[2] and job.attempt == 1, job
    store.beat(job.id, sys.argv[2], 600, News([(1, sys.argv[2])]))
    assert store.end(job.id, sys.argv[2], "succeeded", report={"by": sys.argv[2]})
registry.close()
"""
    running = [
        subprocess.Popen([sys.executable, "-c", script, registry_url, f"t{number}"], stderr=subprocess.PIPE, text=True)
        for number in range(4)
    ]
    ends = [(process.communicate()[1], process.returncode) for process in running]
    assert [code for _, code in ends] == [0] * 4, ends
    done = now.find(skill=skill, limit=100)
    assert {job.id for job in done} == jobs and Counter(job.state for job in done) == {"succeeded": 40}
    for job in done:
        assert [line.text for line in now.logs(job.id)] == [job.report["by"]]
    registry.close()
