"""The serving process's side of the lake: appends to the logs, and keeps a thread that syncs, seals and has segments converted."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from server.lake import schema
from server.lake.ids import IdKey
from server.lake.log import Log, sealed_segments
from server.lake.table import log_folder

# A power cut loses at most the last so many seconds; a killed process loses nothing.
SYNC_S = 1.0
CONVERT_TIMEOUT_S = 120.0

_log = logging.getLogger(__name__)


class Lake:
    """Opened once a process; several processes may open one path. Appending is safe from any thread and never waits for a device.

    Args:
        path: folder of the lake, created when missing.
        flush_s: age in seconds at which a segment is sealed and converted.
        segment_bytes: size at which it is sealed whatever its age.
    """

    def __init__(self, path: Path, *, flush_s: float = 10.0, segment_bytes: int = 8 << 20) -> None:
        self.path = path
        self.ids = IdKey.open(path / "id.key")
        self.lost = 0  # records that the file system refused
        self._flush_s = flush_s
        self._logs = {name: Log(log_folder(path, name), max_bytes=segment_bytes, max_age_s=flush_s) for name in schema.TABLES}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._work, name="lake", daemon=True)
        self._thread.start()

    def append(self, table: str, records: Iterable[Mapping[str, Any]]) -> bool:
        """Appends records, each with `time_ns`, to a table's log. False, and an error in our own log, where the file system refuses.

        An answer that was paid for is delivered even when the disk is full, so this does not raise.
        """
        kept = list(records)
        try:
            self._logs[table].append(kept)
        except OSError as error:
            self.lost += len(kept)
            _log.error("the lake's log takes no records (%s): %d lost so far", error, self.lost)
            return False
        return True

    def close(self) -> None:
        """Seals and converts what is left, and waits for it. What could not be converted is taken up at the next start."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for log in self._logs.values():
            log.close()
        self._convert()

    def _work(self) -> None:
        next_convert = time.monotonic()  # at once: segments of a process that died may wait
        while not self._stop.wait(SYNC_S if self._flush_s > SYNC_S else self._flush_s):
            try:
                sealed = sum(log.tick() for log in self._logs.values())
                if sealed or time.monotonic() >= next_convert:
                    self._convert()
                    next_convert = time.monotonic() + self._flush_s
            except Exception:
                _log.exception("the lake's background work failed; it goes on")

    def _convert(self) -> None:
        if not any(sealed_segments(log_folder(self.path, name)) for name in schema.TABLES):
            return
        command = [sys.executable, "-m", "server.lake.convert", str(self.path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            _log.error("log segments stay as they are: the converter did not run to its end: %s", error)
            return
        if done.returncode:
            _log.error("log segments stay as they are: the converter failed: %s", done.stderr[-2000:])
