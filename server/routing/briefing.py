"""From what a caller asks for to a brief: the skill by its name, or the task found in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from server.core import Call, Detected, Limits, Tool, Work
from server.errors import InvalidArgument, UnderstudyError, Unimplemented
from server.routing.candidates import Brief, Manner
from server.routing.prompting import check_work
from server.routing.skills import Skill, SkillBook, check_labels
from server.settings import SKILL_TASKS

_MAX_INSTRUCTION_BYTES = 16 * 1024
_MAX_LABELS = 256


class Detector(Protocol):
    """Finds a task in plain words."""

    async def detect(self, text: str, call: Call) -> Detected:
        """`task` is empty where no reference phrase was near enough."""
        ...


@dataclass(slots=True, frozen=True)
class Ask:
    """A request for a skill, by `skill` or by `instruction`; fields as in understudy.v1.RunRequest."""

    skill: str = ""
    works: Sequence[Work] = ()
    instruction: str = ""
    labels: tuple[str, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    tools: tuple[Tool, ...] = ()
    max_tokens: int = 0  # 0: the skill's own
    temperature: float | None = None  # None: the skill's own
    json_schema: str = ""  # "": the skill's own
    manner: Manner = field(default_factory=Manner)
    model: str = ""  # "provider/model" that is to answer; "": the skill's own


@dataclass(slots=True, frozen=True)
class Briefed:
    """What is to be done, on what, and how that was found. `refused`: inputs that the task cannot take, by their index."""

    brief: Brief
    works: Sequence[Work]
    detected: Detected | None
    refused: Mapping[int, UnderstudyError]


async def brief_of(ask: Ask, skills: SkillBook, detector: Detector | None, call: Call) -> Briefed:
    """Raises SkillNotFound, InvalidArgument (contradictory or missing fields, words of no task), Unimplemented (a task without text)."""
    _check(ask)
    detected = None
    works, parameters, instruction, labels = list(ask.works), dict(ask.parameters), ask.instruction, ask.labels
    if ask.skill:
        skill = skills.get(ask.skill)
        if ask.labels and skill.labels:
            raise InvalidArgument(f"labels are given, but the skill {skill.name!r} has its own. Leave them out.", field="labels")
        labels = skill.labels or ask.labels
    else:
        detected = await _detect(ask, detector, call)
        skill = skills.get(detected.task)
        parameters = {**detected.parameters, **parameters}
        found = tuple(part.strip() for part in parameters.pop("labels", "").split(",") if part.strip())
        labels = labels or found
        if not works:
            instruction, works = _split(ask.instruction, detected)
    brief = Brief(_asked(skill, ask), labels, parameters, instruction, ask.tools, ask.manner, ask.model)
    refused: dict[int, UnderstudyError] = {}
    for index, work in enumerate(works):
        try:
            check_work(brief, work)
        except InvalidArgument as error:
            name = error.metadata.get("field", "")
            shown = name if name in ("labels", "parameters") else f"inputs[{index}].{name}"
            refused[index] = InvalidArgument(error.message, field=shown)
    return Briefed(brief, works, detected, refused)


def _asked(skill: Skill, ask: Ask) -> Skill:
    """The skill with what the request says of its answers."""
    if not ask.max_tokens and ask.temperature is None and not ask.json_schema:
        return skill
    return replace(
        skill,
        max_tokens=ask.max_tokens or skill.max_tokens,
        temperature=skill.temperature if ask.temperature is None else ask.temperature,
        json_schema=ask.json_schema or skill.json_schema,
    )


def _check(ask: Ask) -> None:
    if ask.skill and ask.instruction:
        raise InvalidArgument("skill and instruction are both set; expected one: a skill has its own instruction.", field="instruction")
    if not ask.skill and not ask.instruction.strip():
        raise InvalidArgument("skill and instruction are both empty; expected the name of a skill, or what is to be done.", field="skill")
    size = len(ask.instruction.encode())
    if size > _MAX_INSTRUCTION_BYTES:
        message = f"instruction has {size} bytes; expected at most {_MAX_INSTRUCTION_BYTES}. Put the text to work on into `inputs`."
        raise InvalidArgument(message, field="instruction", limit=_MAX_INSTRUCTION_BYTES)
    if len(ask.labels) > _MAX_LABELS or len(ask.labels) == 1:
        message = f"labels holds {len(ask.labels)}; expected 2 to {_MAX_LABELS}, or none."
        raise InvalidArgument(message, field="labels", limit=_MAX_LABELS)
    check_labels(list(ask.labels), "labels")


async def _detect(ask: Ask, detector: Detector | None, call: Call) -> Detected:
    if ask.labels:  # whoever gives labels wants one of them
        return Detected("text-classification", 1.0, "labels were given")
    if detector is None:
        message = "plain words need an embedding model, and none is loaded; expected the name of a skill. `understudy models pull starter`."
        raise InvalidArgument(message, field="instruction")
    detected = await detector.detect(ask.instruction, call)
    if not detected.task:
        near = ", ".join(detected.candidates[:5]) or "none"
        message = f"the instruction names no task that is known; near ones: {near}. Say it in other words, or name a skill."
        raise InvalidArgument(message, field="instruction", candidates=near)
    if detected.task not in SKILL_TASKS:
        message = f"the instruction asks for {detected.task}, which no skill does; skills work on texts. Call a provider for it."
        raise Unimplemented(message, task=detected.task)
    return detected


def _split(instruction: str, detected: Detected) -> tuple[str, list[Work]]:
    """What is to be done, and the text that came with it; a wish for text, and words without content, are the input themselves."""
    if detected.task == "text-generation" or not detected.content:
        return "", [Work(instruction)]
    return detected.instruction, [Work(detected.content)]
