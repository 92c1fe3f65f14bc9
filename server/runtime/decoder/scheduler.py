"""Who takes part in the next step: admission, fairness, preemption, pages. Integers and a clock that is given; no thread, no graph.

Candidates are ordered by `Candidate.key`. The smallest always goes on, and takes the pages of the largest where it must; so some
answer always ends, and each becomes the smallest in time: nothing starves, nothing deadlocks.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter

import numpy as np

from server.runtime.decoder.pace import Pace
from server.runtime.decoder.pages import PagePool
from server.runtime.decoder.prefix import Match, PrefixCache
from server.runtime.decoder.sequence import NO_DEADLINE, Candidate, Flight

_KEY = attrgetter("key")
_MOST_DEFERRED = 64  # candidates a step whose beginning is compared with those that run


class _Admission(Enum):
    DONE = 0
    FULL = 1
    LATER = 2
    NEVER = 3


@dataclass(slots=True)
class StoredPrefix:
    """Pages that every sequence of an adapter begins with; the last is not full where `positions` is no multiple of a page."""

    positions: int
    pages: list[int]


@dataclass(slots=True)
class Plan:
    """One step: `counts[i]` tokens of `rows[i]`. The first `decoding` rows have one token each and finish with it."""

    rows: list[Candidate] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    decoding: int = 0
    tokens: int = 0
    looked_up: int = 0  # prompt tokens, and how many of them the cache had
    hits: int = 0
    preempted: int = 0
    admitted: list[Candidate] = field(default_factory=list)
    gone: list[Candidate] = field(default_factory=list)  # their caller left; pages are free already
    late: list[tuple[Candidate, str]] = field(default_factory=list)  # and the stage in which the deadline passed
    stuck: list[Candidate] = field(default_factory=list)  # not even all pages would be enough

    def finishing(self) -> list[int]:
        """Places of the rows whose last known token runs in this step, and which therefore need logits. Asked before `advance`."""
        places = list(range(self.decoding))
        places += [i for i in range(self.decoding, len(self.rows)) if self.counts[i] == self.rows[i].pending]
        return places


class Scheduler:
    """The state of one engine's sequences. `copy_page(source, target)` copies a page's content in all layers."""

    def __init__(
        self,
        pool: PagePool,
        cache: PrefixCache,
        pace: Pace,
        copy_page: Callable[[int, int], None],
        *,
        max_sequences: int,
        token_budget: int,
    ) -> None:
        self.pool = pool
        self.cache = cache
        self.pace = pace
        self.running: list[Candidate] = []  # by key
        self.waiting: list[Candidate] = []  # by key
        self.stored: dict[str, StoredPrefix] = {}
        self.suspects: deque[Candidate] = deque()  # took part in a step that failed: each has its next step alone
        self._sharing = cache.enabled
        self._page = cache.page
        self._copy_page = copy_page
        self._max_sequences = max_sequences
        self._budget = max(token_budget, max_sequences)
        self._slots = list(range(max_sequences - 1, -1, -1))
        self._soonest = NO_DEADLINE

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.waiting

    def flights(self) -> list[Flight]:
        """All jobs that have a candidate here, each once."""
        return list({id(c.flight): c.flight for c in [*self.running, *self.waiting]}.values())

    def add(self, candidate: Candidate) -> None:
        """Puts a candidate among those that wait."""
        self._soonest = min(self._soonest, candidate.flight.deadline)
        insort(self.waiting, candidate, key=_KEY)

    def plan(self, now: float) -> Plan:
        """The next step, without rows when there is nothing to do. After it comes `advance` or `suspect`, or `finish` of its rows."""
        plan = Plan()
        self._sweep(now, plan)
        if self.suspects:
            self._alone(plan)
            return plan
        self._yield_to_urgent(plan)
        decoding = sum(c.pending == 1 for c in self.running)
        room = min(self._budget - decoding, self.pace.chunk(decoding, len(self.running) - decoding + len(self.waiting)))
        chunks: list[tuple[Candidate, int]] = []
        room = self._continue(plan, chunks, room)
        if self.waiting and room > 0 and self._slots:
            self._admit_waiting(plan, chunks, room)
        plan.decoding = len(plan.rows)
        for candidate, count in chunks:
            plan.rows.append(candidate)
            plan.counts.append(count)
        plan.tokens = sum(plan.counts)
        return plan

    def advance(self, plan: Plan, *, wide: bool) -> None:
        """The step ran: its tokens are in their pages. `wide`: by the wide form."""
        for candidate, count in zip(plan.rows, plan.counts, strict=True):
            if wide and candidate.pure == candidate.computed:
                candidate.pure += count
            before = candidate.computed // self._page
            candidate.computed += count
            if count > 1 and candidate.computed // self._page > before:
                self._keep(candidate)

    def fork(self, parent: Candidate) -> None:
        """The prompt was run, and the forks have a token each: they go on from the parent's pages, or wait for one to copy to."""
        whole, rest = divmod(parent.base + parent.prompt, self._page)
        children, parent.forks = parent.forks, []
        for child in children:
            child.cached = parent.cached
            copy = self._take() if rest else -1
            if copy is None:
                self._slots.append(child.slot)
                child.slot = -1
                self.add(child)
                continue
            child.reserve()
            for page in parent.pages[:whole]:
                self.pool.hold(page)
                child.pages.append(page)
            if rest:
                self._copy_page(parent.pages[whole], copy)
                child.pages.append(copy)
            child.computed = child.base + child.prompt
            child.pure = min(parent.pure, child.computed)
            insort(self.running, child, key=_KEY)

    def finish(self, candidate: Candidate) -> None:
        """The candidate ended, wherever it is; what it computed stays in the cache while there is room."""
        if candidate.slot >= 0:
            self._stop(candidate)
        elif candidate in self.waiting:
            self.waiting.remove(candidate)
        if candidate in self.suspects:
            self.suspects.remove(candidate)

    def suspect(self, plan: Plan) -> None:
        """The step failed with several rows: each runs alone next, so that only the one at fault fails. What the pages held stays valid."""
        self.suspects.extend(plan.rows)

    def store(self, key: str, positions: int) -> StoredPrefix | None:
        """Takes pages that every sequence of an adapter begins with; None where so many cannot be had. Their content is the caller's."""
        pages: list[int] = []
        for _ in range(self._pages_of(positions)):
            page = self._take()
            if page is None:
                for taken in pages:
                    self.pool.release(taken)
                return None
            pages.append(page)
        self.stored[key] = StoredPrefix(positions, pages)
        return self.stored[key]

    def drop(self, key: str) -> None:
        """Lets an adapter's stored pages go, and all that the cache holds under its key."""
        self.cache.drop(key)
        stored = self.stored.pop(key, None)
        for page in stored.pages if stored is not None else ():
            self.pool.release(page)

    def _alone(self, plan: Plan) -> None:
        candidate = self.suspects.popleft()
        count = min(candidate.pending, self._budget)
        if self._grow(candidate, candidate.computed + count, plan):
            plan.rows, plan.counts, plan.tokens = [candidate], [count], count
            plan.decoding = int(candidate.pending == 1)

    def _sweep(self, now: float, plan: Plan) -> None:
        """Takes out whoever left or is late."""
        for candidate in [c for c in self.running if c.flight.gone or c.flight.deadline <= now]:
            self._out(candidate, "run", plan)
        late = now >= self._soonest
        for candidate in [c for c in self.waiting if c.flight.gone or (late and c.flight.deadline <= now)]:
            self._out(candidate, "run" if candidate.generated else "queue", plan)
        if late:
            self._soonest = min((c.flight.deadline for c in self.waiting), default=NO_DEADLINE)

    def _out(self, candidate: Candidate, stage: str, plan: Plan) -> None:
        self.finish(candidate)
        if candidate.flight.gone:
            plan.gone.append(candidate)
        else:
            plan.late.append((candidate, stage))

    def _yield_to_urgent(self, plan: Plan) -> None:
        """Work of a lower priority makes room for the first that waits, where that lacks a place or pages."""
        if not self.waiting:
            return
        head = self.waiting[0]
        need = self._pages_of(head.base + head.length)
        while self.running and (len(self._slots) <= len(head.forks) or self.pool.available < need):
            victim = self.running[-1]
            if victim.priority <= head.priority or victim.key < head.key:
                return
            self._preempt(victim, plan)

    def _continue(self, plan: Plan, chunks: list[tuple[Candidate, int]], room: int) -> int:
        """Those that run, in order: a page is taken from the last where there is none. Returns what is left of the room for prompts."""
        index = 0
        while index < len(self.running):
            candidate = self.running[index]
            pending = candidate.pending
            if pending == 1:
                if self._grow(candidate, candidate.computed + 1, plan):
                    plan.rows.append(candidate)
                    plan.counts.append(1)
            elif room > 0:
                count = min(pending, room)
                if self._grow(candidate, candidate.computed + count, plan):
                    chunks.append((candidate, count))
                    room -= count
            index += 1
        return room

    def _admit_waiting(self, plan: Plan, chunks: list[tuple[Candidate, int]], room: int) -> None:
        """In order, until one does not fit. One whose next page is being computed by another waits for it, and lets the others by."""
        index = 0
        while index < min(len(self.waiting), _MOST_DEFERRED) and room > 0:
            candidate = self.waiting[index]
            outcome = self._admit(candidate, plan)
            if outcome is _Admission.FULL:
                return
            if outcome is _Admission.LATER:
                index += 1
                continue
            del self.waiting[index]
            if outcome is _Admission.NEVER:
                plan.stuck.append(candidate)
                continue
            plan.admitted.append(candidate)
            count = min(candidate.pending, room)
            if self._grow(candidate, candidate.computed + count, plan):
                chunks.append((candidate, count))
                room -= count

    def _admit(self, candidate: Candidate, plan: Plan) -> _Admission:
        """Gives a candidate its place and the pages that the cache has of it; those for the rest of its prompt must be there to be had."""
        if len(self._slots) <= len(candidate.forks):
            return _Admission.FULL
        stored = self.stored.get(candidate.stored) if candidate.base else None
        if candidate.base and (stored is None or stored.positions != candidate.base):
            return _Admission.NEVER
        unfinished = [c for c in self.running if c.pending > 1]
        if self._sharing and any(self._shares(candidate, other) for other in unfinished):
            return _Admission.LATER
        positions = candidate.base + candidate.length
        match = self.cache.match(candidate.stored, candidate.ids, candidate.base, positions - 1, pure=candidate.seeded)
        before = stored.pages[: candidate.base // self._page] if stored is not None else []
        for page in before:
            self.pool.hold(page)
        candidate.pages = [*before, *match.pages]
        promised = sum(self._pages_of(c.base + c.length) - len(c.pages) for c in unfinished)
        need = self._pages_of(positions) - len(candidate.pages)
        # A page for each that runs: else the next steps would take back what was just given.
        if self.pool.available - promised < need + len(self.running):
            self._release(candidate)
            if match.source >= 0:
                self.pool.release(match.source)
            return _Admission.FULL if self.running else _Admission.NEVER
        self._place(candidate, match, stored)
        if candidate.cached < 0:
            candidate.cached = candidate.computed - candidate.base
            plan.looked_up += candidate.length
            plan.hits += candidate.cached
        return _Admission.DONE

    def _place(self, candidate: Candidate, match: Match, stored: StoredPrefix | None) -> None:
        """The candidate runs from here on, from the end of what its pages hold."""
        whole = candidate.base // self._page
        candidate.computed = max(candidate.base, len(candidate.pages) * self._page)
        candidate.pure = max(candidate.base, (whole + match.pure) * self._page)
        if match.source >= 0:
            self._copy_to(candidate, match.source)
            if match.source_pure and candidate.pure == candidate.computed:
                candidate.pure += match.copied
            candidate.computed += match.copied
            self.pool.release(match.source)
        elif stored is not None and candidate.base % self._page and not match.pages:
            self._copy_to(candidate, stored.pages[-1])
        candidate.reserve()
        candidate.slot = self._slots.pop()
        for child in candidate.forks:
            child.slot = self._slots.pop()
        insort(self.running, candidate, key=_KEY)

    def _copy_to(self, candidate: Candidate, source: int) -> None:
        copy = self._take()
        assert copy is not None, "what is needed was there"
        self._copy_page(source, copy)
        candidate.pages.append(copy)

    def _shares(self, candidate: Candidate, other: Candidate) -> bool:
        """Whether the page that `other` computes next is one that `candidate` needs."""
        if candidate.stored != other.stored or (candidate.seeded and other.pure < other.computed):
            return False
        tokens = (other.computed // self._page + 1) * self._page - candidate.base
        if tokens > min(candidate.length - 1, other.length):
            return False
        return bool(np.array_equal(candidate.ids[:tokens], other.ids[:tokens]))

    def _grow(self, candidate: Candidate, positions: int, plan: Plan) -> bool:
        """Pages for so many positions; the last that run give theirs. False where the candidate was the last itself."""
        while len(candidate.pages) * self._page < positions:
            page = self._take()
            if page is not None:
                candidate.pages.append(page)
                continue
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is candidate:
                return False
        return True

    def _take(self) -> int | None:
        page = self.pool.take()
        if page is None and self.pool.evictable and self.cache.evict():
            page = self.pool.take()
        return page

    def _preempt(self, candidate: Candidate, plan: Plan) -> None:
        """Drops the pages; the tokens stay, and what the cache still has of them is found again when its turn comes."""
        forks = candidate.forks
        self._stop(candidate)
        candidate.forks = forks
        if candidate in self.suspects:
            self.suspects.remove(candidate)
        plan.preempted += 1
        self.add(candidate)

    def _stop(self, candidate: Candidate) -> None:
        self._keep(candidate)
        self._release(candidate)
        self.running.remove(candidate)
        for one in (candidate, *candidate.forks):
            self._slots.append(one.slot)
            one.slot = -1
        candidate.forks = []

    def _keep(self, candidate: Candidate) -> None:
        if candidate.adapter_slot >= 0 and candidate.flight.gone:
            return  # its caller has let the adapter go: the slot may have been written to while the last step ran
        self.cache.insert(candidate.stored, candidate.ids, candidate.base, candidate.pages, candidate.computed, candidate.pure)

    def _release(self, candidate: Candidate) -> None:
        _release_all(self.pool, candidate.pages)
        candidate.pages = []
        candidate.shown_pages = candidate.computed = candidate.pure = 0

    def _pages_of(self, positions: int) -> int:
        return -(-positions // self._page)


def _release_all(pool: PagePool, pages: Sequence[int]) -> None:
    for page in pages:
        pool.release(page)
