"""From the lake's rows to rows worth learning from, step by step, with a count and a reason for each row that falls away.

The order: input -> sources -> answers -> quality -> agreement -> personal data -> duplicates -> near duplicates -> decontamination ->
label errors -> balance -> unlabelled. Which side of the held-out line a row is on follows from its text (or user) as it came, before
anything is changed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

import numpy as np

from server.config import Config
from server.errors import SkillNotFound, UnderstudyError, near_names
from server.lake.reading import LakeReader
from server.registry.registry import Registry
from server.routing.judge import FILE as QUALITY_FILE
from server.routing.skills import CLASSIFYING
from server.settings import CurationConfig
from trainer.classify.recipe import FEW_A_LABEL
from trainer.context import JobContext
from trainer.curate import answers, balance, drafts, duplicates, names, noise, pii
from trainer.curate.drafts import Draft
from trainer.curate.licences import Licences
from trainer.curate.rows import Curated, Row, Step, normalised
from trainer.publish import adapters_folder

TOO_OLD = "older than the newest curation.max_rows"
PERSONAL = "holds personal data (curation.pii = drop)"
STEPS = 12
T = TypeVar("T")
_EXAMPLES = 3
# A row whose label is likely wrong, where such rows are kept with less weight.
_DOUBTED = 0.25
# More requests without a label than this teach little that so many do not.
_MOST_UNLABELLED = 20_000


class Embed(Protocol):
    """Texts to vectors; see noise.embedded."""

    def __call__(self, texts: Sequence[str], progress: Callable[[int, int], None], /) -> tuple[str, Any, list[int]]: ...


@dataclass(slots=True, frozen=True)
class Task:
    """What curation has to know of a skill. `labels`: of one that classifies, else empty. `embed`: its base, where it has one."""

    labels: tuple[str, ...] = ()
    embed: Embed | None = None
    find_names: names.FindNames | None = None
    measured: datetime | None = None  # see answers.Judge

    @property
    def classifies(self) -> bool:
        return bool(self.labels)


def _nothing(row: Row, reason: str) -> None:
    """Where a row falls away that was counted before."""


def curate(config: Config, skill: str, context: JobContext | None = None, registry: Registry | None = None) -> Curated:
    """Reads the lake and curates a skill's rows.

    Raises SkillNotFound, InvalidArgument (settings), FailedPrecondition (a package that a setting wants is not installed), Cancelled.
    """
    settings = config.skills.get(skill)
    if settings is None:
        raise SkillNotFound(f"There is no skill {skill!r} in the configuration; {near_names(skill, list(config.skills))}", skill=skill)
    reader = LakeReader(config, registry)
    version = reader.version()
    found = reader.interactions(skill=skill, columns=drafts.COLUMNS)
    labels = tuple(settings.read_labels()) if settings.task in CLASSIFYING else ()
    base, model = settings.base, config.curation.pii_names_model
    task = Task(
        labels,
        (lambda texts, progress, /: noise.embedded(config, base, texts, progress)) if base and labels else None,
        names.finder(config, model) if model else None,
        _measured(config, skill),
    )
    most = config.curation.max_rows
    older, newest = max(0, found.num_rows - most), found.slice(max(0, found.num_rows - most))
    curated = refine(drafts.raw_rows(newest), task, config.curation, context)
    if older:
        curated.read += older
        curated.dropped[TOO_OLD] = older
    curated.table_version = max(version, 0)
    return curated


def _measured(config: Config, skill: str) -> datetime | None:
    """Since when the skill has a quality model of its own, or None."""
    try:
        return datetime.fromtimestamp((adapters_folder(config, skill) / QUALITY_FILE).stat().st_mtime, UTC)
    except OSError:
        return None


def refine(raws: Iterable[Mapping[str, Any]], task: Task, settings: CurationConfig, context: JobContext | None = None) -> Curated:
    """All steps, over rows as LakeReader gives them, oldest first. The same rows give the same result."""
    run = _Run(task, settings, context)
    left = run.drafts(raws)
    run.count_sources(left)
    rows = run.personal(run.rows_of(left))
    with run.step("duplicates", rows) as step:
        rows = step.keep(duplicates.exact(rows, step.drop))
    with run.step("near duplicates", rows) as step:
        rows = step.keep(duplicates.near(rows, settings.near_duplicates, step.drop, run.check))
    with run.step("decontamination", rows) as step:
        rows = step.keep(duplicates.decontaminated(rows, settings.near_duplicates, step.drop, run.check))
    rows = run.label_errors(rows)
    with run.step("balance", rows) as step:
        rows = step.keep(balance.weighted(balance.capped(rows, settings.max_rows_per_label, step.drop), settings.balance))
    run.curated.rows = run.unlabelled(rows)
    return run.curated


@dataclass(slots=True)
class _Running:
    """A step under way."""

    step: Step
    curated: Curated
    kept: int = 0

    def drop(self, one: Draft | Row, reason: str) -> None:
        self.count(one.interaction_id, reason)

    def count(self, interaction: str, reason: str) -> None:
        self.step.dropped[reason] += 1
        self.curated.dropped[reason] += 1
        examples = self.step.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(interaction)

    def keep(self, left: list[T]) -> list[T]:
        self.kept = len(left)
        return left


@dataclass(slots=True)
class _Run:
    task: Task
    settings: CurationConfig
    context: JobContext | None
    curated: Curated = field(default_factory=Curated)
    unanswered: list[Draft] = field(default_factory=list)  # training inputs that nobody gave an answer to learn from

    def check(self) -> None:
        if self.context is not None:
            self.context.check()

    def progress(self, stage: str, done: int, total: int) -> None:
        if self.context is not None:
            self.context.progress(stage, done, total)

    @contextmanager
    def step(self, name: str, before: Sequence[object]) -> Iterator[_Running]:
        self.check()
        running = _Running(Step(name, len(before)), self.curated)
        self.curated.steps.append(running.step)
        begun = time.perf_counter()
        yield running
        running.step.seconds = time.perf_counter() - begun
        running.step.after = running.kept
        self.progress("curate", len(self.curated.steps), STEPS)

    def drafts(self, raws: Iterable[Mapping[str, Any]]) -> list[Draft]:
        """The steps that decide each row's answer."""
        task, settings = self.task, self.settings
        left: list[Draft] = []
        with self.step("input", ()) as step:
            for raw in raws:
                self.curated.read += 1
                draft = drafts.draft_of(raw, task.classifies, settings)
                if isinstance(draft, str):
                    step.count(str(raw.get("interaction_id") or ""), draft)
                else:
                    left.append(draft)
            step.step.before = self.curated.read
            # The order of the lake's files is nobody's business; the votes and the choice of one of equals follow it.
            left = step.keep(sorted(left, key=lambda one: (one.time, one.interaction_id)))
        licences = Licences(settings.licences, [one.lower() for one in settings.allowed_licences], settings.licence_is_enough)
        judge = answers.Judge.of(settings, task.labels, task.measured)
        with self.step("sources", left) as step:
            left = step.keep(answers.sources(left, licences, step.drop))
        with self.step("answers", left) as step:
            left = step.keep(judge.choose(left, lambda one, reason: self._unanswered(step, one, reason)))
        with self.step("quality", left) as step:
            left = step.keep(judge.good(left, step.drop))
        with self.step("agreement", left) as step:
            return step.keep(answers.agreement(left, settings.agreement_bonus, step.drop) if task.classifies else left)

    def _unanswered(self, step: _Running, one: Draft, reason: str) -> None:
        step.drop(one, reason)
        if reason == answers.NO_TEACHER and self.task.classifies and not one.held_out:
            self.unanswered.append(one)

    def unlabelled(self, rows: list[Row]) -> list[Row]:
        """Finds the newest inputs without an answer, one of equals, none that is near a held-out text or stands among `rows`.

        They were counted as dropped where they were. Personal data is treated as in rows. None are kept where labels are plenty.
        """
        with self.step("unlabelled", rows) as step:
            if not self.task.classifies or sum(not row.held_out for row in rows) >= FEW_A_LABEL * len(self.task.labels):
                step.step.notes = {"skipped": "there are labels enough" if self.task.classifies else "the skill writes"}
                return step.keep(rows)
            left, _ = self._scrubbed(self.rows_of(self.unanswered[-_MOST_UNLABELLED:]), _nothing)
            known = {normalised(row.text) for row in rows}
            left = [row for row in duplicates.exact(left, _nothing) if normalised(row.text) not in known]
            held = [row for row in rows if row.held_out]
            left = duplicates.decontaminated([*held, *left], self.settings.near_duplicates, _nothing, self.check)
            self.curated.unlabelled = [row for row in left if not row.held_out]
            step.step.notes = {"without an answer": len(self.unanswered), "kept without a label": len(self.curated.unlabelled)}
            return step.keep(rows)

    def count_sources(self, left: Sequence[Draft]) -> None:
        """Whose words the answers are."""
        others = {"person": "a person", "student": "the student, liked", "": "nobody: put down by a person"}
        self.curated.sources = Counter(others.get(one.origin, one.source_model) for one in left)

    def rows_of(self, left: Iterable[Draft]) -> list[Row]:
        shared: dict[str, str] = {}  # instructions repeat
        return [
            Row(
                interaction_id=one.interaction_id,
                text=one.text,
                label=one.answer if self.task.classifies else "",
                held_out=one.held_out,
                corrected=one.corrected,
                answer=one.answer,
                messages=one.messages,
                rejected=one.rejected,
                thumb=one.thumb,
                weight=one.weight,
                time=one.time,
                group=one.group,
                instruction=shared.setdefault(one.instruction, one.instruction),
                parameters=one.parameters,
                teacher_tokens=one.teacher_tokens if one.origin == "teacher" else "",
            )
            for one in left
        ]

    def personal(self, rows: list[Row]) -> list[Row]:
        """Placeholders in the place of personal data, or no row."""
        with self.step("personal data", rows) as step:
            left, step.step.notes = self._scrubbed(rows, step.drop)
            return step.keep(left)

    def _scrubbed(self, rows: list[Row], drop: Callable[[Row, str], None]) -> tuple[list[Row], dict[str, Any]]:
        """The rows as they may be kept, and what was found in them."""
        mode = self.settings.pii
        if mode == "off":
            return rows, {}
        scrubber = pii.Scrubber.of(self.settings.pii_entities)
        people = self.task.find_names(rows, lambda done, total: self.progress("names", done, total)) if self.task.find_names else {}
        found: Counter[str] = Counter()
        left, touched = [], 0
        for number, row in enumerate(rows):
            if number % 4096 == 0:
                self.check()
            scrubbed, kinds = scrubber.scrub(row, people.get(row.interaction_id, ()))
            found.update(kinds)
            touched += bool(kinds)
            if kinds and mode == "drop":
                drop(row, PERSONAL)
            else:
                left.append(scrubbed)
        return left, {"rows with personal data": touched, "found": dict(found.most_common())}

    def label_errors(self, rows: list[Row]) -> list[Row]:
        """Leaves out, or doubts, training rows whose labels are likely wrong; a person's correction is believed."""
        with self.step("label errors", rows) as step:
            reason = "curation.label_errors is off" if self.settings.label_errors == "off" else ""
            reason = reason or (noise.possible(rows) if self.task.classifies else "the skill writes")
            if reason:
                step.step.notes = {"skipped": reason}
                return step.keep(rows)
            vectors, kept, features = self._vectors(rows)
            places = [place for place, row in enumerate(kept) if not row.held_out]
            labels = sorted({kept[place].label for place in places})
            index = {label: number for number, label in enumerate(labels)}
            classes = np.array([index[kept[place].label] for place in places], dtype=np.int64)
            suspects = noise.find(vectors[places], classes, len(labels), self.settings.label_errors_cap, self.check)
            suspected = [kept[places[number]] for number in suspects.indices]
            doubted = {id(row) for row in suspected if not row.corrected}
            notes = {"suspected": len(doubted), "held-back accuracy": round(suspects.accuracy, 4), "features": features}
            step.step.notes = notes
            left = []
            for row in rows:
                if id(row) not in doubted:
                    left.append(row)
                elif self.settings.label_errors == "weigh":
                    left.append(replace(row, weight=row.weight * _DOUBTED))
                else:
                    step.drop(row, noise.MISLABELLED)
            return step.keep(left)

    def _vectors(self, rows: list[Row]) -> tuple[Any, list[Row], str]:
        """Vectors float32[n, H], the rows that have one, and what they are of."""
        texts = [row.text for row in rows]
        if self.task.embed is not None:
            try:
                base, vectors, kept = self.task.embed(texts, lambda done, total: self.progress("embed", done, total))
            except UnderstudyError:
                pass  # the training that needs the base says what is wrong with it; words will do here
            else:
                left = [rows[place] for place in kept]
                self.curated.base = base
                self.curated.vectors = {row.interaction_id: vector for row, vector in zip(left, vectors, strict=True)}
                return vectors, left, base
        return noise.hashed(texts), rows, "hashed words"
