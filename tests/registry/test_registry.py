"""The registry keeps what outlives a process, on SQLite and, where its binaries are installed, on a real PostgreSQL."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from server.errors import FailedPrecondition, Unavailable
from server.registry.registry import Adapter, Registry
from server.settings import RegistryConfig


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres"))
    return f"sqlite:///{tmp_path}/new/folder/registry.db"


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    opened = Registry(RegistryConfig(url=url))
    yield opened
    opened.close()


def test_a_new_database_that_another_process_holds_is_waited_for(tmp_path: Path) -> None:
    """The switch to write-ahead logging is the one statement that SQLite refuses at once, whatever the timeout."""
    held = sqlite3.connect(tmp_path / "r.db", isolation_level=None, check_same_thread=False)
    held.execute("BEGIN IMMEDIATE")
    registry = Registry(RegistryConfig(url=f"sqlite:///{tmp_path}/r.db"))
    opened: list[object] = []
    thread = threading.Thread(target=lambda: opened.append(registry.engine()))
    thread.start()
    thread.join(1.0)
    assert thread.is_alive(), "did not wait"
    held.execute("ROLLBACK")
    held.close()
    thread.join(30.0)
    assert opened
    registry.close()


def adapter(skill: str, version: str, job: str) -> Adapter:
    return Adapter(skill, version, "linear-head", "base@1", "0" * 64, {"accuracy": 0.9}, job)


def test_a_jobs_life(registry: Registry, tmp_path: Path) -> None:
    skill = tmp_path.name
    job = registry.start_job(skill, "linear-head")
    assert [found.state for found in registry.jobs(skill)] == ["running"]
    registry.heartbeat(job)
    dataset = registry.add_dataset(job, 3, "f" * 64, [(f"{skill}-1", False), (f"{skill}-2", True)])
    assert len(dataset) == 32
    registry.add_adapter(adapter(skill, "1", job))
    registry.end_job(job, "succeeded", report={"accuracy": 0.9})
    (found,) = registry.jobs(skill)
    assert (found.state, found.report, found.error) == ("succeeded", {"accuracy": 0.9}, None)
    assert found.end_ms is not None and found.end_ms >= found.create_ms
    assert [one.version for one in registry.adapters(skill)] == ["1"]
    assert [one.version for one in registry.adapters_with(f"{skill}-2")] == ["1"]
    assert registry.adapters_with("another") == []


def test_versions_are_written_once(registry: Registry, tmp_path: Path) -> None:
    skill = tmp_path.name
    job = registry.start_job(skill, "linear-head")
    registry.add_adapter(adapter(skill, "1", job))
    with pytest.raises(FailedPrecondition, match="already"):
        registry.add_adapter(adapter(skill, "1", job))


def test_feedback_is_kept_once_by_its_request(registry: Registry, tmp_path: Path) -> None:
    request = tmp_path.name
    assert registry.feedback_of(request) is None
    kept: list[dict[str, object]] = []
    threads = [threading.Thread(target=lambda n=n: kept.append(registry.keep_feedback(request, {"n": n}))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 6 and all(one == kept[0] for one in kept), "everyone is told of the first"
    assert registry.feedback_of(request) == kept[0]


def test_processes_that_open_a_new_database_at_once_all_succeed(url: str) -> None:
    script = """
import sys
from server.settings import RegistryConfig
from server.registry.registry import Registry
registry = Registry(RegistryConfig(url=sys.argv[1]))
registry.start_job("race", "linear-head")
registry.close()
"""
    running = [subprocess.Popen([sys.executable, "-c", script, url], stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ends = [(process.communicate()[1], process.returncode) for process in running]
    assert [code for _, code in ends] == [0, 0, 0, 0], ends
    registry = Registry(RegistryConfig(url=url))
    assert len(registry.jobs("race")) == 4
    registry.close()


def test_a_database_that_is_away_says_so_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed")
    monkeypatch.setenv("REGISTRY_PASSWORD", "hunter2-very-secret")
    config = RegistryConfig(url="postgresql+psycopg://understudy@127.0.0.1:1/none", password_env="REGISTRY_PASSWORD")
    registry = Registry(config)
    with pytest.raises(Unavailable) as caught:
        registry.jobs("s")
    assert "hunter2" not in str(caught.value) + repr(registry) + repr(config)
    assert caught.value.retry_after_s
