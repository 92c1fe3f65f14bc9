"""A trainer that works on jobs: takes the oldest, runs it, says how it ended, takes the next. As many may run as there are machines.

Where one dies, its lease runs out and another takes the job up in the same folder (`training.path`, which they must share), from the last
checkpoint. Where one is told to stop, it gives its job back at the next step.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from server.config import Config
from server.errors import Cancelled, Unavailable, UnderstudyError
from server.logs import get
from server.registry.jobs import CANCELLED, FAILED, KINDS, QUEUED, Held, Job, JobError, JobStore
from server.registry.registry import Registry
from trainer.context import JobContext
from trainer.pulse import Pulse
from trainer.report import Report

# Kind of job -> module and function, imported when the first job of that kind comes.
_RUNS = {"train": ("trainer.train", "train"), "assess": ("trainer.assess", "assess"), "finetune": ("trainer.hosted.run", "finetune")}
_DEFAULT_BUDGET_S = 3600.0
_AGAIN_S = 0.5
WORK = "work"
Watch = Callable[[str, int, int], None]


@dataclass(slots=True, frozen=True)
class Ended:
    """How this trainer's work on a job ended. `state` queued: it was given back; "lost": it belongs to another trainer."""

    job: str
    state: str
    report: Report | None = None
    error: JobError | None = None


def new_holder() -> str:
    """A name for a trainer: of at most 64 characters, and nobody else's."""
    return f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(6)}"


def folder_of(config: Config, job: str) -> Path:
    """Where a job's curves and page are; what the method keeps, checkpoints above all, is in `work` within it."""
    return Path(config.training.path) / job


def run_job(config: Config, store: JobStore, job: Job, stop: threading.Event, watch: Watch | None = None) -> Ended:
    """Runs a job that its holder has leased, to one of its ends. Raises Unavailable where the registry cannot be told of it.

    `stop`: once set, the job is given back to the queue at its next step. `watch` is told of progress.
    """
    folder = folder_of(config, job.id)
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    with Pulse(store, job, job.holder, config.training.lease_s, folder) as pulse:
        pulse.watch = watch
        pulse.log(f"attempt {job.attempt} by {job.holder}" if job.attempt > 1 else f"begun by {job.holder}")
        ended = _published(store, job) or _attempt(config, job, pulse, stop)
        if ended.error is not None:
            pulse.log(f"{ended.error.reason}: {ended.error.message}")
        elif ended.report is not None:
            words = f"version {ended.report.version}" if ended.report.version else ended.report.reason
            pulse.log(f"{ended.state}: {words}" if words else ended.state)
    return _close(config, store, job, ended)


def _published(store: JobStore, job: Job) -> Ended | None:
    """What a trainer published that died before it could say so; it would find its own version in the way."""
    if job.attempt <= 1 or job.kind != "train":
        return None
    made = [one for one in store.registry.adapters(job.skill) if one.job_id == job.id]
    if not made:
        return None
    reason = "published by a trainer that died before it could tell"
    found = Report(job.skill, job.id, "succeeded", reason, made[0].version, made[0].kind, made[0].base, metrics=dict(made[0].metrics))
    return Ended(job.id, found.state, found)


def _attempt(config: Config, job: Job, pulse: Pulse, stop: threading.Event) -> Ended:
    settings = config.skills.get(job.skill)
    budget_s = (settings.train_budget_s if settings is not None else _DEFAULT_BUDGET_S) - pulse.spent_before_s
    context = JobContext(
        job.id,
        folder_of(config, job.id) / WORK,
        seed=int(job.spec.get("seed", 0)),
        attempt=job.attempt,
        deadline=time.monotonic() + max(0.0, budget_s),
        checkpoint_s=config.training.checkpoint_s,
        log=pulse.log,
        metric=pulse.metric,
        progress=pulse.progress,
        is_cancelled=lambda: stop.is_set() or pulse.held is not Held.YES,
    )
    try:
        report = _function(job.kind)(config, job.skill, context, job.spec)
        return Ended(job.id, report.state, report)
    except Cancelled:
        if pulse.held is Held.LOST:
            return Ended(job.id, "lost")
        return Ended(job.id, CANCELLED if pulse.held is Held.CANCELLED else QUEUED)
    except UnderstudyError as error:
        return Ended(job.id, FAILED, error=JobError(error.reason, error.message, dict(error.metadata)))
    except Exception as error:
        get("trainer").error("job failed", job=job.id, exc_info=error)
        return Ended(job.id, FAILED, error=_unforeseen(error))


def _close(config: Config, store: JobStore, job: Job, ended: Ended) -> Ended:
    """Tells the registry; the page is written before, so that whoever sees the end finds it."""
    if ended.state == "lost":
        return ended
    if ended.state == QUEUED:
        return ended if _told(lambda: store.release(job.id, job.holder), config) else Ended(job.id, "lost")
    report = ended.report.to_json() if ended.report is not None else {}
    try:
        from trainer.page import write_page

        write_page(folder_of(config, job.id), job, ended.state, report, ended.error, store.metrics(job.id))
    except Exception as error:
        get("trainer").error("the job's page was not written", job=job.id, exc_info=error)
    if not _told(lambda: store.end(job.id, job.holder, ended.state, report=report, error=ended.error), config):
        return Ended(job.id, "lost", ended.report)
    return ended


def _told(tell: Callable[[], bool], config: Config) -> bool:
    """Tells the registry, again and again for as long as the lease lasts while it does not answer. Raises Unavailable after that."""
    until = time.monotonic() + config.training.lease_s
    while True:
        try:
            return tell()
        except Unavailable:
            if time.monotonic() >= until:
                raise
            time.sleep(_AGAIN_S)


def _function(kind: str) -> Callable[[Config, str, JobContext, Mapping[str, Any]], Report]:
    module, name = _RUNS[kind]
    function: Callable[[Config, str, JobContext, Mapping[str, Any]], Report] = getattr(import_module(module), name)
    return function


def _unforeseen(error: Exception) -> JobError:
    """Our own mistake, or the machine's. The words of other errors may hold callers' texts, so only where it was is told."""
    if isinstance(error, OSError | MemoryError | ImportError):
        return JobError("INTERNAL", f"{type(error).__name__}: {str(error)[:500]}")
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return JobError("INTERNAL", f"{type(error).__name__} in {where}; the trainer's own log has the whole story.")


class Worker:
    """One trainer. `work` in the main thread; `stop` from a signal's handler or another thread."""

    def __init__(self, config: Config) -> None:
        self.holder = new_holder()
        self._config = config
        self._registry = Registry(config.registry)
        self._store = JobStore(self._registry)
        self._stop = threading.Event()
        self._log = get("trainer")

    def stop(self) -> None:
        """Ends the work; a job that runs is given back at its next step."""
        self._stop.set()

    def work(self, *, once: bool = False) -> int:
        """Works until `stop`, or with `once` until no job is left. Returns how many jobs it has ended."""
        from trainer.schedule import Schedules

        count = 0
        schedules = Schedules(self._config, self._registry)
        self._log.info("trainer ready", holder=self.holder, path=self._config.training.path)
        while not self._stop.is_set():
            job = None
            try:
                schedules.look()
                job = self._lease()
                if job is not None:
                    self._run(job)
                    count += 1
            except UnderstudyError as error:
                if once:
                    raise
                self._log.error("no work was done", error=error.message)
            if job is None:
                if once:
                    break
                self._stop.wait(self._config.training.poll_s)
        self._registry.close()
        return count

    def _lease(self) -> Job | None:
        training = self._config.training
        return self._store.lease(self.holder, training.lease_s, max_attempts=training.max_attempts, kinds=KINDS)

    def _run(self, job: Job) -> None:
        self._log.info("job begins", job=job.id, skill=job.skill, kind=job.kind, attempt=job.attempt)
        ended = run_job(self._config, self._store, job, self._stop)
        more = {"reason": ended.error.reason, "error": ended.error.message} if ended.error is not None else {}
        self._log.info("job ends", job=job.id, skill=job.skill, state=ended.state, **more)
