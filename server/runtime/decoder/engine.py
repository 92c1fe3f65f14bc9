"""The decoder engine: jobs of many callers in, one step after another through the graph, tokens of all of them out.

A step takes one token of every answer that runs and pieces of new prompts, within a token budget. A token's logits depend on its own
sequence alone, so what else is in a step changes when a token comes, and nothing about it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from native.sample import RowState
from server.core import FloatArray, IntArray
from server.errors import (
    AdapterNotFound,
    Cancelled,
    DeadlineExceeded,
    Draining,
    InputTooLong,
    InternalError,
    InvalidArgument,
    ModelRejected,
    OutOfMemory,
    UnderstudyError,
)
from server.runtime.decoder.contract import Job, Masks, Piece, Stream
from server.runtime.decoder.delivery import Delivery, Draw, Drawn
from server.runtime.decoder.door import Arrived, Door
from server.runtime.decoder.forms import Forms, measure
from server.runtime.decoder.pace import Pace
from server.runtime.decoder.pages import PagePool
from server.runtime.decoder.prefix import PrefixCache
from server.runtime.decoder.scheduler import Plan, Scheduler
from server.runtime.decoder.sequence import Candidate, Flight
from server.runtime.decoder.settings import GenerationSettings
from server.runtime.decoder.step import StepLimits, StepRunner
from server.runtime.decoder.stream import JobStream
from server.runtime.manifest import Decoder, Manifest
from server.runtime.observer import NullObserver, Observer, StepReport
from server.runtime.sessions import Array, Session

log = logging.getLogger(__name__)
T = TypeVar("T")
_MOST_CONTEXTS = 4  # for each answer that may run: more pages than so many full contexts would never be used


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of. `sessions`: one a form, as in `manifest.decoder.graphs`; they stay open until `close` has returned.

    `bank`: the arrays of lora_bank and lora_ranks by name; `masks`: fills the masks of rows with a grammar, used by one engine alone;
    `runner`: what runs the steps, and where the pages are.
    """

    manifest: Manifest
    sessions: Mapping[str, Session]
    bank: Mapping[str, Array] | None = None
    masks: Masks | None = None
    runner: type[StepRunner] = StepRunner


class GenerationEngine:
    """One model's loop, a `contract.DecoderEngine`. Made and used on the event loop; runs on a thread of its own."""

    def __init__(self, parts: EngineParts, settings: GenerationSettings | None = None, observer: Observer | None = None) -> None:
        """Takes the memory for pages and buffers. Raises ModelRejected for graphs with other inputs, OutOfMemory."""
        settings = settings or GenerationSettings()
        manifest = parts.manifest
        assert manifest.decoder is not None, "a manifest of form decoder"
        self.decoder: Decoder = manifest.decoder
        self.name, self.version, self.settings = manifest.name, manifest.version, settings
        self._observer: Observer = observer or NullObserver()
        self._failure: UnderstudyError | None = None
        self._pace = Pace(settings.prompt_share, settings.least_chunk)
        self._pool = PagePool(self._page_count(settings.pool_bytes(), manifest.max_tokens))
        self.context = min(manifest.max_tokens, self._pool.count * self.decoder.page)
        limits = StepLimits(max(settings.token_budget, settings.max_sequences), settings.max_sequences, self.context)
        self._runner = parts.runner(self.decoder, parts.sessions, self._pool.count, limits, parts.bank)
        self._copied = 0
        self._forms = Forms.of(parts.sessions)
        self._scheduler = Scheduler(
            self._pool,
            PrefixCache(self._pool, self.decoder.page, enabled=settings.prefix_cache),
            self._pace,
            self._copy_page,
            max_sequences=settings.max_sequences,
            token_budget=settings.token_budget,
        )
        self._delivery = Delivery(self.name, settings, parts.masks)
        self._grammars = parts.masks is not None
        self._door = Door(self.name, settings)
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._serve, name=f"generate-{self.name}-{self.version}", daemon=True)
        self._thread.start()

    async def ready(self) -> None:
        """Returns once the forms were measured and the first job can run; raises ModelRejected where the graphs fail on a first token."""
        await asyncio.shield(self._started)

    @property
    def forms(self) -> Forms:
        """The forms and their crossover, as measured."""
        return self._forms

    @property
    def pages(self) -> PagePool:
        """The pages' counts, for reading."""
        return self._pool

    @property
    def waiting(self) -> int:
        """Answers that have not run yet."""
        return self._door.waiting

    def submit(self, job: Job) -> Stream:
        """As `contract.DecoderEngine.submit`; DeadlineExceeded too, where it has passed already."""
        try:
            flight = self._flight(job)
            self._door.put(flight)
        except UnderstudyError as error:
            self._observer.rejected(self.name, error.reason)
            raise
        job.call.stage = "queue"
        self._observer.queue_depth(self.name, self._door.waiting)
        assert flight.stream is not None, "made with the flight"
        return flight.stream

    async def add_prefix(self, key: str, keys: FloatArray, values: FloatArray) -> int:
        """As `contract.DecoderEngine.add_prefix`. Raises OutOfMemory, InvalidArgument, Draining."""
        decoder = self.decoder
        shape = (decoder.layers, decoder.kv_heads, keys.shape[2] if keys.ndim == 4 else -1, decoder.head_dim)
        if keys.shape != shape or values.shape != shape:
            raise InvalidArgument(
                f"the prefix has keys {keys.shape} and values {values.shape}; the model takes [layers, heads, positions, dim] = {shape}",
                field="prefix",
            )

        def write(pages: list[int]) -> None:
            self._runner.write_prefix(pages, keys, values)

        return await self._order(lambda: self._store(key, shape[2], write))

    async def add_prompt(self, key: str, rows: FloatArray) -> int:
        """As `contract.DecoderEngine.add_prompt`. Raises OutOfMemory, InvalidArgument, Draining."""
        hidden = self._runner.hidden
        if rows.ndim != 2 or rows.shape[1] != hidden:
            raise InvalidArgument(f"the prompt's embeddings are {rows.shape}; the model takes [positions, {hidden}]", field="prompt")
        wide = self._forms.wide
        return await self._order(lambda: self._store(key, len(rows), lambda pages: self._runner.run_embeddings(wide, pages, rows)))

    async def drop_prefix(self, key: str) -> None:
        """As `contract.DecoderEngine.drop_prefix`."""
        await self._order(lambda: self._scheduler.drop(key))

    async def close(self, *, drain: bool) -> None:
        """As `contract.DecoderEngine.close`."""
        self._door.close(drain=drain)
        await asyncio.to_thread(self._thread.join)

    def _page_count(self, room: int, context: int) -> int:
        decoder = self.decoder
        most = _MOST_CONTEXTS * self.settings.max_sequences * -(-context // decoder.page)
        pages = min(room // (decoder.layers * decoder.page_bytes), most)
        if pages < 2:
            raise OutOfMemory(
                f"{room} bytes hold {pages} pages of model {self.name!r}, of {decoder.layers * decoder.page_bytes} bytes each; "
                "two are the least: set generation.kv_cache_bytes higher",
                retry_after_s=10.0,
            )
        return pages

    def _flight(self, job: Job) -> Flight:
        """Checks a job and makes its candidates."""
        if self._failure is not None:
            raise self._failure
        now = time.monotonic()
        ids = np.array(job.prompt, np.int64)
        base = job.adapter.prefix if job.adapter is not None else 0
        self._check(job, ids, base)
        remaining = job.call.remaining(now)
        if remaining is not None and remaining <= 0.0:
            raise DeadlineExceeded("the deadline passed before the request was queued; give the call more time", stage="queue")
        flight = Flight(job)
        flight.stream = JobStream(flight, self._door.nudge)
        most = min(len(ids) + job.max_tokens, self.context - base)
        try:
            sampler = RowState(job.sampling, ids, self.decoder.vocabulary)
        except ValueError as error:
            raise InvalidArgument(f"these sampling values do not go together: {error}", field="sampling") from error
        for index in range(job.n):
            candidate = Candidate(flight, index, now + self.settings.ageing_s * int(job.call.priority), ids, most)
            candidate.times.arrival = now
            candidate.sampler = sampler if index == 0 else sampler.fork(index)
            candidate.text = job.text() if job.text is not None else None
            candidate.matcher = job.matcher() if job.matcher is not None else None
            flight.candidates.append(candidate)
        flight.candidates[0].forks = flight.candidates[1:]
        return flight

    def _check(self, job: Job, ids: IntArray, base: int) -> None:
        limit = self.context - base
        if len(ids) == 0 or job.max_tokens < 1:
            what, field = ("the prompt has no token", "prompt") if len(ids) == 0 else (f"max_tokens is {job.max_tokens}", "max_tokens")
            raise InvalidArgument(f"{what}; at least one is needed", field=field)
        if len(ids) >= limit:
            raise InputTooLong(
                f"the prompt has {len(ids)} tokens; model {self.name!r} takes {limit}, prompt and answer together. Shorten the prompt.",
                tokens=len(ids),
                limit=limit,
            )
        if ids.min() < 0 or ids.max() >= self.decoder.vocabulary:
            raise InvalidArgument(f"the prompt has token ids outside 0..{self.decoder.vocabulary - 1}", field="prompt")
        if not 1 <= job.n <= self.settings.max_sequences:
            raise InvalidArgument(f"{job.n} answers were asked for; 1 to {self.settings.max_sequences} run at a time", field="sampling.n")
        if job.matcher is not None and not self._grammars:
            raise InvalidArgument(f"model {self.name!r} has no grammars; ask without a response format", field="response_format")

    async def _order(self, action: Callable[[], T]) -> T:
        """Has the engine's thread do something between two steps, and waits for its result."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def run(refusal: UnderstudyError | None) -> None:
            try:
                if refusal is not None:
                    raise refusal
                result = action()
            except Exception as error:
                _resolve(loop, done, error=error)
            else:
                _resolve(loop, done, result)

        self._door.order(run)
        return await done

    # On the engine's thread.

    def _serve(self) -> None:
        if not self._start():
            return
        while (arrived := self._door.collect(idle=self._scheduler.idle)) is not None:
            try:
                self._take_in(arrived)
                plan = self._scheduler.plan(time.monotonic())
                self._settle(plan)
                if plan.rows:
                    self._step(plan)
                elif plan.gone or plan.late:
                    self._observer.answers_running(self.name, self.version, len(self._scheduler.running), self._pool.used)
            except Exception as error:
                # A mistake of ours or of an observer's: whoever was not answered yet hears of it, and the engine goes on.
                log.exception("engine %s failed outside of a run", self.name)
                self._fail_all(self._scheduler.flights(), InternalError(f"model {self.name!r} failed: {error}"))
            if self._scheduler.idle:
                self._delivery.send()
        self._end(Draining(f"model {self.name!r} was stopped before this answer ended; send it again, to another replica if there is one"))

    def _step(self, plan: Plan) -> None:
        form = self._forms.choose(plan.tokens, seeded=any(c.seeded for c in plan.rows))
        draw = Draw(plan.finishing())
        try:
            self._delivery.begin(plan, draw)
            self._runner.load(form, plan, draw.places)
            # The event loop hears of the step before as this one lets go of the interpreter: else each would wait for the other.
            self._delivery.send()
            began = time.monotonic()
            logits = self._runner.run()
        except Exception as error:
            self._delivery.abandon(draw)
            self._run_failed(plan, error)
            return
        ran = time.monotonic()
        self._scheduler.advance(plan, wide=form == self._forms.wide)
        drawn = self._delivery.end(draw, logits)
        for parent in draw.parents:
            self._scheduler.fork(parent)
        for candidate in drawn.ended:
            self._scheduler.finish(candidate)
        for flight in drawn.failed:
            self._remove(flight)
        self._pace.record(plan.decoding, plan.tokens - plan.decoding, ran - began)
        self._report(plan, drawn, form, ran - began, time.monotonic() - ran)

    def _take_in(self, arrived: Arrived) -> None:
        for flight in arrived.flights:
            self._scheduler.add(flight.candidates[0])
        for order in arrived.orders:
            order(None)

    def _settle(self, plan: Plan) -> None:
        """Tells those who are in this plan for the first time, or out of it."""
        now = time.monotonic()
        fresh = [c for c in plan.admitted if c.times.admitted == 0.0]
        for candidate in fresh:
            flight = candidate.flight
            self._door.left(flight)
            flight.call.stage = "run"
            for one in flight.candidates:
                one.times.admitted = now
        if fresh:
            self._door.turned_over(sum(c.flight.job.n for c in fresh), now)
        for candidate in plan.gone:
            self._give_up(candidate, Cancelled("the caller left"), "cancelled")
        for candidate, stage in plan.late:
            where = "while it waited for its turn" if stage == "queue" else "while the model wrote the answer"
            text = f"the deadline passed {where}; give the call more time, or ask for fewer tokens"
            self._give_up(candidate, DeadlineExceeded(text, stage=stage), "expired")
        for candidate in plan.stuck:
            self._give_up(candidate, self._too_large(candidate), "")

    def _give_up(self, candidate: Candidate, error: UnderstudyError, reason: str) -> None:
        """A candidate is out; its siblings with it."""
        flight = candidate.flight
        if flight.left > 0:
            if candidate.times.admitted == 0.0:
                self._door.left(flight)
                candidate.times.admitted = time.monotonic()
            if reason:
                self._observer.skipped(self.name, reason, flight.left)
            self._remove(flight)
            self._delivery.fail(flight, error)

    def _run_failed(self, plan: Plan, error: Exception) -> None:
        """With several rows each runs alone next, so that only the one at fault fails; what the pages held before is as it was."""
        known = error if isinstance(error, UnderstudyError) else InternalError(f"model {self.name!r} failed on a step: {error}")
        if not isinstance(error, UnderstudyError):
            log.exception("engine %s failed on a step of %d", self.name, len(plan.rows))
        self._observer.run_failed(self.name, known.reason)
        if len(plan.rows) > 1:
            self._scheduler.suspect(plan)
            return
        flight = plan.rows[0].flight
        self._remove(flight)
        self._delivery.fail(flight, known)

    def _remove(self, flight: Flight) -> None:
        for candidate in flight.candidates:
            self._scheduler.finish(candidate)

    def _end(self, error: UnderstudyError) -> None:
        """The door is closed: whatever is left is refused."""
        rest = self._door.rest()
        for order in rest.orders:
            order(error)
        self._fail_all([*self._scheduler.flights(), *rest.flights], error)
        self._delivery.send()

    def _fail_all(self, flights: Sequence[Flight], error: UnderstudyError) -> None:
        for flight in flights:
            if flight.candidates[0].times.admitted == 0.0:
                self._door.left(flight)
            self._remove(flight)
            self._delivery.fail(flight, error)

    def _store(self, key: str, positions: int, write: Callable[[list[int]], None]) -> int:
        """Takes pages for an adapter's prefix and has them written."""
        if not 0 < positions < self.context:
            raise InvalidArgument(f"a prefix of {positions} positions does not fit the model's context of {self.context}", field="prefix")
        self._scheduler.drop(key)
        spare = self._pool.count - sum(len(s.pages) for s in self._scheduler.stored.values())
        stored = None
        # A whole context must stay: else a long answer could never end.
        if spare - (-(-positions // self.decoder.page)) >= -(-self.context // self.decoder.page):
            stored = self._scheduler.store(key, positions)
        if stored is None:
            raise OutOfMemory(
                f"there are no pages for the {positions} positions of adapter {key!r}; set generation.kv_cache_bytes higher",
                retry_after_s=1.0,
            )
        try:
            write(stored.pages)
        except BaseException:
            self._scheduler.drop(key)
            raise
        return positions

    def _too_large(self, candidate: Candidate) -> UnderstudyError:
        if candidate.base and candidate.stored not in self._scheduler.stored:
            text = f"adapter {candidate.stored!r} was unloaded before the answer began; load it again"
            return AdapterNotFound(text, adapter=candidate.stored)
        return OutOfMemory(
            f"the answer outgrew all {self._pool.count} pages of model {self.name!r}; ask for fewer tokens",
            retry_after_s=1.0,
        )

    def _report(self, plan: Plan, drawn: Drawn, form: str, run_s: float, post_s: float) -> None:
        self._observer.step_done(
            StepReport(
                model=self.name,
                version=self.version,
                form=form,
                run_s=run_s,
                post_s=post_s,
                tokens=plan.tokens,
                prompt_tokens=plan.tokens - plan.decoding,
                generated=drawn.generated,
                finished=len(drawn.ended),
                running=len(self._scheduler.running),
                waiting=self._door.waiting,
                pages_used=self._pool.used,
                pages=self._pool.count,
                preempted=plan.preempted,
                looked_up=plan.looked_up,
                hits=plan.hits,
                copied=self._take_copied(),
                queue_waits_s=[c.times.admitted - c.times.arrival for c in plan.admitted if not c.generated],
                first_token_s=drawn.first_token_s,
                inter_token_s=drawn.inter_token_s,
            )
        )

    def _copy_page(self, source: int, target: int) -> None:
        self._copied += 1
        self._runner.copy_page(source, target)

    def _take_copied(self) -> int:
        copied, self._copied = self._copied, 0
        return copied

    def _start(self) -> bool:
        """Measures the forms with a first run of each. False where the graphs fail: every job is refused then."""
        try:
            self._forms = measure(self._forms, self._runner, self._pace)
        except Exception as error:
            self._failure = ModelRejected(f"model {self.name!r} fails on a first step: {error}", model=self.name)
            self._failure.__cause__ = error
            self._door.close(drain=False)
        _resolve(self._loop, self._started, error=self._failure)
        if self._failure is not None:
            self._end(self._failure)
        return self._failure is None


def _resolve(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], result: object = None, error: Exception | None = None) -> None:
    """Ends a future of the event loop from another thread."""

    def resolve() -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
            future.exception()  # whoever does not wait for it is not warned of it
        else:
            future.set_result(result)

    try:
        loop.call_soon_threadsafe(resolve)
    except RuntimeError:
        log.debug("a result for a closed event loop was dropped")


async def run_offline(engine: GenerationEngine, jobs: Sequence[Job]) -> list[list[Piece]]:
    """Runs all jobs at once and returns the pieces of each, one a candidate, in order: the bare loop, for measuring and for parity.

    Raises the first error of a job; Overloaded where more candidates are given than may wait.
    """

    async def read(stream: Stream) -> list[Piece]:
        whole: dict[int, Piece] = {}
        async for pieces in stream:
            for piece in pieces:
                known = whole.setdefault(piece.index, piece)
                if known is not piece:
                    known.tokens += piece.tokens
                    known.finish, known.text_end = piece.finish, piece.text_end
        return [whole[index] for index in sorted(whole)]

    return await asyncio.gather(*(read(engine.submit(job)) for job in jobs))
