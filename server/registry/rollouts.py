"""Rollouts in the registry: where each skill's rollout is, the audit trail of its steps, and what every server saw since the last one.

Blocking; for worker threads. Every function raises Unavailable where the database cannot be reached.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.errors import Unavailable

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from server.registry.registry import Registry

CHAMPION, CHALLENGER, SHADOW = "champion", "challenger", "shadow"


@dataclass(slots=True, frozen=True)
class StoredRollout:
    """A row of `rollouts`. `state`: JSON values; `revision` grows with every change."""

    skill: str
    stage: str
    percent: int
    student: str
    state: Mapping[str, Any]
    revision: int
    update_ms: int = 0


@dataclass(slots=True, frozen=True)
class RolloutEvent:
    """A step of a rollout, for ever. `actor`: "auto", or who asked; `evidence`: JSON values."""

    id: str
    skill: str
    time_ms: int
    actor: str
    from_stage: str
    to_stage: str
    student: str
    reason: str
    evidence: Mapping[str, Any]


@dataclass(slots=True, frozen=True)
class Change:
    """A step to be written: the row as it shall be, the revision that it was decided on (0: there was none), what is told of it, and which
    version each alias means from now on ("" takes an alias away). `about`: the version that went from stage to stage, which after a step
    back is not the one that answers.
    """

    row: StoredRollout
    was: int
    actor: str
    from_stage: str
    reason: str
    evidence: Mapping[str, Any]
    aliases: Mapping[str, str]
    to_stage: str
    about: str


class RolloutTable:
    """The three tables. Thread-safe, as the engine is."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def all(self) -> dict[str, StoredRollout]:
        """Every skill's row."""
        from sqlalchemy import select

        from server.registry.schema import ROLLOUTS

        with self._connect() as connection:
            rows = connection.execute(select(ROLLOUTS)).all()
        return {r.skill: StoredRollout(r.skill, r.stage, r.percent, r.student, json.loads(r.state), r.revision, r.update_ms) for r in rows}

    def change(self, change: Change) -> bool:
        """Writes a step with its event and aliases, at once or not at all. False where somebody else was quicker."""
        from sqlalchemy.exc import IntegrityError

        from server.registry.schema import ROLLOUT_EVENTS, ROLLOUT_EVIDENCE, ROLLOUTS

        row, now = change.row, _now()
        values = {"stage": row.stage, "percent": row.percent, "student": row.student, "state": json.dumps(row.state)}
        values |= {"revision": row.revision, "update_ms": now}
        try:
            with self._connect() as connection:
                if change.was == 0:
                    connection.execute(ROLLOUTS.insert().values(skill=row.skill, **values))
                else:
                    where = (ROLLOUTS.c.skill == row.skill) & (ROLLOUTS.c.revision == change.was)
                    if not connection.execute(ROLLOUTS.update().where(where).values(**values)).rowcount:
                        return False
                event = {"id": secrets.token_hex(16), "skill": row.skill, "time_ms": now, "actor": change.actor[:128]}
                event |= {"from_stage": change.from_stage, "to_stage": change.to_stage, "student": change.about}
                connection.execute(ROLLOUT_EVENTS.insert().values(**event, reason=change.reason, evidence=json.dumps(change.evidence)))
                for alias, version in change.aliases.items():
                    _set_alias(connection, row.skill, alias, version, now)
                epoch = int(row.state.get("epoch", 0))
                old = (ROLLOUT_EVIDENCE.c.skill == row.skill) & (ROLLOUT_EVIDENCE.c.epoch < epoch - 1)
                connection.execute(ROLLOUT_EVIDENCE.delete().where(old))
        except IntegrityError:
            return False
        return True

    def note(self, skill: str, actor: str, stage: str, student: str, reason: str, evidence: Mapping[str, Any]) -> None:
        """An event that is no step: an alarm."""
        from server.registry.schema import ROLLOUT_EVENTS

        event = {
            "id": secrets.token_hex(16),
            "skill": skill,
            "time_ms": _now(),
            "actor": actor[:128],
            "from_stage": stage,
            "to_stage": stage,
        }
        with self._connect() as connection:
            connection.execute(ROLLOUT_EVENTS.insert().values(**event, student=student, reason=reason, evidence=json.dumps(evidence)))

    def events(self, skill: str, most: int = 100, after: tuple[int, str] | None = None) -> list[RolloutEvent]:
        """A skill's steps, newest first; `after`: time and id of the last one of the page before."""
        from sqlalchemy import select

        from server.registry.schema import ROLLOUT_EVENTS

        when, key = ROLLOUT_EVENTS.c.time_ms, ROLLOUT_EVENTS.c.id
        query = select(ROLLOUT_EVENTS).where(ROLLOUT_EVENTS.c.skill == skill)
        if after is not None:
            query = query.where((when < after[0]) | ((when == after[0]) & (key > after[1])))
        query = query.order_by(when.desc(), key).limit(most)
        with self._connect() as connection:
            rows = connection.execute(query).all()
        return [
            RolloutEvent(r.id, r.skill, r.time_ms, r.actor, r.from_stage, r.to_stage, r.student, r.reason, json.loads(r.evidence))
            for r in rows
        ]

    def put_evidence(self, skill: str, epoch: int, holder: str, sums: Mapping[str, Any]) -> None:
        """What one server has seen since a stage began, over what it had written before."""
        from sqlalchemy.exc import IntegrityError

        from server.registry.schema import ROLLOUT_EVIDENCE

        table, values = ROLLOUT_EVIDENCE, {"sums": json.dumps(sums), "update_ms": _now()}
        where = (table.c.skill == skill) & (table.c.epoch == epoch) & (table.c.holder == holder)
        with self._connect() as connection:
            if connection.execute(table.update().where(where).values(**values)).rowcount:
                return
        try:
            with self._connect() as connection:
                connection.execute(table.insert().values(skill=skill, epoch=epoch, holder=holder, **values))
        except IntegrityError:  # a holder has one writer; the row that appeared is its own
            pass

    def evidence(self, skill: str, epoch: int) -> dict[str, dict[str, Any]]:
        """What each server has written of a stage, by holder."""
        from sqlalchemy import select

        from server.registry.schema import ROLLOUT_EVIDENCE

        table = ROLLOUT_EVIDENCE
        query = select(table.c.holder, table.c.sums).where((table.c.skill == skill) & (table.c.epoch == epoch))
        with self._connect() as connection:
            return {row.holder: dict(json.loads(row.sums)) for row in connection.execute(query)}

    def aliases(self, skill: str) -> dict[str, str]:
        """Which version each alias of a skill means."""
        from sqlalchemy import select

        from server.registry.schema import ALIASES

        with self._connect() as connection:
            query = select(ALIASES.c.alias, ALIASES.c.version).where(ALIASES.c.skill == skill)
            return {row.alias: row.version for row in connection.execute(query)}

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        from sqlalchemy.exc import OperationalError

        try:
            with self._registry.engine().begin() as connection:
                yield connection
        except OperationalError as error:
            cause = str(error.orig).strip().splitlines()[0][:300]
            raise Unavailable(f"The registry's database does not answer: {cause}. Look at registry.url.", retry_after_s=5.0) from None


def shown(stage: str, percent: int) -> str:
    """A stage for people: a canary with its share."""
    return f"{stage} {percent}" if stage == "canary" else stage


def _set_alias(connection: Connection, skill: str, alias: str, version: str, now: int) -> None:
    from server.registry.schema import ALIASES

    where = (ALIASES.c.skill == skill) & (ALIASES.c.alias == alias)
    if not version:
        connection.execute(ALIASES.delete().where(where))
    elif not connection.execute(ALIASES.update().where(where).values(version=version, update_ms=now)).rowcount:
        connection.execute(ALIASES.insert().values(skill=skill, alias=alias, version=version, update_ms=now))


def _now() -> int:
    return time.time_ns() // 1_000_000
