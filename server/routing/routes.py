"""Who may answer a request, in which order, and who is passed over for which of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.core import Call, Limits, Preference, Task, Work
from server.errors import FailedPrecondition, InvalidArgument, ModelNotFound, ModelNotLoaded, UnderstudyError, near_names
from server.providers.base import Provider
from server.routing.budget import Budget
from server.routing.budget_windows import Scopes
from server.routing.candidates import Brief, Candidate
from server.routing.difficulty import DifficultyEstimate
from server.routing.items import Item, Place
from server.routing.local_head import HeadCandidate
from server.routing.local_model import EncoderCandidate, GeneratorCandidate, Pinned
from server.routing.pace import Paces
from server.routing.policy import Facts, assigned, order
from server.routing.remote import ProviderCandidate
from server.routing.skills import Skill, SkillBook, Standing, Student
from server.runtime.runtime import Runtime

# What a task's built-in skill asks of local models: models of these tasks, the first that is loaded.
_LOCAL_TASKS: Mapping[str, tuple[Task, ...]] = {
    "text-classification": (Task.TEXT_CLASSIFICATION,),
    "zero-shot-classification": (Task.ZERO_SHOT_CLASSIFICATION,),
    "token-classification": (Task.TOKEN_CLASSIFICATION,),
    "question-answering": (Task.QUESTION_ANSWERING, Task.TEXT_GENERATION),
    "table-question-answering": (Task.TEXT_GENERATION,),
    "translation": (Task.TRANSLATION, Task.TEXT_GENERATION),
    "summarization": (Task.SUMMARIZATION, Task.TEXT_GENERATION),
    "text-generation": (Task.TEXT_GENERATION,),
    "fill-mask": (Task.TEXT_GENERATION,),
    "feature-extraction": (Task.FEATURE_EXTRACTION,),
    "text-ranking": (Task.TEXT_RANKING,),
    "sentence-similarity": (Task.FEATURE_EXTRACTION,),
}


def local_tasks(brief: Brief) -> tuple[Task, ...]:
    """Tasks of local models that can do what a brief asks for, the fittest first."""
    if brief.skill.classifies and brief.labels:
        return (Task.ZERO_SHOT_CLASSIFICATION, Task.TEXT_GENERATION)
    return _LOCAL_TASKS[brief.skill.task]


class Difficulty(Protocol):
    """Says how hard inputs are for a skill's student."""

    async def estimate(self, skill: str, texts: Sequence[str]) -> Sequence[DifficultyEstimate] | None:
        """The estimate of each text; None where nothing was learned of the skill."""
        ...


@dataclass(slots=True)
class RouteParts:
    """What routes are made of. `default_model`: the model of a task for requests that name none; raises where there is none, or several."""

    skills: SkillBook
    runtime: Runtime
    providers: Mapping[str, Provider]
    default_model: Callable[[Task], str]
    paces: Paces
    budget: Budget | None = None
    difficulty: Difficulty | None = None
    max_difficulty: float = 0.6
    least_gain: float = 0.1


class Routes:
    """One a process, on the event loop."""

    def __init__(self, parts: RouteParts) -> None:
        self._parts = parts

    def places(self, brief: Brief, limits: Limits, work: Work) -> list[Place]:
        """The route of a request; `work`: one of its inputs, for prices. Raises FailedPrecondition where nobody may answer."""
        skill, preference = brief.skill, limits.preference or brief.skill.preference
        standing = self._parts.skills.standing(skill.name)
        stage = standing.stage
        locals_, why = self._locals(brief, standing)
        # Until its quality is known, a skill stays with its teacher, unless the caller asks for what is free, quick or here.
        waits = stage == "held" and skill.teachers and preference in (Preference.LOCAL_FIRST, Preference.BEST)
        if stage == "held" and skill.rollout == "held":
            locals_, why = [], "its rollout is held."
        elif waits:
            locals_, why = [], "its students are not measured yet."
        # Whose answers are compared and not delivered: of all requests in the shadow, in a canary of those that are assigned to others.
        shadowed: dict[str, Candidate] = {}
        if stage == "shadow" and preference is not Preference.LOCAL_ONLY:
            shadowed = {one.name: one for one, version in locals_ if not standing.moves or version == standing.student}
        made: dict[str, Candidate] = {one.name: one for one, _ in locals_}
        versions = {one.name: version for one, version in locals_}
        remotes = [] if skill.classifies and not brief.labels else self._remotes(brief)
        made |= {one.name: one for one in remotes}
        facts = [_facts(one, rank, preference, work) for rank, one in enumerate(made.values()) if one.name not in shadowed]
        found = [Place(made[one.name], reason, version=versions.get(one.name, "")) for one, reason in order(facts, preference)]
        if stage == "canary" and standing.moves and preference is not Preference.LOCAL_ONLY:
            shadowed = {one.name: one for one, version in locals_ if version == standing.student}
        if preference is not Preference.PROVIDER_ONLY:
            shadows = (Place(one, "it runs in the shadow", True, versions[one.name]) for one in shadowed.values())
            found += shadows if any(not place.shadow for place in found) else ()
        if not any(not place.shadow for place in found):
            raise self._nobody(skill, preference, why)
        return found

    async def pass_over(self, brief: Brief, limits: Limits, places: Sequence[Place], items: Sequence[Item], call: Call) -> None:
        """Marks, item by item, the candidates that will not be asked. Assignments stick to the call's user, without one to the item."""
        skill = brief.skill
        latency = limits.max_latency_s if limits.max_latency_s is not None else skill.max_latency_s
        if latency is not None:
            for place in places:
                reason = _slow(place.candidate, latency)
                if reason:
                    for item in items:
                        item.passed_over[place.candidate.name] = reason
        students = [place.candidate for place in places if place.candidate.local and not place.shadow]
        remote = any(not place.candidate.local for place in places)
        if not students or not remote or limits.preference in (Preference.LOCAL_ONLY, Preference.PROVIDER_ONLY):
            return
        standing = self._parts.skills.standing(skill.name)
        if standing.stage == "canary":
            _assign(skill.name, standing, places, items, call)
        await self._difficulty(skill, students, items)

    async def _difficulty(self, skill: Skill, students: Sequence[Candidate], items: Sequence[Item]) -> None:
        if self._parts.difficulty is None:
            return
        values = await self._parts.difficulty.estimate(skill.name, [item.work.plain for item in items])
        if values is None:
            return
        for item, value in zip(items, values, strict=True):
            item.outcome.decision.difficulty = value.value
            # What the teacher would get wrong too is not sent to it: that would be pure cost.
            if value.value > self._parts.max_difficulty and value.gain >= self._parts.least_gain:
                for student in students:
                    hard = f"difficulty {value.value:.2f} is above {self._parts.max_difficulty:g}"
                    reason = f"it seems too hard: {hard}, and the teacher would add {value.gain:.2f}"
                    item.passed_over.setdefault(student.name, reason)

    def blocked(self, brief: Brief, candidate: Candidate, call: Call) -> str:
        """Why a budget keeps a candidate from being asked, as of the last look, or ""; asking it finds out exactly."""
        if candidate.local or self._parts.budget is None:
            return ""
        scopes = Scopes(provider=candidate.name.partition("/")[0], skill=brief.skill.name, key=call.tenant)
        return self._parts.budget.blocked(scopes)

    def _locals(self, brief: Brief, standing: Standing) -> tuple[list[tuple[Candidate, str]], str]:
        """Local candidates in order with the version where one is a student of the skill, and why there is none."""
        parts, skill = self._parts, brief.skill
        found: list[tuple[Candidate, str]] = []
        why = "there is no student yet; run `understudy train` once there is enough traffic."
        if standing.stage == "rolled_back" and not standing.champion:
            why = "its student was rolled back; `understudy rollout events` tells why."
        for version in dict.fromkeys((standing.student, standing.champion)):
            if not version or (version == standing.student and standing.stage == "rolled_back"):
                continue
            student = parts.skills.student(skill.name, version)
            if student is None:
                why = f"its student {version} is not loaded."
            elif student.held:
                why = f"its student {student.candidate} is held: {student.held}. Train it again."
            else:
                found.append((candidate_of(student, brief, parts.runtime, parts.paces), version))
        if skill.student_model:
            try:
                found.append((self._model(skill.student_model, brief), ""))
            except UnderstudyError as error:
                why = error.message
        elif skill.built_in:
            candidate, problem = self._default(brief)
            found += [(candidate, "")] if candidate is not None else []
            why = problem
        return found, why

    def _default(self, brief: Brief) -> tuple[Candidate | None, str]:
        """The loaded model that does the skill's task best, or why there is none."""
        problem = ""
        for task in local_tasks(brief):
            try:
                return self._of_task(self._parts.default_model(task), task, brief), ""
            except (ModelNotLoaded, InvalidArgument) as error:
                problem = problem or error.message
        return None, problem

    def _model(self, model: str, brief: Brief) -> Candidate:
        task = self._parts.runtime.manifest(model.partition("/")[0]).task
        if task is Task.FEATURE_EXTRACTION and brief.skill.classifies:
            task = Task.ZERO_SHOT_CLASSIFICATION
        return self._of_task(model, task, brief)

    def _of_task(self, model: str, task: Task, brief: Brief) -> Candidate:
        if task is Task.TEXT_GENERATION:
            return GeneratorCandidate(model, self._parts.runtime, brief, self._parts.paces)
        return EncoderCandidate(model, task, self._parts.runtime, brief, self._parts.paces)

    def student(self, brief: Brief, version: str) -> Candidate | None:
        """A version of the skill's student, None where it is not at hand or may not answer."""
        student = self._parts.skills.student(brief.skill.name, version)
        return None if student is None or student.held else candidate_of(student, brief, self._parts.runtime, self._parts.paces)

    def teacher(self, brief: Brief) -> Candidate | None:
        """Whoever sets the skill's standard, to be asked for comparison; None where nobody does."""
        model = brief.skill.teacher
        provider = self._parts.providers.get(model.partition("/")[0]) if model else None
        if provider is None or (brief.skill.classifies and not brief.labels):
            return None
        return ProviderCandidate(model, provider, brief, self._parts.budget)

    def _remotes(self, brief: Brief) -> list[Candidate]:
        found: list[Candidate] = []
        if brief.model and brief.model.partition("/")[0] not in self._parts.providers:
            name = brief.model.partition("/")[0]
            near = near_names(name, sorted(self._parts.providers))
            raise ModelNotFound(f"{brief.model[:128]!r} names the provider {name[:64]!r}, which is not configured; {near}", field="model")
        for model in (brief.model,) if brief.model else brief.skill.teachers:
            provider = self._parts.providers.get(model.partition("/")[0])
            if provider is not None:
                found.append(ProviderCandidate(model, provider, brief, self._parts.budget))
        return found

    def _nobody(self, skill: Skill, preference: Preference, why: str) -> FailedPrecondition:
        if preference is Preference.PROVIDER_ONLY:
            why = "it has no teacher; give it one in the configuration."
        elif not skill.teachers:
            why = f"it has no teacher, and {why}"
        return FailedPrecondition(f"Nobody may answer the skill {skill.name!r}: {why}", skill=skill.name, preference=preference.value)


def candidate_of(student: Student, brief: Brief, runtime: Runtime, paces: Paces) -> Candidate:
    """A student as a candidate, whatever it is made of."""
    reference = student.reference
    if reference is None:
        return HeadCandidate(student, runtime, paces)
    target = reference.target
    pinned = Pinned(student.candidate, target.version, student.judge, student.measured)
    if reference.kind == "decoder-adapter":
        return GeneratorCandidate(f"{target.model}/{target.adapter}@{target.adapter_version}", runtime, brief, paces, pinned)
    task = _served_task(reference.task, target.model, target.version, runtime)
    if task is Task.TEXT_GENERATION:
        return GeneratorCandidate(target.model, runtime, brief, paces, pinned)
    return EncoderCandidate(target.model, task, runtime, brief, paces, pinned)


def _served_task(task: str, model: str, version: str, runtime: Runtime) -> Task:
    """What a model is asked for: its own task; of models that do several, the one that the skill is about."""
    own = runtime.manifest(model, version).task if runtime.has(model, version) else None
    return own if own is not None and own is not Task.FEATURE_EXTRACTION else _LOCAL_TASKS[task][0]


def _assign(skill: str, standing: Standing, places: Sequence[Place], items: Sequence[Item], call: Call) -> None:
    """Who is in the canary. Sticky: by user, without one by item. The others go to the champion where there is one, else to the teacher;
    the student runs in the shadow of theirs.
    """
    locals_ = [place for place in places if place.candidate.local and not place.shadow]
    students = [one for one in locals_ if not standing.moves or one.version == standing.student]
    others = [one for one in locals_ if one not in students]
    behind = "the champion" if others else "the teacher"
    for item in items:
        inside, item.outcome.decision.propensity = assigned(skill, call.user or item.outcome.interaction_id, standing.percent)
        for place in others if inside else students:
            to = "the student" if inside else behind
            item.passed_over[place.candidate.name] = f"assigned to {to}: {standing.percent} % go to the student"
        if inside:
            item.unshadowed = frozenset(place.candidate.name for place in students)


def _facts(candidate: Candidate, rank: int, preference: Preference, work: Work) -> Facts:
    """What the preference asks of a candidate: a price needs the whole prompt, a latency a look at the last answers."""
    priced = preference in (Preference.CHEAPEST, Preference.FREE_FIRST)
    cost = candidate.worst_cost_micro_usd(work) if priced else None
    return Facts(candidate.name, candidate.local, rank, cost, candidate.expected_s() if preference is Preference.FASTEST else None)


def _slow(candidate: Candidate, latency: float) -> str:
    expected = candidate.expected_s()
    if expected is None or expected <= latency:
        return ""
    return f"it took {expected:.3g} s of late; at most {latency:.3g} s are allowed"
