"""The members of an ensemble: from the names in a request to candidates that can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from server.core import Preference, Task, Work
from server.errors import InvalidArgument, ModelNotFound, NotFound, TaskNotSupported, VersionNotFound, near_names
from server.routing.candidates import Brief, Candidate
from server.routing.local_model import EncoderCandidate, GeneratorCandidate
from server.routing.remote import ProviderCandidate
from server.routing.routes import RouteParts, candidate_of, local_tasks

MAX_MEMBERS, MAX_CALLS = 16, 32
SAMPLE_TEMPERATURE = 0.7  # of members that are asked several times, where nobody says otherwise
_LOCAL = "local:"


@dataclass(slots=True, frozen=True)
class MemberAsk:
    """A member as it is asked for; fields as in understudy.v1.EnsembleMember."""

    model: str
    samples: int = 1
    accuracy: float | None = None
    observations: float = 0.0


@dataclass(slots=True, frozen=True)
class Member:
    """Somebody who can be asked. `worst_cost_micro_usd`: of one call; 0 for local models, None where no price is known."""

    asked: MemberAsk
    candidate: Candidate
    worst_cost_micro_usd: int | None = 0

    @property
    def provider(self) -> str:
        """Of paid members: whom the budget names."""
        return "" if self.candidate.local else self.candidate.name.partition("/")[0]


def check_members(asked: Sequence[MemberAsk], preference: Preference | None) -> int:
    """How many calls they are at most. Raises InvalidArgument, naming the field."""
    if not 1 <= len(asked) <= MAX_MEMBERS:
        raise InvalidArgument(f"members holds {len(asked)}; expected 1 to {MAX_MEMBERS}.", field="members", limit=MAX_MEMBERS)
    seen: dict[str, int] = {}
    for index, one in enumerate(asked):
        field = f"members[{index}]"
        if not one.model.removeprefix(_LOCAL) or (not one.model.startswith(_LOCAL) and not all(one.model.partition("/")[::2])):
            message = f'{field}.model is {one.model[:128]!r}; expected "local:<model>" or "<provider>/<model>".'
            raise InvalidArgument(message, field=f"{field}.model")
        if one.model in seen:
            message = f"{field}.model is {one.model[:128]!r} again, as members[{seen[one.model]}] is. Ask for more samples of one."
            raise InvalidArgument(message, field=f"{field}.model")
        seen[one.model] = index
        if not 1 <= one.samples <= MAX_CALLS:
            raise InvalidArgument(f"{field}.samples is {one.samples}; expected 1 to {MAX_CALLS}.", field=f"{field}.samples")
        if one.accuracy is not None and not 0 < one.accuracy < 1:
            raise InvalidArgument(f"{field}.accuracy is {one.accuracy:g}; expected a share between 0 and 1.", field=f"{field}.accuracy")
        if not 0 <= one.observations <= 1e6:
            message = f"{field}.observations is {one.observations:g}; expected 0 to 1000000."
            raise InvalidArgument(message, field=f"{field}.observations")
        local = one.model.startswith(_LOCAL)
        if (preference is Preference.LOCAL_ONLY and not local) or (preference is Preference.PROVIDER_ONLY and local):
            message = f"preference {preference.value} and {field}.model {one.model[:128]!r} contradict each other. Leave one out."
            raise InvalidArgument(message, field="preference")
    calls = sum(one.samples for one in asked)
    if calls > MAX_CALLS:
        raise InvalidArgument(f"members ask for {calls} calls; expected at most {MAX_CALLS}.", field="members", limit=MAX_CALLS)
    return calls


def members_of(asked: Sequence[MemberAsk], brief: Brief, parts: RouteParts, work: Work, temperature: float | None) -> list[Member]:
    """Candidates in the order of the request; those with several samples write at `temperature`.

    Raises ModelNotFound, VersionNotFound, NotFound (of a provider) with near names, TaskNotSupported, InvalidArgument.
    """
    found = []
    for index, one in enumerate(asked):
        field = f"members[{index}]"
        own = _brief_for(brief, one, temperature, f"{field}.samples")
        if one.model.startswith(_LOCAL):
            found.append(Member(one, _local(one, own, parts, field)))
        else:
            candidate = _remote(one, own, parts, field)
            found.append(Member(one, candidate, candidate.worst_cost_micro_usd(work)))
    return found


def _brief_for(brief: Brief, asked: MemberAsk, temperature: float | None, field: str) -> Brief:
    if asked.samples == 1:
        return brief if temperature is None else replace(brief, skill=replace(brief.skill, temperature=temperature))
    if temperature == 0.0:
        raise InvalidArgument(f"temperature is 0 and {field} is {asked.samples}: all would be the same. Raise it.", field="temperature")
    return replace(brief, skill=replace(brief.skill, temperature=temperature or brief.skill.temperature or SAMPLE_TEMPERATURE))


def _remote(asked: MemberAsk, brief: Brief, parts: RouteParts, field: str) -> ProviderCandidate:
    name = asked.model.partition("/")[0]
    provider = parts.providers.get(name)
    if provider is None:
        near = near_names(name, sorted(parts.providers))
        raise NotFound(f"{field}.model names the provider {name[:64]!r}, which is not configured; {near}", field=f"{field}.model")
    return ProviderCandidate(asked.model, provider, brief)  # without the budget: a wave's calls are reserved for together


def _local(asked: MemberAsk, brief: Brief, parts: RouteParts, field: str) -> Candidate:
    name, _, version = asked.model.removeprefix(_LOCAL).partition("@")
    student = parts.skills.student(brief.skill.name)
    if student is not None and name == student.skill:
        _check_version(version, student.version, asked, field)
        found = candidate_of(student, brief, parts.runtime, parts.paces)
        return found if isinstance(found, GeneratorCandidate) else _once(found, asked, field)
    base = name.partition("/")[0]
    tasks = local_tasks(brief)
    task = next((task for task in tasks if base in parts.runtime.models_for(task)), None)
    if task is None:
        known = sorted({model for one in Task for model in parts.runtime.models_for(one)})
        if base in known:
            does = parts.runtime.manifest(base).task.value
            wanted = " or ".join(one.value for one in tasks)
            raise TaskNotSupported(f"{field}.model {base!r} does {does}; {brief.skill.task} needs {wanted}.", field=f"{field}.model")
        message = f"{field}.model: no model {base[:128]!r} is loaded; {near_names(base, known)}"
        raise ModelNotFound(message, field=f"{field}.model", model=base[:128])
    if "/" not in name:
        _check_version(version, str(parts.runtime.manifest(base).version), asked, field)
    model = name if not version or "/" not in name else f"{name}@{version}"  # adapters have versions of their own
    if task is Task.TEXT_GENERATION:
        return GeneratorCandidate(model, parts.runtime, brief, parts.paces)
    return _once(EncoderCandidate(model, task, parts.runtime, brief, parts.paces), asked, field)


def _check_version(asked: str, current: str, member: MemberAsk, field: str) -> None:
    if asked and asked != current:
        message = f"{field}.model is {member.model[:128]!r}, and version {current} answers. Leave the version out, or load that one."
        raise VersionNotFound(message, field=f"{field}.model", version=asked[:32])


def _once(candidate: Candidate, asked: MemberAsk, field: str) -> Candidate:
    if asked.samples > 1:
        message = f"{field}.samples is {asked.samples}, and {candidate.name} says the same each time; expected 1."
        raise InvalidArgument(message, field=f"{field}.samples")
    return candidate
