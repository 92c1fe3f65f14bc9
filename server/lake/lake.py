"""The serving process's side of the lake: appends to the logs, and keeps a thread that syncs, seals and has segments converted."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from server.lake import schema
from server.lake.holding import Holding
from server.lake.ids import IdKey
from server.lake.keyring import LogKey
from server.lake.log import Log, sealed_segments
from server.lake.place import Place
from server.lake.stats import backlog

if TYPE_CHECKING:
    from server.config import Config
    from server.registry.registry import Registry

# A power cut loses at most the last so many seconds; a killed process loses nothing.
SYNC_S = 1.0
CONVERT_TIMEOUT_S = 120.0
# Records that a full disk refuses wait in memory, up to so many bytes: minutes of heavy traffic.
HOLD_BYTES = 64 << 20

_log = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class LakeCounters:
    """Records since the process began. `appended`: in the log; `held`: in memory now, because the disk refuses; `lost`: gone.

    `refusals`: appends that the file system refused; an alarm is due when it grows.
    """

    appended: int
    held: int
    lost: int
    refusals: int


class LakeObserver(Protocol):
    """Told of the lake's state once a second, on the lake's thread."""

    def lake_written(self, *, appended: int, held: int, lost: int, refusals: int) -> None:
        """See LakeCounters."""

    def lake_set_aside(self, damaged: int, rejected: int) -> None:
        """Damaged segments and files of rejected records that lie in the log's folder."""


class Lake:
    """Opened once a process; several processes may open one path. Appending is safe from any thread and never waits for a device.

    Args:
        path: folder of the lake, created when missing.
        flush_s: age in seconds at which a segment is sealed and converted.
        segment_bytes: size at which it is sealed whatever its age.
    """

    def __init__(self, path: Path, *, flush_s: float = 10.0, segment_bytes: int = 8 << 20, hold_bytes: int = HOLD_BYTES) -> None:
        self.path = path
        self.ids = IdKey.open(path / "id.key")
        self.appended = self.lost = self.refusals = 0
        self._flush_s = flush_s
        self._place = Place.at(path)
        self._logs = {name: Log(self._place.log(name), max_bytes=segment_bytes, max_age_s=flush_s) for name in schema.TABLES}
        self._holding = Holding(lambda table, frames: self._logs[table].append_frames(frames), hold_bytes)
        self._config: Config | None = None
        self._registry: Registry | None = None
        self._encrypted = False
        self._observer: LakeObserver | None = None
        self._key: LogKey | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._converting: threading.Thread | None = None
        self._compacting: subprocess.Popen[bytes] | None = None

    @classmethod
    def of(cls, config: Config, registry: Registry, *, observer: LakeObserver | None = None) -> Lake:
        """The configured lake, whose users' keys are in the registry. Raises InvalidArgument for a store that is not set up."""
        lake = cls(Path(config.lake.path), flush_s=config.lake.flush_s, segment_bytes=config.lake.segment_bytes)
        lake._place, lake._observer = Place.of(config.lake), observer
        lake._config, lake._registry, lake._encrypted = config, registry, config.lake.encrypt
        return lake

    def start(self) -> None:
        """Starts the thread. Blocking. Raises Unavailable where the lake is encrypted and the registry does not answer."""
        if self._encrypted and self._key is None:
            from server.registry.keys import UserKeys

            assert self._registry is not None, "a configured lake has its registry"
            self._key = LogKey(self.path, UserKeys(self._registry))
            for log in self._logs.values():
                log.seal_with(self._key.sealer.seal)
        self._thread = threading.Thread(target=self._work, name="lake", daemon=True)
        self._thread.start()

    def append(self, table: str, records: Iterable[Mapping[str, Any]]) -> bool:
        """Appends records, each with `time_ns`, to a table's log. True: they survive the death of this process.

        An answer that was paid for is delivered even when the disk is full, so this does not raise: what the file system refuses is held in
        memory, written when there is room again, and counted where it is lost. Feedback is not held: its sender is told, and can repeat it.
        """
        assert self._key is not None or not self._encrypted, "an encrypted lake takes records once started"
        kept = list(records)
        try:
            frames = self._logs[table].frames(kept)
        except (TypeError, ValueError):
            self.lost += len(kept)
            _log.exception("%d records for table %s are not JSON and are lost: a mistake of this program", len(kept), table)
            return False
        if not self._holding.records or table == schema.FEEDBACK:
            try:
                self._logs[table].append_frames(frames)
            except OSError as error:
                self._refused(error)
            else:
                self.appended += len(kept)
                return True
        if table != schema.FEEDBACK and not self._holding.add(table, frames, len(kept)):
            self.lost += len(kept)
        return False

    def counters(self) -> LakeCounters:
        """Counts so far; costs nothing."""
        return LakeCounters(self.appended, self._holding.records, self.lost, self.refusals)

    def close(self) -> None:
        """Seals and converts what is left, and waits for it. What could not be converted is taken up at the next start."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._converting is not None:
            self._converting.join()
        self._drain()
        self.lost += self._holding.records
        if self._holding.records:
            _log.error("the lake's log takes no records still: %d that were held are lost", self._holding.records)
        for log in self._logs.values():
            try:
                log.close()
            except OSError as error:
                _log.error("a log segment stays open (%s); the next start takes it up", error)
        if self._key is not None:
            self._key.release()
        self._convert()
        if self._compacting is not None:
            self._compacting.terminate()
            self._compacting.wait()

    def _refused(self, error: OSError) -> None:
        self.refusals += 1
        if self._holding.alarm_due():
            _log.error(
                "ALARM: the lake's log takes no records (%s). Answers go out; %d records wait in memory, %d are lost. Free space in %s.",
                error,
                self._holding.records,
                self.lost,
                self.path,
            )

    def _drain(self) -> None:
        if not self._holding.records:
            return
        try:
            written = self._holding.drain()
        except OSError as error:
            self._refused(error)
            return
        self.appended += written
        _log.warning("the lake's log takes records again: those that were held are written (%d), %d were lost", written, self.lost)

    def _work(self) -> None:
        next_convert = time.monotonic()  # at once: segments of a process that died may wait
        while not self._stop.wait(SYNC_S if self._flush_s > SYNC_S else self._flush_s):
            try:
                self._drain()
                sealed = sum([self._tick(log) for log in self._logs.values()])
                if (sealed or time.monotonic() >= next_convert) and not (self._converting and self._converting.is_alive()):
                    # Beside this thread: a slow conversion must hold up neither syncing nor what a full disk made wait.
                    self._converting = threading.Thread(target=self._convert_and_tell, name="lake-convert", daemon=True)
                    self._converting.start()
                    next_convert = time.monotonic() + self._flush_s
                if self._observer is not None:
                    self._observer.lake_written(**asdict(self.counters()))
            except Exception:
                _log.exception("the lake's background work failed; it goes on")

    def _convert_and_tell(self) -> None:
        try:
            self._convert()
            if self._observer is not None:
                found = backlog(self._place)
                self._observer.lake_set_aside(found.damaged, found.rejected)
        except Exception:
            _log.exception("a conversion of the lake's log failed; the next one takes it up")

    def _tick(self, log: Log) -> int:
        try:
            return log.tick()
        except OSError as error:
            self._refused(error)
            return 0

    def _convert(self) -> None:
        folders = [self._place.log(name) for name in schema.TABLES]
        keys = self.path / "log" / "keys"
        idle = self._stop.is_set() and keys.exists() and any(keys.iterdir())
        if not idle and not any(sealed_segments(folder) for folder in folders):
            return
        command, given = self._command()
        try:
            done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            _log.error("log segments stay as they are: the converter did not run to its end: %s", error)
            return
        for line in done.stderr.splitlines()[-20:]:
            _log.error("converter: %s", line[:2000])
        if done.returncode:
            _log.error("log segments stay as they are: the converter failed with status %d", done.returncode)
        elif json.loads(done.stdout)["crowded"] and not self._stop.is_set():
            self._compact()

    def _compact(self) -> None:
        """Has small files joined beside the conversions, by one process at a time."""
        if self._compacting is not None and self._compacting.poll() is None:
            return
        command, given = self._command("--compact")
        quiet = subprocess.DEVNULL
        self._compacting = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
        assert self._compacting.stdin is not None
        self._compacting.stdin.write(given.encode())
        self._compacting.stdin.close()

    def _command(self, *more: str) -> tuple[list[str], str]:
        """The converter's command line and its standard input."""
        start = [sys.executable, "-m", "server.lake.convert"]
        if self._config is None:
            return [*start, str(self.path), *more], ""
        sections = {name: getattr(self._config, name).model_dump(mode="json") for name in ("lake", "registry")}
        return [*start, "-", *more], json.dumps(sections)
