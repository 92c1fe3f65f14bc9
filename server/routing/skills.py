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
from server.quality.model import QualityModel
from server.runtime.heads import LinearHead
from server.runtime.references import Reference
from server.settings import SKILL_TASKS, RoutingConfig, SkillConfig

MAX_LABEL_BYTES = 256
MAX_SCHEMA_BYTES = 256 * 1024
# Names of the figure that says how often, or how far, a student's answer is the wanted one; the first that a student has.
_MEASURED = ("local_accuracy", "agreement", "accuracy", "exact_match", "f1", "ndcg", "concordance", "spearman")
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
    teacher_logprobs: int = 0
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
    """A student that is at hand for a skill. `held` says why it may not answer, "" where it may; heads that may have a calibration,
    those that write may have a quality model of their own, `judge`.
    """

    made: LinearHead | Reference
    calibration: Calibration | None = None
    held: str = ""
    judge: QualityModel | None = None

    @property
    def head(self) -> LinearHead:
        """The head that it is; asked only where `reference` is None."""
        assert not isinstance(self.made, Reference), "a reference has no head"
        return self.made

    @property
    def reference(self) -> Reference | None:
        """What it points to, where it is no head."""
        return self.made if isinstance(self.made, Reference) else None

    @property
    def skill(self) -> str:
        """The name that it was published under."""
        return self.made.name if isinstance(self.made, Reference) else self.made.manifest.name

    @property
    def version(self) -> str:
        """Its number, as text."""
        return self.made.version if isinstance(self.made, Reference) else self.made.manifest.version

    @property
    def metrics(self) -> Mapping[str, float]:
        """What it was measured to be."""
        return self.made.metrics if isinstance(self.made, Reference) else self.made.manifest.metrics

    @property
    def measured(self) -> float | None:
        """The share of held-out rows, or how much of each, that it answered as wanted; None where that was not measured."""
        return next((float(self.metrics[name]) for name in _MEASURED if name in self.metrics), None)

    @property
    def candidate(self) -> str:
        """Its name in decisions."""
        return f"local:{self.skill}@{self.version}"


class Adapters(Protocol):
    """Where students come from; see server.runtime.adapters."""

    def current(self, skill: str) -> LinearHead | None:
        """The newest good head that is loaded, or None."""
        ...


class Students(Protocol):
    """Students of every kind by version; see server.routing.rollout_book."""

    def ready(self, skill: str) -> Mapping[str, LinearHead | Reference]:
        """Those whose models are loaded, newest first, by version."""
        ...


class Standings(Protocol):
    """Where the rollouts are; see server.routing.rollout_book."""

    def standing(self, skill: str) -> Standing:
        """Of a skill whose rollout moves by itself."""
        ...


@dataclass(slots=True, frozen=True)
class Standing:
    """Who answers for a skill now, by version; "" is nobody. `student` answers `percent` of the requests, or none in the shadow; `champion`
    the others, where there is one; at full the student is the champion. `moves`: the rollout goes on by itself.
    """

    stage: str
    percent: int = 0
    student: str = ""
    champion: str = ""
    moves: bool = False

    @property
    def serving(self) -> str:
        """Who answers most callers that do not go to the teacher."""
        return self.champion or (self.student if self.stage in ("canary", "full") else "")

    @property
    def challenger(self) -> str:
        """Who is on its way."""
        return self.student if self.stage in ("shadow", "canary") else ""


class SkillBook:
    """Skills by name, from the configuration and one for each task; students from the adapters, as they come and go."""

    def __init__(
        self,
        skills: Mapping[str, Skill],
        adapters: Adapters,
        *,
        students: Students | None = None,
        rollouts: Standings | None = None,
    ) -> None:
        """`students` gives those that are no heads too; without `rollouts` a student is at full as soon as it is there."""
        self._skills = dict(skills)
        self._adapters = adapters
        self.students = students
        self.rollouts = rollouts
        self._known: dict[tuple[str, str], Student] = {}

    @classmethod
    def from_config(
        cls, config: Config, adapters: Adapters, *, students: Students | None = None, rollouts: Standings | None = None
    ) -> SkillBook:
        """Raises InvalidArgument, naming the setting, for a skill that cannot work."""
        skills = built_in(config.routing) | {name: read_skill(name, skill) for name, skill in config.skills.items()}
        return cls(skills, adapters, students=students, rollouts=rollouts)

    def names(self) -> list[str]:
        """Sorted."""
        return sorted(self._skills)

    def get(self, name: str) -> Skill:
        """Raises SkillNotFound with near names."""
        skill = self._skills.get(name)
        if skill is None:
            raise SkillNotFound(f"There is no skill {name[:128]!r}; {near_names(name, self.names())}", skill=name[:128], field="skill")
        return skill

    def rolls(self, name: str) -> bool:
        """Whether the skill's rollout moves by itself: told so, and with a teacher to compare with."""
        skill = self.get(name)
        return self.rollouts is not None and skill.rollout == "auto" and bool(skill.teachers) and not skill.student_model

    def standing(self, name: str) -> Standing:
        """Who answers now. As configured; with "auto" as the rollout has it, and without one "full" where a student may answer."""
        skill = self.get(name)
        if self.rolls(name):
            assert self.rollouts is not None, "rolls() says so"
            return self.rollouts.standing(name)
        newest = self._newest(name)
        version = newest.version if newest is not None else ""
        if skill.rollout != "auto":
            percent = {"full": 100, "canary": skill.rollout_percent}.get(skill.rollout, 0)
            return Standing(skill.rollout, percent, version)
        may = skill.student_model or (skill.built_in and not skill.teachers) or (newest is not None and not newest.held)
        return Standing("full", 100, version) if may else Standing("held", 0, version)

    def student(self, name: str, version: str = "") -> Student | None:
        """A version that is at hand; without one, the one that answers callers, all or some. None where there is none."""
        if not version:
            standing = self.standing(name)
            version = standing.serving if standing.moves else ""
            if standing.moves and not version:
                return None
        return self._at_hand(name, version) if version else self._newest(name)

    def stage(self, name: str) -> str:
        """Of the rollout: held, shadow, canary, full or rolled_back."""
        return self.standing(name).stage

    def _newest(self, name: str) -> Student | None:
        if self.students is not None:
            ready = self.students.ready(name)
            return self._known_as(name, next(iter(ready.values()))) if ready else None
        head = self._adapters.current(name)
        return None if head is None else self._known_as(name, head)

    def _at_hand(self, name: str, version: str) -> Student | None:
        if self.students is not None:
            made = self.students.ready(name).get(version)
            return None if made is None else self._known_as(name, made)
        newest = self._newest(name)
        return newest if newest is not None and newest.version == version else None

    def _known_as(self, name: str, made: LinearHead | Reference) -> Student:
        version = made.version if isinstance(made, Reference) else made.manifest.version
        known = self._known.get((name, version))
        if known is None or known.made is not made:
            known = self._known[name, version] = student_of(made, self.get(name))
        return known


def student_of(made: LinearHead | Reference, skill: Skill) -> Student:
    """Whether a student may answer for a skill: a head only where its quality was measured, and for the labels that it was measured on."""
    if isinstance(made, Reference):
        if made.task != skill.task:
            return Student(made, held=f"it was made for {made.task}, and the skill does {skill.task}")
        try:
            return Student(made, judge=QualityModel.from_json(made.quality) if made.quality else None)
        except UnderstudyError as error:
            return Student(made, held=error.message)
    manifest = made.manifest
    trained_for = set(manifest.lineage.get("skill_labels", manifest.labels))
    if trained_for != set(skill.labels):
        return Student(made, None, "the skill's labels have changed since it was trained")
    if not manifest.calibration:
        return Student(made, None, "it is not calibrated")
    try:
        return Student(made, Calibration.from_json(manifest.calibration))
    except UnderstudyError as error:
        return Student(made, None, error.message)


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
    if config.teacher_logprobs and config.task != "text-generation":
        message = f"{place}.teacher_logprobs is set, but a student that learns {config.task} has no use for it. Leave it out."
        raise InvalidArgument(message, field=f"{place}.teacher_logprobs")
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
        teacher_logprobs=config.teacher_logprobs,
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
