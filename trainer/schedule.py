"""Makes the jobs that schedules ask for. Every trainer looks; for each due time one of them makes the job, whoever comes first."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC
from zoneinfo import ZoneInfo

from server.config import Config
from server.errors import AlreadyExists, InvalidArgument, UnderstudyError
from server.lake.counting import good_rows
from server.lake.reading import LakeReader
from server.logs import get
from server.registry.jobs import JobStore, now_ms
from server.registry.registry import Registry
from server.registry.schedules import TIMES, Schedule, ScheduleStore, When, parse

COUNT_EVERY_S = 15.0  # how often rows are counted, at most: each count reads a part of the lake


ASSESS = "assess"


def _timed(skill: str, text: str) -> When:
    """The meaning of an assessment's schedule. Raises InvalidArgument."""
    when = parse(text)
    if when.rows:
        raise InvalidArgument(
            f"skills.{skill}.assess_schedule is {text[:128]!r}; an assessment has a time: {TIMES}.", field="assess_schedule"
        )
    return when


class Schedules:
    """One a trainer. `look` is quick where nothing is due. `clock`: milliseconds since 1970; `monotonic`: seconds."""

    def __init__(
        self, config: Config, registry: Registry, *, clock: Callable[[], int] = now_ms, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._clock = clock
        self._monotonic = monotonic
        zone = UTC if config.budget.time_zone == "UTC" else ZoneInfo(config.budget.time_zone)
        self._store = ScheduleStore(registry, zone, clock=clock)
        self._reader = LakeReader(config, registry)
        self._zone = zone
        self._jobs = JobStore(registry, clock=clock)
        self._store.adopt({name: skill.schedule for name, skill in config.skills.items()})
        self._assessed = {name: _timed(name, skill.assess_schedule) for name, skill in config.skills.items() if skill.assess_schedule}
        self._assess_ms: dict[str, int] = {}  # skill -> when it is due next
        self._counted_at = -COUNT_EVERY_S
        self._counted: dict[str, tuple[int, int]] = {}  # skill -> what its last count was of: the table's version, since when

    def look(self) -> list[str]:
        """Makes the jobs that are due; returns their ids."""
        made: list[str] = []
        now = self._clock()
        for schedule in self._store.list():
            if not schedule.spec or schedule.skill not in self._config.skills:
                continue  # of a skill that another configuration has
            if schedule.next_ms is not None and schedule.next_ms <= now:
                made += self._fire(schedule, schedule.next_ms, {})
        made += self._look_at_assessments(now)
        if self._monotonic() - self._counted_at >= COUNT_EVERY_S:
            self._counted_at = self._monotonic()
            made += self._look_at_rows()
        return made

    def _look_at_assessments(self, now: int) -> list[str]:
        """The last assessment's time is in the table of jobs, where whoever looks next finds what another trainer made."""
        made: list[str] = []
        for skill, when in self._assessed.items():
            if self._assess_ms.get(skill, 0) > now:
                continue
            due = self._assess_due(skill, when)
            if due is not None and due <= now:
                try:
                    job = self._jobs.create(skill, ASSESS)
                except AlreadyExists:  # another trainer was quicker
                    continue
                get("trainer").info("schedule made a job", skill=skill, schedule=self._config.skills[skill].assess_schedule, job=job.id)
                made.append(job.id)
                due = self._assess_due(skill, when)
            self._assess_ms[skill] = due or 0
        return made

    def _assess_due(self, skill: str, when: When) -> int | None:
        """None while the skill has had no job: there is nothing to assess."""
        if (mine := self._jobs.created(skill, ASSESS)) is not None:
            return when.next_ms(mine[1], self._zone)
        every = self._jobs.created(skill)
        return when.next_ms(every[0], self._zone) if every is not None else None

    def _look_at_rows(self) -> list[str]:
        made: list[str] = []
        asked = [(one, parse(one.spec).rows) for one in self._store.list() if one.spec and one.skill in self._config.skills]
        version = self._reader.version() if any(rows for _, rows in asked) else -1
        for schedule, rows in asked:
            if not rows or version < 0:
                continue
            since = max(schedule.last_ms or 0, self._store.last_trained_ms(schedule.skill))
            if self._counted.get(schedule.skill) == (version, since):
                continue
            self._counted[schedule.skill] = (version, since)
            found = good_rows(self._reader, schedule.skill, since)
            if found >= rows:
                made += self._fire(schedule, since, {"rows": found, "version": version})
        return made

    def _fire(self, schedule: Schedule, due_ms: int, mark: dict[str, int]) -> list[str]:
        try:
            job = self._store.fire(schedule, due_ms, mark)
        except InvalidArgument as error:  # a later release's words
            get("trainer").error("schedule not understood", skill=schedule.skill, error=error.message)
            return []
        except UnderstudyError as error:
            get("trainer").error("schedule not followed", skill=schedule.skill, error=error.message)
            return []
        if job is None:
            return []
        get("trainer").info("schedule made a job", skill=schedule.skill, schedule=schedule.spec, job=job)
        return [job]
