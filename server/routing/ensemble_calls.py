"""The calls of an ensemble: reserved for wave by wave, made at once, cut off where they are of no use any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.core import Call, Timings, Usage, Work
from server.errors import BudgetExceeded, Cancelled, InternalError, ProviderUnavailable, UnderstudyError
from server.routing.candidates import Allowance, Answer, Failure
from server.routing.ensemble_members import Member
from server.routing.ensemble_strategies import Slot

if TYPE_CHECKING:
    from server.routing.budget import Budget, Reservation


@dataclass(slots=True)
class Shot:
    """One call of a member, and what became of it. `wave` 0: it was not made. `outcome`: see understudy.v1.EnsembleAnswer."""

    slot: Slot
    member: Member
    wave: int = 0
    answer: Answer | None = None
    error: UnderstudyError | None = None
    outcome: str = "skipped"
    reason: str = ""
    share: float = 0.0
    cost_micro_usd: int = 0
    usage: Usage = field(default_factory=Usage)
    elapsed_s: float = 0.0

    @property
    def name(self) -> str:
        """As decisions show the member."""
        return self.member.candidate.name


class Purse:
    """What one call may still pay: the budget's reservations, and the request's own limit. `budget` None: nothing bounds the bill."""

    def __init__(self, budget: Budget | None, max_cost: int | None, skill: str, tenant: str) -> None:
        self._budget = budget
        self._left = max_cost
        self._skill = skill
        self._tenant = tenant

    async def reserve(self, member: Member) -> Reservation | None:
        """Promises a call's worst case. Raises BudgetExceeded, Unavailable."""
        if member.candidate.local:
            return None
        from server.routing.budget_windows import Scopes

        scopes = Scopes(provider=member.provider, skill=self._skill, key=self._tenant)
        budget = self._budget if self._budget is not None and self._budget.bounds(scopes) else None
        worst = member.worst_cost_micro_usd
        if worst is None and (self._left is not None or budget is not None):
            message = f"{member.candidate.name} has no price, and a limit is set. Add its price under providers.{member.provider}.prices."
            raise BudgetExceeded(message, field="prices")
        if self._left is not None and worst is not None and worst > self._left:
            may = f"{member.candidate.name} may cost {worst} millionths of a US dollar"
            message = f"{may}, and {self._left} are left of max_cost. Raise max_cost."
            raise BudgetExceeded(message, field="max_cost", limit=self._left)
        reservation = None
        if budget is not None and worst is not None:
            reservation = await budget.reserve(worst, scopes)
        if self._left is not None:
            self._left -= worst or 0
        return reservation

    async def settle(self, member: Member, reservation: Reservation | None, spent: int) -> None:
        """Replaces the worst case by what was paid. Never waits."""
        if self._left is not None:
            self._left += (member.worst_cost_micro_usd or 0) - spent
        if reservation is not None and self._budget is not None:
            await self._budget.settle(reservation, spent)

    @property
    def left(self) -> int | None:
        """Of the request's limit, in 1e-6 US dollars."""
        return self._left


class Calls:
    """The calls that are under way. Leave it by `stop`, whatever happened."""

    def __init__(self, work: Work, call: Call, timings: Timings, purse: Purse) -> None:
        self._work = work
        self._call = call
        self._timings = timings
        self._purse = purse
        self._running: dict[asyncio.Task[Answer | Failure], tuple[Shot, Reservation | None, float]] = {}
        self.waves = 0

    @property
    def running(self) -> list[Shot]:
        """Calls that have not answered."""
        return [shot for shot, _, _ in self._running.values()]

    async def begin(self, wave: Sequence[Shot], fewest: int, until: float | None) -> bool:
        """Reserves for all calls of a wave, then makes those that were reserved for; calls without room in the budget are skipped.

        Where fewer than `fewest` would be left nothing is made, what was reserved is given back, and the answer is False.
        """
        reserved: list[tuple[Shot, Reservation | None]] = []
        try:
            for shot in wave:
                closed = shot.member.candidate.closed()
                if closed:
                    shot.error = ProviderUnavailable(f"{shot.name} {closed}.")
                    shot.reason = closed
                    continue
                try:
                    reserved.append((shot, await self._purse.reserve(shot.member)))
                except UnderstudyError as error:
                    shot.error, shot.reason = error, error.message
        except BaseException:
            await self._give_back(reserved)
            raise
        if len(reserved) < fewest:
            await self._give_back(reserved)
            for shot, _ in reserved:
                shot.reason = "too few of its wave could be asked"
            return False
        self.waves += 1
        for shot, reservation in reserved:
            shot.wave = self.waves
            task = asyncio.ensure_future(self._one(shot, until))
            self._running[task] = (shot, reservation, time.perf_counter())
        return True

    async def next(self, until: float | None) -> list[Shot]:
        """Waits for some of them, and returns those that ended; none where the time is over."""
        timeout = None if until is None else max(0.0, until - time.monotonic())
        done, _ = await asyncio.wait(self._running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        return [await self._end(task) for task in done]

    async def stop(self, reason: str) -> list[Shot]:
        """Cuts off what is still under way, and returns it. A provider's answer may be charged all the same: its worst case is debited."""
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        found = []
        for task in tasks:
            shot = await self._end(task)
            if shot.outcome == "cut_off":
                shot.reason = reason
            found.append(shot)
        return found

    async def _one(self, shot: Shot, until: float | None) -> Answer | Failure:
        answers = shot.member.candidate.answers([self._work], self._call, self._timings, Allowance(None, until))
        async for _, answer in answers:
            return answer
        return Failure(InternalError(f"{shot.name} gave no answer"))

    async def _end(self, task: asyncio.Task[Answer | Failure]) -> Shot:
        shot, reservation, began = self._running.pop(task)
        if task.cancelled():
            shot.outcome, shot.error = "cut_off", Cancelled(f"{shot.name} was not waited for.")
            shot.cost_micro_usd = shot.member.worst_cost_micro_usd or 0
            shot.elapsed_s = time.perf_counter() - began
        elif (raised := task.exception()) is not None:
            await self._purse.settle(shot.member, reservation, shot.member.worst_cost_micro_usd or 0)
            raise raised
        else:
            answer = task.result()
            shot.cost_micro_usd, shot.usage, shot.elapsed_s = answer.cost_micro_usd, answer.usage, answer.elapsed_s
            if isinstance(answer, Answer):
                shot.answer, shot.outcome = answer, "answered"
            else:
                shot.error, shot.outcome, shot.reason = answer.error, "skipped" if answer.skipped else "failed", answer.error.message
        await self._purse.settle(shot.member, reservation, shot.cost_micro_usd)
        return shot

    async def _give_back(self, reserved: Sequence[tuple[Shot, Reservation | None]]) -> None:
        for shot, reservation in reserved:
            await self._purse.settle(shot.member, reservation, 0)
