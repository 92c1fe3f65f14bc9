"""Jobs of the trainer: a queue in the registry, leased to one trainer at a time.

A job is queued, then running under a lease, then succeeded, rejected, failed or cancelled. Whoever leases it is its *holder* and renews the
lease while it works (`beat`). A holder that is silent for longer than its lease has lost the job: the next trainer takes it up, in the same
folder. Everything that a holder writes is fenced by its name in the same transaction, so that one that was only slow, and comes back
after its job went to another, writes nothing. All of it is done by single statements that both SQLite and PostgreSQL take whole.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from server.errors import AlreadyExists, JobNotFound
from server.registry.registry import Registry, reaching

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table

QUEUED, RUNNING, SUCCEEDED, REJECTED, FAILED, CANCELLED = "queued", "running", "succeeded", "rejected", "failed", "cancelled"
OPEN = (QUEUED, RUNNING)
STATES = (*OPEN, SUCCEEDED, REJECTED, FAILED, CANCELLED)
KINDS = ("train", "assess", "finetune")
MAX_LINE = 8192  # characters of one log line that are kept


@dataclass(slots=True, frozen=True)
class JobError:
    """Why a job failed: `reason` and `metadata` as in server.errors."""

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Job:
    """A run of the trainer; times in milliseconds since 1970. `attempt`: which trainer it has, 1 being the first; 0 before that."""

    id: str
    skill: str
    kind: str
    state: str
    spec: Mapping[str, Any]
    progress: Mapping[str, tuple[int, int]]
    attempt: int
    holder: str
    lease_ms: int
    cancel: bool
    create_ms: int
    start_ms: int | None
    end_ms: int | None
    report: Mapping[str, Any]
    error: JobError | None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in OPEN


class LogLine(NamedTuple):
    """What a job said; numbers begin at 1 and have no gaps."""

    number: int
    time_ms: int
    text: str


class Point(NamedTuple):
    """A point of a curve."""

    name: str
    step: int
    value: float
    time_ms: int


@dataclass(slots=True)
class News:
    """What a holder has to tell since the last time: (time_ms, text), points, and the stages that went on."""

    lines: list[tuple[int, str]] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    progress: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.lines or self.points or self.progress)


class Held(Enum):
    """How a holder stands: it goes on, it should stop for somebody asked for that, or the job is no longer its own."""

    YES = "yes"
    CANCELLED = "cancelled"
    LOST = "lost"


def now_ms() -> int:
    """The clock of this machine in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class JobStore:
    """Blocking and thread-safe, as the registry is. `clock` gives milliseconds since 1970. Every method raises Unavailable."""

    def __init__(self, registry: Registry, *, clock: Callable[[], int] = now_ms) -> None:
        self.registry = registry
        self.clock = clock

    def create(self, skill: str, kind: str, spec: Mapping[str, Any] | None = None, *, request_id: str = "") -> Job:
        """Queues a job. The same `request_id` gives the job that it made before.

        Raises AlreadyExists with the job's id where one that asks for the same waits and has not begun: it will read the same rows.
        """
        return self._insert(skill, kind, spec, request_id, {"state": QUEUED})

    def begin(self, skill: str, kind: str, spec: Mapping[str, Any] | None, holder: str, lease_s: float) -> Job:
        """A job that its maker runs itself, at once, past the queue."""
        now = self.clock()
        lease = {"state": RUNNING, "holder": holder, "lease_ms": now + int(lease_s * 1000), "start_ms": now, "attempt": 1}
        return self._insert(skill, kind, spec, "", lease)

    def get(self, job: str) -> Job:
        """One job. Raises JobNotFound."""
        from sqlalchemy import select

        from server.registry.schema import JOBS

        with reaching(), self.registry.engine().connect() as connection:
            row = connection.execute(select(JOBS).where(JOBS.c.id == job)).one_or_none()
        if row is None:
            raise JobNotFound(f"There is no job {job[:64]!r}; `understudy jobs list` shows those that there are.", job=job[:64])
        return _job(row)

    def find(
        self, *, skill: str = "", states: Sequence[str] = (), kind: str = "", limit: int = 100, before: tuple[int, str] | None = None
    ) -> list[Job]:
        """Jobs, newest first; `before` is (create_ms, id) of the last one of the page before."""
        from sqlalchemy import select, tuple_

        from server.registry.schema import JOBS

        query = select(JOBS).order_by(JOBS.c.create_ms.desc(), JOBS.c.id.desc()).limit(limit)
        if skill:
            query = query.where(JOBS.c.skill == skill)
        if kind:
            query = query.where(JOBS.c.kind == kind)
        if states:
            query = query.where(JOBS.c.state.in_(states))
        if before is not None:
            query = query.where(tuple_(JOBS.c.create_ms, JOBS.c.id) < before)
        with reaching(), self.registry.engine().connect() as connection:
            return [_job(row) for row in connection.execute(query)]

    def created(self, skill: str, kind: str = "") -> tuple[int, int] | None:
        """When the skill's first and its last job were created (of this kind, where one is given), in milliseconds; None: it has none."""
        from sqlalchemy import func, select

        from server.registry.schema import JOBS

        query = select(func.min(JOBS.c.create_ms), func.max(JOBS.c.create_ms)).where(JOBS.c.skill == skill)
        query = query.where(JOBS.c.kind == kind) if kind else query
        with reaching(), self.registry.engine().connect() as connection:
            first, last = connection.execute(query).one()
        return None if first is None else (first, last)

    def cancel(self, job: str) -> Job:
        """Ends a queued job at once; tells a running one to stop; leaves one that has ended as it is. Raises JobNotFound."""
        from sqlalchemy import or_, update

        from server.registry.schema import JOBS

        now = self.clock()
        with reaching(), self.registry.engine().begin() as connection:
            idle = or_(JOBS.c.state == QUEUED, (JOBS.c.state == RUNNING) & (JOBS.c.lease_ms < now))
            ended = {"state": CANCELLED, "cancel": True, "end_ms": now, "holder": ""}
            if not connection.execute(update(JOBS).where(JOBS.c.id == job, idle).values(**ended)).rowcount:
                connection.execute(update(JOBS).where(JOBS.c.id == job, JOBS.c.state == RUNNING).values(cancel=True))
        return self.get(job)

    def lease(self, holder: str, lease_s: float, *, max_attempts: int, kinds: Sequence[str] = KINDS) -> Job | None:
        """The oldest job that waits or was lost by its trainer, now this holder's; None where there is none. Nobody else gets it."""
        from sqlalchemy import and_, func, or_, select, update

        from server.registry.schema import JOBS

        now = self.clock()
        self._bury(now, max_attempts)
        free = or_(JOBS.c.state == QUEUED, and_(JOBS.c.state == RUNNING, JOBS.c.lease_ms < now))
        oldest = (
            select(JOBS.c.id)
            .where(free, JOBS.c.kind.in_(kinds))
            .order_by(JOBS.c.create_ms, JOBS.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
            .scalar_subquery()
        )
        taken = {"state": RUNNING, "holder": holder, "lease_ms": now + int(lease_s * 1000), "heartbeat_ms": now}
        statement = update(JOBS).where(JOBS.c.id == oldest).values(**taken, attempt=JOBS.c.attempt + 1)
        statement = statement.values(start_ms=func.coalesce(JOBS.c.start_ms, now))
        with reaching(), self.registry.engine().begin() as connection:
            row = connection.execute(statement.returning(JOBS)).one_or_none()
        return _job(row) if row is not None else None

    def beat(self, job: str, holder: str, lease_s: float, news: News | None = None) -> Held:
        """Renews the lease and keeps the news, both or neither."""
        from sqlalchemy import update

        from server.registry.schema import JOBS

        now, news = self.clock(), news or News()
        values: dict[str, Any] = {"lease_ms": now + int(lease_s * 1000), "heartbeat_ms": now}
        if news.progress:
            values["progress"] = json.dumps(news.progress)
        mine = update(JOBS).where(JOBS.c.id == job, JOBS.c.holder == holder, JOBS.c.state == RUNNING).values(**values)
        with reaching(), self.registry.engine().begin() as connection:
            cancel = connection.execute(mine.returning(JOBS.c.cancel)).scalar_one_or_none()
            if cancel is None:
                return Held.LOST
            self._keep(connection, job, news)
        return Held.CANCELLED if cancel else Held.YES

    def end(self, job: str, holder: str, state: str, *, report: Mapping[str, Any] | None = None, error: JobError | None = None) -> bool:
        """Closes the job; False where it is no longer this holder's."""
        from dataclasses import asdict

        said = json.dumps(asdict(error)) if error is not None else ""
        values = {"state": state, "end_ms": self.clock(), "report": json.dumps(report or {}), "error": said, "holder": ""}
        return self._fenced(job, holder, values)

    def release(self, job: str, holder: str) -> bool:
        """Gives the job back to the queue, for the next trainer to go on with; it does not count as an attempt."""
        from server.registry.schema import JOBS

        return self._fenced(job, holder, {"state": QUEUED, "holder": "", "lease_ms": 0, "attempt": JOBS.c.attempt - 1})

    def abandon(self, holder: str) -> None:
        """Ends what this holder runs as cancelled: its process is about to end, and nobody is to take the job up."""
        from sqlalchemy import update

        from server.registry.schema import JOBS

        ended = {"state": CANCELLED, "end_ms": self.clock(), "holder": ""}
        with reaching(), self.registry.engine().begin() as connection:
            connection.execute(update(JOBS).where(JOBS.c.holder == holder, JOBS.c.state == RUNNING).values(**ended))

    def logs(self, job: str, *, after: int = 0, limit: int = 1000) -> list[LogLine]:
        """Lines whose number is greater than `after`."""
        from sqlalchemy import select

        from server.registry.schema import JOB_LOGS

        query = select(JOB_LOGS).where(JOB_LOGS.c.job_id == job, JOB_LOGS.c.number > after).order_by(JOB_LOGS.c.number).limit(limit)
        with reaching(), self.registry.engine().connect() as connection:
            return [LogLine(row.number, row.time_ms, row.text) for row in connection.execute(query)]

    def metrics(self, job: str, *, names: Sequence[str] = (), limit: int = 100_000, after: tuple[str, int] | None = None) -> list[Point]:
        """Points of the job's curves by name and step; `after` is (name, step) of the last one of the page before."""
        from sqlalchemy import select, tuple_

        from server.registry.schema import JOB_METRICS

        query = select(JOB_METRICS).where(JOB_METRICS.c.job_id == job)
        query = query.order_by(JOB_METRICS.c.name, JOB_METRICS.c.step).limit(limit)
        if names:
            query = query.where(JOB_METRICS.c.name.in_(names))
        if after is not None:
            query = query.where(tuple_(JOB_METRICS.c.name, JOB_METRICS.c.step) > after)
        with reaching(), self.registry.engine().connect() as connection:
            return [Point(row.name, row.step, row.value, row.time_ms) for row in connection.execute(query)]

    def _insert(self, skill: str, kind: str, spec: Mapping[str, Any] | None, request_id: str, more: Mapping[str, Any]) -> Job:
        from sqlalchemy import select

        from server.registry.schema import JOBS

        text = json.dumps(dict(spec or {}), sort_keys=True)
        now = self.clock()
        row = {"id": secrets.token_hex(16), "skill": skill, "kind": kind, "spec": text, "create_ms": now, "heartbeat_ms": now, **more}
        with reaching(), self.registry.engine().begin() as connection:
            statement = inserting(connection, JOBS).values(**row, request_id=request_id or None).on_conflict_do_nothing()
            made = connection.execute(statement.returning(JOBS)).one_or_none()
            if made is not None:
                return _job(made)
            known = connection.execute(select(JOBS).where(JOBS.c.request_id == request_id)).one_or_none() if request_id else None
            if known is not None and (known.skill, known.kind, known.spec) != (skill, kind, text):
                message = f"The request id {request_id!r} belongs to a {known.kind} job of {known.skill!r} that asked for something else."
                raise AlreadyExists(f"{message} Give a new one.", job=known.id, field="request_id")
            if known is not None:
                return _job(known)
            same = (JOBS.c.skill == skill, JOBS.c.kind == kind, JOBS.c.spec == text, JOBS.c.state == QUEUED)
            waits = connection.execute(select(JOBS.c.id).where(*same)).scalars().first()
        message = f"Job {waits} asks for the same, and waits for a trainer: `understudy jobs work` starts one."
        raise AlreadyExists(f"{message} Another would read the same rows.", job=waits or "", skill=skill)

    def _bury(self, now: int, max_attempts: int) -> None:
        """Ends what no trainer shall take up again: jobs that were cancelled while theirs was dead, and those that killed too many."""
        from dataclasses import asdict

        from sqlalchemy import or_, select, update

        from server.registry.schema import JOBS

        lost = (JOBS.c.state == RUNNING, JOBS.c.lease_ms < now)
        hopeless = or_(JOBS.c.cancel, JOBS.c.attempt >= max_attempts)
        with reaching():
            with self.registry.engine().connect() as connection:  # looking is cheap, and mostly there is nothing
                if connection.execute(select(JOBS.c.id).where(*lost, hopeless).limit(1)).first() is None:
                    return
            message = f"{max_attempts} trainers died over this job or were not heard of in time; training.max_attempts allows no more."
            error = JobError("UNAVAILABLE", f"{message} Look at their logs and at the memory they had.", {"attempts": str(max_attempts)})
            with self.registry.engine().begin() as connection:
                ended = update(JOBS).where(*lost).values(end_ms=now, holder="")
                connection.execute(ended.where(JOBS.c.cancel).values(state=CANCELLED))
                connection.execute(ended.where(JOBS.c.attempt >= max_attempts).values(state=FAILED, error=json.dumps(asdict(error))))

    def _fenced(self, job: str, holder: str, values: Mapping[str, Any]) -> bool:
        from sqlalchemy import update

        from server.registry.schema import JOBS

        mine = update(JOBS).where(JOBS.c.id == job, JOBS.c.holder == holder, JOBS.c.state == RUNNING)
        with reaching(), self.registry.engine().begin() as connection:
            return connection.execute(mine.values(**values)).rowcount == 1

    def _keep(self, connection: Connection, job: str, news: News) -> None:
        """Lines get the next numbers: the job's row is locked by this transaction, so nobody else takes them."""
        from sqlalchemy import func, select

        from server.registry.schema import JOB_LOGS, JOB_METRICS

        if news.lines:
            last = connection.execute(select(func.max(JOB_LOGS.c.number)).where(JOB_LOGS.c.job_id == job)).scalar() or 0
            numbered = enumerate(news.lines, last + 1)
            lines = [{"job_id": job, "number": number, "time_ms": when, "text": text[:MAX_LINE]} for number, (when, text) in numbered]
            connection.execute(JOB_LOGS.insert(), lines)
        latest = {(point.name, point.step): point for point in news.points}
        if latest:
            statement = inserting(connection, JOB_METRICS)
            key = [JOB_METRICS.c.job_id, JOB_METRICS.c.name, JOB_METRICS.c.step]
            new = {"value": statement.excluded.value, "time_ms": statement.excluded.time_ms}
            points = [{"job_id": job, **point._asdict()} for point in latest.values()]
            connection.execute(statement.on_conflict_do_update(index_elements=key, set_=new), points)


def inserting(connection: Connection, table: Table) -> Any:
    """An INSERT that knows ON CONFLICT, in the database's own dialect."""
    from sqlalchemy.dialects import postgresql, sqlite

    return (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table)


def error_of(text: str) -> JobError | None:
    """What a job's row says of its failure. Rows of older releases hold words alone."""
    if not text:
        return None
    try:
        found = json.loads(text)
        return JobError(str(found["reason"]), str(found["message"]), dict(found["metadata"]))
    except (ValueError, KeyError, TypeError):
        return JobError("INTERNAL", text)


def _job(row: Any) -> Job:
    progress = {stage: (int(done), int(total)) for stage, (done, total) in json.loads(row.progress).items()}
    return Job(
        row.id,
        row.skill,
        row.kind,
        row.state,
        json.loads(row.spec),
        progress,
        row.attempt,
        row.holder,
        row.lease_ms,
        bool(row.cancel),
        row.create_ms,
        row.start_ms,
        row.end_ms,
        json.loads(row.report),
        error_of(row.error),
    )
