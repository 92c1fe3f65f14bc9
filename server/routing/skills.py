"""The skills that callers can ask for, and who stands in for each of them now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from server.config import Config
from server.core import Preference
from server.errors import InvalidArgument, SkillNotFound, UnderstudyError, near_names
from server.quality.calibration import Calibration
from server.runtime.heads import LinearHead
from server.settings import SKILL_TASKS, RoutingConfig, SkillConfig

MAX_LABEL_BYTES = 256
MAX_SCHEMA_BYTES = 256 * 1024
CLASSIFYING = ("text-classification", "zero-shot-classification")


@dataclass(slots=True, frozen=True)
class Skill:
    """A named job; the fields are those of `server.settings.SkillConfig`.

    `teachers`: "provider/model" in the order of asking, the teacher first. `task`: a Hugging Face pipeline tag.
    """

    name: str
    task: str = "text-classification"
    instruction: str = ""
    labels: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    base: str = ""
    student_model: str = ""
    examples: tuple[tuple[str, str], ...] = ()
    json_schema: str = ""
    deliver_bar: float = 0.8
    second_try_bar: float = 0.6
    preference: Preference = Preference.LOCAL_FIRST
    rollout: str = "auto"
    rollout_percent: int = 10
    max_cost_micro_usd: int | None = None
    max_latency_s: float | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    built_in: bool = False

    @property
    def teacher(self) -> str:
        """Who sets the standard, or empty."""
        return self.teachers[0] if self.teachers else ""

    @property
    def classifies(self) -> bool:
        """Whether answers are labels."""
        return self.task in CLASSIFYING


@dataclass(slots=True, frozen=True)
class Student:
    """A head that is loaded for a skill. `calibration` is None where it may not answer, and `held` says why."""

    head: LinearHead
    calibration: Calibration | None
    held: str = ""

    @property
    def candidate(self) -> str:
        """Its name in decisions."""
        return f"local:{self.head.manifest.name}@{self.head.manifest.version}"


class Adapters(Protocol):
    """Where adapters come from; see server.runtime.adapters."""

    def current(self, skill: str) -> LinearHead | None:
        """The newest good version that is loaded, or None."""
        ...


class SkillBook:
    """Skills by name, from the configuration and one for each task; students from the adapters, as they come and go."""

    def __init__(self, skills: Mapping[str, Skill], adapters: Adapters) -> None:
        self._skills = dict(skills)
        self._adapters = adapters
        self._students: dict[str, Student] = {}

    @classmethod
    def from_config(cls, config: Config, adapters: Adapters) -> SkillBook:
        """Raises InvalidArgument, naming the setting, for a skill that cannot work."""
        return cls(built_in(config.routing) | {name: read_skill(name, skill) for name, skill in config.skills.items()}, adapters)

    def names(self) -> list[str]:
        """Sorted."""
        return sorted(self._skills)

    def get(self, name: str) -> Skill:
        """Raises SkillNotFound with near names."""
        skill = self._skills.get(name)
        if skill is None:
            raise SkillNotFound(f"There is no skill {name[:128]!r}; {near_names(name, self.names())}", skill=name[:128], field="skill")
        return skill

    def student(self, name: str) -> Student | None:
        """The head that answers locally at the moment, or None."""
        head = self._adapters.current(name)
        if head is None:
            return None
        known = self._students.get(name)
        if known is None or known.head is not head:
            known = self._students[name] = _student(head, self.get(name))
        return known

    def stage(self, name: str) -> str:
        """Of the rollout: as configured; with "auto", "full" where a student may answer, else "held"."""
        skill = self.get(name)
        if skill.rollout != "auto":
            return skill.rollout
        if skill.student_model or (skill.built_in and not skill.teachers):
            return "full"
        student = self.student(name)
        return "full" if student is not None and student.calibration is not None else "held"


def _student(head: LinearHead, skill: Skill) -> Student:
    """Whether a head may answer for a skill: only where its quality was measured, and for the labels that it was measured on."""
    manifest = head.manifest
    trained_for = set(manifest.lineage.get("skill_labels", manifest.labels))
    if trained_for != set(skill.labels):
        return Student(head, None, "the skill's labels have changed since it was trained")
    if not manifest.calibration:
        return Student(head, None, "it is not calibrated")
    try:
        return Student(head, Calibration.from_json(manifest.calibration))
    except UnderstudyError as error:
        return Student(head, None, error.message)


def built_in(config: RoutingConfig) -> dict[str, Skill]:
    """A skill for each task, of the task's name: local models of the task where there are any, else the default teacher."""
    teachers = tuple(dict.fromkeys(model for model in (config.default_teacher, *config.default_fallbacks) if model))
    return {task: Skill(task, task, teachers=teachers, built_in=True) for task in SKILL_TASKS}


def read_skill(name: str, config: SkillConfig) -> Skill:
    """A skill as it is configured. Raises InvalidArgument, naming the setting."""
    place = f"skills.{name}"
    labels = config.read_labels()
    if config.task in CLASSIFYING:
        _check_labels(labels, place)
    elif labels:
        raise InvalidArgument(f"{place}.labels are given, but {config.task} has none. Leave them out.", field=f"{place}.labels")
    if not config.teacher and not config.base and not config.student_model:
        raise InvalidArgument(f"{place} has neither teacher nor base nor student_model: nobody could answer. Give one.", field=place)
    if config.fallbacks and not config.teacher:
        raise InvalidArgument(f"{place}.fallbacks are given without a teacher. Name the first as teacher.", field=f"{place}.teacher")
    teachers = tuple(model for model in (config.teacher, *config.fallbacks) if model)
    if len(set(teachers)) < len(teachers):
        message = f"{place}.fallbacks name a model twice; a request never asks one twice. Leave one out."
        raise InvalidArgument(message, field=f"{place}.fallbacks")
    return Skill(
        name=name,
        task=config.task,
        instruction=config.instruction,
        labels=tuple(labels),
        teachers=teachers,
        base=config.base,
        student_model=config.student_model,
        examples=tuple((one.input, one.output) for one in config.examples),
        json_schema=_read_schema(config, place),
        deliver_bar=config.deliver_bar,
        second_try_bar=min(config.second_try_bar, config.deliver_bar),
        preference=config.preference,
        rollout=config.rollout,
        rollout_percent=config.rollout_percent,
        max_cost_micro_usd=config.max_cost_micro_usd,
        max_latency_s=config.max_latency_s,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
    )


def check_labels(labels: list[str], place: str) -> None:
    """Raises InvalidArgument, naming `place`, for labels that a teacher could not answer with."""
    for label in labels:
        if not label.strip() or len(label.encode()) > MAX_LABEL_BYTES or not label.isprintable():
            message = f"{place} holds {label[:64]!r}; a label is printable text of 1 to {MAX_LABEL_BYTES} bytes on one line."
            raise InvalidArgument(message, field=place)
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(normalised(label), label)
        if other != label or labels.count(label) > 1:
            message = f"{place} holds {other!r} and {label!r}, which a teacher's answer cannot tell apart. Rename one."
            raise InvalidArgument(message, field=place)


def _check_labels(labels: list[str], place: str) -> None:
    if len(labels) < 2:
        message = f"{place} has {len(labels)} labels; a classification needs two at least. Give labels or labels_file."
        raise InvalidArgument(message, field=f"{place}.labels")
    check_labels(labels, f"{place}.labels")


def _read_schema(config: SkillConfig, place: str) -> str:
    text = config.read_json_schema()
    if not text:
        return ""
    field = f"{place}.json_schema"
    if config.task in CLASSIFYING or len(text.encode()) > MAX_SCHEMA_BYTES:
        message = f"{field} is for skills that write text, and has {MAX_SCHEMA_BYTES} bytes at most. Leave it out, or shorten it."
        raise InvalidArgument(message, field=field)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{field} is no JSON: {str(error)[:100]}. Give a JSON Schema.", field=field) from None
    if not isinstance(schema, dict):
        raise InvalidArgument(f"{field} is no JSON object. Give a JSON Schema.", field=field)
    return text


def normalised(label: str) -> str:
    """A label without what models change when they repeat one: case, quotes, spaces against underscores, a closing period."""
    return "_".join(label.strip().strip("\"'`*.").casefold().replace("_", " ").replace("-", " ").split())
