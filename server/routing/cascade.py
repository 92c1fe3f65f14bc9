"""Asks a route's candidates in order: deliver, second try, escalate to the next, or one clear error.

An answer is delivered when its candidate sets the standard, or when its quality reaches the skill's bar; between the second-try bar and
that one a generated answer is asked for again with what was found wanting; below, the next candidate is asked. No candidate is asked twice
for money.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from server.core import Call, Priority, Timings, Usage
from server.routing.candidates import Allowance, Answer, Brief, Candidate, Failure
from server.routing.items import Item, Place
from server.routing.policy import share_of_deadline

# Longest that an answer for comparison may take, in seconds.
SHADOW_S = 60.0


class Judge(Protocol):
    """Says how good an answer is."""

    def look(self, brief: Brief, item: Item, answer: Answer) -> Answer:
        """The same answer with a quality, where one can be known, and what was found wanting."""
        ...

    async def agree(self, prompt: str, answers: Sequence[Answer], call: Call) -> tuple[int, float]:
        """Index of the answer that the others agree with most, and how much they do, in [0, 1]."""
        ...


class Cascade:
    """One request's way through its route."""

    def __init__(self, brief: Brief, judge: Judge, call: Call, timings: Timings, max_cost: int | None) -> None:
        self._brief = brief
        self._judge = judge
        self._call = call
        self._timings = timings
        self._max_cost = max_cost

    async def run(self, route: Sequence[Place], items: Sequence[Item]) -> None:
        """Answers what can be answered; what cannot be is closed by the caller."""
        asked = [place for place in route if not place.shadow]
        for number, place in enumerate(asked):
            pending = [item for item in items if not item.done]
            if not pending:
                break
            await self._ask(place.candidate, pending, asked[number + 1 :])

    def shadow(self, route: Sequence[Place], items: Sequence[Item]) -> list[asyncio.Task[None]]:
        """Begins to ask those that run in the shadow. Nobody waits for them: they go on after the answer went out, and yield to callers."""
        found = []
        for place in route:
            under = [item for item in items if place.candidate.name not in item.unshadowed] if place.shadow else []
            if under:
                found.append(asyncio.ensure_future(self._shadow(place, under)))
        return found

    def allowance(self, later: int) -> Allowance:
        """What one item may take of the candidate that is asked now."""
        return Allowance(self._max_cost, share_of_deadline(time.monotonic(), self._call.deadline, later))

    async def _ask(self, candidate: Candidate, pending: Sequence[Item], later: Sequence[Place]) -> None:
        items = []
        for item in pending:
            reason = item.passed_over.get(candidate.name) or candidate.closed()
            if reason:
                item.skip(candidate, reason)
            else:
                items.append(item)
        if not items:
            return
        allowed = self.allowance(len(later))
        answers = candidate.answers([item.work for item in items], self._call, self._timings, allowed)
        async for index, answer in answers:
            await self._take(candidate, items[index], answer, later)

    async def _take(self, candidate: Candidate, item: Item, answer: Answer | Failure, later: Sequence[Place]) -> None:
        if isinstance(answer, Failure):
            item.note(candidate, answer)
            item.hop(candidate, "skipped" if answer.skipped else "failed", answer.error.message, answer)
            return
        await self.finish(candidate, item, answer, later)

    async def finish(self, candidate: Candidate, item: Item, answer: Answer, later: Sequence[Place]) -> None:
        """Scores a whole answer, tries once more where that may help, and delivers or writes down why not."""
        answer = self._judge.look(self._brief, item, answer)
        if candidate.scored and self._wants_second_try(answer):
            answer = await self._second_try(candidate, item, answer, len(later))
        item.note(candidate, answer)
        self._settle(candidate, item, answer, any(not place.candidate.scored for place in later))

    def _settle(self, candidate: Candidate, item: Item, answer: Answer, others: bool) -> None:
        """Delivers the answer or writes down why not. `others`: somebody who sets the standard may be asked yet."""
        bar = self._brief.skill.deliver_bar
        if not candidate.scored:
            item.deliver(candidate, answer, "it sets the skill's standard")
        elif answer.quality is None and others:
            item.hop(candidate, "below_bar", "its quality is not known", answer)
        elif answer.quality is None:
            item.deliver(candidate, answer, "its quality is not known, and nobody who sets a standard may answer")
        elif answer.quality < bar:
            item.hop(candidate, "below_bar", f"quality {answer.quality:.3f} is below the bar {bar:g}{_by(answer)}", answer)
        else:
            item.deliver(candidate, answer, f"quality reaches the bar {bar:g}{_by(answer)}")

    def _wants_second_try(self, answer: Answer) -> bool:
        skill = self._brief.skill
        return answer.quality is not None and skill.second_try_bar <= answer.quality < skill.deliver_bar

    async def _second_try(self, candidate: Candidate, item: Item, first: Answer, later: int) -> Answer:
        """The better of two answers, by how far they agree; the first where there is no second."""
        second = await candidate.second_try(item.work, first, self._call, self.allowance(later))
        if second is None:
            return first
        usage = Usage(first.usage.input + second.usage.input, first.usage.output + second.usage.output)
        cost, elapsed = first.cost_micro_usd + second.cost_micro_usd, first.elapsed_s + second.elapsed_s
        if isinstance(second, Failure):
            return replace(first, usage=usage, cost_micro_usd=cost, elapsed_s=elapsed, tries=2)
        both = (first, second)
        chosen, agreement = await self._judge.agree(item.work.plain, both, self._call)
        signals = replace(both[chosen].signals, agreement=agreement)
        answer = replace(both[chosen], signals=signals, usage=usage, cost_micro_usd=cost, elapsed_s=elapsed, tries=2)
        return self._judge.look(self._brief, item, answer)

    async def _shadow(self, place: Place, items: Sequence[Item]) -> None:
        """Asks for comparison: what comes in time is kept in the story, and changes nothing."""
        candidate = place.candidate
        own = Call(self._call.request_id, time.monotonic() + SHADOW_S, Priority.BULK, tenant=self._call.tenant, user=self._call.user)
        answers = candidate.answers([item.work for item in items], own, Timings(), Allowance(None, own.deadline))
        async for index, answer in answers:
            item = items[index]
            if isinstance(answer, Failure):
                item.failures[candidate.name] = answer
                item.hop(candidate, "shadow", answer.error.message, answer)
                continue
            answer = self._judge.look(self._brief, item, answer)
            item.answers[candidate.name] = answer
            item.hop(candidate, "shadow", "asked for comparison", answer)


def _by(answer: Answer) -> str:
    return f", by {answer.basis}" if answer.basis else ""
