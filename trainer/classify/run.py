"""One job of a classifying skill: curate, try students from the cheapest on, judge what would be served, publish what is proven."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from server.config import Config
from server.core import FloatArray
from server.errors import FailedPrecondition, InvalidArgument
from server.quality.calibration import BoolArray
from server.registry.registry import CHAMPION, Registry
from server.runtime.adapter_folder import version_numbers
from server.runtime.heads import LinearHead
from server.runtime.repository import Repository
from trainer import card, evaluate, publish
from trainer.classify.data import Data, enough
from trainer.classify.recipe import FULL, LORA, VALIDATED, Recipe, recipe_for
from trainer.classify.students import LINEAR, Trained, Work, train_encoder, train_linear
from trainer.context import JobContext
from trainer.curate.pipeline import curate
from trainer.curate.rows import Curated
from trainer.report import REJECTED, SUCCEEDED, Report, Timed
from trainer.serving import ServedBase

LADDER = (LINEAR, LORA, FULL)
# Most trials of a search, where the job's spec gives no other number.
SEARCHED = 30
# What a deeper student needs beside its training: export, embedding, evaluation. With less left none is begun.
_LEAST_LEFT_S = 60.0


def train(config: Config, skill: str, context: JobContext, spec: Mapping[str, Any]) -> Report:
    """Trains a classifying skill's student. Errors as in `trainer.train`."""
    settings = config.skills[skill]
    method = str(spec.get("method") or settings.method)
    if method not in ("auto", *LADDER):
        allowed = ", ".join(("auto", *LADDER))
        raise InvalidArgument(f"The method {method[:32]!r} trains no classifier. Allowed: {allowed}.", field="method", allowed=allowed)
    if not settings.base:
        message = f"The skill {skill!r} has no base to learn on. Set skills.{skill}.base to an embedding model of the repository."
        raise FailedPrecondition(message, skill=skill)
    for package, extra in (("scipy", "learn"), ("torch", "trainer")):
        if find_spec(package) is None and (extra == "learn" or method in (LORA, FULL)):
            message = f"Training needs {package}, which is not installed. Run: pip install 'understudy-server[{extra}]'"
            raise FailedPrecondition(message, package=package)
    context.folder.mkdir(parents=True, exist_ok=True)
    registry = Registry(config.registry)
    report = Report(skill, context.job)
    try:
        with Timed(report, "curate"):  # outside of the loop: it embeds texts in one of its own
            curated = curate(config, skill, context, registry)
        asyncio.run(_Run(config, skill, registry, report, context).run(curated, method, spec))
    finally:
        registry.close()
    return report


class _Run:
    def __init__(self, config: Config, skill: str, registry: Registry, report: Report, context: JobContext) -> None:
        self._config = config
        self._settings = config.skills[skill]
        self._skill = skill
        self._registry = registry
        self._report = report
        self._context = context
        self._present_lineage: Mapping[str, Any] = {}

    async def run(self, curated: Curated, method: str, spec: Mapping[str, Any]) -> None:
        report, known = self._report, self._settings.read_labels()
        self._note(curated)
        rows = enough(curated, self._skill, self._settings.min_rows, report)
        base = await ServedBase.open(self._config, self._settings.base)
        try:
            report.base = f"{base.base.name}@{base.base.version}"
            with Timed(report, "embed"):
                data, vectors = await self._embed(base, Data(rows, known), curated.vectors if curated.base == report.base else {})
            used = [(row.interaction_id, row.held_out) for row in data.rows]
            dataset = self._registry.add_dataset(report.job, curated.table_version, curated.fingerprint, used, report.curation)
            seed, asked = int(spec.get("seed", self._context.seed)), [row.text for row in curated.unlabelled]
            work = Work(self._config, self._skill, self._settings.deliver_bar, data, self._context, seed, asked)
            trials = int(spec.get("trials", SEARCHED)) if spec.get("search") else 0
            chosen = await self._ladder(work, base, vectors, method, trials)
            present = await self._present(data, base, vectors)
        finally:
            await base.close()
        lineage = {"job": report.job, "dataset": dataset, "fingerprint": curated.fingerprint, "table_version": curated.table_version}
        lineage |= {"sources": dict(curated.sources), "train_rows": report.train_rows, "skill_labels": known}
        self._decide(work, chosen, present, lineage)
        self._tell(lineage, str(spec.get("hub_repo") or ""))

    def _note(self, curated: Curated) -> None:
        report = self._report
        report.read = curated.read
        report.dropped = dict(curated.dropped)
        report.sources = dict(curated.sources)
        report.curation = curated.report()

    async def _embed(self, base: ServedBase, data: Data, known: Mapping[str, FloatArray]) -> tuple[Data, FloatArray]:
        """The rows that the base takes, with their vectors float32[n, H]; `known`: those that curation had to make already."""
        missing = [index for index, row in enumerate(data.rows) if row.interaction_id not in known]
        texts = [data.texts[index] for index in missing]
        fresh, kept, errors = await base.embed(texts, lambda done, total: self._context.progress("embed", done, total))
        found = {index: known[row.interaction_id] for index, row in enumerate(data.rows) if row.interaction_id in known}
        found |= {missing[place]: vector for place, vector in zip(kept, fresh, strict=True)}
        report = self._report
        for error in errors:
            reason = f"the base refuses the text ({error.reason})"
            report.dropped[reason] = report.dropped.get(reason, 0) + 1
        rows = [data.rows[index] for index in sorted(found)]
        there = {row.label for row in rows}
        left = Data(rows, [label for label in data.labels if label in there])
        report.held_out_rows = int(left.held_out.sum())
        report.train_rows = len(rows) - report.held_out_rows
        report.labels, report.labels_without_rows = len(left.labels), [label for label in data.labels if label not in there]
        vectors = [found[index] for index in sorted(found)]
        return left, np.stack(vectors) if vectors else np.zeros((0, base.features.size), np.float32)

    async def _ladder(self, work: Work, base: ServedBase, vectors: FloatArray, method: str, trials: int) -> Trained:
        """Students from the cheapest on until one reaches the bar or the budget is spent; the best of them."""
        tried: list[Trained] = []
        for step in LADDER if method == "auto" else (method,):
            self._context.check()
            if tried and (skipped := self._skip(step)):
                self._report.tried.append({"method": step, "skipped": skipped})
                continue
            with Timed(self._report, step):
                if step == LINEAR:
                    student = train_linear(work, base, vectors)
                else:
                    recipe = recipe_for(step, self._report.train_rows, len(work.data.labels), seed=work.seed)
                    student = await train_encoder(work, recipe.with_(self._searched(work, recipe, trials)))
            tried.append(student)
            self._report.tried.append(student.told(work.bar))
            self._context.log(f"{step}: agrees on {student.judged.accuracy:.2%}, {student.judged.share:.1%} at the bar")
            for name, value in student.judged.metrics().items():
                self._context.metric(f"{step}/{name}", len(tried), value)
            if student.judged.reaches(work.bar) and not student.problem:
                return student
        sound = [student for student in tried if not student.problem] or tried
        return max(sound, key=lambda student: (student.judged.share * student.judged.delivered_accuracy, student.judged.accuracy))

    def _searched(self, work: Work, recipe: Recipe, trials: int) -> dict[str, Any]:
        """What at most so many trials find better than the recipe, in half of what is left of the budget."""
        if not trials:
            return {}
        from trainer.classify.students import SPACE, validation_accuracy
        from trainer.search import search

        short = recipe.with_({"validated": max(recipe.validated, VALIDATED)})
        with Timed(self._report, "search"):
            found = search(
                lambda parameters, name: validation_accuracy(work, short.with_(parameters), f"{recipe.method}-{name}"),
                SPACE,
                self._context,
                self._context.left_s() / 2 if self._context.left_s() < float("inf") else self._settings.train_budget_s / 2,
                first={name: getattr(recipe, name) for name in SPACE},
                most=trials,
            )
        self._context.log(f"search: {found.trials} trials, the best agrees on {found.value:.2%} of the validation rows")
        return dict(found.parameters)

    def _skip(self, step: str) -> str:
        """Why a dearer student is not tried; "" where it is."""
        if find_spec("torch") is None:
            return "torch is not installed"
        if self._context.left_s() < _LEAST_LEFT_S:
            return "the budget is spent"
        from trainer.classify.source import find_source

        try:
            find_source(self._config, self._settings.base)
        except FailedPrecondition as error:
            return error.message
        return ""

    async def _present(self, data: Data, base: ServedBase, vectors: FloatArray) -> BoolArray | None:
        """Where the student that serves now is right on the held-out rows; None where none serves."""
        head = self._present_head()
        if head is None:
            return None
        manifest = head.manifest
        held = vectors[data.held_out]
        if manifest.base.sha256 != base.base.sha256:
            repository = Repository(Path(self._config.models.path))
            if manifest.base.version not in (repository.versions(manifest.base.name) if repository.exists(manifest.base.name) else []):
                return None  # its encoder is gone, so it does not serve
            other = await ServedBase.open(self._config, manifest.base.name, manifest.base.version)
            try:
                held, kept, _ = await other.embed([row.text for row in data.rows if row.held_out], lambda done, total: None)
                if len(kept) != int(data.held_out.sum()) or other.base.sha256 != manifest.base.sha256:
                    return None
            finally:
                await other.close()
        _, right = evaluate.agreement(head, held, data.held_labels)
        self._present_lineage = manifest.lineage
        self._report.present_version = manifest.version
        self._report.present_accuracy = float(right.mean())
        return right

    def _present_head(self) -> LinearHead | None:
        """The champion, or where the rollout has named none the newest version that loads."""
        folder = publish.adapters_folder(self._config, self._skill)
        champion = self._registry.aliases(self._skill).get(CHAMPION, "")
        for version in [champion] if champion else [str(number) for number in version_numbers(folder)]:
            try:
                return LinearHead.load(folder / version, base_sha256=None)
            except Exception as error:
                self._context.log(f"version {version} cannot be compared with: {str(error)[:200]}")
        return None

    def _decide(self, work: Work, chosen: Trained, present: BoolArray | None, lineage: Mapping[str, Any]) -> None:
        report, judged = self._report, chosen.judged
        report.method, report.parameters, report.metrics = chosen.method, dict(chosen.parameters), judged.metrics() | chosen.more
        report.details = dict(judged.details)
        if present is not None:
            report.details["paired"] = evaluate.paired(judged.correct, present)
        mine = {**lineage, "method": chosen.method}
        same = ("fingerprint", "skill_labels", "method")
        if self._present_lineage and all(self._present_lineage.get(key) == mine[key] for key in same):
            report.reason = f"version {report.present_version} was made of the same rows. Let new traffic pass."
        else:
            report.reason = chosen.problem or evaluate.verdict(judged, present, work.bar)
        if report.reason:
            report.state = REJECTED
            return
        update: dict[str, Any] = {"metrics": report.metrics, "calibration": judged.calibration.to_json()}
        update["lineage"] = mine
        if chosen.draft is not None:
            made = publish.publish_encoder(self._config, self._registry, chosen.draft, self._skill, report.job)
            assert made.manifest.files["model.onnx"].sha256 == chosen.spec.base.sha256
            update["base"] = chosen.spec.base.model_copy(update={"name": made.manifest.name, "version": made.manifest.version})
            report.model = f"{made.manifest.name}@{made.manifest.version}"
        update["license"] = Repository(Path(self._config.models.path)).manifest(self._settings.base).license
        final = chosen.spec.model_copy(update=update)
        arrays = np.ascontiguousarray(chosen.weight), np.ascontiguousarray(chosen.bias)
        manifest = publish.publish_head(self._config, self._registry, final, arrays, kind=chosen.method, job=report.job)
        report.state, report.version = SUCCEEDED, manifest.version

    def _tell(self, lineage: Mapping[str, Any], hub_repo: str) -> None:
        """The card, and the Hub where the job says so."""
        report, models = self._report, Path(self._config.models.path)
        license = Repository(models).manifest(self._settings.base).license
        made_of = card.Lineage(lineage["dataset"], lineage["fingerprint"], lineage["table_version"], license)
        folders = {"head": publish.adapters_folder(self._config, self._skill) / report.version}
        if report.model:
            name, _, version = report.model.partition("@")
            folders["encoder"] = models / name / version
        card.tell(self._context, report, self._settings.task, made_of, card.Published(folders, hub_repo))
