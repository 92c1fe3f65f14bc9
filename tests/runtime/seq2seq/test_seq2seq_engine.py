"""The loop: who waits, who leaves, what is bounded, and what one failure takes with it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from server.core import Call, Priority
from server.errors import Cancelled, DeadlineExceeded, Draining, Overloaded, RequestTooLarge, UnderstudyError
from server.runtime.queue import QueueLimits
from server.runtime.seq2seq.beam import Answer
from server.runtime.seq2seq.engine import Seq2SeqEngine, Seq2SeqSettings
from server.runtime.seq2seq.pools import Places, SlotPool
from server.runtime.seq2seq.rules import Rules, make_rules
from server.runtime.sessions import Sessions
from tests.runtime.seq2seq.conftest import Export, Exported
from tests.runtime.seq2seq.test_seq2seq_against_transformers import spec_of

WIDTH_BYTES = 2 * 2 * 4 * 8 * 4  # of a row of either pool: layers, K and V, heads, head_dim, float32


def texts(count: int, vocabulary: int) -> list[np.ndarray]:
    random = np.random.default_rng(count)
    return [random.integers(5, vocabulary, random.integers(1, 24)) for _ in range(count)]


def long_rules(one: Exported, **more: Any) -> Rules:
    """Answers that never end before their limit."""
    spec = spec_of(one)
    rules = make_rules(spec.model_copy(update={"generation": {}}))
    return dataclasses.replace(rules, **{"num_beams": 3, "max_length": 40, "min_length": 40, "banned": frozenset(), **more})


@asynccontextmanager
async def opened(one: Exported, settings: Seq2SeqSettings | None = None) -> AsyncIterator[Seq2SeqEngine]:
    spec = spec_of(one)
    sessions = Sessions()
    graphs = sessions.open(one.files.paths[spec.encoder]), sessions.open(one.files.paths[spec.decoder])
    engine = Seq2SeqEngine(one.manifest.name, graphs, spec, settings, max_source=one.manifest.max_tokens)
    try:
        yield engine
        await settled(engine)
        assert engine._slots.free == engine._slots.size
        assert engine._places.take(engine._places.size) == 0
    finally:
        await engine.close(drain=False)
        for graph in graphs:
            graph.close()


async def settled(engine: Seq2SeqEngine) -> None:
    """Until nobody waits and nobody runs."""
    async with asyncio.timeout(20):
        while engine.waiting or engine.running:
            await asyncio.sleep(0.001)


async def running(engine: Seq2SeqEngine, count: int) -> None:
    async with asyncio.timeout(20):
        while engine.running < count:
            await asyncio.sleep(0.001)


async def answers(engine: Seq2SeqEngine, sources: list[np.ndarray], rules: Rules) -> list[Answer]:
    flights = await asyncio.gather(*(engine.run([one], rules, Call(str(i))) for i, one in enumerate(sources)))
    found = [flight.outcomes[0] for flight in flights]
    assert all(isinstance(one, Answer) for one in found), found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    "settings",
    [
        Seq2SeqSettings(rows=4),
        Seq2SeqSettings(rows=64, encoder_tokens=30),
        # So little memory that texts have to start again, time after time.
        Seq2SeqSettings(rows=64, pool_bytes=2 * WIDTH_BYTES * 100),
    ],
)
async def test_an_answer_does_not_depend_on_company_or_memory(settings: Seq2SeqSettings, exported: Export) -> None:
    one = exported("bart")
    sources = texts(14, spec_of(one).vocabulary)
    rules = long_rules(one, min_length=0, max_length=30)
    async with opened(one) as engine:
        alone = [(await answers(engine, [source], rules))[0] for source in sources]
    async with opened(one, settings) as engine:
        together = await answers(engine, sources, rules)
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [a.score for a in together] == pytest.approx([a.score for a in alone], rel=1e-5)


async def test_a_caller_that_leaves_frees_its_place_at_once(exported: Export) -> None:
    one = exported("bart")
    rules = long_rules(one, max_length=90, min_length=90)
    async with opened(one, Seq2SeqSettings(rows=6)) as engine:
        tasks = [asyncio.create_task(engine.run([source], rules, Call(str(i)))) for i, source in enumerate(texts(4, 200))]
        await running(engine, 2)
        left, call = tasks.pop(0), Call("flag")
        left.cancel()
        flagged = asyncio.create_task(engine.run(texts(1, 200), rules, call))
        call.cancelled = True
        with pytest.raises(asyncio.CancelledError):
            await left
        with pytest.raises(Cancelled):
            await flagged
        for flight in await asyncio.gather(*tasks):
            (outcome,) = flight.outcomes
            assert isinstance(outcome, Answer)
            assert len(outcome.tokens) == 89


async def test_a_deadline_ends_a_call_while_it_waits_and_while_it_runs(exported: Export) -> None:
    one = exported("bart")
    rules = long_rules(one, max_length=97, min_length=97)
    async with opened(one, Seq2SeqSettings(rows=3)) as engine:
        with pytest.raises(DeadlineExceeded) as past:
            await engine.run(texts(1, 200), rules, Call("past", deadline=time.monotonic() - 1))
        assert past.value.metadata["stage"] == "queue"
        long = asyncio.create_task(engine.run(texts(30, 200), rules, Call("long", deadline=time.monotonic() + 0.15)))
        with pytest.raises(DeadlineExceeded):
            await long
        await settled(engine)
        assert isinstance((await engine.run(texts(1, 200), rules, Call("next"))).outcomes[0], Answer)


async def test_a_full_queue_refuses_and_says_when_to_come_back(exported: Export) -> None:
    one = exported("bart")
    rules = long_rules(one)
    async with opened(one, Seq2SeqSettings(rows=3, limits=QueueLimits(max_sequences=4))) as engine:
        with pytest.raises(RequestTooLarge):
            await engine.run(texts(5, 200), rules, Call("a"))
        with pytest.raises(RequestTooLarge):
            await engine.run(texts(1, 200), dataclasses.replace(rules, num_beams=4), Call("a"))
        waiting = [asyncio.create_task(engine.run(texts(2, 200), rules, Call("b"))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            for _ in range(3):
                await engine.run(texts(4, 200), rules, Call("c"))
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s > 0
        await asyncio.gather(*waiting)


async def test_the_urgent_go_first(exported: Export) -> None:
    one = exported("bart")
    rules = long_rules(one)
    done: list[str] = []

    async with opened(one, Seq2SeqSettings(rows=3)) as engine:

        async def call(name: str, priority: Priority) -> None:
            await engine.run(texts(1, 200), rules, Call(name, priority=priority))
            done.append(name)

        tasks = [asyncio.create_task(call("first", Priority.BULK))]
        await running(engine, 1)
        tasks += [asyncio.create_task(call(name, Priority.BULK)) for name in ("bulk1", "bulk2")]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(call("urgent", Priority.CRITICAL)))
        await asyncio.gather(*tasks)
    assert done.index("urgent") < done.index("bulk2")


async def test_a_failing_run_ends_its_batch_alone(exported: Export) -> None:
    one = exported("bart")
    rules = long_rules(one)
    async with opened(one) as engine:
        flight = await engine.run([np.array([10**6], np.int64)], rules, Call("outside of the vocabulary"))
        assert isinstance(flight.outcomes[0], UnderstudyError)
        assert len(await answers(engine, texts(3, 200), rules)) == 3


@pytest.mark.parametrize("drain", [True, False])
async def test_closing_finishes_or_fails_what_was_accepted(drain: bool, exported: Export) -> None:
    one = exported("bart")
    rules = long_rules(one)
    async with opened(one, Seq2SeqSettings(rows=6)) as engine:
        calls = [asyncio.create_task(engine.run(texts(2, 200), rules, Call(str(i)))) for i in range(3)]
        await running(engine, 2)
        await engine.close(drain=drain)
        results = await asyncio.gather(*calls, return_exceptions=True)
        with pytest.raises(Draining):
            await engine.run(texts(1, 200), rules, Call("late"))
    if drain:
        assert all(isinstance(outcome, Answer) for flight in results for outcome in flight.outcomes)  # type: ignore[union-attr]
    else:
        assert any(isinstance(result, Draining) for result in results)


def test_runs_of_places_are_joined_again() -> None:
    places = Places(10)
    first, second, third = places.take(3), places.take(4), places.take(3)
    assert (first, second, third) == (0, 3, 7)
    assert places.take(1) is None
    places.give_back(3, 4)
    assert places.take(5) is None
    places.give_back(7, 3)
    assert places.take(7) == 3
    places.give_back(0, 3)
    places.give_back(3, 7)
    assert places.take(10) == 0


def test_slots_that_nobody_refers_to_are_given_back() -> None:
    pool = SlotPool(8)
    mine, other = pool.take(5, owner=1), pool.take(2, owner=2)
    assert pool.free == 1
    pool.keep(1, mine[:2])
    assert pool.free == 4
    again = pool.take(4, owner=3)
    assert not set(again) & ({*mine[:2].tolist()} | set(other.tolist()))
    for owner in (1, 2, 3):
        pool.keep(owner, np.empty(0, np.int32))
    assert pool.free == 8
    assert sorted(pool.take(8, owner=4).tolist()) == list(range(8))
