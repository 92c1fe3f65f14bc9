"""Records that the disk refused, in memory until it takes them again: bounded, in order, and counted where they do not fit."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

ALARM_S = 60.0


class Holding:
    """Thread-safe. `write(table, frames)` raises OSError while the disk refuses."""

    def __init__(self, write: Callable[[str, bytes], None], max_bytes: int) -> None:
        self._write = write
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._waiting: deque[tuple[str, bytes, int]] = deque()
        self._bytes = 0
        self.records = 0  # that wait now; read without the lock
        self._next_alarm = 0.0

    def add(self, table: str, frames: bytes, records: int) -> bool:
        """Takes records, or False where there is no room."""
        with self._lock:
            if self._bytes + len(frames) > self._max_bytes:
                return False
            self._waiting.append((table, frames, records))
            self._bytes += len(frames)
            self.records += records
            return True

    def drain(self) -> int:
        """Writes what waits, in order; returns how many records. Raises OSError at the first that is refused, which stays."""
        written = 0
        while True:
            with self._lock:
                if not self._waiting:
                    return written
                table, frames, records = self._waiting[0]
                self._write(table, frames)
                self._waiting.popleft()
                self._bytes -= len(frames)
                self.records -= records
                written += records

    def alarm_due(self) -> bool:
        """Whether a minute has passed since it was last true."""
        now = time.monotonic()
        with self._lock:
            if now < self._next_alarm:
                return False
            self._next_alarm = now + ALARM_S
            return True
