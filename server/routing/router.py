"""Decides who answers each item of a skill's request, asks them in order, and keeps the story.

The order is the student, then the teacher; an answer is delivered when its quality reaches the skill's bar, or when its candidate sets
the standard.
Every item becomes an interaction in the lake before the caller has its answer, the unanswered and the cancelled ones too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from server.core import Call, Decision, Hop, Outcome, Preference, Results, Timings, Usage
from server.errors import Cancelled, FailedPrecondition, InternalError, ProviderUnavailable, UnderstudyError
from server.lake.lake import Lake
from server.lake.schema import INTERACTIONS
from server.providers.base import Provider
from server.routing.candidates import Answer, Candidate, Failure, LocalStudent, Teacher
from server.routing.skills import Skill, SkillBook
from server.runtime.runtime import Runtime


@dataclass(slots=True)
class _Item:
    """One input under way, and what the lake wants to know of it."""

    text: str
    outcome: Outcome
    answers: dict[str, Answer] = field(default_factory=dict)  # by candidate
    last: Failure | None = None
    done: bool = False
    input_tokens: int = 0
    output_tokens: int = 0
    provider_s: float = 0.0


class Router:
    """One a process; used on its event loop, any number of calls at once."""

    def __init__(self, skills: SkillBook, runtime: Runtime, providers: Mapping[str, Provider], lake: Lake) -> None:
        self.skills = skills
        self._runtime = runtime
        self._providers = dict(providers)
        self._lake = lake

    async def run(
        self,
        skill_name: str,
        texts: Sequence[str],
        call: Call,
        preference: Preference = Preference.LOCAL_FIRST,
        max_cost_micro_usd: int | None = None,
    ) -> Results[Outcome]:
        """Answers texts, each by itself: an item that nobody could answer has `error` in its outcome.

        Raises:
            SkillNotFound: with near names.
            FailedPrecondition: nobody may answer under this preference (no student, no teacher).
        """
        skill = self.skills.get(skill_name)
        stage = self.skills.stage(skill_name)
        route = self.route(skill, preference)
        limit = max_cost_micro_usd if max_cost_micro_usd is not None else skill.max_cost_micro_usd
        items = [_Item(text, Outcome(self._lake.ids.new(), Decision(skill.name, stage))) for text in texts]
        results: Results[Outcome] = Results([item.outcome for item in items])
        started_ns, started = time.time_ns(), time.perf_counter()
        try:
            for candidate in route:
                pending = [item for item in items if not item.done]
                if pending:
                    await self._ask(skill, candidate, pending, call, results.timings, limit)
        finally:
            for item in items:
                self._close(item)
            elapsed = time.perf_counter() - started
            rows = [self._row(skill, item, call, results.timings, started_ns, elapsed) for item in items]
            self._lake.append(INTERACTIONS, rows)
        results.usage = Usage(sum(item.input_tokens for item in items), sum(item.output_tokens for item in items))
        return results

    def route(self, skill: Skill, preference: Preference) -> list[Candidate]:
        """Candidates in order. Raises FailedPrecondition where there is none."""
        route: list[Candidate] = []
        student = self.skills.student(skill.name)
        why = "there is no student yet; run `understudy train` once there is enough traffic."
        if student is not None and student.calibration is None:
            why = f"its student {student.candidate} is held: {student.held}. Train it again."
        elif student is not None and preference is not Preference.PROVIDER_ONLY:
            route.append(LocalStudent(student, self._runtime))
        if preference is not Preference.LOCAL_ONLY and skill.provider:
            route.append(Teacher(skill, self._providers[skill.provider]))
        if not route:
            if preference is Preference.PROVIDER_ONLY:
                why = "it has no teacher; give it one in the configuration."
            elif not skill.provider:
                why = f"it has no teacher, and {why}"
            raise FailedPrecondition(f"Nobody may answer the skill {skill.name!r}: {why}", skill=skill.name, preference=preference.value)
        return route

    async def _ask(self, skill: Skill, candidate: Candidate, items: list[_Item], call: Call, timings: Timings, limit: int | None) -> None:
        texts = [item.text for item in items]
        async for index, answer in candidate.answers(texts, call, timings, limit):
            item = items[index]
            item.input_tokens += answer.usage.input
            item.output_tokens += answer.usage.output
            item.outcome.cost_micro_usd += answer.cost_micro_usd
            hops = item.outcome.decision.hops
            if isinstance(answer, Failure):
                item.last = answer
                outcome = "skipped" if answer.skipped else "failed"
                hops.append(Hop(candidate.name, outcome, answer.error.message, cost_micro_usd=answer.cost_micro_usd))
                continue
            item.answers[candidate.name] = answer
            item.provider_s += answer.elapsed_s
            if answer.quality is not None and answer.quality < skill.deliver_bar:
                reason = f"quality {answer.quality:.3f} is below the bar {skill.deliver_bar:g}"
                hops.append(Hop(candidate.name, "below_bar", reason, answer.quality, answer.cost_micro_usd))
                continue
            reason = "it is the skill's teacher" if answer.quality is None else f"quality reaches the bar {skill.deliver_bar:g}"
            hops.append(Hop(candidate.name, "delivered", reason, answer.quality, answer.cost_micro_usd))
            self._deliver(item, candidate, answer)

    def _deliver(self, item: _Item, candidate: Candidate, answer: Answer) -> None:
        outcome = item.outcome
        outcome.decision.candidate = candidate.name
        outcome.decision.local = candidate.local
        outcome.output_text = answer.labels[0].name
        outcome.labels = answer.labels
        outcome.quality = answer.quality
        item.done = True

    def _close(self, item: _Item) -> None:
        """Gives an item that nobody answered its error."""
        outcome = item.outcome
        outcome.usage = Usage(item.input_tokens, item.output_tokens)
        if item.done:
            return
        hops = outcome.decision.hops
        if not hops:
            outcome.error = Cancelled("The call ended before this item was answered.")
        elif hops[-1].outcome == "below_bar":
            quality = hops[-1].quality
            message = f"The local answer's quality {quality:.3f} is below the bar, and no other candidate may answer. Allow the teacher."
            outcome.error = ProviderUnavailable(message, quality=f"{quality:.3f}")
        else:
            assert item.last is not None
            outcome.error = item.last.error

    def _row(self, skill: Skill, item: _Item, call: Call, timings: Timings, time_ns: int, elapsed: float) -> dict[str, Any]:
        """The interaction as server.lake.schema describes it."""
        outcome, decision = item.outcome, item.outcome.decision
        teacher = item.answers.get(skill.teacher)
        name, student = next(((key, value) for key, value in item.answers.items() if key.startswith("local:")), ("", None))
        delivered = item.answers.get(decision.candidate)
        adapter, _, version = name.removeprefix("local:").partition("@")
        return {
            "time_ns": time_ns,
            "interaction_id": outcome.interaction_id,
            "request_id": call.request_id,
            "skill": skill.name,
            "task": skill.task.value,
            "input_kind": "text",
            "input": item.text,
            "hops": json.dumps([asdict(hop) for hop in decision.hops], ensure_ascii=False),
            "candidate": decision.candidate,
            "local": decision.local,
            "output_text": outcome.output_text,
            "labels": [label.name for label in outcome.labels[:8]],
            "scores": [label.score for label in outcome.labels[:8]],
            "quality": outcome.quality,
            "error": _reason(outcome.error),
            "cost_micro_usd": outcome.cost_micro_usd,
            "input_tokens": item.input_tokens,
            "output_tokens": item.output_tokens,
            "queue_ms": timings.queue * 1e3,
            "tokenize_ms": timings.tokenize * 1e3,
            "run_ms": timings.run * 1e3,
            "post_ms": timings.post * 1e3,
            "provider_ms": item.provider_s * 1e3,
            "total_ms": elapsed * 1e3,
            "teacher_label": teacher.labels[0].name if teacher else None,
            "student_label": student.labels[0].name if student else None,
            "student_quality": student.quality if student else None,
            "student": adapter or None,
            "student_version": version or None,
            "source_model": delivered.source_model if delivered else None,
            "training_allowed": bool(teacher and teacher.training_allowed),
            "rollout_stage": decision.rollout_stage,
            "propensity": 1.0,  # the route follows from quality alone; nothing is drawn by lot
            "user_hash": self._lake.ids.pseudonym(call.user) or None,
        }


def _reason(error: Exception | None) -> str | None:
    return None if error is None else error.reason if isinstance(error, UnderstudyError) else InternalError.reason
