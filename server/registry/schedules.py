"""Schedules: when a skill is trained without being told to. Words into times, and the table that all trainers share.

`daily at 02:30`, `weekly`, `weekly on sunday at 02:30`, `when 500 new good rows`, or the five fields of cron. Times are local ones of
`budget.time_zone`. A time that does not exist on the day that clocks go forward is taken as far after the gap; one that exists twice is the
first. Of times that passed while no trainer ran, one job is made, not many.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from datetime import time as clock_time
from typing import TYPE_CHECKING, Any

from server.errors import FailedPrecondition, InvalidArgument
from server.registry.jobs import QUEUED, inserting, now_ms
from server.registry.registry import Registry, reaching

if TYPE_CHECKING:
    from sqlalchemy import Connection

ALLOWED = '"daily at HH:MM", "weekly on DAY at HH:MM", "when N new good rows", or the five fields of cron, e.g. "30 2 * * 1-5"'
TIMES = ALLOWED.replace('"when N new good rows", ', "")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
NIGHT = clock_time(2, 30)  # where no time is given
MOST_ROWS = 1_000_000_000
CONFIGURATION, COMMAND = "configuration", "command"
_TIMED = re.compile(r"(?P<often>daily|weekly)(\s+on\s+(?P<day>[a-z]+))?(\s+at\s+(?P<hour>\d{1,2}):(?P<minute>\d{2}))?")
_ROWS = re.compile(r"when\s+(?P<rows>\d{1,12})\s+new(\s+good)?\s+rows?")


@dataclass(slots=True, frozen=True)
class When:
    """What the words mean: by rows, where `rows` is set; else by cron, where that is; else daily, or each `weekday` (0: Monday), `at`."""

    rows: int = 0
    cron: str = ""
    weekday: int | None = None
    at: clock_time = NIGHT

    def next_ms(self, after_ms: int, zone: tzinfo) -> int | None:
        """The first time later than `after_ms`, in milliseconds since 1970; None where rows decide."""
        if self.rows:
            return None
        after = datetime.fromtimestamp(after_ms / 1000, UTC)
        if self.cron:
            return _next_cron(self.cron, after.astimezone(zone))
        day = after.astimezone(zone).date() - timedelta(days=1)
        while True:
            day += timedelta(days=1)
            due = datetime.combine(day, self.at, tzinfo=zone).astimezone(UTC)
            if due > after and self.weekday in (None, day.weekday()):
                return int(due.timestamp()) * 1000


def parse(text: str) -> When:
    """The meaning of a schedule's words. Raises InvalidArgument with what is allowed."""
    words = " ".join(text.lower().split())
    if match := _ROWS.fullmatch(words):
        if 1 <= int(match["rows"]) <= MOST_ROWS:
            return When(rows=int(match["rows"]))
        raise _refusal(text, f"N is a number from 1 to {MOST_ROWS}")
    if match := _TIMED.fullmatch(words):
        if match["day"] and match["often"] == "daily":
            raise _refusal(text, "what is daily has no day")
        if match["day"] and match["day"] not in DAYS:
            raise _refusal(text, f"DAY is one of {', '.join(DAYS)}")
        at = NIGHT
        if match["hour"]:
            if int(match["hour"]) > 23 or int(match["minute"]) > 59:
                raise _refusal(text, "times go from 00:00 to 23:59")
            at = clock_time(int(match["hour"]), int(match["minute"]))
        weekday = DAYS.index(match["day"] or "monday") if match["often"] == "weekly" else None
        return When(weekday=weekday, at=at)
    if len(words.split()) == 5:
        return When(cron=_checked(words, text))
    raise _refusal(text, "it is none of them")


def _checked(cron: str, text: str) -> str:
    from croniter import CroniterError, croniter

    try:
        if re.search(r"[hr]\s*\(|\bh\b|\br\b", cron):  # the library's own words for any time
            raise _refusal(text, "cron's fields are numbers, names, and the signs * , - /")
        croniter(cron, datetime(2024, 1, 1, tzinfo=UTC), max_years_between_matches=9).get_next(datetime)
    except (CroniterError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise _refusal(text, f"as cron: {str(error)[:160]}") from None
    return cron


def _next_cron(cron: str, after: datetime) -> int:
    from croniter import croniter

    return int(croniter(cron, after, max_years_between_matches=9).get_next(datetime).timestamp()) * 1000


def _refusal(text: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{text[:128]!r} is no schedule: {why}. Allowed are {ALLOWED}.", field="schedule")


@dataclass(slots=True, frozen=True)
class Schedule:
    """A skill's schedule. `spec` "": a command turned off what the configuration says. `next_ms` is unset where rows decide."""

    skill: str
    spec: str
    origin: str
    next_ms: int | None
    last_ms: int | None


class ScheduleStore:
    """The table that all trainers share. Blocking; raises Unavailable. `clock` gives milliseconds since 1970."""

    def __init__(self, registry: Registry, zone: tzinfo = UTC, *, clock: Callable[[], int] = now_ms) -> None:
        self._registry = registry
        self._zone = zone
        self._clock = clock

    def list(self) -> list[Schedule]:
        """Schedules by skill."""
        from sqlalchemy import select

        from server.registry.schema import SCHEDULES

        query = select(SCHEDULES).order_by(SCHEDULES.c.skill)
        with reaching(), self._registry.engine().connect() as connection:
            return [Schedule(row.skill, row.spec, row.origin, row.next_ms, row.last_ms) for row in connection.execute(query)]

    def set(self, skill: str, spec: str) -> Schedule:
        """Gives a skill a schedule over the configuration's; "" turns that off. Raises InvalidArgument with what is allowed."""
        due = parse(spec).next_ms(self._clock(), self._zone) if spec else None
        with reaching(), self._registry.engine().begin() as connection:
            self._write(connection, skill, spec, COMMAND, due)
        return Schedule(skill, spec, COMMAND, due, None)

    def remove(self, skill: str, configured: str = "") -> None:
        """Takes back what a command said, so that the configuration holds. Raises FailedPrecondition where no command said anything."""
        from server.registry.schema import SCHEDULES

        mine = (SCHEDULES.c.skill == skill, SCHEDULES.c.origin == COMMAND)
        with reaching(), self._registry.engine().begin() as connection:
            if not connection.execute(SCHEDULES.delete().where(*mine)).rowcount:
                where = f"Its schedule stands in the configuration, skills.{skill}.schedule." if configured else "It has none."
                raise FailedPrecondition(f"No command has given {skill!r} a schedule. {where}", skill=skill)
            if configured:
                self._write(connection, skill, configured, CONFIGURATION, parse(configured).next_ms(self._clock(), self._zone))

    def adopt(self, configured: Mapping[str, str]) -> None:
        """Takes over what the configuration says of these skills, except where a command has said otherwise. Raises InvalidArgument."""
        from server.registry.schema import SCHEDULES

        known = {one.skill: one for one in self.list()}
        with reaching(), self._registry.engine().begin() as connection:
            for skill, spec in sorted(configured.items()):
                now = known.get(skill)
                if (now is None and not spec) or (now is not None and (now.origin == COMMAND or now.spec == spec)):
                    continue
                if not spec:
                    connection.execute(SCHEDULES.delete().where(SCHEDULES.c.skill == skill, SCHEDULES.c.origin == CONFIGURATION))
                    continue
                self._write(connection, skill, spec, CONFIGURATION, parse(spec).next_ms(self._clock(), self._zone))

    def fire(self, schedule: Schedule, due_ms: int, mark: Mapping[str, Any]) -> str | None:
        """Makes the job that is due, and sets the next time, in one transaction; None where another trainer was quicker.

        A job that asks for the same and still waits is as good: its id is returned. `mark` is kept with the schedule.
        """
        from sqlalchemy import func, select, update

        from server.registry.schema import JOBS, SCHEDULES

        now = self._clock()
        values = {"last_ms": now, "next_ms": parse(schedule.spec).next_ms(now, self._zone), "mark": json.dumps(dict(mark))}
        seen = (SCHEDULES.c.spec == schedule.spec, func.coalesce(SCHEDULES.c.last_ms, 0) == (schedule.last_ms or 0))
        claim = update(SCHEDULES).where(SCHEDULES.c.skill == schedule.skill, *seen).values(**values)
        request = hashlib.sha256(f"{schedule.skill}\n{schedule.spec}\n{due_ms}".encode()).hexdigest()[:32]
        job: dict[str, Any] = {"id": secrets.token_hex(16), "skill": schedule.skill, "kind": "train", "state": QUEUED, "spec": "{}"}
        job |= {"request_id": f"schedule-{request}", "create_ms": now, "heartbeat_ms": now}
        with reaching(), self._registry.engine().begin() as connection:
            if connection.execute(claim).rowcount != 1:
                return None
            made = connection.execute(inserting(connection, JOBS).values(**job).on_conflict_do_nothing().returning(JOBS.c.id))
            if (new := made.scalar_one_or_none()) is not None:
                return str(new)
            same = (JOBS.c.skill == schedule.skill, JOBS.c.kind == "train", JOBS.c.spec == "{}", JOBS.c.state == QUEUED)
            return connection.execute(select(JOBS.c.id).where(*same)).scalars().first()

    def last_trained_ms(self, skill: str) -> int:
        """When the last job began that made a data set of this skill's rows: later rows are new. 0 where there was none."""
        from sqlalchemy import func, select

        from server.registry.schema import DATASETS, JOBS

        joined = JOBS.join(DATASETS, DATASETS.c.job_id == JOBS.c.id)
        query = select(func.max(func.coalesce(JOBS.c.start_ms, JOBS.c.create_ms))).select_from(joined).where(JOBS.c.skill == skill)
        with reaching(), self._registry.engine().connect() as connection:
            return int(connection.execute(query).scalar() or 0)

    def _write(self, connection: Connection, skill: str, spec: str, origin: str, due: int | None) -> None:
        from server.registry.schema import SCHEDULES

        statement = inserting(connection, SCHEDULES).values(skill=skill, spec=spec, origin=origin, next_ms=due)
        new = {key: statement.excluded[key] for key in ("spec", "origin", "next_ms")}
        connection.execute(statement.on_conflict_do_update(index_elements=[SCHEDULES.c.skill], set_=new))
