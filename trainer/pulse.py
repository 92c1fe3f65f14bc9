"""The thread that speaks for a job while the job works: it renews the lease, and carries lines and curves to the registry."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from server.errors import UnderstudyError
from server.logs import get
from server.registry.jobs import Held, Job, JobStore, News, Point, now_ms
from trainer.curves import Events

_FLUSH_S = 0.5
_MOST_LINES = 10_000  # that wait while the registry does not answer; then the oldest are dropped
_MOST_POINTS = 100_000
_NAME = 64  # characters of a curve's name
SPENT = "spent.json"
POINTS = "points.jsonl"


class Pulse:
    """Use: `with Pulse(store, job, holder, lease_s, folder) as pulse:`; on leaving, what waits has been told.

    A holder that cannot reach the registry for as long as its lease has lost the job as far as it knows: another may have it.
    """

    def __init__(self, store: JobStore, job: Job, holder: str, lease_s: float, folder: Path) -> None:
        self._store = store
        self._job = job
        self._holder = holder
        self._lease_s = lease_s
        self._spent_file = folder / SPENT
        self._began = time.monotonic()
        self.spent_before_s = _spent(self._spent_file)
        self._lock = threading.Lock()
        self._lines: deque[tuple[int, str]] = deque(maxlen=_MOST_LINES)
        self._points: deque[Point] = deque(maxlen=_MOST_POINTS)
        self._progress: dict[str, tuple[int, int]] = dict(job.progress)
        self._progress_changed = False
        self._bad_numbers: set[str] = set()
        known = store.metrics(job.id)
        self._points.extend(_unheard(folder / POINTS, known))
        self._file = (folder / POINTS).open("a", buffering=1, encoding="utf-8")  # a line is one write, which a killed process has made
        self._file.write("\n")  # ends a line that a full disk or a power cut tore
        self._events = Events.open(folder / "tensorboard", known)
        self._done = threading.Event()
        self._last_beat = time.monotonic()
        self.held = Held.YES
        self.watch: Callable[[str, int, int], None] | None = None
        self._thread = threading.Thread(target=self._work, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._beat()
        self._events.close()
        self._file.close()

    def log(self, text: str) -> None:
        """Keeps a line."""
        with self._lock:
            self._lines.append((now_ms(), str(text).replace("\x00", "")))

    def metric(self, name: str, step: int, value: float) -> None:
        """Keeps a point. What is no finite number is named once in the log, and left out."""
        value, name = float(value), name[:_NAME]
        if not math.isfinite(value):
            if name not in self._bad_numbers:
                self._bad_numbers.add(name)
                self.log(f"{name} is {value} at step {step}; such points are left out")
            return
        point = Point(name, int(step), value, now_ms())
        with self._lock:
            self._points.append(point)
            with suppress(OSError):  # a full disk; the registry has the point
                self._file.write(json.dumps(point) + "\n")

    def progress(self, stage: str, done: int, total: int) -> None:
        """Says how far a stage is."""
        with self._lock:
            self._progress[stage] = (int(done), int(total))
            self._progress_changed = True
        if self.watch is not None:
            self.watch(stage, done, total)

    def _work(self) -> None:
        while not self._done.wait(_FLUSH_S):
            self._beat()

    def _beat(self) -> None:
        """One turn: sends what is new, or nothing but a sign of life when that is due."""
        news = self._take()
        silent_s = time.monotonic() - self._last_beat
        if not news and silent_s < self._lease_s / 3 and self.held is Held.YES and not self._done.is_set():
            return
        try:
            self.held = self._store.beat(self._job.id, self._holder, self._lease_s, news)
        except UnderstudyError as error:
            self._put_back(news)
            if silent_s > self._lease_s:
                self.held = Held.LOST
            get("trainer").warning("the registry does not hear", job=self._job.id, error=error.message)
            return
        self._last_beat = time.monotonic()
        self._events.write(news.points)
        _keep_spent(self._spent_file, self.spent_before_s + time.monotonic() - self._began)

    def _take(self) -> News:
        with self._lock:
            news = News(list(self._lines), list(self._points), dict(self._progress) if self._progress_changed else {})
            self._lines.clear()
            self._points.clear()
            self._progress_changed = False
        return news

    def _put_back(self, news: News) -> None:
        with self._lock:
            self._lines.extendleft(reversed(news.lines))
            self._points.extendleft(reversed(news.points))
            self._progress_changed |= bool(news.progress)


def _unheard(file: Path, known: Sequence[Point]) -> list[Point]:
    """Points that a killed trainer kept in its file and had no time to tell: its checkpoint may be later than they are."""
    if not file.exists():
        return []
    latest: dict[tuple[str, int], Point] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, TypeError):  # the last one may be torn
            point = Point(*json.loads(line))
            latest[point.name, point.step] = point
    told = {(point.name, point.step): point.value for point in known}
    return [point for key, point in latest.items() if told.get(key) != point.value]


def _spent(file: Path) -> float:
    """Seconds that attempts before this one have taken of the job's budget."""
    try:
        return float(json.loads(file.read_text())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _keep_spent(file: Path, seconds: float) -> None:
    draft = file.with_suffix(".tmp")
    try:
        draft.write_text(json.dumps({"seconds": round(seconds, 3)}))
        os.replace(draft, file)
    except OSError as error:
        get("trainer").warning("the time that is spent cannot be kept", place=str(file), error=str(error))
