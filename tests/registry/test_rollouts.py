"""Rollouts in the registry: one of several that decide, evidence that adds up, an audit trail, on SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from server.errors import Unavailable
from server.registry.registry import Registry
from server.registry.rollouts import CHALLENGER, CHAMPION, SHADOW, Change, RolloutTable, StoredRollout
from server.settings import RegistryConfig


@pytest.fixture
def table(registry_url: str, request: pytest.FixtureRequest) -> Iterator[RolloutTable]:
    registry = Registry(RegistryConfig(url=registry_url))
    yield RolloutTable(registry)
    registry.close()


@pytest.fixture
def skill(request: pytest.FixtureRequest) -> str:
    """Of its own: all tests share one PostgreSQL."""
    return f"skill-{abs(hash(request.node.nodeid)) % 10**9}"


def step(skill: str, was: int, stage: str = "shadow", percent: int = 0, **more: Any) -> Change:
    row = StoredRollout(skill, stage, percent, "1", {"epoch": was + 1, "stage": stage}, was + 1)
    to = f"{stage} {percent}" if percent else stage
    return Change(row, was, "auto", "held", "because", {"compared": 3}, more.get("aliases", {SHADOW: "1"}), to, "1")


def test_a_step_is_written_with_its_event_and_aliases(table: RolloutTable, skill: str) -> None:
    assert skill not in table.all()
    assert table.change(step(skill, 0))
    row = table.all()[skill]
    assert (row.stage, row.student, row.revision, row.state["epoch"]) == ("shadow", "1", 1, 1)
    (event,) = table.events(skill)
    assert (event.actor, event.from_stage, event.to_stage, event.reason, event.evidence) == (
        "auto",
        "held",
        "shadow",
        "because",
        {"compared": 3},
    )
    assert table.aliases(skill) == {SHADOW: "1"}
    assert table.change(step(skill, 1, "canary", 10, aliases={SHADOW: "", CHALLENGER: "1", CHAMPION: "0"}))
    assert table.aliases(skill) == {CHALLENGER: "1", CHAMPION: "0"} and table.events(skill)[0].to_stage == "canary 10"


def test_of_several_that_decide_at_once_one_does(table: RolloutTable, skill: str) -> None:
    assert table.change(step(skill, 0)) and not table.change(step(skill, 0)), "somebody was quicker"
    done: list[bool] = []
    threads = [threading.Thread(target=lambda: done.append(table.change(step(skill, 1, "canary", 10)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [False] * 5 + [True] and len(table.events(skill)) == 2


def test_evidence_is_kept_by_server_and_stage(table: RolloutTable, skill: str) -> None:
    table.put_evidence(skill, 1, "a", {"compared": 1})
    table.put_evidence(skill, 1, "a", {"compared": 5})
    table.put_evidence(skill, 1, "b", {"compared": 2})
    table.put_evidence(skill, 2, "a", {"compared": 9})
    assert table.evidence(skill, 1) == {"a": {"compared": 5}, "b": {"compared": 2}} and table.evidence(skill, 3) == {}
    for was in range(4):  # stages that are long gone leave nothing behind
        assert table.change(step(skill, was))
    assert table.evidence(skill, 1) == {} and table.evidence(skill, 2) == {}


def test_events_come_in_pages(table: RolloutTable, skill: str) -> None:
    for was in range(5):
        assert table.change(step(skill, was))
    table.note(skill, "auto", "shadow", "1", "drift alarm", {})
    first = table.events(skill, 4)
    rest = table.events(skill, 10, (first[-1].time_ms, first[-1].id))
    assert len(first) == 4 and len(rest) == 2 and not {one.id for one in first} & {one.id for one in rest}
    assert [one.time_ms for one in first + rest] == sorted((one.time_ms for one in first + rest), reverse=True)


def test_a_database_that_is_away_is_said_to_be(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((Unavailable, OSError)):
        RolloutTable(Registry(RegistryConfig(url=f"sqlite:///{tmp_path}/file/registry.db"))).all()
