"""Fixtures of every part: small models, and the real server around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.postgres_server import postgres_server, why_no_postgres
from tests.server_process import ServerProcess
from tests.small_models import build_repository
from trainer.endings import keep_swig_types

StartServer = Callable[..., ServerProcess]


def pytest_unconfigure() -> None:
    """A run in which all tests passed is to end with 0."""
    keep_swig_types()


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository, see tests/small_models.py. Shared: tests that change it copy it first."""
    return build_repository(tmp_path_factory.mktemp("small")).root


@pytest.fixture(scope="session")
def server(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as it was: every small model is loaded. `server.address` is where it listens."""
    running = ServerProcess(tmp_path_factory.mktemp("server"), "[server]\ngrace_s = 5", models=small_models)
    running.wait_ready()
    yield running
    running.stop(allow_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server of our own, on a free port."""
    if why := why_no_postgres():
        pytest.skip(why)
    with postgres_server("-c", "fsync=off") as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def registry_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new SQLite file; then, where its binaries are installed, the PostgreSQL server, which all tests share."""
    return str(request.getfixturevalue("postgres")) if request.param == "postgres" else f"sqlite:///{tmp_path}/registry.db"


@pytest.fixture
def start_server(tmp_path: Path, small_models: Path) -> Iterator[StartServer]:
    """Starts servers of a test's own: `start_server(config="", models=small_models, env=None, ready=True)`. Each must end cleanly."""
    started: list[ServerProcess] = []

    def start(config: str = "", *, models: Path | None = None, env: Mapping[str, str] | None = None, ready: bool = True) -> ServerProcess:
        folder = tmp_path / f"server{len(started)}"
        running = ServerProcess(folder, config, models=models or small_models, env=env)
        started.append(running)
        if ready:
            running.wait_ready()
        return running

    yield start
    for running in started:
        if running.process.poll() is None:
            running.stop(allow_errors=True)
        elif not running.closed:
            running.wait()
