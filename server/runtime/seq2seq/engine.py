"""The loop of translation and summarization: texts join when there is room, all beams of all texts step together, answers leave.

admit (encode what waits) -> step (one token a beam) -> settle (answers, dropped beams), on one thread. Rows are unpadded and independent
of each other, so a text may join at any step, whatever the age of the others. Memory is two pools of a size that is known at start.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from server.core import Call, FloatArray, IntArray, Timings
from server.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    InternalError,
    OutOfMemory,
    Overloaded,
    RequestTooLarge,
    UnderstudyError,
)
from server.runtime.manifest import Seq2Seq
from server.runtime.observer import BatchReport, NullObserver, Observer
from server.runtime.queue import QueueLimits
from server.runtime.seq2seq.beam import Answer, Row, Search
from server.runtime.seq2seq.pools import Places, SlotPool, Slots
from server.runtime.seq2seq.rules import Rules
from server.runtime.sessions import Session

log = logging.getLogger(__name__)
_CLEAN_EVERY = 16  # steps after which the slots that no beam refers to any more are given back
Outcome = Answer | UnderstudyError


@dataclass(frozen=True, slots=True)
class Seq2SeqSettings:
    """`rows`: beams that step together at most. `encoder_tokens`: source tokens that join in one step at most (a longer text joins alone).

    `pool_bytes`: of both pools together; memory is touched only as far as it was ever used.
    """

    rows: int = 128
    encoder_tokens: int = 2048
    pool_bytes: int = 1 << 30
    limits: QueueLimits = field(default_factory=lambda: QueueLimits(max_sequences=1024))


class Flight:
    """A call's texts on their way. `outcomes`, `left` and `timings` belong to the event loop."""

    __slots__ = ("abandoned", "arrival", "call", "done", "left", "loop", "outcomes", "timings")

    def __init__(self, count: int, call: Call) -> None:
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.call = call
        self.abandoned = False
        self.outcomes: list[Outcome | None] = [None] * count
        self.left = count
        self.timings = Timings()
        self.arrival = time.monotonic()

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.abandoned or self.call.cancelled


@dataclass(slots=True, eq=False)
class _Text:
    """One text from its arrival to its answer. `table`: int32[beams, steps], the slots of each beam's positions."""

    number: int
    flight: Flight
    index: int
    source: IntArray
    rules: Rules
    search: Search
    place: int = -1
    table: Slots = field(default_factory=lambda: np.zeros((1, 16), np.int32))
    admitted: float = 0.0


class Seq2SeqEngine:
    """Two loaded graphs. Made and used on the event loop; the sessions belong to who opened them, and outlive it."""

    def __init__(
        self,
        name: str,
        sessions: tuple[Session, Session],
        spec: Seq2Seq,
        settings: Seq2SeqSettings | None = None,
        observer: Observer | None = None,
        *,
        version: str = "",
        max_source: int = 512,
    ) -> None:
        self.name = name
        self.version = version
        self.settings = settings or Seq2SeqSettings()
        self._encoder, self._decoder = sessions
        self._spec = spec
        self._observer: Observer = observer or NullObserver()
        width = 2 * spec.layers * spec.heads * spec.head_dim
        half = self.settings.pool_bytes // (2 * 4 * width)
        places = max(max_source, min(half, self.settings.rows * max_source))
        slots = max(self.settings.rows, min(half, self.settings.rows * (spec.max_output_tokens + 1)))
        self._memory: FloatArray = np.empty((places, width), np.float32)
        self._past: FloatArray = np.empty((slots, width), np.float32)
        self._places, self._slots = Places(places), SlotPool(slots)
        self._waiting: list[_Text] = []
        self._running: list[_Text] = []
        self._ready = threading.Condition(threading.Lock())
        self._closed = False
        self._numbers = 0
        self._steps = 0
        self._text_s = 0.0  # moving average of the seconds between two answers while texts wait
        self._answered = time.monotonic()
        self._encoder_inputs = {one.name for one in self._encoder.inputs}
        self._decoder_inputs = {one.name for one in self._decoder.inputs}
        self._thread = threading.Thread(target=self._serve, name=f"seq2seq {name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Texts that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts that are being answered."""
        return len(self._running)

    async def run(self, sources: Sequence[IntArray], rules: Rules, call: Call) -> Flight:
        """An outcome a source, in order. Cancelling the task withdraws it.

        Raises DeadlineExceeded, Overloaded, RequestTooLarge, Draining, Cancelled.
        """
        flight = Flight(len(sources), call)
        if not sources:
            return flight
        call.stage = "queue"
        try:
            self._put(sources, rules, flight)
        except UnderstudyError as error:
            self._observer.rejected(self.name, error.reason)
            raise
        try:
            await flight.done
        except asyncio.CancelledError:
            flight.abandoned = True
            with self._ready:
                self._ready.notify()
            raise
        return flight

    def _put(self, sources: Sequence[IntArray], rules: Rules, flight: Flight) -> None:
        remaining = flight.call.remaining()
        if remaining is not None and remaining <= 0:
            raise _late("queue")
        limit = self.settings.limits.max_sequences
        if rules.num_beams > self.settings.rows:
            raise RequestTooLarge(
                f"{rules.num_beams} beams were asked of model {self.name!r}, which runs {self.settings.rows}; ask for fewer"
            )
        if len(sources) > limit:
            raise RequestTooLarge(
                f"one request of {len(sources)} texts is more than model {self.name!r} lets wait ({limit}); split it", limit=limit
            )
        with self._ready:
            if self._closed:
                raise Draining(f"model {self.name!r} is being stopped; send the request again, to another replica if there is one")
            wait = self._text_s * len(self._waiting)
            patience = min(self.settings.limits.max_wait_s, wait if remaining is None else remaining)
            if len(self._waiting) + len(sources) > limit or wait > patience:
                retry = min(30.0, max(0.02, wait - patience if wait > patience else self._text_s * len(sources)))
                raise Overloaded(
                    f"model {self.name!r} has too much work: {len(self._waiting)} texts wait; try again in {retry:.2f} s, or add replicas",
                    retry_after_s=retry,
                    model=self.name,
                )
            for index, source in enumerate(sources):
                self._numbers += 1
                search = Search(rules, source.tolist(), self._spec.vocabulary)
                self._waiting.append(_Text(self._numbers, flight, index, source, rules, search))
            # The urgent first; among equals the order of arrival.
            self._waiting.sort(key=lambda text: (text.flight.call.priority, text.number))
            self._ready.notify()
        self._observer.queue_depth(self.name, len(self._waiting))

    async def close(self, *, drain: bool = True) -> None:
        """Refuses new calls; with `drain` finishes the accepted ones, else fails them; returns once the thread ended."""
        with self._ready:
            self._closed = True
            if not drain:
                left, self._waiting = [*self._waiting, *self._running], []
                error = Draining(
                    f"model {self.name!r} was stopped before this call was done; send it again, to another replica if there is one"
                )
                for text in left:
                    text.flight.abandoned = True
                for flight in {text.flight for text in left}:
                    _call_soon(flight.loop, partial(_fail, flight, error))
            self._ready.notify()
        await asyncio.to_thread(self._thread.join)

    # On the engine's thread.

    def _serve(self) -> None:
        while self._wait():
            try:
                self._drop_gone()
                self._admit()
                if self._running:
                    self._step()
            except Exception as error:
                # Whatever it was, those who were part of it hear of it, and the loop goes on.
                known = error if isinstance(error, UnderstudyError) else InternalError(f"model {self.name!r} failed on a step: {error}")
                if not isinstance(error, UnderstudyError):
                    log.exception("engine %s failed on a step of %d texts", self.name, len(self._running))
                self._observer.run_failed(self.name, known.reason)
                for text in [*self._running]:
                    self._leave(text, known)

    def _wait(self) -> bool:
        with self._ready:
            while not self._running and not self._waiting and not self._closed:
                self._ready.wait()
            return bool(self._running or self._waiting)

    def _drop_gone(self) -> None:
        now = time.monotonic()
        with self._ready:
            late = [text for text in self._waiting if _over(text, now)]
            if late:
                self._waiting = [text for text in self._waiting if not _over(text, now)]
        for text in late:
            self._observer.skipped(self.name, "cancelled" if text.flight.gone else "expired", 1)
            self._tell(text, _gone_error(text, "queue"))
        for text in [text for text in self._running if _over(text, now)]:
            self._leave(text, _gone_error(text, "run"))

    def _admit(self) -> None:
        """Encodes the texts that there is room for: rows for their beams, places for what the encoder gives, one batch of tokens."""
        rows = sum(text.rules.num_beams for text in self._running)
        batch: list[_Text] = []
        tokens = 0
        with self._ready:
            while self._waiting:
                text = self._waiting[0]
                size = len(text.source)
                full = rows + text.rules.num_beams > self.settings.rows or (batch and tokens + size > self.settings.encoder_tokens)
                place = None if full else self._places.take(size)
                if place is None:
                    break
                text.place = place
                rows += text.rules.num_beams
                tokens += size
                batch.append(self._waiting.pop(0))
        if batch:
            self._running += batch
            self._encode(batch, tokens)

    def _encode(self, batch: list[_Text], tokens: int) -> None:
        began = time.monotonic()
        lengths = [len(text.source) for text in batch]
        feeds = {
            "input_ids": np.concatenate([text.source for text in batch]),
            "position_ids": np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]),
            "cu_seqlens": np.cumsum([0, *lengths], dtype=np.int32),
        }
        try:
            memory = self._encoder.run({name: feeds[name] for name in self._encoder_inputs}, ["memory"])[0]
        except UnderstudyError as error:
            self._observer.run_failed(self.name, error.reason)
            for text in batch:
                self._leave(text, error)
            return
        start = 0
        for text, length in zip(batch, lengths, strict=True):
            self._memory[text.place : text.place + length] = memory[start : start + length]
            start += length
            text.admitted = began
            text.flight.call.stage = "run"
        waits = [began - text.flight.arrival for text in batch]
        ran = time.monotonic() - began
        fill = tokens / self.settings.encoder_tokens
        self._observer.batch_done(BatchReport(self.name, self.version, len(batch), tokens, fill, waits, ran, 0.0))
        self._observer.queue_depth(self.name, len(self._waiting))

    def _step(self) -> None:
        self._make_room()
        texts = self._running
        if not texts:
            return
        feeds, bounds = self._feeds(texts)
        logits, lse, values, ids = self._decoder.run(feeds, ["logits", "lse", "values", "ids"])
        finite = np.isfinite(lse)
        lses, best, tokens = lse.tolist(), values.tolist(), ids.tolist()
        for text, first, last in zip([*texts], bounds, bounds[1:], strict=False):
            if not finite[first:last].all():
                self._leave(text, InternalError(f"model {self.name!r} computed numbers that are not finite"))
                continue
            sources = text.search.advance([Row(best[i], tokens[i], lses[i], logits[i]) for i in range(first, last)])
            if sources is None:
                self._leave(text, text.search.answer())
            else:
                length = text.search.length - 1
                kept = np.zeros((len(sources), text.table.shape[1]), np.int32)
                kept[:, :length] = text.table[sources, :length]
                text.table = kept
        self._steps += 1
        if self._steps % _CLEAN_EVERY == 0:
            self._clean()

    def _feeds(self, texts: list[_Text]) -> tuple[dict[str, Any], list[int]]:
        """The decoder's inputs for all beams of `texts`, and where each text's rows begin."""
        newest = [text.search.newest for text in texts]
        bounds = [0, *np.cumsum([len(one) for one in newest]).tolist()]
        lengths = [text.search.length for text in texts]
        rows = bounds[-1]
        table = np.zeros((rows, max(lengths)), np.int32)
        counts, spans = np.empty(rows, np.int32), np.empty((rows, 2), np.int32)
        widest = 1
        for text, length, first, last in zip(texts, lengths, bounds, bounds[1:], strict=False):
            if length > text.table.shape[1]:
                text.table = np.pad(text.table, ((0, 0), (0, text.table.shape[1])))
            text.table[:, length - 1] = self._slots.take(last - first, text.number)
            table[first:last, :length] = text.table[:, :length]
            counts[first:last] = length
            spans[first:last] = (text.place, len(text.source))
            widest = max(widest, text.rules.keep + max(len(edit) for edit in text.search.edits()))
        feeds: dict[str, Any] = {
            "input_ids": np.array([token for one in newest for token in one], np.int64),
            "position_ids": (counts - 1).astype(np.int64),
            "past": self._past,
            "table": table,
            "lengths": counts,
            "memory": self._memory,
            "spans": spans,
            "top": np.array([min(widest, self._spec.vocabulary)], np.int64),
        }
        return {name: feeds[name] for name in self._decoder_inputs}, bounds

    def _make_room(self) -> None:
        """Sees to it that every row finds a slot: unused ones are collected, then the youngest texts start again later."""
        if self._slots.free >= self._rows():
            return
        self._clean()
        while self._slots.free < self._rows():
            youngest = max(self._running, key=lambda text: text.number)
            if len(self._running) == 1:
                limit = f"{self._slots.size} positions"
                self._leave(
                    youngest, OutOfMemory(f"the text's beams need more than the {limit} that model {self.name!r} has; ask for fewer beams")
                )
                return
            self._release(youngest)
            youngest.search.restart()
            youngest.table = np.zeros((1, 16), np.int32)
            with self._ready:
                self._waiting.insert(0, youngest)

    def _rows(self) -> int:
        return sum(len(text.search.newest) for text in self._running)

    def _clean(self) -> None:
        for text in self._running:
            length = text.search.length - 1
            self._slots.keep(text.number, text.table[:, :length].ravel())

    def _release(self, text: _Text) -> None:
        self._running = [other for other in self._running if other is not text]
        self._slots.keep(text.number, np.empty(0, np.int32))
        self._places.give_back(text.place, len(text.source))
        text.place = -1

    def _leave(self, text: _Text, outcome: Outcome) -> None:
        self._release(text)
        now = time.monotonic()
        if self._waiting and isinstance(outcome, Answer):
            between = min(now - self._answered, 10.0)
            self._text_s = between if self._text_s == 0.0 else 0.9 * self._text_s + 0.1 * between
        self._answered = now
        self._tell(text, outcome)

    def _tell(self, text: _Text, outcome: Outcome) -> None:
        _call_soon(text.flight.loop, partial(_arrive, text, outcome, time.monotonic()))


def _over(text: _Text, now: float) -> bool:
    deadline = text.flight.call.deadline
    return text.flight.gone or (deadline is not None and deadline <= now)


def _gone_error(text: _Text, stage: str) -> UnderstudyError:
    return Cancelled("the caller left", stage=stage) if text.flight.gone else _late(stage)


def _late(stage: str) -> DeadlineExceeded:
    where = {"queue": "while it waited for its turn", "run": "while the model ran"}[stage]
    return DeadlineExceeded(f"the deadline passed {where}; give the call more time, or send less at once", stage=stage)


def _arrive(text: _Text, outcome: Outcome, now: float) -> None:
    """On the event loop: an answer reaches its call. A deadline or a caller that left ends the whole call."""
    flight = text.flight
    if flight.outcomes[text.index] is None:
        flight.outcomes[text.index] = outcome
        flight.left -= 1
    admitted = text.admitted or now
    flight.timings.merge(Timings(queue=admitted - flight.arrival, run=now - admitted))
    if isinstance(outcome, DeadlineExceeded | Cancelled):
        _fail(flight, outcome)
    elif flight.left == 0 and not flight.done.done():
        flight.done.set_result(None)


def _fail(flight: Flight, error: UnderstudyError) -> None:
    if not flight.done.done():
        flight.done.set_exception(error)


def _call_soon(loop: asyncio.AbstractEventLoop, action: partial[None]) -> None:
    try:
        loop.call_soon_threadsafe(action)
    except RuntimeError:  # the loop was closed: its callers are gone
        log.debug("an answer for a closed event loop was dropped")
