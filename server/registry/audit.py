"""The audit log: every call that changed something, and every one that was refused for want of a role. Rows are only added, and after a
time taken away.
"""

from __future__ import annotations

import itertools
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.registry.registry import reaching

if TYPE_CHECKING:
    from server.registry.registry import Registry

_KEY = re.compile(r"(und_[a-z0-9]{8})_[A-Za-z0-9_-]+")
_HOLDER = secrets.token_hex(6)
_NUMBERS = itertools.count()


@dataclass(slots=True, frozen=True)
class AuditEvent:
    """One call. `id` begins with the time and, within a process, goes on by number: its order is that of the events."""

    id: str
    time_ms: int
    actor: str
    method: str
    resource: str
    code: str
    request_id: str = ""
    peer: str = ""


def event_of(actor: str, method: str, resource: str, code: str, *, request_id: str = "", peer: str = "") -> AuditEvent:
    """An event of now, its texts cut to what the table takes. A key that somebody gave for a name loses its secret."""
    when = time.time_ns() // 1_000_000
    key = f"{when:012x}{next(_NUMBERS) & 0xFFFFFFFF:08x}{_HOLDER}"
    clean = _KEY.sub(r"\1", resource.encode("utf-8", "replace").decode().replace("\x00", ""))[:256]
    return AuditEvent(key, when, actor[:64], method[:160], clean, code[:32], request_id[:128], peer[:128])


class AuditLog:
    """Blocking; for threads and commands, never the event loop. Methods raise Unavailable where the database does not answer."""

    def __init__(self, registry: Registry, *, clock: Callable[[], int] | None = None) -> None:
        self._registry = registry
        self._clock = clock or (lambda: time.time_ns() // 1_000_000)

    def add(self, events: Sequence[AuditEvent]) -> None:
        """Writes events, all or none. Those that are there already stay: what may have been written can be written again."""
        from dataclasses import asdict

        from server.registry.jobs import inserting
        from server.registry.schema import AUDIT_EVENTS

        with reaching(), self._registry.engine().begin() as connection:
            connection.execute(inserting(connection, AUDIT_EVENTS).on_conflict_do_nothing(), [asdict(event) for event in events])

    def page(self, limit: int, *, before: str = "", actor: str = "", since_ms: int | None = None) -> list[AuditEvent]:
        """The newest first; `before`: id of the last one that was seen."""
        from sqlalchemy import select

        from server.registry.schema import AUDIT_EVENTS as TABLE

        query: Any = select(TABLE).order_by(TABLE.c.id.desc()).limit(limit)
        query = query.where(TABLE.c.id < before) if before else query
        query = query.where(TABLE.c.actor == actor) if actor else query
        query = query.where(TABLE.c.id >= f"{max(since_ms, 0):012x}") if since_ms is not None else query
        with reaching(), self._registry.engine().connect() as connection:
            return [AuditEvent(*row) for row in connection.execute(query)]

    def forget(self, keep_days: int) -> int:
        """Deletes what is older; returns how many there were. 0 keeps all."""
        from server.registry.schema import AUDIT_EVENTS as TABLE

        if not keep_days:
            return 0
        with reaching(), self._registry.engine().begin() as connection:
            gone = connection.execute(TABLE.delete().where(TABLE.c.time_ms < self._clock() - keep_days * 86_400_000))
            return int(gone.rowcount)
