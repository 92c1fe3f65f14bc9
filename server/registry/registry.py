"""The registry: jobs, data sets, adapters and idempotency keys in one SQL database. Tables are made on first use."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import FailedPrecondition, Unavailable
from server.settings import RegistryConfig

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.sql import Executable

_BUSY_S = 10.0


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
class Job:
    """A run of the trainer; times in milliseconds since 1970."""

    id: str
    skill: str
    state: str
    create_ms: int
    end_ms: int | None
    report: Mapping[str, Any]
    error: str


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
        """Writes down a job that runs from now on; returns its id."""
        from server.registry.schema import JOBS

        job = secrets.token_hex(16)
        row = {"id": job, "skill": skill, "kind": kind, "state": "running", "create_ms": _now(), "heartbeat_ms": _now(), "report": "{}"}
        self._write(JOBS.insert().values(**row, error=""))
        return job

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
        from sqlalchemy import select

        from server.registry.schema import JOBS

        query = select(JOBS).where(JOBS.c.skill == skill).order_by(JOBS.c.create_ms.desc())
        return [Job(r.id, r.skill, r.state, r.create_ms, r.end_ms, json.loads(r.report), r.error) for r in self._rows(query)]

    def add_dataset(self, job: str, table_version: int, fingerprint: str, rows: Sequence[tuple[str, bool]]) -> str:
        """Keeps which interactions (id, held out) a job used; returns the data set's id."""
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
            create_ms=_now(),
        )
        with self._open().begin() as connection:
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
        from sqlalchemy.exc import OperationalError

        try:
            with self._open().begin() as connection:
                connection.execute(statement)
        except OperationalError as error:
            raise _unreachable(error) from None

    def _rows(self, query: Any) -> list[Any]:
        from sqlalchemy.exc import OperationalError

        try:
            with self._open().connect() as connection:
                return list(connection.execute(query))
        except OperationalError as error:
            raise _unreachable(error) from None

    def _open(self) -> Engine:
        from sqlalchemy import create_engine, event, make_url

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
            _make_tables(engine)
            self._engine = engine
            return engine


def _make_tables(engine: Engine) -> None:
    """Makes the tables that are missing. Other processes may do the same: a table that appears meanwhile is theirs, and as good."""
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    from server.registry.schema import METADATA

    # Each failure that says "exists" means that somebody made one more of them, so this ends.
    for left in reversed(range(2 * len(METADATA.tables) + 1)):
        try:
            METADATA.create_all(engine)
            return
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            if not left or "exists" not in str(error.orig):
                raise _unreachable(error) from None


def _prepare_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # readers and one writer at once, across processes
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _unreachable(error: Exception) -> Unavailable:
    """The driver's words only: SQLAlchemy's would repeat the statement's values."""
    cause = str(getattr(error, "orig", None) or type(error).__name__).strip().splitlines()[0][:300]
    return Unavailable(f"The registry's database does not answer: {cause}. Look at registry.url and at the database.", retry_after_s=5.0)


def _now() -> int:
    return time.time_ns() // 1_000_000
