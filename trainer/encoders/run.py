"""One training run of a skill of entities, ranking or embeddings: curate, read the answers, train, export, prove the file, publish."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from server.config import Config
from server.errors import AlreadyExists, FailedPrecondition, InvalidArgument, SkillNotFound, TooLittleData, near_names
from server.registry.registry import Adapter, ModelRecord, Registry
from server.runtime.adapter_folder import version_numbers
from server.runtime.references import Reference, Target, write_reference
from server.runtime.repository import ModelFiles, Repository
from server.runtime.verify import MODEL
from trainer import card
from trainer.classify.source import Source, find_source
from trainer.context import JobContext
from trainer.curate.rows import Row, normalised
from trainer.encoders import examples as answers
from trainer.encoders.examples import EMBEDDING, ENTITIES, RELEVANT, SIMILARITY, Example, Examples
from trainer.encoders.export import Exported, export
from trainer.encoders.fit import Recipe
from trainer.encoders.judge import Judge, Judged, compared, verdict
from trainer.encoders.measure import Interval
from trainer.encoders.present import Present, find_present
from trainer.encoders.rows import read_rows
from trainer.encoders.serving import served_output
from trainer.encoders.students import Student, Trial, recipes
from trainer.report import REJECTED, SUCCEEDED, Report, Timed

METHODS = ("auto", "lora", "full")
KIND = "model"
MIN_HELD_OUT = 10
# Of the training rows, so many are left out of training to decide when to stop and which student to take.
VALIDATION_ONE_IN = 10
_MIN_VALIDATION = 8
_PIN = "rows.json"
# Shares of the time that is left: for LoRA where the whole model may have to be trained after it, and for all training.
_FIRST_SHARE, _TRAINING_SHARE = 0.4, 0.85
_NEEDED = ("torch", "transformers", "peft")


def train(config: Config, skill: str, context: JobContext, spec: Mapping[str, Any]) -> Report:
    """Trains a student for a skill of the tasks in trainer.encoders.examples.TASKS, and publishes it where it passes.

    `spec`: "method" ("auto", "lora", "full"; default: the skill's), "seed", "hub_repo", and what trainer.encoders.students.recipes takes.

    Raises:
        SkillNotFound, FailedPrecondition, ModelNotFound: no such skill, no base, its torch weights or a package are missing.
        InvalidArgument: a method that is none of METHODS, a number of `spec` that is out of its range.
        TooLittleData: with `rows` and `minimum`.
        Cancelled: by the context; its checkpoint is written.
    """
    settings = config.skills.get(skill)
    if settings is None:
        raise SkillNotFound(f"There is no skill {skill!r} in the configuration; {near_names(skill, list(config.skills))}", skill=skill)
    assert settings.task in answers.TASKS, settings.task
    method = _method(str(spec.get("method") or settings.method), settings.task)
    seed = spec.get("seed", context.seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise InvalidArgument(f"seed is {str(seed)[:40]!r}; expected a whole number from 0 to {2**31 - 1}.", field="seed")
    if not settings.base:
        message = f"The skill {skill!r} has no base to learn on. Set skills.{skill}.base to an embedding model of the repository."
        raise FailedPrecondition(message, skill=skill)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        message = f"Training needs {', '.join(missing)}, not installed here. Run: pip install 'understudy-server[trainer]'"
        raise FailedPrecondition(message, package=missing[0])
    source = find_source(config, settings.base)
    registry = Registry(config.registry)
    report = Report(skill, context.job, base=f"{source.base}@{source.manifest.version}")
    try:
        _Run(config, skill, registry, report, replace(context, seed=seed), source).run(method, spec)
    finally:
        registry.close()
    return report


@dataclass(frozen=True, slots=True)
class Parts:
    """The examples by what they are for; `texts`: every text of the training part, to calibrate int8 on and to search among."""

    train: list[Example]
    validation: list[Example]
    held_out: list[Example]

    @property
    def documents(self) -> list[str]:
        """Second texts of the training part."""
        return sorted({row.pair for row in (*self.train, *self.validation) if row.pair})


class _Run:
    def __init__(self, config: Config, skill: str, registry: Registry, report: Report, context: JobContext, source: Source) -> None:
        self._config = config
        self._settings = config.skills[skill]
        self._task = self._settings.task
        self._skill = skill
        self._registry = registry
        self._report = report
        self._context = context
        self._source = source
        self._models = Path(config.models.path)
        self._folder = self._models / "adapters" / skill

    def run(self, method: str, spec: Mapping[str, Any]) -> None:
        report, context = self._report, self._context
        with Timed(report, "curate"):
            curated = read_rows(self._config, self._skill, context, self._registry)
            rows = self._pinned(curated.rows)
        report.read, report.sources, report.curation = curated.read, dict(curated.sources), curated.report()
        found = answers.read(self._task, rows, self._settings.read_labels() if self._task == ENTITIES else ())
        report.dropped = dict(curated.dropped + found.dropped)
        parts = split(found.rows)
        self._enough(parts, found)
        tries = recipes(self._task, method, len(parts.train), spec)
        fingerprint = _fingerprint(found.rows)
        present = find_present(self._config, self._skill)
        if present is not None:
            if present.lineage.get("job") == context.job:
                self._finish(present)
                return
            report.present_version = present.shown
            if present.lineage.get("fingerprint") == fingerprint and present.lineage.get("asked") == method:
                self._reject(f"version {present.number} was made of the same rows in the same way. Let new traffic pass.")
                return
        dataset = self._registry.add_dataset(
            context.job, curated.table_version, fingerprint, [(row.id, row.held_out) for row in found.rows], report.curation
        )
        trial = self._train(tries, parts, fingerprint)
        report.method, report.parameters = trial.recipe.method, trial.parameters()
        with Timed(report, "export"):
            exported = self._export(trial, parts)
        lineage = {"job": context.job, "dataset": dataset, "fingerprint": fingerprint, "table_version": curated.table_version}
        lineage |= {"asked": method, "method": trial.recipe.method, "seed": context.seed, "sources": dict(curated.sources)}
        lineage |= {"base": report.base, "train_rows": report.train_rows, "held_out_rows": report.held_out_rows}
        if isinstance(exported, str):
            self._reject(exported)
        else:
            self._prove(exported, present, lineage)
            self._tell(lineage, str(spec.get("hub_repo") or ""))
        self._clean()

    def _enough(self, parts: Parts, found: Examples) -> None:
        """Raises TooLittleData with what was read and why rows fell away."""
        report, minimum = self._report, self._settings.min_rows
        report.train_rows, report.held_out_rows = len(parts.train) + len(parts.validation), len(parts.held_out)
        kinds = {span[2] for row in found.rows for span in row.spans}
        report.labels = len(kinds)
        wanted = [(report.train_rows, minimum, "rows"), (report.held_out_rows, MIN_HELD_OUT, "held-out rows")]
        if self._task == ENTITIES:
            wanted.append((len({span[2] for row in parts.train for span in row.spans}), 1, "kinds of entities"))
        elif self._task == EMBEDDING:
            for rows, least, what in ((parts.train, MIN_HELD_OUT, "pairs"), (parts.held_out, MIN_HELD_OUT, "held-out pairs")):
                wanted.append((sum(row.score >= RELEVANT for row in rows), least, f"{what} that belong together"))
        else:
            wanted.append((len({row.score for row in parts.train}), 2, "different scores"))
            wanted.append((len({row.score for row in parts.held_out}), 2, "different scores in held-out rows"))
        for count, least, what in wanted:
            if count < least:
                dropped = "; ".join(f"{number} rows: {why}" for why, number in report.dropped.items()) or "none were dropped"
                message = f"{self._skill!r} has {count} {what} to learn from; {least} are needed ({report.read} were read, {dropped})."
                raise TooLittleData(f"{message} Let more traffic pass, or lower min_rows.", rows=count, minimum=least, skill=self._skill)

    def _pinned(self, rows: Sequence[Row]) -> list[Row]:
        """A job that is taken up again learns from the rows that it began with, whatever came since; those that were erased are gone."""
        pin = self._context.folder / _PIN
        with suppress(OSError, ValueError):
            known = set(json.loads(pin.read_text(encoding="utf-8")))
            return [row for row in rows if row.interaction_id in known]
        pin.parent.mkdir(parents=True, exist_ok=True)
        part = pin.with_suffix(".part")
        part.write_text(json.dumps([row.interaction_id for row in rows]), encoding="utf-8")
        part.replace(pin)
        return list(rows)

    def _train(self, tries: list[Recipe], parts: Parts, fingerprint: str) -> Trial:
        """The cheapest student that reaches the bar on the validation part, else the best."""
        report, context, bar = self._report, self._context, self._settings.deliver_bar
        done: list[Trial] = []
        for number, recipe in enumerate(tries):
            context.check()
            share = _FIRST_SHARE if number + 1 < len(tries) else _TRAINING_SHARE
            until = time.monotonic() + share * context.left_s()
            start = time.monotonic()
            with Timed(report, f"train {recipe.method}"):
                student = Student(self._task, self._source, context, kinds_of(parts.train))
                trial = student.train(recipe, parts.train, parts.validation, key=fingerprint, until=until)
            reaches = trial.judged.bar.value >= bar
            report.tried.append({**trial.tried(), "seconds": round(time.monotonic() - start, 3), "reaches": reaches})
            shown = ", ".join(f"{one.name} {one.value:.4f}" for one in (trial.judged.bar, trial.judged.quality))
            context.log(f"{recipe.method}: {shown} on the validation part after {trial.fit.steps} steps")
            done.append(trial)
            if reaches or context.left_s() <= 0:
                break
        return max(done, key=lambda one: (one.judged.bar.value >= bar, one.judged.quality.value))

    def _export(self, trial: Trial, parts: Parts) -> Exported | str:
        """The file in a repository of its own, or why it does not answer as the torch model."""
        context = self._context
        context.check()
        texts = [text for row in parts.train for text in (row.text, row.pair) if text]
        manifest = self._source.manifest
        more: dict[str, Any] = {"license": manifest.license, "max_tokens": manifest.max_tokens}
        more["source"] = {"kind": "trainer", "id": self._skill, "revision": context.job}
        if self._task in (EMBEDDING, SIMILARITY):
            more |= {"pooling": self._source.pooling, "normalize": manifest.normalize}
            more |= {"query_prefix": manifest.query_prefix, "passage_prefix": manifest.passage_prefix}
        judge = Judge(self._task, parts.held_out, parts.documents)
        return export(self._config, trial, judge, f"{self._skill}-student", texts, more)

    def _prove(self, exported: Exported, present: Present | None, lineage: dict[str, Any]) -> None:
        report = self._report
        judge = exported.judge
        with Timed(report, "evaluate"):
            new = judge.judge(exported.served)
            report.metrics = {**new.figures, "held_out_rows": float(len(judge.rows)), **_interval(new)}
            report.metrics |= {f"parity/{name}": value for name, value in exported.parity.items()}
            report.metrics |= {f"torch/{new.quality.name}": judge.judge(exported.torch).quality.value}
            report.metrics |= judge.said(exported.served)
            difference = None
            if present is not None:
                old = judge.judge(asyncio.run(served_output(self._config, self._models, present.model, present.version, judge)))
                difference = compared(new, old)
                report.present_accuracy = old.bar.value
                report.metrics |= {f"present_{old.quality.name}": old.quality.value, "difference": difference.value}
                report.metrics |= {"difference_low": difference.low, "difference_high": difference.high}
            report.details = _tables(new, difference, present)
        reason = verdict(new, difference, self._settings.deliver_bar, present.shown if present else "")
        if reason:
            self._reject(reason)
            return
        with Timed(report, "publish"):
            self._publish(exported, lineage)

    def _publish(self, exported: Exported, lineage: dict[str, Any]) -> None:
        """The model first, what points to it last: the server takes over what it sees there."""
        report = self._report
        files = Repository(self._models).add(exported.files.folder, f"{self._skill}-student")
        digest = files.manifest.files[MODEL].sha256
        report.model = f"{files.manifest.name}@{files.manifest.version}"
        metrics = {name: float(value) for name, value in report.metrics.items()}
        record = ModelRecord(files.manifest.name, files.manifest.version, "local", self._skill, report.base, digest, metrics, report.job)
        self._registry.add_model(record)
        reference = self._point(files, digest, metrics, lineage)
        adapter = Adapter(self._skill, reference.version, KIND, report.base, digest, metrics, report.job)
        self._registry.add_adapter(adapter)
        report.state, report.version = SUCCEEDED, reference.version

    def _point(self, files: ModelFiles, digest: str, metrics: dict[str, float], lineage: dict[str, Any]) -> Reference:
        self._folder.mkdir(parents=True, exist_ok=True)
        target = Target(model=files.manifest.name, version=files.manifest.version, sha256=digest)
        while True:
            known = [int(one.version) for one in self._registry.adapters(self._skill) if one.version.isdecimal()]
            number = 1 + max([*version_numbers(self._folder), *known], default=0)
            reference = Reference(
                kind="model",
                name=self._skill,
                version=str(number),
                task=self._task,
                target=target,
                metrics=metrics,
                lineage=lineage,
                license=self._source.manifest.license,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            with suppress(AlreadyExists):  # another run took the number
                return write_reference(self._folder / str(number), reference)

    def _tell(self, lineage: Mapping[str, Any], hub_repo: str) -> None:
        """The card, and the Hub where the job says so."""
        report = self._report
        made_of = card.Lineage(lineage["dataset"], lineage["fingerprint"], lineage["table_version"], self._source.manifest.license)
        name, _, version = report.model.partition("@")
        folders = {"student": self._folder / report.version, "model": self._models / name / version}
        card.tell(self._context, report, self._task, made_of, card.Published(folders, hub_repo))

    def _finish(self, present: Present) -> None:
        """Says what the job published before it died."""
        report = self._report
        report.state, report.version, report.model = SUCCEEDED, present.number, present.shown
        report.method, report.metrics = str(present.lineage.get("method", "")), dict(present.metrics)
        with suppress(FailedPrecondition):  # the registry has it
            self._registry.add_adapter(Adapter(self._skill, present.number, KIND, report.base, present.sha256, report.metrics, report.job))
        self._clean()

    def _reject(self, reason: str) -> None:
        self._report.state, self._report.reason = REJECTED, reason
        self._context.log(f"not published: {reason}")

    def _clean(self) -> None:
        """What the job needed and nobody needs after it."""
        for name in (*METHODS, "draft"):
            shutil.rmtree(self._context.folder / name, ignore_errors=True)


def split(rows: Sequence[Example]) -> Parts:
    """Held-out rows as curation has it; of the others one in ten, by a hash of the first text, for validation."""
    training = [row for row in rows if not row.held_out]
    chosen = [row for row in training if _validates(row.text)]
    if len(chosen) < _MIN_VALIDATION:
        chosen = training[:: max(2, min(VALIDATION_ONE_IN, len(training) // _MIN_VALIDATION))]
    out = {row.id for row in chosen}
    return Parts([row for row in training if row.id not in out], chosen, [row for row in rows if row.held_out])


def kinds_of(rows: Sequence[Example]) -> list[str]:
    """Kinds of entities in the rows, sorted."""
    return sorted({span[2] for row in rows for span in row.spans})


def _method(name: str, task: str) -> str:
    if name not in METHODS:
        message = f"The method {name[:64]!r} trains no student for {task}; {', '.join(METHODS)} do. Set the skill's method to one of them."
        raise InvalidArgument(message, field="method", allowed=",".join(METHODS))
    return name


def _validates(text: str) -> bool:
    digest = hashlib.sha256(b"validation\n" + normalised(text).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % VALIDATION_ONE_IN == 0


def _fingerprint(rows: Sequence[Example]) -> str:
    """SHA-256 of ids and what is learned from each; equal where a run would learn the same again."""
    lines = sorted(f"{row.id}\t{row.score!r}\t{row.spans!r}\t{row.held_out}\n" for row in rows)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _tables(judged: Judged, difference: Interval | None, present: Present | None) -> dict[str, Any]:
    """For the job's page."""
    labels = [{"label": name.partition("/")[2], "f1": value} for name, value in judged.figures.items() if name.startswith("f1/")]
    found: dict[str, Any] = {"by_label": labels} if labels else {}
    if difference is not None and present is not None:
        ends = {"low": difference.low, "high": difference.high}
        found["paired"] = [{"against": present.shown, "figure": judged.quality.name, "difference": difference.value, **ends}]
    return found


def _interval(judged: Judged) -> dict[str, float]:
    ends = [(one.name, one.interval) for one in (judged.bar, judged.quality)]
    return {key: value for name, at in ends for key, value in ((f"{name}_low", at.low), (f"{name}_high", at.high))}
