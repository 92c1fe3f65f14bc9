"""The revisions lead to the tables of schema.py, from nothing and from a database of before them, and back, by however many at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from server.errors import FailedPrecondition
from server.registry import migrate
from server.registry.registry import Registry
from server.registry.schema import METADATA
from server.settings import RegistryConfig


@pytest.fixture
def empty_url(registry_url: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """A database without tables; on PostgreSQL one of its own, since the other tests share theirs."""
    from sqlalchemy import create_engine, make_url

    if registry_url.startswith("sqlite"):
        yield registry_url
        return
    owner = create_engine(registry_url, isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE migrations")
    yield make_url(registry_url).set(database="migrations").render_as_string(hide_password=False)
    with owner.connect() as connection:
        connection.exec_driver_sql("DROP DATABASE migrations WITH (FORCE)")
    owner.dispose()


@pytest.fixture
def engine(empty_url: str) -> Iterator[Any]:
    from sqlalchemy import create_engine, event

    from server.registry.registry import _prepare_sqlite

    made = create_engine(empty_url)
    if empty_url.startswith("sqlite"):
        event.listen(made, "connect", _prepare_sqlite)
    yield made
    made.dispose()


def differences(engine: Any) -> list[Any]:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with engine.connect() as connection:
        options = {"compare_server_default": engine.dialect.name == "postgresql"}  # SQLite's '' is read as another one
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), METADATA))


def test_the_revisions_make_the_tables_of_the_schema_and_take_them_back(engine: Any) -> None:
    from sqlalchemy import inspect

    migrate.bring_up(engine)
    assert differences(engine) == []
    assert migrate.revision_of(engine) == migrate.HEAD
    migrate.downgrade(engine, migrate.FIRST)
    assert "job_logs" not in inspect(engine).get_table_names()
    migrate.bring_up(engine)
    assert differences(engine) == []
    migrate.downgrade(engine, "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]


def test_the_newest_revision_is_the_one_that_the_code_asks_for(engine: Any) -> None:
    from alembic.script import ScriptDirectory

    with engine.connect() as connection:
        assert ScriptDirectory.from_config(migrate._config(connection)).get_heads() == [migrate.HEAD]


def test_a_database_of_before_the_revisions_is_adopted_with_its_rows(engine: Any, empty_url: str) -> None:
    migrate.bring_up(engine)
    migrate.downgrade(engine, migrate.FIRST)
    with engine.begin() as connection:  # as the last release left it: its tables, and no word of revisions
        connection.exec_driver_sql("DROP TABLE alembic_version")
        connection.exec_driver_sql("INSERT INTO jobs VALUES ('j1', 's', 'linear-head', 'failed', 1, 1, 2, '{}', 'no base')")
        connection.exec_driver_sql("INSERT INTO datasets VALUES ('d1', 'j1', 3, 1, 0, 'f', 1)")
        connection.exec_driver_sql("INSERT INTO dataset_rows VALUES ('d1', 'i1', " + ("false" if "postgres" in empty_url else "0") + ")")
        connection.exec_driver_sql("INSERT INTO adapters VALUES ('s', '1', 'linear-head', 'b@1', 'x', '{}', 'j1', 1)")
    registry = Registry(RegistryConfig(url=empty_url))
    (job,) = registry.jobs("s")
    assert (job.state, job.attempt, job.spec) == ("failed", 0, {})
    assert job.error is not None and job.error.message == "no base"
    assert [one.version for one in registry.adapters_with("i1")] == ["1"]
    registry.close()
    assert differences(engine) == []


def test_a_database_of_a_newer_release_is_left_alone(engine: Any, empty_url: str) -> None:
    migrate.bring_up(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    registry = Registry(RegistryConfig(url=empty_url))
    with pytest.raises(FailedPrecondition, match="newer release"):
        registry.jobs("s")
    registry.close()
    assert migrate.revision_of(engine) == "9999"


def test_processes_that_start_at_once_all_find_the_tables(engine: Any, empty_url: str) -> None:
    script = """
import sys
from server.settings import RegistryConfig
from server.registry.registry import Registry
registry = Registry(RegistryConfig(url=sys.argv[1]))
sys.stdin.read(1)
registry.set_alias("race", "champion", sys.argv[2])
assert registry.aliases("race")
registry.close()
"""
    named: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", script, empty_url, str(number)], **named) for number in range(5)]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.flush()
    ends = [(process.communicate()[1], process.returncode) for process in running]
    assert [code for _, code in ends] == [0] * 5, ends
    assert differences(engine) == []


def test_an_up_to_date_database_is_opened_without_alembic(empty_url: str, engine: Any) -> None:
    migrate.bring_up(engine)
    script = (
        "import sys; from server.registry.registry import Registry; from server.settings import RegistryConfig\n"
        f"Registry(RegistryConfig(url={empty_url!r})).engine(); sys.exit('alembic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
