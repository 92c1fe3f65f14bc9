"""Assesses a skill from what people and its teacher said of live answers: recalibrates its quality and difficulty, checks its student.

A new model is fitted on the earlier traffic, measured with the present one on the later, and published only where it is better.

`python -m trainer.assess SKILL` does it at once. Exit code 0: something was published or checked; 3: too little to go by; 1: an error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Before NumPy: see trainer/__main__.py.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from server.config import Config, load_config
from server.core import FloatArray
from server.errors import SkillNotFound, UnderstudyError, near_names
from server.lake.reading import LakeReader
from server.quality.calibration import Calibration
from server.registry.registry import Registry
from server.runtime.adapter_folder import MANIFEST
from server.runtime.heads import Base, Features
from trainer.assessment import difficulty_part, evidence, quality_part, student_part
from trainer.assessment.evidence import Judged
from trainer.context import JobContext
from trainer.report import REJECTED, SUCCEEDED, Report, Timed
from trainer.serving import ServedBase

METHOD = "assess"
PUBLISHED = "published"


def assess(config: Config, skill: str, context: JobContext, spec: Mapping[str, Any]) -> Report:
    """A job of the kind "assess"; `spec` has no keys of its own. The report's `details` has "quality", "difficulty" and "student", each
    with a "state", a "reason", and the figures "before" and "after". Its state is "succeeded" where something was published or the
    student was checked, else "rejected", and `reason` says why.

    Raises:
        SkillNotFound: no such skill.
        Unavailable, FailedPrecondition: the lake cannot be read.
    """
    if skill not in config.skills:
        raise SkillNotFound(f"There is no skill {skill!r} in the configuration; {near_names(skill, list(config.skills))}", skill=skill)
    registry = Registry(config.registry)
    try:
        return _Run(config, skill, context, registry).run()
    finally:
        registry.close()


class _Run:
    def __init__(self, config: Config, skill: str, context: JobContext, registry: Registry) -> None:
        self._config = config
        self._settings = config.skills[skill]
        self._skill = skill
        self._context = context
        self._registry = registry
        self._root = Path(config.models.path) / "adapters"
        self._report = Report(skill, context.job, method=METHOD)

    def run(self) -> Report:
        report, context = self._report, self._context
        with Timed(report, "read"):
            sayings = evidence.read(LakeReader(self._config, self._registry), self._skill)
        report.read = len(sayings)
        with Timed(report, "embed"):
            judged, students, vectors, made_by = asyncio.run(self._judged(sayings))
        report.train_rows = len(judged)
        report.sources = {f"judged by a {who}": sum(one.by == who for one in judged) for who in (evidence.PERSON, evidence.TEACHER)}
        context.check()
        with Timed(report, "quality"):
            report.details["quality"] = quality_part.recalibrate(self._root, self._skill, self._settings.task, judged)
        context.check()
        with Timed(report, "difficulty"):
            report.details["difficulty"] = difficulty_part.recalibrate(self._root, self._skill, students, vectors, made_by)
        report.details["student"] = student_part.check(judged, *self._stated(judged))
        self._end()
        for line in in_words(report).splitlines():
            context.log(line)
        return report

    async def _judged(
        self, sayings: Sequence[evidence.Saying]
    ) -> tuple[list[Judged], list[Judged], dict[str, FloatArray], tuple[Base, Features] | None]:
        """Judgements, those that difficulty learns from, and vectors of their prompts with what made them."""
        base = await self._base()
        if base is None:
            judged = evidence.judge(sayings, {})
            return judged, difficulty_part.students(judged), {}, None
        try:
            judged = evidence.judge(sayings, await self._vectors(base, evidence.texts_to_compare(sayings), "compare"))
            students = difficulty_part.students(judged)
            vectors = await self._vectors(base, [row.text for row in difficulty_part.merged(students)[0]], "embed")
            return judged, students, vectors, (base.base, base.features)
        finally:
            await base.close()

    async def _base(self) -> ServedBase | None:
        """The skill's base, else the server's embedder; without one words answer alone."""
        name = self._settings.base or self._config.routing.embedder
        if not name:
            return None
        try:
            return await ServedBase.open(self._config, name)
        except UnderstudyError as error:
            self._context.log(f"texts are compared and judged by their words alone: {error.message}")
            return None

    async def _vectors(self, base: ServedBase, texts: Sequence[str], stage: str) -> dict[str, FloatArray]:
        found, kept, errors = await base.embed(texts, lambda done, total: self._context.progress(stage, done, total))
        if errors:
            self._report.dropped["the base refuses the text"] = self._report.dropped.get("the base refuses the text", 0) + len(errors)
        return {texts[place]: vector for place, vector in zip(kept, found, strict=True)}

    def _stated(self, judged: Sequence[Judged]) -> tuple[float | None, float]:
        """What the newest student's manifest says: the error of its calibration, and how often its teacher is right."""
        version = next((one.version for one in reversed(judged) if one.student), "").rpartition("@")[2]
        try:
            manifest = json.loads((self._root / self._skill / version / MANIFEST).read_text(encoding="utf-8"))
            said = Calibration.from_json(manifest["calibration"])
        except (OSError, ValueError, KeyError, TypeError, UnderstudyError):  # gone, or a student without one
            return None, 1.0
        return said.ece, said.teacher

    def _end(self) -> None:
        report = self._report
        parts = report.details
        for name in ("quality", "difficulty"):
            for when in ("before", "after"):
                values = parts[name].get(when, {})
                report.metrics |= {f"{name}_{when}_{key}": value for key, value in values.items() if isinstance(value, float)}
        student = parts["student"]
        report.metrics |= {f"student_{key}": student[key] for key in ("promised", "kept", "ece", "brier") if key in student}
        done = student["state"] != "skipped" or any(parts[name]["state"] == PUBLISHED for name in ("quality", "difficulty"))
        report.state = SUCCEEDED if done else REJECTED
        report.version = parts["difficulty"].get("version", "")
        if student["state"] == "drifted":
            report.reason = f"the student's calibration has drifted: {student['reason']}"
        elif not done:
            report.reason = "; ".join(f"{name}: {part['reason']}" for name, part in parts.items() if part["reason"])


def in_words(report: Report) -> str:
    """The report for people."""
    judged = ", ".join(f"{count} {who}" for who, count in report.sources.items())
    lines = [f"{report.skill}: {report.read} interactions read, {report.train_rows} answers judged ({judged})"]
    for name in ("quality", "difficulty"):
        part = report.details[name]
        end = {PUBLISHED: "published", "kept": "the present one stays", "skipped": "not refitted"}[part["state"]]
        lines.append(f"{name}: {end}{': ' + part['reason'] if part['reason'] else ''}")
        for when in ("before", "after"):
            if when in part:
                lines.append(f"  {when:6s}  {_line(part[when])}")
    student = report.details["student"]
    if student["state"] == "skipped":
        lines.append(f"student: not checked: {student['reason']}")
    else:
        said = f"promised {student['promised']:.1%}, kept {student['kept']:.1%}; {_line(student)}"
        lines.append(f"student {student['version']}: {student['state']}: {said}")
        lines += [f"  {student['reason']}"] if student["reason"] else []
    return "\n".join(lines)


def _line(values: Mapping[str, Any]) -> str:
    order = f", AUROC {values['auroc']:.3f}" if values.get("auroc") is not None else ""
    gain = f", APGR {values['apgr']:.3f}" if values.get("apgr") is not None else ""
    return f"calibration error {values['ece']:.3f}, Brier {values['brier']:.4f}{order}{gain} on {values['rows']} rows"


def main(arguments: list[str] | None = None) -> int:
    """Runs it as a job of its own, past the queue."""
    parser = argparse.ArgumentParser(prog="trainer.assess", description=__doc__)
    parser.add_argument("skill")
    parser.add_argument("--config", help="TOML file, as for the server")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; repeatable")
    parser.add_argument("--json", metavar="PATH", help='write the report there as JSON; "-" prints it')
    options = parser.parse_args(arguments)

    from server.registry.job_requests import checked_spec
    from server.registry.jobs import JobStore
    from trainer.work import new_holder, run_job

    try:
        config = load_config(options.config, flags=dict(text.partition("=")[::2] for text in options.set))
        checked_spec(config, options.skill, METHOD, {})
        registry, holder = Registry(config.registry), new_holder()
        store = JobStore(registry)
        job = store.begin(options.skill, METHOD, {}, holder, config.training.lease_s)
        ended = run_job(config, store, job, threading.Event())
        registry.close()
    except UnderstudyError as error:
        print(f"understudy assess: {error.message}", file=sys.stderr)
        return 1
    if ended.report is None:
        print(f"understudy assess: {ended.error.message if ended.error is not None else ended.state}", file=sys.stderr)
        return 1
    text = json.dumps(ended.report.to_json(), indent=2)
    print(text if options.json == "-" else in_words(ended.report))
    if options.json and options.json != "-":
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return 0 if ended.state == SUCCEEDED else 3


if __name__ == "__main__":
    sys.exit(main())
