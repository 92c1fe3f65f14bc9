"""The users' keys: what payloads in the lake are sealed with, who was erased, and the keys that server processes seal their logs with.

A key is made once and never changed. Erasing a user deletes the key and keeps the mark, so that no new key is ever made. On SQLite a
deleted key's bytes are written over (`secure_delete`) and the write-ahead log is emptied.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from server.registry.registry import Registry

KEY_BYTES = 32
LOG_PREFIX = "log-"  # users' names are hexadecimal, so no user is called so
_MANY = 500  # names a statement


class Trained(NamedTuple):
    """What interactions went into: jobs, and what they made, as "name@version". `recorded`: all that have a data set; `ended`: all."""

    jobs: list[str]
    made: list[str]
    recorded: set[str]
    ended: set[str]


class UserKeys:
    """Blocking; for threads and other processes, never the event loop. Methods raise Unavailable where the database does not answer."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def find(self, users: Collection[str]) -> dict[str, bytes | None]:
        """The keys that there are; None for a user who was erased, no entry for one who has none yet."""
        with self._begin() as connection:
            return _find(connection, users)

    def make(self, users: Collection[str]) -> dict[str, bytes | None]:
        """As `find`, having made what was missing. Of two makers at once one wins, and both get that key."""
        with self._begin() as connection:
            found = _find(connection, users)
        missing = sorted(set(users) - found.keys())
        if missing:
            with self._begin() as connection:
                _add(connection, [{"user_hash": user, "key": secrets.token_bytes(KEY_BYTES), "create_ms": _now()} for user in missing])
                found |= _find(connection, missing)
        return found

    def erased(self) -> set[str]:
        """All users who were erased."""
        from sqlalchemy import select

        from server.registry.schema import USER_KEYS

        with self._begin() as connection:
            return set(connection.execute(select(USER_KEYS.c.user_hash).where(USER_KEYS.c.erase_ms.is_not(None))).scalars())

    def erase(self, user: str) -> None:
        """Deletes a user's key and marks the user; one who has no key is marked too. Doing it again changes nothing."""
        from sqlalchemy import func

        from server.registry.schema import USER_KEYS

        now = _now()
        with self._begin(secure=True) as connection:
            _add(connection, [{"user_hash": user, "key": None, "create_ms": now}])
            erased = {"key": None, "erase_ms": func.coalesce(USER_KEYS.c.erase_ms, now)}
            connection.execute(USER_KEYS.update().where(USER_KEYS.c.user_hash == user).values(**erased))
        self._empty_wal()

    def new_log_key(self) -> tuple[str, bytes]:
        """A fresh key for one process's log, with its name of 32 characters."""
        name, key = LOG_PREFIX + secrets.token_hex(14), secrets.token_bytes(KEY_BYTES)
        with self._begin() as connection:
            _add(connection, [{"user_hash": name, "key": key, "create_ms": _now()}])
        return name, key

    def drop_log_key(self, name: str) -> None:
        """Deletes the key of a log whose segments are all rows by now: no copy of them can be read any more."""
        from sqlalchemy import delete

        from server.registry.schema import USER_KEYS

        assert name.startswith(LOG_PREFIX), name
        with self._begin(secure=True) as connection:
            connection.execute(delete(USER_KEYS).where(USER_KEYS.c.user_hash == name))
        self._empty_wal()

    def forget_feedback(self, interactions: Collection[str]) -> int:
        """Deletes the feedback on these interactions that is remembered by request id; returns how much."""
        import json

        from sqlalchemy import delete, select

        from server.registry.schema import FEEDBACK_REQUESTS

        table = FEEDBACK_REQUESTS
        with self._begin(secure=True) as connection:
            rows = connection.execution_options(yield_per=1000).execute(select(table.c.request_id, table.c.feedback))
            gone = [row.request_id for row in rows if json.loads(row.feedback).get("interaction_id") in interactions]
            for some in _chunks(gone):
                connection.execute(delete(table).where(table.c.request_id.in_(some)))
        if gone:
            self._empty_wal()
        return len(gone)

    def trained_on(self, interactions: Collection[str]) -> Trained:
        """The jobs that any of these interactions went into, and what they made."""
        from sqlalchemy import select

        from server.registry.schema import ADAPTERS, DATASET_ROWS, DATASETS, JOBS, MODELS

        jobs: set[str] = set()
        with self._begin() as connection:
            for some in _chunks(sorted(interactions)):
                own = select(DATASET_ROWS.c.dataset_id).where(DATASET_ROWS.c.interaction_id.in_(some))
                jobs |= set(connection.execute(select(DATASETS.c.job_id).where(DATASETS.c.id.in_(own))).scalars()) - {None}
            adapters: set[str] = set()
            for some in _chunks(sorted(jobs)):
                rows = connection.execute(select(ADAPTERS.c.skill, ADAPTERS.c.version).where(ADAPTERS.c.job_id.in_(some)))
                adapters |= {f"{row.skill}@{row.version}" for row in rows}
                rows = connection.execute(select(MODELS.c.name, MODELS.c.version).where(MODELS.c.job_id.in_(some)))
                adapters |= {f"{row.name}@{row.version}" for row in rows}
            recorded = set(connection.execute(select(DATASETS.c.job_id)).scalars())
            ended = set(connection.execute(select(JOBS.c.id).where(JOBS.c.end_ms.is_not(None))).scalars())
        return Trained(sorted(jobs), sorted(adapters), recorded, ended)

    @contextmanager
    def _begin(self, *, secure: bool = False) -> Iterator[Connection]:
        from server.registry.registry import reaching

        with reaching(), self._registry.engine().begin() as connection:
            if secure and connection.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA secure_delete=ON")
            yield connection

    def _empty_wal(self) -> None:
        """The log of writes keeps what a page held before; where a reader holds it, the next checkpoint empties it."""
        engine = self._registry.engine()
        if engine.dialect.name == "sqlite":
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")


def _find(connection: Connection, users: Iterable[str]) -> dict[str, bytes | None]:
    from sqlalchemy import select

    from server.registry.schema import USER_KEYS

    found: dict[str, bytes | None] = {}
    for some in _chunks(sorted(set(users))):
        query = select(USER_KEYS.c.user_hash, USER_KEYS.c.key, USER_KEYS.c.erase_ms).where(USER_KEYS.c.user_hash.in_(some))
        for row in connection.execute(query):
            found[row.user_hash] = bytes(row.key) if row.erase_ms is None and row.key is not None else None
    return found


def _add(connection: Connection, rows: list[Mapping[str, Any]]) -> None:
    from sqlalchemy.dialects import postgresql, sqlite

    from server.registry.schema import USER_KEYS

    insert = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(USER_KEYS).on_conflict_do_nothing()
    connection.execute(insert, rows)


def _chunks(names: list[str]) -> Iterator[list[str]]:
    return (names[start : start + _MANY] for start in range(0, len(names), _MANY))


def _now() -> int:
    return time.time_ns() // 1_000_000
