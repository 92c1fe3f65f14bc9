"""Brings a database to the schema of this release, once, however many processes start at the same time.

A database says its revision in the table alembic_version. Where that is this release's, one SELECT is all that happens, and Alembic is not
even imported. Where it is not, the revisions of `migrations/versions` run in one transaction under a lock. A database without a revision
that has tables was made by a release that had none yet: it is taken to be at FIRST.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.errors import FailedPrecondition

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

FIRST = "0001"  # tables as they were before there were revisions
HEAD = "0003"  # of migrations/versions; a test holds it to theirs
_LOCK = 0x756E6465_6D696772  # PostgreSQL's advisory lock of migrations


def bring_up(engine: Engine) -> None:
    """Makes or alters the tables. Raises FailedPrecondition where a newer release has altered them; drivers' errors pass."""
    if revision_of(engine) == HEAD:
        return
    with engine.connect() as connection, connection.begin():
        _lock(connection)
        found = _revision(connection)
        if found == HEAD:  # somebody was quicker
            return
        from alembic import command

        config = _config(connection)
        if found is not None and found not in _known(config):
            message = f"The registry's database is at revision {found!r}, which a newer release made; this one knows {HEAD!r}."
            raise FailedPrecondition(f"{message} Install the newer release, or name another database in registry.url.", revision=found)
        if found is None and connection.dialect.has_table(connection, "jobs"):
            command.stamp(config, FIRST)
        command.upgrade(config, HEAD)


def downgrade(engine: Engine, revision: str) -> None:
    """Takes a database back to an earlier revision ("base": to nothing). What the later tables held is lost."""
    with engine.connect() as connection, connection.begin():
        _lock(connection)
        from alembic import command

        command.downgrade(_config(connection), revision)


def revision_of(engine: Engine) -> str | None:
    """The database's revision, or None where it has none."""
    with engine.connect() as connection:
        return _revision(connection)


def write_revision(engine: Engine, message: str) -> str:
    """For developers: writes the revision that leads from the database to schema.py; returns its path."""
    from alembic import command
    from alembic.script import Script

    with engine.connect() as connection, connection.begin():
        config = _config(connection)
        written = command.revision(config, message, autogenerate=True, rev_id=f"{int(HEAD) + 1:04d}")
    assert isinstance(written, Script)
    return str(written.path)


def _lock(connection: Connection) -> None:
    """Until the end of the transaction, everything in the database is this process's to alter."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")


def _revision(connection: Connection) -> str | None:
    from sqlalchemy.exc import OperationalError, ProgrammingError

    lite = connection.dialect.name == "sqlite"
    if not lite and not connection.dialect.has_table(connection, "alembic_version"):  # a failed statement would end the transaction
        return None
    try:
        found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()
        return None if found is None else str(found)
    except (OperationalError, ProgrammingError) as error:
        if "no such table" in str(error.orig):
            return None
        raise


def _config(connection: Connection) -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "server.registry:migrations")
    config.set_main_option("path_separator", "os")
    config.set_main_option("file_template", "r%%(rev)s_%%(slug)s")
    config.attributes["connection"] = connection
    return config


def _known(config: Any) -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}


def main(arguments: list[str]) -> None:
    """`python -m server.registry.migrate revision "message"`: see migrations/env.py."""
    import tempfile

    from sqlalchemy import create_engine

    if len(arguments) != 2 or arguments[0] != "revision":
        raise SystemExit(main.__doc__)
    with tempfile.TemporaryDirectory() as folder:
        engine = create_engine(f"sqlite:///{folder}/new.db")
        bring_up(engine)
        print(write_revision(engine, arguments[1]))
        engine.dispose()


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
