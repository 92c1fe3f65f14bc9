"""Several members asked for one answer: waves, what their answers say together, and the skill's route where they say nothing.

One interaction each, whose hops are the calls: the lake has it before the caller has the answer.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from server.core import Call, Decision, FloatArray, Outcome, Task, Timings, Usage
from server.errors import (
    BudgetExceeded,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ProviderUnavailable,
    UnderstudyError,
)
from server.lake.lake import Lake
from server.lake.schema import INTERACTIONS
from server.quality.agreement import Agreement, agree, kind_of, support
from server.routing import ensemble_strategies as strategies
from server.routing.briefing import Ask, Briefed, Detector, brief_of
from server.routing.candidates import Brief, Failure
from server.routing.cascade import Judge
from server.routing.ensemble_calls import Calls, Purse, Shot
from server.routing.ensemble_fallback import fall_back
from server.routing.ensemble_members import Member, MemberAsk, check_members, members_of
from server.routing.ensemble_strategies import Rule, Slot, Standing, Strategy, WinTable
from server.routing.items import Item
from server.routing.policy import share_of_deadline
from server.routing.record import row
from server.routing.remote import early
from server.routing.router import ItemObserver
from server.routing.routes import RouteParts, Routes
from server.runtime.runtime import Runtime

_NO_VOTE = ("text-ranking", "sentence-similarity")  # measures, of which no two are equal


@dataclass(slots=True, frozen=True)
class EnsembleAsk:
    """A request; fields as in understudy.v1.RunEnsembleRequest. `ask` has one work; its `limits.max_cost_micro_usd` is the whole call's."""

    ask: Ask
    members: Sequence[MemberAsk]
    strategy: Strategy = Strategy.CONSENSUS
    wave_size: int = 0
    quorum: int = 0
    threshold: float | None = None
    members_only: bool = False
    max_latency_s: float | None = None


@dataclass(slots=True)
class Ensemble:
    """What came of a request. `shots`: the calls, in the order of asking; `stopped`: why no more was asked."""

    strategy: Strategy
    outcome: Outcome
    shots: Sequence[Shot]
    confidence: float | None = None
    waves: int = 0
    stopped: str = ""
    fell_back: bool = False
    timings: Timings = field(default_factory=Timings)


@dataclass(slots=True)
class _Run:
    """A request under way."""

    asked: EnsembleAsk
    briefed: Briefed
    item: Item
    shots: list[Shot]
    rule: Rule
    call: Call
    purse: Purse
    ensemble: Ensemble
    until: float | None = None
    ended: bool = False
    no_route: str = ""  # why the skill's route could not be taken
    agreement: Agreement | None = None
    vectors: dict[str, FloatArray] = field(default_factory=dict)

    @property
    def answered(self) -> list[Shot]:
        return [shot for shot in self.shots if shot.answer is not None]


class Ensembles:
    """One a process, on the event loop. `embedder` names the model whose vectors compare texts; it raises where there is none."""

    def __init__(
        self,
        parts: RouteParts,
        lake: Lake,
        judge: Judge,
        embedder: Callable[[], str],
        *,
        detector: Detector | None = None,
        observer: ItemObserver | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._parts = parts
        self._routes = Routes(parts)
        self._lake = lake
        self._judge = judge
        self.texts = TextVectors(parts.runtime, embedder)
        self._detector = detector
        self._observer = observer
        self._chance = chance
        self.wins = WinTable()

    async def run(self, asked: EnsembleAsk, call: Call) -> Ensemble:
        """Asks the members, then, unless `members_only`, the skill's route. An outcome without an answer has `error` set.

        Raises:
            SkillNotFound, ModelNotFound, VersionNotFound, NotFound (a provider): with near names.
            InvalidArgument: fields that contradict each other; TaskNotSupported: a member that cannot do the skill's task.
        """
        calls = check_members(asked.members, asked.ask.limits.preference)
        if not 0 <= asked.quorum <= calls:
            raise InvalidArgument(f"quorum is {asked.quorum}; expected 0 to {calls}, the calls of the members.", field="quorum")
        briefed = await brief_of(asked.ask, self._parts.skills, self._detector, call)
        for error in briefed.refused.values():
            raise error
        run = self._begin(asked, briefed, call)
        began = (time.time_ns(), time.perf_counter())
        try:
            await self._answer(run)
            run.ended = True
        finally:
            self._close(run, began)
        return run.ensemble

    async def _answer(self, run: _Run) -> None:
        """Asks, chooses, and has the route answer where the members have no result."""
        calling = Calls(run.item.work, run.call, run.ensemble.timings, run.purse)
        chosen = None
        try:
            try:
                run.ensemble.stopped = await self._ask(run, calling)
            finally:
                for shot in await calling.stop(run.ensemble.stopped or "the call ended"):
                    self._look(run, shot)
                run.ensemble.waves = calling.waves
            chosen = await self._choose(run)
        finally:  # what was asked and paid is told, also of a call whose caller left
            self._tell(run, chosen)
        if chosen is None and not run.asked.members_only:
            await self._fall_back(run)

    def _begin(self, asked: EnsembleAsk, briefed: Briefed, call: Call) -> _Run:
        brief, skill, limits = briefed.brief, briefed.brief.skill, asked.ask.limits
        if skill.task == "feature-extraction" or (asked.strategy.votes and skill.task in _NO_VOTE):
            message = f"{skill.task} gives numbers, which no two models give alike. Choose another skill, or another strategy."
            raise InvalidArgument(message, field="strategy")
        assert len(briefed.works) == 1, "one input a call"
        work = briefed.works[0]
        members = members_of(asked.members, brief, self._parts, work, asked.ask.temperature)
        decision = Decision(
            skill.name,
            self._parts.skills.stage(skill.name),
            task=skill.task,
            preference=limits.preference or skill.preference,
            detected=briefed.detected,
        )
        shots = self._shots(asked.strategy, members, brief, decision)
        max_cost = limits.max_cost_micro_usd if limits.max_cost_micro_usd is not None else skill.max_cost_micro_usd
        return _Run(
            asked,
            briefed,
            item := Item(work, Outcome(self._lake.ids.new(), decision)),
            shots,
            strategies.rule_of(asked.strategy, len(shots), asked.quorum, asked.wave_size, (asked.threshold, skill.deliver_bar)),
            call,
            Purse(self._parts.budget, max_cost, skill.name, call.tenant),
            Ensemble(asked.strategy, item.outcome, shots),
            _until(asked, call),
        )

    def _shots(self, strategy: Strategy, members: Sequence[Member], brief: Brief, decision: Decision) -> list[Shot]:
        """The calls in the order of asking."""
        skill = decision.skill
        posteriors = [self.wins.posterior(skill, one.candidate.name, one.asked.accuracy, one.asked.observations) for one in members]
        if strategy is Strategy.SPECIALIST:
            probabilities = strategies.best_probabilities(posteriors)
            first = strategies.draw(probabilities, self._chance())
            decision.propensity = probabilities[first]
            order = sorted(range(len(members)), key=lambda i: (i != first, -posteriors[i].mean))
            return [Shot(Slot(i, 0, members[i].candidate.local, posteriors[i].mean), members[i]) for i in order]
        weights = [1.0] * len(members)
        if strategy is Strategy.WEIGHTED:
            stated = [one.asked.accuracy for one in members]
            accuracies = [known.mean if p is None else p for p, known in zip(stated, posteriors, strict=True)]
            weights = strategies.weights_of(accuracies, len(brief.labels) or strategies.OPEN_CHOICES)
        slots = [
            Slot(i, sample, one.worst_cost_micro_usd == 0, weights[i])
            for i, one in enumerate(members)
            for sample in range(one.asked.samples)
        ]
        return [Shot(slot, members[slot.member]) for slot in strategies.ordered(slots)]

    async def _ask(self, run: _Run, calling: Calls) -> str:
        """Wave by wave. Returns why no more is asked."""
        unasked = list(run.shots)
        standing = await self._standing(run, calling, unasked)
        while unasked:
            if run.until is not None and time.monotonic() >= run.until:
                return "the time for it is over"
            wave = unasked[: strategies.next_wave(run.rule, standing, [shot.slot for shot in unasked])]
            unasked = unasked[len(wave) :]
            missing = run.rule.needed - standing.answered - len(unasked)
            if not await calling.begin(wave, missing, run.until):
                return "too few of the members could be asked"
            while calling.running:
                ended = await calling.next(run.until)
                if not ended:
                    return "the time for it is over"
                for shot in ended:
                    self._look(run, shot)
                standing = await self._standing(run, calling, unasked)
                reason = strategies.verdict(run.rule, standing)
                if reason:
                    return reason
            standing = await self._standing(run, calling, unasked)
        return "everybody was asked"

    def _look(self, run: _Run, shot: Shot) -> None:
        if shot.answer is not None:
            shot.answer = self._judge.look(run.briefed.brief, run.item, shot.answer)

    async def _standing(self, run: _Run, calling: Calls, unasked: Sequence[Shot]) -> Standing:
        """How it stands now."""
        running, answered = calling.running, run.answered
        left = tuple(shot.slot.weight for shot in (*running, *unasked))
        if not run.rule.strategy.votes:
            if run.rule.strategy is Strategy.BEST_OF_N and not running:
                self._weigh(run, answered)
            known = [quality for shot in answered if (quality := _good(shot, run.rule.strategy)) is not None]
            return Standing(len(answered), left, len(running), confidence=max(known, default=None))
        if not answered:
            return Standing(0, left, len(running))
        closed = await self._compare(run, answered)
        assert run.agreement is not None
        total = sum(shot.slot.weight for shot in answered)
        share, margin = run.agreement.share, run.agreement.margin
        return Standing(len(answered), left, len(running), total, share * total, margin * total, share, closed)

    def _weigh(self, run: _Run, answered: Sequence[Shot]) -> None:
        """Looks at answers again with what the others say of them, which tells more of a quality than one answer alone."""
        texts = [comparable(shot) for shot in answered]
        if len(texts) < 2:
            return
        for shot, agreed in zip(answered, support(run.item.work.plain, texts).tolist(), strict=True):
            assert shot.answer is not None
            if shot.answer.signals.agreement != agreed:
                signals = replace(shot.answer.signals, agreement=agreed)
                shot.answer = self._judge.look(run.briefed.brief, run.item, replace(shot.answer, signals=signals))

    async def _compare(self, run: _Run, answered: Sequence[Shot]) -> bool:
        """Finds what the answers say together; whether they could be counted as votes."""
        said = [comparable(shot) for shot in answered]
        vectors = None
        if not run.briefed.brief.skill.classifies and any(kind_of(text) == "text" for text in said):
            vectors = await self.texts.of(said, run.vectors, run.call)
        accuracies = None
        if run.rule.strategy is Strategy.WEIGHTED:
            accuracies = [strategies.accuracy_of(shot.slot.weight) for shot in answered]
        run.agreement = agree(said, vectors, accuracies)
        for shot, share in zip(answered, run.agreement.shares, strict=True):
            shot.share = share
        return vectors is None

    async def _choose(self, run: _Run) -> Shot | None:
        """Whose answer it is, or None where the members have no result. Sets the confidence."""
        answered, rule = run.answered, run.rule
        if len(answered) < max(rule.needed, 1):
            return None
        if rule.strategy.votes:
            return await self._voted(run, answered)
        if rule.strategy is Strategy.BEST_OF_N:
            self._weigh(run, answered)
        chosen = answered[-1] if rule.strategy is Strategy.SPECIALIST else await self._best(run, answered)
        for shot in answered:  # a quality that nobody measured on this skill is no observation
            if shot.answer is not None and shot.answer.quality is not None and not shot.answer.basis:
                self.wins.count(run.item.outcome.decision.skill, shot.name, shot.answer.quality >= rule.threshold)
        assert chosen.answer is not None
        quality = chosen.answer.quality
        if rule.strategy is Strategy.SPECIALIST:
            run.ensemble.confidence = chosen.slot.weight  # the share of its answers that is expected to be right
        elif quality is not None:
            run.ensemble.confidence = quality
        taken = quality is None or not chosen.member.candidate.scored or quality >= rule.threshold
        return chosen if taken else None

    async def _best(self, run: _Run, answered: Sequence[Shot]) -> Shot:
        """Best of n. Where no quality is known, and nobody sets a standard, the answer that the others support most."""
        qualities = [shot.answer.quality if shot.answer is not None else None for shot in answered]
        index = strategies.best(qualities, [not shot.member.candidate.scored for shot in answered], run.rule.threshold)
        if index is None:
            await self._compare(run, answered)
            assert run.agreement is not None
            index = run.agreement.index
            run.ensemble.confidence = run.agreement.share if len(answered) > 1 else None
        return answered[index]

    async def _voted(self, run: _Run, answered: Sequence[Shot]) -> Shot | None:
        """The answer that the others agree with, where enough of them do."""
        closed = await self._compare(run, answered)
        agreement = run.agreement
        assert agreement is not None
        run.ensemble.confidence = agreement.share
        chosen = answered[agreement.index]
        dissent = {index: why for index in range(len(answered)) if (why := _dissent(agreement, index))}
        if agreement.tie or agreement.share < run.rule.bar(closed) - 1e-9:
            return None
        several = len({shot.name for shot in answered}) > 1  # that samples of one member agree says nothing of their being right
        for index, shot in enumerate(answered):
            shot.outcome, shot.reason = ("dissented", dissent[index]) if index in dissent else ("agreed", "")
            if several:
                self.wins.count(run.item.outcome.decision.skill, shot.name, index not in dissent)
        self._weigh(run, answered)
        return chosen

    def _tell(self, run: _Run, chosen: Shot | None) -> None:
        """Writes the calls into the item's story, the delivered one last."""
        item, slowest = run.item, dict[int, float]()
        for shot in run.shots:
            candidate = shot.member.candidate
            if not shot.wave and shot.error is None:
                shot.reason = shot.reason or run.ensemble.stopped
                continue
            told = shot.answer or Failure(shot.error or Cancelled("not asked"), False, shot.usage, shot.cost_micro_usd, shot.elapsed_s)
            item.note(candidate, told)
            if not candidate.local:
                slowest[shot.wave] = max(slowest.get(shot.wave, 0.0), shot.elapsed_s)
            if shot is not chosen:
                item.hop(candidate, *_hop(shot, chosen, run), told)
        item.provider_s = sum(slowest.values())  # members of a wave are asked at once
        if chosen is not None and chosen.answer is not None:
            chosen.outcome, chosen.reason = "chosen", ""
            item.answers[chosen.name] = chosen.answer
            sure = run.ensemble.confidence
            item.deliver(
                chosen.member.candidate,
                chosen.answer,
                f"{run.rule.strategy.value} of {len(run.answered)} answers" + ("" if sure is None else f", confidence {sure:.2f}"),
            )

    async def _fall_back(self, run: _Run) -> None:
        """The skill's route answers; members are not asked again, but what they said is."""
        run.ensemble.fell_back = True
        run.ensemble.confidence = None
        limits = replace(run.asked.ask.limits, max_cost_micro_usd=run.purse.left, max_latency_s=None)
        brief = run.briefed.brief
        try:
            await fall_back(self._routes, self._judge, (brief, limits), run.item, run.shots, (run.call, run.ensemble.timings))
        except UnderstudyError as error:  # nobody may answer
            run.no_route = error.message
        run.ensemble.confidence = run.item.outcome.quality

    def _close(self, run: _Run, began: tuple[int, float]) -> None:
        """Ends the story, and hands the row to the lake."""
        item, brief = run.item, run.briefed.brief
        item.close()
        outcome = item.outcome
        if not item.done:
            outcome.error = _error(run)
        outcome.usage = Usage(item.input_tokens, item.output_tokens)
        elapsed = time.perf_counter() - began[1]
        user = self._lake.ids.pseudonym(run.call.user) or None
        self._lake.append(INTERACTIONS, [{**row(brief, item, run.call, run.ensemble.timings, began[0], elapsed), "user_hash": user}])
        if self._observer is not None:
            self._observer.item_done(brief, outcome, elapsed)


class TextVectors:
    """Vectors of texts for comparison, each made once a request."""

    def __init__(self, runtime: Runtime, embedder: Callable[[], str]) -> None:
        self._runtime = runtime
        self._embedder = embedder

    async def of(self, texts: Sequence[str], known: dict[str, FloatArray], call: Call) -> FloatArray | None:
        """float32[n, H], or None where no embedding model is loaded, or it fails."""
        import numpy as np

        missing = [text for text in dict.fromkeys(texts) if text not in known]
        try:
            if missing:
                with self._runtime.use(self._embedder(), Task.FEATURE_EXTRACTION) as model:
                    results = await model.embed(missing, call=call, normalize=True, truncate=True)
                for text, vector in zip(missing, results.items, strict=True):
                    if isinstance(vector, Exception):
                        return None
                    known[text] = vector
        except UnderstudyError:
            return None
        return np.stack([known[text] for text in texts])


def comparable(shot: Shot) -> str:
    """An answer as it is compared with others: its words; a label letter by letter; named things each with its kind, however given."""
    assert shot.answer is not None
    reply = shot.answer.reply
    if reply.labels:
        return json.dumps([reply.labels[0].name], ensure_ascii=False)
    if reply.entities:
        return json.dumps(sorted([entity.text, entity.label] for entity in reply.entities), ensure_ascii=False)
    return reply.text


def _good(shot: Shot, strategy: Strategy) -> float | None:
    """What is known of an answer where qualities decide; 1 of a member that is taken at its word."""
    assert shot.answer is not None
    quality, scored = shot.answer.quality, shot.member.candidate.scored
    if strategy is Strategy.SPECIALIST and (quality is None or not scored):
        return 1.0
    return 1.0 if quality is None and not scored else quality


def _until(asked: EnsembleAsk, call: Call) -> float | None:
    """Monotonic seconds until which members are waited for; where the route may answer after them, half of the time is its own."""
    now = time.monotonic()
    until = early(call.deadline) if asked.members_only else share_of_deadline(now, call.deadline, 1)
    if asked.max_latency_s is None:
        return until
    return now + asked.max_latency_s if until is None else min(until, now + asked.max_latency_s)


def _dissent(agreement: Agreement, index: int) -> str:
    """Why an answer was counted as different from the chosen one, or ""."""
    return next((why for why in agreement.dissent if why.startswith(f"answer {index + 1} ")), "")


def _hop(shot: Shot, chosen: Shot | None, run: _Run) -> tuple[str, str]:
    """Outcome and reason of a call that does not deliver."""
    if shot.answer is None:
        return shot.outcome, shot.reason
    if chosen is not None:
        return "member", shot.reason or f"it {shot.outcome}"
    sure = run.ensemble.confidence
    return "below_bar", "the members have no result" + ("" if sure is None else f": confidence {sure:.2f}")


def _error(run: _Run) -> UnderstudyError:
    """Why there is no answer, with each one's reason."""
    if not run.ended:
        return Cancelled("The call ended before it was answered.")
    hops = run.item.outcome.decision.hops
    reasons = "; ".join(dict.fromkeys(f"{hop.candidate}: {hop.reason}" for hop in hops))
    route = f" The skill's route: {run.no_route}" if run.no_route else ""
    if run.answered and run.asked.members_only:  # to ask again would pay again
        return FailedPrecondition(f"The members have no result: {reasons}. Lower the threshold, or leave members_only out.")
    if run.answered:
        return ProviderUnavailable(f"The members have no result, and nobody else has one: {reasons}.{route}")
    errors = [shot.error for shot in run.shots if shot.error is not None]
    if errors and all(isinstance(error, BudgetExceeded) for error in errors):
        return errors[-1]
    if errors and all(isinstance(error, DeadlineExceeded | Cancelled) for error in errors):
        return DeadlineExceeded(f"No member answered in time: {reasons}. Allow more.", stage="provider")
    return ProviderUnavailable(f"Nobody could answer: {reasons}.{route}")
