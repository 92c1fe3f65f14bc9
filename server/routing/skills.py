"""The skills that callers can ask for, and who stands in for each of them now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from server.config import Config
from server.core import Task
from server.errors import InvalidArgument, SkillNotFound, UnderstudyError, near_names
from server.quality.calibration import Calibration
from server.runtime.heads import LinearHead
from server.settings import SkillConfig

MAX_LABEL_BYTES = 256


@dataclass(slots=True, frozen=True)
class Skill:
    """A named job. `provider` and `teacher_model` are empty where it has no teacher, `base` where it has no local model to learn on."""

    name: str
    task: Task
    instruction: str
    labels: tuple[str, ...]
    provider: str
    teacher_model: str
    base: str
    deliver_bar: float
    max_cost_micro_usd: int | None

    @property
    def teacher(self) -> str:
        """As the configuration says it, "provider/model", or empty."""
        return f"{self.provider}/{self.teacher_model}" if self.provider else ""


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
    """Skills by name, from the configuration; students from the adapters, as they come and go."""

    def __init__(self, skills: Mapping[str, Skill], adapters: Adapters) -> None:
        self._skills = dict(skills)
        self._adapters = adapters
        self._students: dict[str, Student] = {}

    @classmethod
    def from_config(cls, config: Config, adapters: Adapters) -> SkillBook:
        """Raises InvalidArgument, naming the setting, for a skill that cannot work."""
        return cls({name: read_skill(name, skill) for name, skill in config.skills.items()}, adapters)

    def names(self) -> list[str]:
        """Sorted."""
        return sorted(self._skills)

    def get(self, name: str) -> Skill:
        """Raises SkillNotFound with near names."""
        skill = self._skills.get(name)
        if skill is None:
            hint = near_names(name, self.names()) if self._skills else "none is configured; add a [skills.<name>] section."
            raise SkillNotFound(f"There is no skill {name[:128]!r}; {hint}", skill=name[:128], field="skill")
        return skill

    def student(self, name: str) -> Student | None:
        """Who answers locally at the moment, or None."""
        head = self._adapters.current(name)
        if head is None:
            return None
        known = self._students.get(name)
        if known is None or known.head is not head:
            known = self._students[name] = _student(head, self.get(name))
        return known

    def stage(self, name: str) -> str:
        """Of the rollout: "full" where a calibrated student serves, else "held"."""
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


def read_skill(name: str, config: SkillConfig) -> Skill:
    """A skill as it is configured. Raises InvalidArgument, naming the setting."""
    place = f"skills.{name}"
    if config.task is not Task.TEXT_CLASSIFICATION:
        what = f"{place}.task is {config.task.value}; skills do text-classification"
        message = f"{what}. Call local models of other tasks by their own methods."
        raise InvalidArgument(message, field=f"{place}.task")
    labels = config.read_labels()
    if len(labels) < 2:
        message = f"{place} has {len(labels)} labels; a classification needs two at least. Give labels or labels_file."
        raise InvalidArgument(message, field=f"{place}.labels")
    for label in labels:
        if not label.strip() or len(label.encode()) > MAX_LABEL_BYTES or not label.isprintable():
            message = f"{place}.labels holds {label[:64]!r}; a label is printable text of 1 to {MAX_LABEL_BYTES} bytes on one line."
            raise InvalidArgument(message, field=f"{place}.labels")
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(normalised(label), label)
        if other != label or labels.count(label) > 1:
            message = f"{place}.labels holds {other!r} and {label!r}, which a teacher's answer cannot tell apart. Rename one."
            raise InvalidArgument(message, field=f"{place}.labels")
    if not config.teacher and not config.base:
        raise InvalidArgument(f"{place} has neither teacher nor base: nobody could answer. Give one.", field=place)
    provider, _, model = config.teacher.partition("/")
    return Skill(
        name=name,
        task=config.task,
        instruction=config.instruction,
        labels=tuple(labels),
        provider=provider,
        teacher_model=model,
        base=config.base,
        deliver_bar=config.deliver_bar,
        max_cost_micro_usd=config.max_cost_micro_usd,
    )


def normalised(label: str) -> str:
    """A label without what models change when they repeat one: case, quotes, spaces against underscores, a closing period."""
    return "_".join(label.strip().strip("\"'`*.").casefold().replace("_", " ").replace("-", " ").split())
