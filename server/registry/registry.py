"""The registry: skills, data sets, models, adapters, aliases and idempotency keys in one SQL database. Tables are made on first use.

Jobs, budgets, keys and rollouts have files of their own beside this one, on the same engine.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unavailable
from server.settings import RegistryConfig

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.sql import Executable

    from server.registry.jobs import Job

_BUSY_S = 10.0
_UNLEASED_S = 10.0 * 365 * 86_400


@dataclass(slots=True, frozen=True)
class Adapter:
    """A version that was published. `sha256` is its head.onnx's; `base` is "name@version"."""

    skill: str
    version: str
    kind: str
    base: str
    sha256: str
    metrics: Mapping[str, float]
    job_id: str


@dataclass(slots=True, frozen=True)
class ModelRecord:
    """A model that a job made. `kind`: local (a version in the repository) or provider ("openai/ft:..."); `base`: what it was made of."""

    name: str
    version: str
    kind: str
    skill: str
    base: str
    sha256: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    job_id: str = ""


@dataclass(slots=True, frozen=True)
class SkillRecord:
    """A skill as the servers that share this registry know it."""

    name: str
    task: str
    config: Mapping[str, Any]
    update_ms: int


CHAMPION, CHALLENGER, SHADOW = "champion", "challenger", "shadow"
ALIASES = (CHAMPION, CHALLENGER, SHADOW)
"""Names for versions of a skill: the one that serves, the one that is on its way, the one that is compared."""


class Registry:
    """Blocking; for worker threads and other processes, never the event loop. Thread-safe. SQLAlchemy is imported at the first call.

    Every method raises Unavailable where the database cannot be reached.
    """

    def __init__(self, config: RegistryConfig) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return "Registry()"

    def start_job(self, skill: str, kind: str) -> str:
        """Writes down a job that its caller runs from now on, and that no trainer takes up; returns its id."""
        from server.registry.jobs import JobStore

        return JobStore(self).begin(skill, kind, None, "", _UNLEASED_S).id

    def heartbeat(self, job: str) -> None:
        """Says that a job still runs."""
        from server.registry.schema import JOBS

        self._write(JOBS.update().where(JOBS.c.id == job).values(heartbeat_ms=_now()))

    def end_job(self, job: str, state: str, *, report: Mapping[str, Any] | None = None, error: str = "") -> None:
        """Closes a job: "succeeded", "rejected" or "failed"."""
        from server.registry.schema import JOBS

        values = {"state": state, "end_ms": _now(), "report": json.dumps(report or {}), "error": error}
        self._write(JOBS.update().where(JOBS.c.id == job).values(**values))

    def jobs(self, skill: str) -> list[Job]:
        """A skill's jobs, newest first."""
        from server.registry.jobs import JobStore

        return JobStore(self).find(skill=skill, limit=1000)

    def add_dataset(
        self,
        job: str,
        table_version: int,
        fingerprint: str,
        rows: Sequence[tuple[str, bool]],
        report: Mapping[str, Any] | None = None,
    ) -> str:
        """Keeps which interactions (id, held out) a job used, and what curation says of them; returns the data set's id."""
        from server.registry.schema import DATASET_ROWS, DATASETS

        dataset = secrets.token_hex(16)
        held = sum(out for _, out in rows)
        head = DATASETS.insert().values(
            id=dataset,
            job_id=job,
            table_version=table_version,
            train_rows=len(rows) - held,
            held_out_rows=held,
            fingerprint=fingerprint,
            report=json.dumps(dict(report or {})),
            create_ms=_now(),
        )
        with reaching(), self._open().begin() as connection:
            connection.execute(head)
            values = [{"dataset_id": dataset, "interaction_id": key, "held_out": out} for key, out in rows]
            if values:
                connection.execute(DATASET_ROWS.insert(), values)
        return dataset

    def add_adapter(self, adapter: Adapter) -> None:
        """Writes down a published version. Raises FailedPrecondition where the version is there already."""
        from sqlalchemy.exc import IntegrityError

        from server.registry.schema import ADAPTERS

        row = {
            "skill": adapter.skill,
            "version": adapter.version,
            "kind": adapter.kind,
            "base": adapter.base,
            "sha256": adapter.sha256,
            "metrics": json.dumps(dict(adapter.metrics)),
            "job_id": adapter.job_id,
            "create_ms": _now(),
        }
        try:
            self._write(ADAPTERS.insert().values(**row))
        except IntegrityError as error:
            message = f"The registry has version {adapter.version} of {adapter.skill!r} already. Versions are written once; take the next."
            raise FailedPrecondition(message, adapter=adapter.skill) from error

    def adapters(self, skill: str) -> list[Adapter]:
        """A skill's versions, newest first."""
        from sqlalchemy import select

        from server.registry.schema import ADAPTERS

        query = select(ADAPTERS).where(ADAPTERS.c.skill == skill).order_by(ADAPTERS.c.create_ms.desc(), ADAPTERS.c.version.desc())
        return [Adapter(r.skill, r.version, r.kind, r.base, r.sha256, json.loads(r.metrics), r.job_id) for r in self._rows(query)]

    def adapters_with(self, interaction_id: str) -> list[Adapter]:
        """The adapters that an interaction went into, for erasure."""
        from sqlalchemy import select

        from server.registry.schema import ADAPTERS, DATASET_ROWS, DATASETS

        jobs = (
            select(DATASETS.c.job_id)
            .join(DATASET_ROWS, DATASET_ROWS.c.dataset_id == DATASETS.c.id)
            .where(DATASET_ROWS.c.interaction_id == interaction_id)
        )
        query = select(ADAPTERS).where(ADAPTERS.c.job_id.in_(jobs))
        return [Adapter(r.skill, r.version, r.kind, r.base, r.sha256, json.loads(r.metrics), r.job_id) for r in self._rows(query)]

    def add_model(self, model: ModelRecord) -> None:
        """Writes down a model that a job made. Raises AlreadyExists where the version is there already."""
        from sqlalchemy.exc import IntegrityError

        from server.registry.schema import MODELS

        row = {**_plain(model), "metrics": json.dumps(dict(model.metrics)), "job_id": model.job_id or None, "create_ms": _now()}
        try:
            self._write(MODELS.insert().values(**row))
        except IntegrityError as error:
            message = f"The registry has version {model.version} of the model {model.name!r} already. Versions are written once."
            raise AlreadyExists(message, model=model.name, version=model.version) from error

    def models(self, *, skill: str = "", kind: str = "") -> list[ModelRecord]:
        """Models that jobs made, newest first."""
        from sqlalchemy import select

        from server.registry.schema import MODELS

        query = select(MODELS).order_by(MODELS.c.create_ms.desc(), MODELS.c.name, MODELS.c.version.desc())
        query = query.where(MODELS.c.skill == skill) if skill else query
        query = query.where(MODELS.c.kind == kind) if kind else query
        return [
            ModelRecord(r.name, r.version, r.kind, r.skill, r.base, r.sha256, json.loads(r.metrics), r.job_id or "")
            for r in self._rows(query)
        ]

    def set_alias(self, skill: str, alias: str, version: str) -> None:
        """Lets `alias` mean this version from now on, for everybody at once; "" takes the alias away. Raises InvalidArgument."""
        self.set_aliases(skill, {alias: version})

    def set_aliases(self, skill: str, versions: Mapping[str, str]) -> None:
        """The same for several aliases in one transaction: a promotion has no moment between. Raises InvalidArgument."""
        from server.registry.jobs import inserting
        from server.registry.schema import ALIASES as TABLE

        for alias in versions:
            if alias not in ALIASES:
                raise InvalidArgument(f"{alias!r} is no alias; expected one of {', '.join(ALIASES)}.", field="alias")
        with reaching(), self._open().begin() as connection:
            for alias, version in sorted(versions.items()):  # in one order, so that two callers do not wait for each other
                if not version:
                    connection.execute(TABLE.delete().where(TABLE.c.skill == skill, TABLE.c.alias == alias))
                    continue
                row = {"skill": skill, "alias": alias, "version": version, "update_ms": _now()}
                statement = inserting(connection, TABLE).values(**row)
                new = {"version": statement.excluded.version, "update_ms": statement.excluded.update_ms}
                connection.execute(statement.on_conflict_do_update(index_elements=[TABLE.c.skill, TABLE.c.alias], set_=new))

    def aliases(self, skill: str) -> dict[str, str]:
        """The versions that a skill's aliases mean."""
        from sqlalchemy import select

        from server.registry.schema import ALIASES as TABLE

        rows = self._rows(select(TABLE.c.alias, TABLE.c.version).where(TABLE.c.skill == skill).order_by(TABLE.c.alias))
        return {row.alias: row.version for row in rows}

    def keep_skills(self, skills: Mapping[str, tuple[str, Mapping[str, Any]]]) -> None:
        """Writes down what this process knows of skills: name -> (task, configuration). Others stay as they are."""
        from server.registry.jobs import inserting
        from server.registry.schema import SKILLS

        with reaching(), self._open().begin() as connection:
            for name, (task, config) in sorted(skills.items()):
                row = {"name": name, "task": task, "config": json.dumps(dict(config), sort_keys=True), "update_ms": _now()}
                statement = inserting(connection, SKILLS).values(**row)
                new = {key: statement.excluded[key] for key in ("task", "config", "update_ms")}
                changed = SKILLS.c.config != statement.excluded.config
                connection.execute(statement.on_conflict_do_update(index_elements=[SKILLS.c.name], set_=new, where=changed))

    def skills(self) -> list[SkillRecord]:
        """Skills by name."""
        from sqlalchemy import select

        from server.registry.schema import SKILLS

        rows = self._rows(select(SKILLS).order_by(SKILLS.c.name))
        return [SkillRecord(row.name, row.task, json.loads(row.config), row.update_ms) for row in rows]

    def feedback_of(self, request_id: str) -> dict[str, Any] | None:
        """The feedback that was kept under a request id, or None."""
        from sqlalchemy import select

        from server.registry.schema import FEEDBACK_REQUESTS

        rows = self._rows(select(FEEDBACK_REQUESTS.c.feedback).where(FEEDBACK_REQUESTS.c.request_id == request_id))
        return dict(json.loads(rows[0].feedback)) if rows else None

    def keep_feedback(self, request_id: str, feedback: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps feedback under a request id, once; returns what is kept, which is the first caller's."""
        from sqlalchemy.exc import IntegrityError

        from server.registry.schema import FEEDBACK_REQUESTS

        values = {"request_id": request_id, "feedback": json.dumps(dict(feedback)), "create_ms": _now()}
        try:
            self._write(FEEDBACK_REQUESTS.insert().values(**values))
        except IntegrityError:
            return self.feedback_of(request_id) or dict(feedback)
        return dict(feedback)

    def engine(self) -> Engine:
        """The database with its tables, for the other files of this package."""
        return self._open()

    def close(self) -> None:
        """Closes connections."""
        if self._engine is not None:
            self._engine.dispose()

    def _write(self, statement: Executable) -> None:
        with reaching(), self._open().begin() as connection:
            connection.execute(statement)

    def _rows(self, query: Any) -> list[Any]:
        with reaching(), self._open().connect() as connection:
            return list(connection.execute(query))

    def _open(self) -> Engine:
        from sqlalchemy import create_engine, event, make_url

        from server.registry.migrate import bring_up

        with self._lock:
            if self._engine is not None:
                return self._engine
            url = make_url(self._config.url)
            password = self._config.read_password()
            if password:
                url = url.set(password=password)
            lite = url.get_backend_name() == "sqlite"
            if lite and url.database:
                Path(url.database).parent.mkdir(parents=True, exist_ok=True)
            engine = create_engine(url, pool_pre_ping=not lite, connect_args={"timeout": _BUSY_S} if lite else {"connect_timeout": 10})
            if lite:
                event.listen(engine, "connect", _prepare_sqlite)
            try:
                with reaching():
                    bring_up(engine)
            except BaseException:
                engine.dispose()
                raise
            self._engine = engine
            return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    _write_ahead(cursor)
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _write_ahead(cursor: Any) -> None:
    """Readers and one writer at once, across processes. Of all statements, the switch itself never waits for a lock: it is tried again."""
    end = time.monotonic() + _BUSY_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)


@contextmanager
def reaching() -> Iterator[None]:
    """Around what reaches the database: its failure to answer is Unavailable, in the driver's words only."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    try:
        yield
    except (OperationalError, InterfaceError) as error:
        raise _unreachable(error) from None


def _unreachable(error: Exception) -> Unavailable:
    """The driver's words only: SQLAlchemy's would repeat the statement's values."""
    cause = str(getattr(error, "orig", None) or type(error).__name__).strip().splitlines()[0][:300]
    return Unavailable(f"The registry's database does not answer: {cause}. Look at registry.url and at the database.", retry_after_s=5.0)


def _plain(record: ModelRecord) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(record)


def _now() -> int:
    return time.time_ns() // 1_000_000
