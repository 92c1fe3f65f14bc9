"""Decides who answers each item of a skill's request, has them asked in order, and keeps the story.

Every item becomes an interaction in the lake before the caller has its answer, the unanswered and the cancelled ones too.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.core import Call, Decision, Limits, Outcome, Results, Timings, Usage, Work
from server.errors import UnderstudyError
from server.lake.lake import Lake
from server.lake.schema import INTERACTIONS
from server.routing.afterwards import Afterwards, Done
from server.routing.briefing import Ask, Briefed, Detector, brief_of
from server.routing.candidates import Brief, Candidate
from server.routing.cascade import Cascade, Judge
from server.routing.items import Item, Place
from server.routing.record import row
from server.routing.rollout_book import RolloutBook
from server.routing.rollout_probes import Probes
from server.routing.routes import RouteParts, Routes
from server.routing.streaming import StreamedCascade


class ItemObserver(Protocol):
    """Counts what became of items; called on the event loop, never blocks."""

    def item_done(self, brief: Brief, outcome: Outcome, elapsed_s: float) -> None:
        """Once an item, answered or not. `elapsed_s`: of the whole call."""
        ...


@dataclass(slots=True)
class Planned:
    """How an item would be routed: the decision so far, and each candidate with its place and why it would be passed over."""

    decision: Decision
    places: list[Place] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    brief: Brief | None = None
    error: Exception | None = None


class Router:
    """One a process; used on its event loop, any number of calls at once."""

    def __init__(
        self,
        parts: RouteParts,
        lake: Lake,
        judge: Judge,
        *,
        detector: Detector | None = None,
        observer: ItemObserver | None = None,
        rollouts: RolloutBook | None = None,
        hold_tokens: int = 24,
    ) -> None:
        self.skills = parts.skills
        self.afterwards = Afterwards(lake, judge, rollouts, self._teacher, Probes(self._student, self._teacher))
        self.routes = Routes(parts)
        self._lake = lake
        self._judge = judge
        self._detector = detector
        self._observer = observer
        self._hold = hold_tokens

    async def run(self, ask: Ask, call: Call) -> Results[Outcome]:
        """Answers inputs, each by itself: an item that nobody could answer has `error` in its outcome.

        Raises:
            SkillNotFound: with near names.
            InvalidArgument: fields that contradict each other, an instruction that names no task (with those that came near).
            FailedPrecondition: nobody may answer under this preference (no student, no teacher).
        """
        briefed = await brief_of(ask, self.skills, self._detector, call)
        items, good = self._items(briefed, ask.limits)
        results: Results[Outcome] = Results([item.outcome for item in items])
        began = (time.time_ns(), time.perf_counter())
        done = Done(briefed.brief, good, call, ask.limits, self.skills.standing(briefed.brief.skill.name))
        try:
            if good:
                places = self.routes.places(briefed.brief, ask.limits, good[0].work)
                await self.routes.pass_over(briefed.brief, ask.limits, places, good, call)
                cascade = self._cascade(briefed.brief, ask.limits, call, results.timings)
                done.shadows = cascade.shadow(places, good)
                await cascade.run(places, good)
        finally:
            self._close(done, items, results.timings, began)
        results.usage = Usage(sum(item.input_tokens for item in items), sum(item.output_tokens for item in items))
        return results

    async def stream(self, ask: Ask, call: Call) -> AsyncGenerator[str | Outcome, None]:
        """One input's answer: visible words as they come, then the outcome. Raises as `run`, and the error where nobody could answer."""
        assert len(ask.works) == 1, "one conversation a stream"
        briefed = await brief_of(ask, self.skills, self._detector, call)
        for error in briefed.refused.values():
            raise error
        items, _ = self._items(briefed, ask.limits)
        timings, began = Timings(), (time.time_ns(), time.perf_counter())
        item = items[0]
        done = Done(briefed.brief, items, call, ask.limits, self.skills.standing(briefed.brief.skill.name))
        try:
            places = self.routes.places(briefed.brief, ask.limits, item.work)
            await self.routes.pass_over(briefed.brief, ask.limits, places, items, call)
            cascade = self._cascade(briefed.brief, ask.limits, call, timings)
            words = StreamedCascade(cascade, briefed.brief, self._judge, call, self._hold).run(places, item)
            try:
                async for text in words:
                    yield text
            finally:
                await words.aclose()
            done.shadows = cascade.shadow(places, items)  # after the stream: it has the machine for itself
        finally:
            self._close(done, items, timings, began)
        if item.outcome.error is not None:
            raise item.outcome.error
        yield item.outcome

    async def explain(self, ask: Ask, call: Call) -> list[Planned]:
        """How each input would be routed, without asking anybody. Raises as `run`, but where nobody may answer says so in each item."""
        briefed = await brief_of(ask, self.skills, self._detector, call)
        items, good = self._items(briefed, ask.limits)
        planned = [Planned(item.outcome.decision, work=item.work, brief=briefed.brief, error=item.outcome.error) for item in items]
        places: list[Place] = []
        try:
            if good:
                places = self.routes.places(briefed.brief, ask.limits, good[0].work)
                await self.routes.pass_over(briefed.brief, ask.limits, places, good, call)
        except UnderstudyError as error:
            for one in planned:
                one.error = one.error or error
        for one, item in zip(planned, items, strict=True):
            if one.error is None:
                one.places = [place for place in places if not (place.shadow and place.candidate.name in item.unshadowed)]
                blocked = {place.candidate.name: self.routes.blocked(briefed.brief, place.candidate, call) for place in places}
                one.passed_over = {name: why for name, why in blocked.items() if why} | item.passed_over
        return planned

    def _items(self, briefed: Briefed, limits: Limits) -> tuple[list[Item], list[Item]]:
        """All items, and those that can be worked on."""
        skill = briefed.brief.skill
        stage = self.skills.stage(skill.name)
        preference = limits.preference or skill.preference
        items, good = [], []
        for index, work in enumerate(briefed.works):
            decision = Decision(skill.name, stage, task=skill.task, preference=preference, detected=briefed.detected)
            item = Item(work, Outcome(self._lake.ids.new(), decision))
            items.append(item)
            if index in briefed.refused:
                item.outcome.error = briefed.refused[index]
            else:
                good.append(item)
        return items, good

    def _cascade(self, brief: Brief, limits: Limits, call: Call, timings: Timings) -> Cascade:
        limit = limits.max_cost_micro_usd if limits.max_cost_micro_usd is not None else brief.skill.max_cost_micro_usd
        return Cascade(brief, self._judge, call, timings, limit)

    def _student(self, brief: Brief, version: str) -> Candidate | None:
        return self.routes.student(brief, version)

    def _teacher(self, brief: Brief) -> Candidate | None:
        return self.routes.teacher(brief)

    def _close(self, done: Done, items: Sequence[Item], timings: Timings, began: tuple[int, float]) -> None:
        """Ends every item's story, hands the rows to the lake, and leaves the rest to whatever goes on after the answer."""
        brief, good, call = done.brief, done.items, done.call
        elapsed = time.perf_counter() - began[1]
        for item in good:
            item.close()
        rows: list[dict[str, Any]] = []
        user = done.user_hash = self._lake.ids.pseudonym(call.user) or None
        for item in good:
            item.recorded = frozenset(item.answers)
            rows.append({**row(brief, item, call, timings, began[0], elapsed), "user_hash": user})
        if rows:
            self._lake.append(INTERACTIONS, rows)
        if self._observer is not None:
            for item in items:
                self._observer.item_done(brief, item.outcome, elapsed)
        self.afterwards.take(done)
