"""A provider's model as a candidate: asked within its budget, paid once, and its words read as an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from server.core import Call, Reply, Timings, Usage, Work
from server.errors import BudgetExceeded, ProviderUnavailable, UnderstudyError
from server.providers.base import Completion, Prompt, Provider
from server.routing.candidates import Allowance, Answer, Brief, Failure, Piece, Signals
from server.routing.prompting import format_of, max_tokens_of, messages_of, read_reply
from server.routing.schema_check import checker

if TYPE_CHECKING:
    from server.routing.budget import Budget, Reservation
    from server.routing.budget_windows import Scopes

# So much of a call's time is kept back, so that what was answered still reaches the caller.
_MARGIN_SHARE, _MARGIN_S = 0.05, 0.05


class ProviderCandidate:
    """One model of one provider for one request. Equal inputs are asked, and paid, once. `budget` None: nothing bounds the bill."""

    local = False
    scored = False

    def __init__(self, model: str, provider: Provider, brief: Brief, budget: Budget | None = None) -> None:
        self.name = model
        self._provider = provider
        self._model = model.partition("/")[2]
        self._brief = brief
        self._budget = budget
        self._check = checker(brief.skill.json_schema) if brief.skill.json_schema else None
        self.aborted_micro_usd = 0

    def closed(self) -> str:
        """See Candidate."""
        return self._provider.open_circuit()

    def expected_s(self) -> float | None:
        """See Candidate."""
        return self._provider.health().latency_p50_s

    def worst_cost_micro_usd(self, work: Work) -> int | None:
        """See Candidate."""
        return self._provider.worst_cost_micro_usd(self._model, self._prompt(work))

    async def second_try(self, work: Work, first: Answer, call: Call, allowed: Allowance) -> Answer | Failure | None:
        """None: one request never pays twice for the same candidate."""
        return None

    async def answers(
        self, works: Sequence[Work], call: Call, timings: Timings, allowed: Allowance
    ) -> AsyncIterator[tuple[int, Answer | Failure]]:
        """See Candidate."""
        call.stage = "provider"
        deadline = early(allowed.deadline)
        if len(works) == 1:  # the usual case, without a queue and a task
            yield 0, await self._one(works[0], call, replace(allowed, deadline=deadline))
            return
        places: dict[Work, list[int]] = {}
        for index, work in enumerate(works):
            places.setdefault(work, []).append(index)
        done: asyncio.Queue[asyncio.Task[Answer | Failure]] = asyncio.Queue()
        each = replace(allowed, deadline=deadline)
        running = {asyncio.ensure_future(self._one(work, call, each)): indices for work, indices in places.items()}
        for task in running:
            task.add_done_callback(done.put_nowait)
        try:
            for _ in range(len(running)):
                task = await done.get()
                answer = task.result()
                for index in running[task]:
                    yield index, answer
                    answer = _free(answer)
        finally:
            for task in running:
                task.cancel()

    async def stream(self, work: Work, call: Call, allowed: Allowance) -> AsyncGenerator[Piece, None]:
        """See Candidate. What an aborted stream used is debited."""
        prompt = self._prompt(work)
        refusal = self._refusal(prompt, allowed)
        if refusal is not None:
            raise refusal.error
        call.stage = "provider"
        started = time.perf_counter()
        reservation = await self._reserve(prompt, call)
        spent: int | None = None
        text: list[str] = []
        try:
            parts = self._provider.stream(self._model, prompt, early(allowed.deadline))
            try:
                async for part in parts:
                    if part.text:
                        text.append(part.text)
                        yield Piece(part.text)
                    if part.completion is None:
                        continue
                    spent = part.completion.cost_micro_usd
                    found = self._read(work, part.completion, time.perf_counter() - started)
                    if isinstance(found, Failure):
                        raise found.error
                    yield Piece(answer=found)
            except UnderstudyError as error:
                spent = max(spent or 0, error.spent_micro_usd)
                raise
            finally:
                await parts.aclose()
        finally:
            if spent is None:  # whoever read has left
                spent = self.aborted_micro_usd = self._provider.aborted_cost_micro_usd(self._model, prompt, "".join(text))
            await self._settle(reservation, spent)

    async def _one(self, work: Work, call: Call, allowed: Allowance) -> Answer | Failure:
        started = time.perf_counter()
        try:
            if self._brief.skill.task == "feature-extraction":
                return await self._embed(work, call, allowed, started)
            prompt = self._prompt(work)
            refusal = self._refusal(prompt, allowed)
            if refusal is not None:
                return refusal
            reservation = await self._reserve(prompt, call)
            spent: int | None = None
            try:
                completion = await self._provider.complete(self._model, prompt, allowed.deadline)
                spent = completion.cost_micro_usd
            except UnderstudyError as error:
                spent = error.spent_micro_usd
                raise
            finally:
                await self._settle(reservation, spent)
        except BudgetExceeded as error:
            return Failure(error, skipped=True)
        except UnderstudyError as error:
            return Failure(error, cost_micro_usd=error.spent_micro_usd, elapsed_s=time.perf_counter() - started)
        return self._read(work, completion, time.perf_counter() - started)

    async def _embed(self, work: Work, call: Call, allowed: Allowance, started: float) -> Answer:
        if self._bounding(call) is not None or allowed.max_cost_micro_usd is not None:
            message = f"{self.name} embeds texts, whose worst cost is not known before; budgets and max_cost keep it from being asked."
            raise BudgetExceeded(message, field="max_cost")
        found = await self._provider.embed(self._model, [work.text], allowed.deadline)
        reply = Reply(embedding=np.ascontiguousarray(found.vectors[0], np.float32))
        elapsed = time.perf_counter() - started
        return Answer(reply, None, (), found.usage, found.cost_micro_usd, found.source_model, self._provider.training_allowed, elapsed)

    def _prompt(self, work: Work) -> Prompt:
        brief = self._brief
        kept = brief.skill.teacher_logprobs
        kept = kept if kept and self._provider.gives_logprobs(self._model) else 0
        return Prompt(
            messages_of(brief, work),
            max_tokens_of(brief),
            temperature=brief.skill.temperature,
            top_p=brief.manner.top_p,
            presence_penalty=brief.manner.presence_penalty,
            frequency_penalty=brief.manner.frequency_penalty,
            stop=brief.manner.stop,
            seed=brief.manner.seed,
            tools=brief.tools,
            tool_choice=brief.manner.tool_choice,
            format=format_of(brief),
            logprobs=brief.manner.logprobs or kept > 0,
            top_logprobs=max(brief.manner.top_logprobs, kept),
        )

    def _refusal(self, prompt: Prompt, allowed: Allowance) -> Failure | None:
        limit = allowed.max_cost_micro_usd
        if limit is not None:
            worst = self._provider.worst_cost_micro_usd(self._model, prompt)
            if worst is None or worst > limit:
                may = "has no price in the configuration" if worst is None else f"may cost {worst}"
                message = f"{self.name} {may}; at most {limit} millionths of a US dollar are allowed. Raise max_cost or add the price."
                return Failure(BudgetExceeded(message, field="max_cost", limit=limit), skipped=True)
        reason = self._provider.open_circuit()
        return Failure(ProviderUnavailable(f"{self.name} {reason}."), skipped=True) if reason else None

    async def _reserve(self, prompt: Prompt, call: Call) -> Reservation | None:
        """Raises BudgetExceeded, also where a budget is set and the model has no price: an unknown cost fits into none."""
        budget = self._bounding(call)
        if budget is None:
            return None
        worst = self._provider.worst_cost_micro_usd(self._model, prompt)
        if worst is None:
            message = f"{self.name} has no price, and a budget is set. Add its price under providers.{self._provider.name}.prices."
            raise BudgetExceeded(message, field="prices")
        return await budget.reserve(worst, self._scopes(call))

    def _bounding(self, call: Call) -> Budget | None:
        """The budget, where it bounds this call."""
        return self._budget if self._budget is not None and self._budget.bounds(self._scopes(call)) else None

    def _scopes(self, call: Call) -> Scopes:
        from server.routing.budget_windows import Scopes

        return Scopes(provider=self._provider.name, skill=self._brief.skill.name, key=call.tenant)

    async def _settle(self, reservation: Reservation | None, spent: int | None) -> None:
        """`spent` None: it is not known, and the worst case is debited. Never waits, so that it is done in a task that is cancelled too."""
        if reservation is not None and self._budget is not None:
            await self._budget.settle(reservation, reservation.amount_micro_usd if spent is None else spent)

    def _read(self, work: Work, completion: Completion, elapsed_s: float) -> Answer | Failure:
        if completion.tool_calls:
            found: Reply | str = Reply(completion.text, tool_calls=completion.tool_calls, finish=completion.finish)
        else:
            found = read_reply(self._brief, work, completion.text, completion.finish, self._check)
        if isinstance(found, str):
            message = f"{self.name} answered with {found}. Sharpen the instruction."
            error = ProviderUnavailable(message)
            return Failure(error, usage=completion.usage, cost_micro_usd=completion.cost_micro_usd, elapsed_s=elapsed_s)
        return Answer(
            replace(found, tokens=completion.logprobs),
            usage=completion.usage,
            cost_micro_usd=completion.cost_micro_usd,
            source_model=completion.source_model,
            training_allowed=self._provider.training_allowed,
            elapsed_s=elapsed_s,
            signals=Signals(valid=True if self._check else None),
        )


def early(deadline: float | None) -> float | None:
    """A little before the call's own deadline, so that the items that were answered still reach the caller."""
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    return deadline - min(max(left, 0.0) * _MARGIN_SHARE, _MARGIN_S)


def _free(answer: Answer | Failure) -> Answer | Failure:
    """The same for the next item with an equal input: nothing is paid twice."""
    if isinstance(answer, Failure):
        return Failure(answer.error, answer.skipped)
    return replace(answer, usage=Usage(), cost_micro_usd=0)
