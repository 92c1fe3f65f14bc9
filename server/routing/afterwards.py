"""What goes on after an answer went out: students that run in its shadow end, a teacher is asked beside a student, and the answers are
compared. Nobody waits for it; so many are under way at most, and the oldest are given up for new ones.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.core import Call, Limits, Preference, Priority, Reply, Timings
from server.lake.lake import Lake
from server.lake.schema import SHADOWS
from server.routing.candidates import Allowance, Answer, Brief, Candidate, Failure
from server.routing.cascade import SHADOW_S, Judge
from server.routing.items import Item
from server.routing.record import local_answer, shadow_row
from server.routing.rollout import CANARY, FULL, SHADOW
from server.routing.rollout_agreement import agrees
from server.routing.rollout_book import RolloutBook
from server.routing.rollout_live import Seen
from server.routing.rollout_probes import Probe, Probes
from server.routing.skills import Standing

_log = logging.getLogger(__name__)
MOST = 256
STAGES = (SHADOW, CANARY, FULL)  # in which there is a student to be compared


@dataclass(slots=True)
class Done:
    """A request whose answers are on their way out. `shadows`: students that are being asked for comparison."""

    brief: Brief
    items: Sequence[Item]
    call: Call
    limits: Limits
    standing: Standing
    shadows: list[asyncio.Task[None]] = field(default_factory=list)
    user_hash: str | None = None


@dataclass(slots=True, frozen=True)
class _Pair:
    """What the student and the champion would have delivered, None where the teacher would have been asked instead."""

    mine: Reply | None
    champion: Reply | None
    teacher: Reply | None
    agree: Callable[[Reply, Reply], bool]

    @property
    def same(self) -> bool:
        """Whether both say the same, so that nobody else has to be asked."""
        return self.mine is not None and self.champion is not None and self.agree(self.mine, self.champion)

    @property
    def open(self) -> bool:
        """Whether only the teacher can tell."""
        return self.teacher is None and not self.same

    def difference(self) -> int | None:
        """See Evidence.pair; None where the teacher did not answer. Who leaves it to the teacher is right by the teacher."""
        if self.same:
            return 0
        if self.teacher is None:
            return None
        mine, champion = (one is None or self.agree(one, self.teacher) for one in (self.mine, self.champion))
        return int(mine) - int(champion)


class Afterwards:
    """One a process, on its event loop. `teacher` makes the candidate that sets a skill's standard, None where there is none."""

    def __init__(
        self,
        lake: Lake,
        judge: Judge,
        rollouts: RolloutBook | None,
        teacher: Callable[[Brief], Candidate | None],
        probes: Probes | None = None,
        most: int = MOST,
    ) -> None:
        self.dropped = 0
        self._probes = probes
        self._lake = lake
        self._judge = judge
        self._rollouts = rollouts
        self._teacher = teacher
        self._most = most
        self._tasks: dict[asyncio.Task[None], None] = {}  # in the order of beginning

    def take(self, done: Done) -> None:
        """Counts what is known, and begins what is not. Called once the rows are written; never waits."""
        moves = self._rollouts is not None and done.standing.moves and done.standing.stage in STAGES
        if not moves and not done.shadows:
            return
        drawn: list[float | None] = [self._draw(done, item) if moves else None for item in done.items]
        asked = [item for item, share in zip(done.items, drawn, strict=True) if share is not None and self._wants_teacher(done, item)]
        if not asked and not self._pairs(done) and all(task.done() for task in done.shadows):
            self._finish(done, drawn)
            return
        self._begin(self._go_on(done, drawn, asked))

    async def close(self, grace_s: float = 10.0) -> None:
        """Waits for what is under way, and gives up what takes longer."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=grace_s)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        while len(self._tasks) >= self._most:
            oldest = next(iter(self._tasks))
            del self._tasks[oldest]
            oldest.cancel()
            self.dropped += 1
        task = asyncio.ensure_future(work)
        self._tasks[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("comparing answers failed", exc_info=error)

    def _draw(self, done: Done, item: Item) -> float | None:
        """The probability with which the item is compared, None where it is not: all that the teacher answers because nobody else was
        to, and a share of what students answer. Items are drawn before anybody knows how they come out, escalated ones too: only what was
        drawn is counted, else those that a student is unsure of would be counted more often.
        """
        assert self._rollouts is not None, "take() looks"
        if done.limits.preference in (Preference.LOCAL_ONLY, Preference.PROVIDER_ONLY) or item.outcome.error is not None:
            return None
        if not self._answered_by_student(done, item):
            return 1.0
        drawn, share = self._rollouts.draw(done.brief.skill.name)
        return share if drawn else None

    def _answered_by_student(self, done: Done, item: Item) -> bool:
        """Whether a student of the rollout was asked for an answer, and not in the shadow alone."""
        names = _names(done)
        return any(hop.candidate in names and hop.outcome in ("delivered", "below_bar", "failed") for hop in item.outcome.decision.hops)

    def _wants_teacher(self, done: Done, item: Item) -> bool:
        return item.outcome.decision.local and done.brief.skill.teacher not in item.answers

    async def _go_on(self, done: Done, drawn: list[float | None], asked: Sequence[Item]) -> None:
        try:
            await asyncio.gather(self._ask_teacher(done, asked, drawn), *done.shadows)
            await self._settle(done, drawn)
        finally:
            for task in done.shadows:
                task.cancel()
        self._finish(done, drawn)

    async def _settle(self, done: Done, drawn: list[float | None]) -> None:
        """Asks the teacher whose answer it would have given, the student's or the champion's, where they say different things."""
        if not self._pairs(done):
            return
        unsettled = [(pair := self._pair(done, item)) is not None and pair.open for item in done.items]
        shares = [1.0 if asked else share for asked, share in zip(unsettled, drawn, strict=True)]
        await self._ask_teacher(done, [item for item, asked in zip(done.items, unsettled, strict=True) if asked], shares)

    def _pairs(self, done: Done) -> bool:
        """Whether a challenger runs in the shadow of the champion."""
        return self._rollouts is not None and bool(done.standing.champion and done.standing.moves and done.shadows)

    def _pair(self, done: Done, item: Item) -> _Pair | None:
        """The student's answer beside the champion's in whose shadow it was; None where there is no such pair."""
        skill, standing = done.brief.skill, done.standing
        name = f"local:{skill.name}@{standing.student}"
        mine, champion = item.answers.get(name), item.answers.get(f"local:{skill.name}@{standing.champion}")
        if (
            mine is None
            or champion is None
            or not any(hop.candidate == name and hop.outcome == "shadow" for hop in item.outcome.decision.hops)
        ):
            return None
        pair = _Pair(
            mine.reply if _delivered(mine, skill.deliver_bar) else None,
            champion.reply if _delivered(champion, skill.deliver_bar) else None,
            teacher.reply if (teacher := item.answers.get(skill.teacher)) is not None else None,
            lambda one, other: agrees(skill.task, item.work.plain, one, other),
        )
        return pair if pair.mine is not None or pair.champion is not None else None

    async def _ask_teacher(self, done: Done, items: Sequence[Item], drawn: list[float | None]) -> None:
        """Within the budgets, whose reservations hold here too; what they refuse is not asked."""
        teacher = self._teacher(done.brief) if items else None
        if teacher is None or teacher.closed():
            return
        own = Call(done.call.request_id, time.monotonic() + SHADOW_S, Priority.BULK, tenant=done.call.tenant, user=done.call.user)
        shares = {id(item): share for item, share in zip(done.items, drawn, strict=True)}
        answers = teacher.answers(
            [item.work for item in items], own, Timings(), Allowance(done.brief.skill.max_cost_micro_usd, own.deadline)
        )
        async for index, found in answers:
            item = items[index]
            if isinstance(found, Answer):
                item.answers[teacher.name] = found
            if not (isinstance(found, Failure) and found.skipped):
                self._write(done, [shadow_row(done.brief, item, teacher.name, "teacher", found, shares[id(item)] or 0.0)])

    def _finish(self, done: Done, drawn: list[float | None]) -> None:
        """Writes down the shadows that the rows do not have, and counts."""
        rows = []
        for item in done.items:
            told = local_answer(item)[0]
            for name, found in (item.answers | item.failures).items():
                late = name.startswith("local:") and (name not in item.recorded or name != told)
                if late and any(hop.candidate == name and hop.outcome == "shadow" for hop in item.outcome.decision.hops):
                    rows.append(shadow_row(done.brief, item, name, "student", found, 1.0))
        self._write(done, rows)
        if self._rollouts is not None and done.standing.moves and done.standing.stage in STAGES:
            for item, share in zip(done.items, drawn, strict=True):
                self._count(done, item, share is not None)
            signs = self._rollouts.signs(done.brief.skill.name)
            if signs:
                self._begin(self._look_into(done, signs))

    async def _look_into(self, done: Done, signs: Sequence[str]) -> None:
        """Says what changed, for people."""
        assert self._rollouts is not None, "take() looks"
        skill, version = done.brief.skill.name, done.standing.student
        cause = await self._probes.diagnose(done.brief, version, dict.fromkeys(signs, 1)) if self._probes is not None else "unknown"
        self._rollouts.alarm(skill, version, signs, cause)

    def _count(self, done: Done, item: Item, compared: bool) -> None:
        assert self._rollouts is not None, "take() looks"
        skill, standing = done.brief.skill, done.standing
        name = f"local:{skill.name}@{standing.student}"
        mine = item.answers.get(name)
        teacher = item.answers.get(skill.teacher)
        seen = Seen(item, standing.student, mine, item.failures.get(name) if mine is None else None, teacher)
        champion = item.answers.get(f"local:{skill.name}@{standing.champion}") if standing.champion else None
        if compared and teacher is not None:
            if mine is not None and _delivered(mine, skill.deliver_bar):
                seen.agreed = agrees(skill.task, item.work.plain, mine.reply, teacher.reply)
                if self._probes is not None and not item.work.messages:
                    self._probes.keep(skill.name, standing.student, Probe(item.work, mine.reply, teacher.reply))
            if champion is not None and _delivered(champion, skill.deliver_bar):
                seen.champion_agreed = agrees(skill.task, item.work.plain, champion.reply, teacher.reply)
        if standing.champion and (pair := self._pair(done, item)) is not None:
            seen.pair = pair.difference()
        self._rollouts.saw(skill, seen)

    def _write(self, done: Done, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            self._lake.append(SHADOWS, [{**row, "user_hash": done.user_hash} for row in rows])


def _names(done: Done) -> set[str]:
    standing, skill = done.standing, done.brief.skill.name
    return {f"local:{skill}@{version}" for version in (standing.student, standing.champion) if version}


def _delivered(answer: Answer, bar: float) -> bool:
    return answer.quality is not None and answer.quality >= bar
