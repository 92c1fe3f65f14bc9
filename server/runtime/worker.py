"""The loop that every engine runs: take -> run -> deliver, on its own threads, with one wake-up of the event loop a batch.

An engine adds what a batch means: how pieces become feeds, and outputs become rows.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from server.core import Call, Timings
from server.errors import Cancelled, DeadlineExceeded, Draining, InternalError, UnderstudyError
from server.runtime.observer import BatchReport, NullObserver, Observer
from server.runtime.queue import QueueLimits, Taken, WorkQueue
from server.runtime.sessions import Session, Stop

log = logging.getLogger(__name__)
P = TypeVar("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How batches are formed. `token_budget`: tokens a batch, padding included where the form has it; one longer sequence runs alone.

    On CPUs the cost of a token is flat from a few dozen tokens on, so a larger batch only makes everyone in it wait longer.
    """

    token_budget: int = 512
    max_sequences: int = 256
    lanes: int = 1  # batches that may run at once, each on a thread of its own
    limits: QueueLimits = field(default_factory=QueueLimits)


class Flight(Generic[P, R]):
    """A call's pieces on their way through batches. `rows`, `left`, `timings` and `done` belong to the event loop."""

    __slots__ = ("abandoned", "arrival", "call", "done", "left", "loop", "pieces", "rows", "sizes", "timings")

    def __init__(self, pieces: Sequence[P], sizes: Sequence[int], call: Call) -> None:
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.pieces = pieces
        self.sizes = sizes
        self.call = call
        self.abandoned = False
        self.rows: list[R | UnderstudyError | None] = [None] * len(pieces)
        self.left = len(pieces)
        self.timings = Timings()
        self.arrival = time.monotonic()

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.abandoned or self.call.cancelled

    def fail(self, error: UnderstudyError) -> None:
        """Ends the whole call with an error, once."""
        if not self.done.done():
            self.done.set_exception(error)


Piece = tuple[Flight[P, R], int]


@dataclass(slots=True)
class Outcome(Generic[R]):
    """One row or error a piece, in the batch's order, and what the run cost: `tokens` with padding (0: no tokens), seconds."""

    rows: Sequence[R | UnderstudyError]
    tokens: int
    run_s: float
    post_s: float


class Worker(ABC, Generic[P, R]):
    """A model's queue and its lanes: threads that each take a batch and run it.

    The session belongs to who opened it, and must stay open until `close` has returned.
    """

    def __init__(
        self, name: str, version: str, session: Session, settings: EngineSettings, observer: Observer | None, *, padded: bool = False
    ) -> None:
        self.name = name
        self.version = version
        self.settings = settings
        self._session = session
        self._observer: Observer = observer or NullObserver()
        self._queue: WorkQueue[Piece[P, R]] = WorkQueue(name, settings.limits, padded=padded)
        # What each lane runs now; a lane writes its own place alone.
        self._running: list[tuple[list[Piece[P, R]], Stop] | None] = [None] * settings.lanes
        self._threads = [
            threading.Thread(target=self._serve, args=(lane,), name=f"engine-{name}-{version}-{lane}", daemon=True)
            for lane in range(settings.lanes)
        ]
        for thread in self._threads:
            thread.start()

    @abstractmethod
    def _execute(self, batch: list[Piece[P, R]], stop: Stop, lane: int) -> Outcome[R]:
        """Runs a batch on the thread of `lane`. What it raises fails the batch's calls, after each had a try alone."""

    @property
    def waiting(self) -> int:
        """Sequences that wait."""
        return self._queue.waiting

    async def submit(self, pieces: Sequence[P], sizes: Sequence[int], call: Call) -> Flight[P, R]:
        """Runs all pieces and returns the flight with a row or an error for each.

        Raises DeadlineExceeded, Overloaded, Draining, RequestTooLarge. When the awaiting task is cancelled, what waits is withdrawn, and
        a run in progress is ended if it works for nobody else.
        """
        flight: Flight[P, R] = Flight(pieces, sizes, call)
        if not pieces:
            return flight
        if call.deadline is not None and call.deadline <= flight.arrival:
            self._observer.rejected(self.name, DeadlineExceeded.reason)
            raise _late("queue")
        call.stage = "queue"
        try:
            tickets = self._queue.put([(flight, i) for i in range(len(pieces))], sizes, call)
        except UnderstudyError as error:
            self._observer.rejected(self.name, error.reason)
            raise
        self._observer.queue_depth(self.name, self._queue.waiting)
        try:
            await flight.done
        except asyncio.CancelledError:
            self._abandon(flight, tickets)
            raise
        return flight

    async def close(self, *, drain: bool = True) -> None:
        """Refuses new calls; with `drain` finishes the accepted ones, without it fails those that wait; returns once the threads ended."""
        left = self._queue.close(drain=drain)
        if left:
            error = Draining(f"model {self.name!r} was stopped before this call ran; send it again, to another replica if there is one")
            self._fail({flight for flight, _ in left}, error)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _abandon(self, flight: Flight[P, R], tickets: Sequence[int]) -> None:
        flight.abandoned = True
        withdrawn = self._queue.cancel(tickets)
        if withdrawn:
            self._observer.skipped(self.name, "cancelled", len(withdrawn))
            self._observer.queue_depth(self.name, self._queue.waiting)
        for running in self._running:
            if running is not None and all(other.gone for other, _ in running[0]):
                running[1].set()

    # On a lane's thread.

    def _serve(self, lane: int) -> None:
        while (taken := self._queue.take(self.settings.token_budget, self.settings.max_sequences)) is not None:
            try:
                self._process(taken, lane)
            except Exception as error:
                # A mistake of ours or of an observer's: the thread goes on, and whoever was not answered yet hears of it.
                log.exception("engine %s failed outside of a run", self.name)
                flights = {flight for flight, _ in (*taken.batch, *taken.expired)}
                self._fail(flights, InternalError(f"model {self.name!r} failed on a batch: {error}"))
            del taken  # the next `take` may block for long: hold nothing of this batch meanwhile

    def _process(self, taken: Taken[Piece[P, R]], lane: int) -> None:
        began = time.monotonic()
        if taken.expired:
            self._expire(taken.expired)
        batch = [piece for piece in taken.batch if not piece[0].gone]
        if len(batch) < len(taken.batch):
            self._observer.skipped(self.name, "cancelled", len(taken.batch) - len(batch))
        if batch:
            self._deliver(batch, self._attempt(batch, lane), began)

    def _attempt(self, batch: list[Piece[P, R]], lane: int) -> Outcome[R]:
        stop = self._session.stop()
        for flight, _ in batch:
            flight.call.stage = "run"
        self._running[lane] = (batch, stop)
        start = time.monotonic()
        try:
            return self._execute(batch, stop, lane)
        except Exception as error:
            known = error if isinstance(error, UnderstudyError) else InternalError(f"model {self.name!r} failed on a batch: {error}")
            if isinstance(known, Cancelled):
                return Outcome([known] * len(batch), 0, time.monotonic() - start, 0.0)
            if not isinstance(error, UnderstudyError):
                log.exception("engine %s failed on a batch of %d", self.name, len(batch))
            self._observer.run_failed(self.name, known.reason)
            known.__cause__ = error if error is not known else None
        finally:
            self._running[lane] = None
        return self._one_by_one(batch, known, time.monotonic() - start, lane)

    def _one_by_one(self, batch: list[Piece[P, R]], error: UnderstudyError, seconds: float, lane: int) -> Outcome[R]:
        """After a failed run: each call's pieces alone, so that only the call at fault fails."""
        shares: dict[Flight[P, R], list[int]] = defaultdict(list)
        for i, (flight, _) in enumerate(batch):
            shares[flight].append(i)
        rows: list[R | UnderstudyError] = [error] * len(batch)
        outcome = Outcome[R](rows, 0, seconds, 0.0)
        if len(shares) == 1:
            return outcome
        for places in shares.values():
            alone = self._attempt([batch[i] for i in places], lane)
            for place, row in zip(places, alone.rows, strict=True):
                rows[place] = row
            outcome.tokens += alone.tokens
            outcome.run_s += alone.run_s
            outcome.post_s += alone.post_s
        return outcome

    def _deliver(self, batch: list[Piece[P, R]], outcome: Outcome[R], began: float) -> None:
        now = time.monotonic()
        groups: dict[asyncio.AbstractEventLoop, list[tuple[Flight[P, R], int, R | UnderstudyError]]] = defaultdict(list)
        for (flight, index), row in zip(batch, outcome.rows, strict=True):
            groups[flight.loop].append((flight, index, row))
        timings = Timings(run=outcome.run_s, post=outcome.post_s)
        for loop, done in groups.items():
            _call_soon(loop, partial(_arrive, done, timings, began, now))
        cost = sum(flight.sizes[index] for flight, index in batch)
        fill = max(cost, outcome.tokens) / self.settings.token_budget
        busy = 1 + sum(running is not None for running in self._running)  # this lane's run has just ended
        self._queue.rate.record(cost, (now - began) / busy, max(fill, len(batch) / self.settings.max_sequences))
        self._observer.batch_done(
            BatchReport(
                model=self.name,
                version=self.version,
                sequences=len(batch),
                tokens=outcome.tokens,
                fill=fill,
                queue_waits_s=[began - flight.arrival for flight, _ in batch],
                run_s=outcome.run_s,
                post_s=outcome.post_s,
            )
        )
        self._observer.queue_depth(self.name, self._queue.waiting)

    def _expire(self, expired: list[Piece[P, R]]) -> None:
        self._observer.skipped(self.name, "expired", len(expired))
        self._fail({flight for flight, _ in expired}, _late("queue"))

    def _fail(self, flights: set[Flight[P, R]], error: UnderstudyError) -> None:
        for flight in flights:
            _call_soon(flight.loop, partial(flight.fail, error))


def _arrive(done: list[tuple[Flight[P, R], int, R | UnderstudyError]], timings: Timings, began: float, now: float) -> None:
    """On the event loop: a batch's rows reach their calls."""
    for flight, index, row in done:
        flight.rows[index] = row
        flight.left -= 1
        flight.timings.queue = max(flight.timings.queue, began - flight.arrival)
        flight.timings.run = max(flight.timings.run, timings.run)
        flight.timings.post = max(flight.timings.post, timings.post)
        if flight.left == 0 and not flight.done.done():
            if flight.call.deadline is not None and flight.call.deadline < now:
                flight.done.set_exception(_late("run"))
            else:
                flight.done.set_result(None)


def _late(stage: str) -> DeadlineExceeded:
    where = {"queue": "while it waited for its turn", "run": "while the model ran"}[stage]
    return DeadlineExceeded(f"the deadline passed {where}; give the call more time, or send less at once", stage=stage)


def _call_soon(loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(action)
    except RuntimeError:  # the loop was closed: its callers are gone
        log.debug("results for a closed event loop were dropped")
