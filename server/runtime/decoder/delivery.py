"""From logits to callers: draws a token for each row, ends answers, and hands what is new to the event loop, once a step."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from native.sample import TOP_MOST, SampleBuffers, sample
from server.core import FinishReason, FloatArray
from server.errors import InternalError, UnderstudyError
from server.runtime.decoder.contract import Masks, Piece, Token
from server.runtime.decoder.scheduler import Plan
from server.runtime.decoder.sequence import Candidate, Flight
from server.runtime.decoder.settings import GenerationSettings
from server.runtime.decoder.stream import JobStream
from server.runtime.sessions import usable_cores

log = logging.getLogger(__name__)
_FADE = 0.9


@dataclass(slots=True)
class Draw:
    """What a step draws: candidate i from the logits of `places[rows[i]]` of the plan. `parents` have just run their prompt."""

    places: list[int]
    candidates: list[Candidate] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    parents: list[Candidate] = field(default_factory=list)
    masked: bool = False


@dataclass(slots=True)
class Drawn:
    """What came of it, for the scheduler and the metrics."""

    ended: list[Candidate] = field(default_factory=list)
    failed: list[Flight] = field(default_factory=list)
    generated: int = 0
    first_token_s: list[float] = field(default_factory=list)
    inter_token_s: list[float] = field(default_factory=list)


class Delivery:
    """One engine's way out. On the engine's thread."""

    def __init__(self, name: str, settings: GenerationSettings, masks: Masks | None) -> None:
        self._name = name
        self._rate = settings.message_rate
        self._masks = masks
        self._buffers = SampleBuffers(settings.max_sequences, TOP_MOST, usable_cores())
        self._rows = np.zeros(settings.max_sequences, np.int32)
        self._out: dict[asyncio.AbstractEventLoop, list[tuple[JobStream, Piece | UnderstudyError]]] = {}
        self._step_s = 0.0
        self._last_step = 0.0

    def begin(self, plan: Plan, draw: Draw) -> None:
        """Finds who draws from which row, and has the masks made while the graph runs."""
        grammar = False
        for row, place in enumerate(draw.places):
            candidate = plan.rows[place]
            grammar = grammar or candidate.matcher is not None
            draw.candidates.append(candidate)
            draw.rows.append(row)
            if candidate.forks:
                draw.parents.append(candidate)
                draw.candidates += candidate.forks
                draw.rows += [row] * len(candidate.forks)
        if grammar:
            assert self._masks is not None, "a job with a grammar was let in"
            self._masks.start([c.matcher for c in draw.candidates])
            draw.masked = True

    def abandon(self, draw: Draw) -> None:
        """The run failed: nothing is drawn."""
        if draw.masked and self._masks is not None:
            self._masks.wait()

    def end(self, draw: Draw, logits: FloatArray) -> Drawn:
        """Draws, and puts what is new into the candidates' pieces; those that are due go out with `send`."""
        drawn = Drawn()
        candidates = draw.candidates
        if not candidates:
            return drawn
        masks: Any = self._masks.wait() if draw.masked and self._masks is not None else None
        count = len(candidates)
        rows = None
        if draw.parents:
            rows = self._rows[:count]
            rows[:] = draw.rows
        buffers = self._buffers
        sample(logits, [c.sampler for c in candidates], masks, buffers, rows)
        now = time.monotonic()
        every = self._every(count, now)
        columns = (buffers.tokens, buffers.logprob, buffers.entropy, buffers.margin)
        values = zip(*(column[:count].tolist() for column in columns), strict=True)
        for row, (candidate, (token, logprob, entropy, margin)) in enumerate(zip(candidates, values, strict=True)):
            try:
                finish, text_end = self._take(candidate, Token(token, "", logprob, entropy, margin), row)
            except Exception as error:
                self._fail_one(candidate, error, drawn)
                continue
            self._time(candidate, now, drawn)
            if finish is not None:
                drawn.ended.append(candidate)
                candidate.flight.left -= 1
            candidate.piece_steps += 1
            if finish is not None or candidate.piece_steps >= every or candidate.generated == 1:
                self._post(candidate, finish, text_end)
        drawn.generated = count
        return drawn

    def fail(self, flight: Flight, error: UnderstudyError) -> None:
        """Ends a job with an error, once."""
        if flight.left > 0 and flight.stream is not None:
            flight.left = 0
            self._out.setdefault(flight.stream.loop, []).append((flight.stream, error))

    def send(self) -> None:
        """One wake-up of the event loop for all that is due."""
        if self._out:
            out, self._out = self._out, {}
            for loop, items in out.items():
                try:
                    loop.call_soon_threadsafe(partial(_arrive, items))
                except RuntimeError:  # the loop was closed: its callers are gone
                    log.debug("answers for a closed event loop were dropped")

    def _take(self, candidate: Candidate, token: Token, row: int) -> tuple[FinishReason | None, str]:
        """Adds a token to its candidate; says whether the answer ends with it, and what text was held back until then."""
        if token.id < 0:
            if candidate.matcher is not None:
                candidate.matcher.advance(token.id)  # raises what became of its grammar, where that is to blame
            raise InternalError("the model's answer is not a number in every place, or its grammar allows no token; send the request again")
        flight = candidate.flight
        job = flight.job
        text = candidate.text
        if token.id in job.stop_ids:
            return FinishReason.STOP, text.finish() if text is not None else ""
        candidate.reserve()
        candidate.append(token.id)
        candidate.sampler.commit(token.id)
        if job.sampling.top_logprobs:
            token.top = self._alternatives(row, job.sampling.top_logprobs)
        stopped = False
        if text is not None:
            token.text, stopped = text.push(token.id)
        candidate.pieces.append(token)
        if stopped:
            return FinishReason.STOP, ""
        matcher = candidate.matcher
        if matcher is not None:
            matcher.advance(token.id)
            if matcher.complete:
                return FinishReason.STOP, text.finish() if text is not None else ""
        if candidate.length >= candidate.most:
            return FinishReason.LENGTH, text.finish() if text is not None else ""
        return None, ""

    def _alternatives(self, row: int, count: int) -> list[tuple[int, float]]:
        ids = self._buffers.top_ids[row, :count].tolist()
        return [(i, p) for i, p in zip(ids, self._buffers.top_logprobs[row, :count].tolist(), strict=True) if i >= 0]

    def _time(self, candidate: Candidate, now: float, drawn: Drawn) -> None:
        times = candidate.times
        times.steps += 1
        if times.first_token == 0.0:
            times.first_token = now
            drawn.first_token_s.append(now - times.arrival)
        else:
            drawn.inter_token_s.append(now - times.last_token)
        times.last_token = now

    def _post(self, candidate: Candidate, finish: FinishReason | None, text_end: str) -> None:
        flight = candidate.flight
        if flight.stream is None or (flight.abandoned and finish is None):
            return  # the end is told all the same: who left may wait for the job to be out
        piece = Piece(candidate.index, candidate.pieces, finish, text_end, max(0, candidate.cached), candidate.times)
        candidate.pieces = []
        candidate.piece_steps = 0
        self._out.setdefault(flight.stream.loop, []).append((flight.stream, piece))

    def _fail_one(self, candidate: Candidate, error: Exception, drawn: Drawn) -> None:
        known = error if isinstance(error, UnderstudyError) else InternalError(f"model {self._name!r} failed on a token: {error}")
        if not isinstance(error, UnderstudyError):
            log.error("engine %s failed on a token", self._name, exc_info=error)
        self.fail(candidate.flight, known)
        drawn.failed.append(candidate.flight)

    def _every(self, rows: int, now: float) -> int:
        """In how many steps a stream gets one message: more than one where the messages would pass `message_rate`."""
        step_s = now - self._last_step
        self._last_step = now
        if step_s < 1.0:  # longer ones hold a pause
            self._step_s = step_s if self._step_s == 0.0 else _FADE * self._step_s + (1.0 - _FADE) * step_s
        return max(1, int(rows / max(1e-9, self._rate * self._step_s)))


def _arrive(items: Sequence[tuple[JobStream, Piece | UnderstudyError]]) -> None:
    """On the event loop."""
    for stream, item in items:
        if isinstance(item, Piece):
            stream.arrive(item)
        else:
            stream.fail(item)
