"""Writes audit events off the requests' path: in order, within moments, and again where the database was away."""

from __future__ import annotations

import logging
import queue
import threading
import time
from contextlib import suppress

from server.errors import UnderstudyError
from server.registry.audit import AuditEvent, AuditLog

_LOG = logging.getLogger(__name__)
_RETRY_S = 1.0
_MOST = 100_000  # events that wait for a database that is away
_BATCH = 500
_FORGET_S = 3600.0


class AuditWriter:
    """`put` is for the event loop, and never waits. The thread starts with the first event."""

    def __init__(self, log: AuditLog, *, keep_days: int = 0) -> None:
        self._log = log
        self._keep_days = keep_days
        self._queue: queue.SimpleQueue[AuditEvent | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lost = 0

    def put(self, event: AuditEvent) -> None:
        """Takes an event; the log says how many were lost where too many wait."""
        if self._queue.qsize() >= _MOST:
            if not self._lost:
                _LOG.error("the audit log cannot be written, and too many events wait: they are lost", extra={"method": event.method})
            self._lost += 1
            return
        self._queue.put(event)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="audit", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Writes what waits, once, and stops. Blocking."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()

    def _work(self) -> None:
        waiting: list[AuditEvent] = []
        ending = False
        forget = 0.0
        while True:
            if not ending:
                ending = self._take(waiting, _RETRY_S if waiting else _FORGET_S)
            waiting = self._write(waiting)
            if self._lost and not waiting:
                _LOG.error("events of the audit log were lost while it could not be written", extra={"events": self._lost})
                self._lost = 0
            if ending:
                if waiting:
                    _LOG.error("the audit log could not be written at the end", extra={"events": len(waiting)})
                return
            if waiting:
                time.sleep(_RETRY_S)
            elif time.monotonic() >= forget:
                forget = time.monotonic() + _FORGET_S
                with suppress(UnderstudyError):
                    self._log.forget(self._keep_days)

    def _take(self, waiting: list[AuditEvent], wait_s: float) -> bool:
        """Adds what has come to `waiting`; True at the end."""
        with suppress(queue.Empty):
            item = self._queue.get(timeout=wait_s)
            while item is not None and len(waiting) < _MOST:
                waiting.append(item)
                item = self._queue.get_nowait()
            return item is None
        return False

    def _write(self, waiting: list[AuditEvent]) -> list[AuditEvent]:
        """Writes them; returns those that could not be."""
        for start in range(0, len(waiting), _BATCH):
            try:
                self._log.add(waiting[start : start + _BATCH])
            except UnderstudyError:
                return waiting[start:]
            except Exception:  # our own mistake: to try for ever would keep all later events from being written
                _LOG.exception("writing to the audit log failed")
        return []
