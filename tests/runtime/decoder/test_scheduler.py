"""The scheduler with integers and a clock of its own: pages are never lost, budgets hold, everyone ends, in any sequence of events."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core import Call, Priority
from server.runtime.decoder.contract import AdapterUse, Job, Sampling
from server.runtime.decoder.pace import Pace
from server.runtime.decoder.pages import PagePool
from server.runtime.decoder.prefix import PrefixCache
from server.runtime.decoder.scheduler import Plan, Scheduler
from server.runtime.decoder.sequence import Candidate, Flight

PAGE = 4
AGEING = 10.0


@dataclass
class World:
    """A scheduler, and in place of a graph what it would have written: the tokens of every page's positions."""

    pages: int = 32
    sequences: int = 4
    budget: int = 16
    cache: bool = True
    now: float = 0.0
    steps: int = 0
    ended: list[Candidate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = PagePool(self.pages)
        self.content: list[list[int | None]] = [[None] * PAGE for _ in range(self.pages)]
        self.scheduler = Scheduler(
            self.pool,
            PrefixCache(self.pool, PAGE, enabled=self.cache),
            Pace(1.2, 4),
            self.copy,
            max_sequences=self.sequences,
            token_budget=self.budget,
        )

    def copy(self, source: int, target: int) -> None:
        self.content[target] = list(self.content[source])

    def add(self, prompt: list[int], new: int, priority: Priority = Priority.INTERACTIVE, n: int = 1, seed: int | None = None) -> Flight:
        flight = Flight(Job(prompt, Sampling(seed=seed), new, Call("r", priority=priority), n=n))
        key = self.now + AGEING * int(priority)
        ids = np.array(prompt, np.int64)
        flight.candidates = [Candidate(flight, i, key, ids, len(prompt) + new) for i in range(n)]
        flight.candidates[0].forks = flight.candidates[1:]
        self.scheduler.add(flight.candidates[0])
        return flight

    def step(self, token: int = 1, *, wide: bool = True) -> Plan:
        self.now += 0.01
        self.steps += 1
        plan = self.scheduler.plan(self.now)
        self.check(plan)
        self.ended += [*plan.gone, *(c for c, _ in plan.late), *plan.stuck]
        for candidate, count in zip(plan.rows, plan.counts, strict=True):
            self.run(candidate, count)
        finishing = [plan.rows[place] for place in plan.finishing()]
        self.scheduler.advance(plan, wide=wide)
        for candidate in finishing:
            family = [candidate, *candidate.forks]
            for one in family:
                if one is not candidate:
                    one.reserve()
                one.append(token + one.index)
            self.scheduler.fork(candidate)
            for one in family:
                if one.length >= one.most:
                    self.scheduler.finish(one)
                    self.ended.append(one)
        return plan

    def run(self, candidate: Candidate, count: int) -> None:
        """Reads every position before, as attention would, and writes the new ones."""
        known = candidate.ids[: candidate.length].tolist()
        for position in range(candidate.computed):
            page, offset = candidate.pages[position // PAGE], position % PAGE
            assert self.content[page][offset] == known[position], "a page holds another sequence's tokens"
        for position in range(candidate.computed, candidate.computed + count):
            page, offset = candidate.pages[position // PAGE], position % PAGE
            assert self.pool.holders(page) == 1, "a shared page is written to"
            self.content[page][offset] = known[position]

    def check(self, plan: Plan) -> None:
        scheduler = self.scheduler
        assert plan.tokens == sum(plan.counts) <= max(self.budget, self.sequences)
        assert len(scheduler.running) <= self.sequences
        assert len({id(c) for c in plan.rows}) == len(plan.rows)
        assert all(c in scheduler.running for c in plan.rows)
        assert all(len(c.pages) * PAGE >= c.computed + n for c, n in zip(plan.rows, plan.counts, strict=True))
        assert all(not c.pages and c.slot < 0 for c in scheduler.waiting)
        slots = [c.slot for one in scheduler.running for c in (one, *one.forks)]
        assert len(set(slots)) == len(slots) and all(0 <= slot < self.sequences for slot in slots)
        held: dict[int, int] = {}
        for page in itertools.chain.from_iterable(c.pages for c in scheduler.running):
            held[page] = held.get(page, 0) + 1
        for stored in scheduler.stored.values():
            for page in stored.pages:
                held[page] = held.get(page, 0) + 1
        for page in range(self.pages):
            assert self.pool.holders(page) == held.get(page, 0) + self.pool.cached(page)
        assert self.pool.free == sum(self.pool.holders(page) == 0 for page in range(self.pages))
        assert self.pool.evictable == sum(self.pool.cached(page) and page not in held for page in range(self.pages))

    def drain(self, limit: int = 5000) -> None:
        idle = 0
        while self.scheduler.running or self.scheduler.waiting:
            plan = self.step()
            idle = 0 if plan.rows or plan.stuck else idle + 1
            assert idle < 3, "work waits, and nothing is done"
            assert self.steps < limit, "it does not end"

    def check_empty(self) -> None:
        assert not self.scheduler.running and not self.scheduler.waiting
        self.scheduler.cache.clear()
        assert self.pool.free == self.pages, "pages leaked"


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=30)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), PROMPTS, st.integers(1, 40), st.sampled_from(list(Priority)), st.integers(1, 3), st.booleans()),
        st.tuples(st.just("step"), st.integers(1, 12), st.booleans()),
        st.tuples(st.just("cancel"), st.integers(0, 100)),
        st.tuples(st.just("expire"), st.integers(0, 100)),
        st.tuples(st.just("fail"), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(EVENTS, st.integers(19, 40), st.integers(3, 6), st.integers(4, 24), st.booleans())
def test_nothing_leaks_and_everyone_ends(events: list[tuple], pages: int, sequences: int, budget: int, cache: bool) -> None:
    world = World(pages=pages, sequences=sequences, budget=budget, cache=cache)
    flights: list[Flight] = []
    for event in events:
        if event[0] == "add":
            _, prompt, new, priority, n, seeded = event
            flights.append(world.add(prompt, new, priority, n, 1 if seeded else None))
        elif event[0] == "step":
            for _ in range(event[1]):
                world.step(wide=event[2])
        elif flights and event[0] == "cancel":
            flights[event[1] % len(flights)].abandoned = True
        elif flights and event[0] == "expire":
            flights[event[1] % len(flights)].deadline = world.now + 0.005
            world.scheduler._soonest = 0.0
        elif event[0] == "fail":
            plan = world.scheduler.plan(world.now)
            world.ended += [*plan.gone, *(c for c, _ in plan.late), *plan.stuck]
            world.scheduler.suspect(plan)
    world.drain()
    started = {id(c) for c in world.ended}
    assert all(id(f.candidates[0]) in started for f in flights)
    world.check_empty()


def test_a_long_prompt_is_cut_while_others_answer() -> None:
    world = World(pages=200, sequences=4, budget=64)
    world.add([1, 2], 100)
    world.step()
    pace = world.scheduler.pace
    for _ in range(20):
        pace.record(1, 0, 0.010)
        pace.record(1, 10, 0.020)  # ten prompt tokens double a step
    world.add(list(range(200)), 1)
    plans = []
    while not plans or len(plans[-1].rows) == 2:
        plans.append(world.step())
    assert all(plan.decoding == 1 and plan.counts[0] == 1 for plan in plans), "the running answer gets a token in every step"
    assert max(plan.tokens for plan in plans) <= 1 + 13, "and no step takes more than 1.2 times longer besides"
    assert len(plans) < 200 // 10 + 3


def test_prompts_alone_fill_the_budget() -> None:
    world = World(pages=200, sequences=4, budget=64)
    world.add(list(range(100)), 1)
    assert [world.step().tokens, world.step().tokens] == [64, 36]


def test_urgent_work_takes_the_place_of_bulk_but_not_of_its_equals() -> None:
    world = World(sequences=2)
    bulk = world.add([1] * 4, 40, Priority.BULK)
    world.step()
    equal = world.add([2] * 4, 40)
    world.step()
    first = world.add([3] * 4, 4)
    world.step()
    running = {c.flight for c in world.scheduler.running}
    assert running == {equal, first} and [c.flight for c in world.scheduler.waiting] == [bulk]
    world.add([4] * 4, 4)
    world.step()
    assert {c.flight for c in world.scheduler.running} == {equal, first}
    world.drain()
    assert len(world.ended) == 4
    world.check_empty()


def test_bulk_is_served_in_time_under_a_stream_of_urgent_work() -> None:
    world = World(sequences=1)
    bulk = world.add([1, 2, 3], 5, Priority.BULK)
    for _ in range(400):
        world.now += 0.2
        world.add([4, 5], 3, Priority.CRITICAL)
        for _ in range(3):
            world.step()
        if bulk.candidates[0] in world.ended:
            break
    assert bulk.candidates[0] in world.ended
    assert world.now < 3 * AGEING


def test_preempted_work_finds_its_pages_again() -> None:
    world = World(pages=12, sequences=2, budget=64)
    world.add(list(range(20)), 10)
    world.add(list(range(100, 120)), 10)
    preempted = 0
    while world.scheduler.running or world.scheduler.waiting:
        preempted += world.step().preempted
        assert world.steps < 100
    assert preempted and len(world.ended) == 2
    assert all(c.generated == 10 for c in world.ended)
    world.check_empty()


def test_sequences_that_start_alike_share_pages_even_when_they_arrive_together() -> None:
    world = World(pages=100, sequences=8, budget=40)
    common = list(range(32))
    for i in range(8):
        world.add([*common, 50 + i], 20)
    plans = [world.step() for _ in range(3)]
    assert sum(plan.tokens for plan in plans[:2]) <= 33 + 8 * 2 + 8
    assert len({tuple(c.pages[:8]) for c in world.scheduler.running}) == 1
    assert len(world.scheduler.running) == 8
    world.drain()
    world.check_empty()


def test_candidates_of_one_prompt_share_its_pages_and_copy_the_last() -> None:
    world = World(pages=100, sequences=4)
    flight = world.add(list(range(10)), 10, n=4)
    world.step()
    first, *others = flight.candidates
    assert len(world.scheduler.running) == 4
    assert all(c.pages[:2] == first.pages[:2] and c.pages[2] != first.pages[2] for c in others)
    world.drain()
    assert all(c.generated == 10 for c in flight.candidates)
    world.check_empty()


def test_cancelled_work_is_out_of_the_next_step() -> None:
    world = World()
    flight = world.add([1] * 8, 30)
    world.step()
    used = world.pool.used
    assert used
    flight.call.cancelled = True
    plan = world.step()
    assert plan.gone == flight.candidates and not plan.rows and world.pool.used == 0


def test_an_answer_that_outgrows_all_pages_is_told() -> None:
    world = World(pages=4, sequences=2, cache=False)
    flight = world.add([1] * 8, 30)
    stuck: list[Candidate] = []
    for _ in range(40):
        stuck += world.step().stuck
    assert stuck == flight.candidates
    world.check_empty()


def test_seeded_work_shares_only_what_the_wide_form_computed() -> None:
    world = World(pages=100)
    prompt = list(range(12))
    world.add([*prompt, 1], 1)
    world.step(wide=False)
    world.add([*prompt, 2], 1, seed=7)
    assert world.step().hits == 0
    world.add([*prompt, 3], 1, seed=7)
    assert world.step().hits == 12
    world.drain()
    world.check_empty()


def test_an_adapters_stored_prefix_comes_before_its_prompts() -> None:
    world = World(pages=100, sequences=4)
    scheduler = world.scheduler
    stored = scheduler.store("a@1", 6)
    assert stored is not None and len(stored.pages) == 2
    for position in range(6):
        world.content[stored.pages[position // PAGE]][position % PAGE] = -1
    flight = Flight(Job(list(range(9)), Sampling(), 5, Call("r"), adapter=AdapterUse("a@1", -1, 6)))
    candidate = Candidate(flight, 0, 0.0, np.arange(9), 14)
    scheduler.add(candidate)
    plan = scheduler.plan(1.0)
    assert plan.rows == [candidate] and candidate.computed == 6 and plan.counts == [9]
    assert candidate.pages[0] == stored.pages[0] and candidate.pages[1] != stored.pages[1]
    assert world.content[candidate.pages[1]][:2] == [-1, -1]
    scheduler.advance(plan, wide=True)
    again = Candidate(flight, 0, 0.0, np.arange(9), 14)
    scheduler.add(again)
    scheduler.plan(1.1)
    assert again.computed == 12 and again.pages[:3] == candidate.pages[:3]
    for one in (candidate, again):
        scheduler.finish(one)
    scheduler.drop("a@1")
    assert world.pool.free == world.pages
