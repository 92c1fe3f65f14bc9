"""One training job of a skill that writes: rows, tokens, fine-tuning, preferences, export, proof, publication."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.config import Config
from server.errors import AlreadyExists, Cancelled, FailedPrecondition, ModelRejected, TooLittleData, UnderstudyError
from server.quality.calibration import MIN_ROWS
from server.registry.registry import Adapter, Registry
from server.routing.skills import Skill, read_skill
from server.runtime.adapter_folder import version_numbers
from server.runtime.references import Reference, Target, read_reference, write_reference
from trainer import card
from trainer.context import JobContext
from trainer.curate.rows import Curated
from trainer.generation import export, proof
from trainer.generation.base import GeneratorBase, load_torch, open_base
from trainer.generation.dataset import rows_of_job
from trainer.generation.material import Example, Material, gather
from trainer.generation.prompts import Prompts
from trainer.generation.recipe import POSITIONS, Recipe, methods, preference_of, recipe_for
from trainer.generation.served import ServedStudent
from trainer.report import REJECTED, SUCCEEDED, Report, Timed

# Held-out rows that are answered for the proof; more would say little more and take long.
MOST_HELD_OUT = 400
_PARITY_PROMPTS, _PARITY_TOKENS = 16, 48
_BASE_PROMPTS, _BASE_TOKENS, _BASE_TOP1 = 4, 12, 0.7
_ENOUGH = 0.5  # of the held-out rows at the bar; below, a dearer method is tried where several are
_RESERVE = 0.25  # of the time budget, for export and proof


def train(config: Config, skill: str, context: JobContext, spec: Mapping[str, Any]) -> Report:
    """Trains an adapter or a whole model on the skill's base, proves it as the server would run it, and publishes a Reference to it.

    `spec`: "method" (auto, lora, full, prefix, prompt), "seed", "search" with "trials" (see trainer.generation.trials), and any field of
    trainer.generation.recipe.Recipe. Under
    `accelerate launch` every process calls this; the first one alone exports and publishes.

    Raises:
        InvalidArgument: an unknown method; a base that does not write, or is none of the repository's.
        FailedPrecondition: the base's torch weights, or a package, are not at hand.
        TooLittleData: with the count and the minimum. Cancelled.
    """
    _need()
    settings = config.skills[skill]
    chosen = methods(settings.method, spec)
    registry = Registry(config.registry)
    try:
        base = open_base(config, skill, context.folder)
        run = _Run(config, read_skill(skill, settings), registry, context, dict(spec), base)
        return asyncio.run(run.run(chosen))
    finally:
        registry.close()


def _need() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers", "peft", "scipy") if find_spec(name) is None]
    if missing:
        message = f"Training students that write needs {', '.join(missing)}. Run: pip install 'understudy-server[trainer]'"
        raise FailedPrecondition(message, missing=",".join(missing))


async def same_weights(config: Config, base: GeneratorBase, model: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Raises FailedPrecondition where the torch model does not answer as the served base does: an adapter of other weights is worth
    nothing, and hours of training would only end in a proof that fails.
    """
    served = await ServedStudent.open(config, Path(config.models.path), base.manifest.name, version=base.manifest.version)
    try:
        found = await proof.parity(served, model, prompts, _BASE_TOKENS, base.exact)
    finally:
        await served.close()
    # A few tokens cannot tell how well a base was quantized, only whether it is this one.
    if found.reason and (base.exact or found.top1 < _BASE_TOP1):
        message = f"the weights in {base.folder} are not those of the served base {base.shown}: {found.reason}."
        raise FailedPrecondition(
            f"{message} Set training.sources.{base.manifest.name} to the model that was pulled.", base=base.manifest.name
        )


@dataclass(slots=True)
class _Trial:
    """A student that was trained and exported, and how it did. `reason`: why it is not published, or ""."""

    recipe: Recipe
    exported: export.Exported
    metrics: dict[str, float]
    quality: dict[str, Any]
    entry: dict[str, Any]
    reason: str

    @property
    def rank(self) -> tuple[bool, float]:
        """Students that pass before others, then by the share of requests that they can answer at the bar."""
        return not self.reason, self.metrics["local_share"]


class _Run:
    def __init__(
        self, config: Config, skill: Skill, registry: Registry, context: JobContext, spec: dict[str, Any], base: GeneratorBase
    ) -> None:
        self._config = config
        self._skill = skill
        self._registry = registry
        self._context = context
        self._spec = spec
        self._base = base
        self._root = Path(config.models.path)
        self._students = self._root / "adapters" / skill.name
        self._main = int(os.environ.get("RANK", "0")) == 0
        self._reserve = _RESERVE * config.skills[skill.name].train_budget_s
        self.report = Report(skill.name, context.job, base=base.shown)
        self._before: proof.Marks | None = None

    async def run(self, chosen: Sequence[str]) -> Report:
        report, context = self.report, self._context
        with Timed(report, "curate"):
            curated = rows_of_job(self._config, self._skill.name, context, self._registry)
        prompts = Prompts(self._skill, self._base.files)
        material = self._gather(curated, prompts, chosen[0])
        present = self._present()
        if present is not None and self._is_same(present, curated):
            report.state, report.reason = REJECTED, f"version {present.version} was made of the same rows. Let new traffic pass."
            return report
        with Timed(report, "check the base"):
            await same_weights(self._config, self._base, load_torch(self._base), [one.prompt for one in material.held_out[:_BASE_PROMPTS]])
        best: _Trial | None = None
        for method in chosen:
            context.check()
            if method != chosen[0]:
                material = gather(curated.rows, prompts, self._skill.max_tokens, self._positions(method))
            trial = await self._try(method, material, present, curated)
            if trial is None:  # another process goes on
                return report
            report.tried.append(trial.entry)
            best = trial if best is None or trial.rank > best.rank else best
            if best.rank >= (True, _ENOUGH):
                break
            if method != chosen[-1] and context.left_s() < self._reserve:
                context.log(f"{method} is not enough, and the time budget has ended")
                break
        assert best is not None, "a ladder has a rung"
        report.reason, report.method, report.metrics = best.reason, best.recipe.method, best.metrics
        if not best.reason:
            self._publish(best, curated)
            return report
        report.state = REJECTED
        return report

    # Rows.

    def _gather(self, curated: Curated, prompts: Prompts, method: str) -> Material:
        material = gather(curated.rows, prompts, self._skill.max_tokens, self._positions(method))
        report = self.report
        report.read, report.sources, report.curation = curated.read, dict(curated.sources), curated.report()
        report.dropped = dict(curated.dropped + material.dropped)
        report.train_rows, report.held_out_rows = len(material.train) + len(material.watched), len(material.held_out)
        told = sum(one.odds is not None for one in (*material.train, *material.watched))
        if told:
            report.details["teacher's odds"] = {"rows": told}
            self._context.log(f"{told} of {report.train_rows} rows to train on have the teacher's odds")
        if not prompts.chats:
            self._context.log(f"{self._base.shown} has no chat template: prompts are the same words, one message a line")
        minimum = self._config.skills[self._skill.name].min_rows
        count = report.train_rows + report.held_out_rows
        if count < minimum or not material.train:
            fell = "; ".join(f"{number} rows: {why}" for why, number in report.dropped.items()) or "none were dropped"
            message = f"{self._skill.name!r} has {count} rows to learn from; {minimum} are needed ({curated.read} were read, {fell})."
            raise TooLittleData(f"{message} Let more traffic pass, or lower min_rows.", rows=count, minimum=minimum, skill=self._skill.name)
        proof.minimum(len(material.held_out), MIN_ROWS, self._skill.name)
        return material

    def _positions(self, method: str) -> int:
        return int(self._spec.get("positions") or POSITIONS) if method in ("prefix", "prompt") else 0

    def _held_out(self, material: Material) -> list[Example]:
        """The newest: traffic is what it was of late."""
        return material.held_out[-MOST_HELD_OUT:]

    # A student.

    async def _try(self, method: str, material: Material, present: Reference | None, curated: Curated) -> _Trial | None:
        rank = self._config.generation.adapter_rank
        spec = {"seed": self._context.seed, **self._spec}
        recipe = recipe_for(method, self._base.manifest.hidden_size, len(material.train), rank, spec)
        if self._spec.get("search"):
            with Timed(self.report, f"search {method}"):
                recipe = self._searched(recipe, material, rank)
        good = sum(one.good for one in material.opinions)
        preference = preference_of(recipe, len(material.pairs), (good, len(material.opinions) - good))
        recipe = replace(recipe, preference=preference)
        entry: dict[str, Any] = {"method": method, "parameters": recipe.to_json(), "reaches": False}
        with Timed(self.report, f"train {method}"):
            student = self._learn(recipe, material, entry)
        if student is None:
            return None
        scratch = self._context.folder / method / "export"
        texts = [one.row.text + "\n" + one.row.answer for one in material.train[:512]]
        with Timed(self.report, f"export {method}"):
            exported = export.draft(student, self._base, self._skill.name, recipe, scratch, texts)
        with Timed(self.report, f"prove {method}"):
            return await self._prove(student, exported, recipe, material, (present, entry))

    def _searched(self, recipe: Recipe, material: Material, rank_limit: int) -> Recipe:
        from trainer.generation.trials import searched

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._context.log("several processes: no search")
            return recipe
        return searched(self._base, recipe, material, self._context, self._spec, rank_limit, self._reserve)

    def _learn(self, recipe: Recipe, material: Material, entry: dict[str, Any]) -> Any:
        """The trained torch student; None in processes that only help."""
        from trainer.generation.student import make_student, put_back
        from trainer.generation.tune import best_of, fine_tune

        context = self._context
        student = make_student(load_torch(self._base), recipe)
        tuned = fine_tune(student, material.train, material.watched, recipe, context, self._reserve)
        entry |= {"steps": tuned.steps, "planned_steps": tuned.planned, "watched_loss": tuned.loss, "stopped": tuned.stopped}
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if not self._main:
                return None
            # Split over processes, the model was never whole in any of them: the best weights are, in a file.
            student = make_student(load_torch(self._base), recipe)
            put_back(student, best_of(recipe, context))
            if recipe.preference:
                context.log("several processes: the preference stage is left out")
        elif recipe.preference:
            from trainer.generation.prefer import prefer

            assert self._base.files.tokenizer is not None, "read by Prompts"
            told = prefer(student, material, recipe, context, self._base.files.tokenizer, self._reserve)
            entry |= {"preference": recipe.preference, "preference_steps": told.steps, "preference_stopped": told.stopped}
        return student

    async def _prove(
        self, student: Any, exported: export.Exported, recipe: Recipe, material: Material, about: tuple[Reference | None, dict[str, Any]]
    ) -> _Trial:
        present, entry = about
        skill, held = self._skill, self._held_out(material)
        rows = [one.row for one in held]
        self._context.check()
        served = await ServedStudent.of(self._config, exported)
        try:
            prompts = [one.prompt for one in held[:_PARITY_PROMPTS]]
            compared = await proof.parity(served, student, prompts, min(_PARITY_TOKENS, skill.max_tokens), self._base.exact)
            said = await served.answers(skill, rows, lambda done, total: self._context.progress("answer held-out rows", done, total))
        finally:
            await served.close()
        marks = proof.mark(skill, said, [row.answer for row in rows])
        before = await self._measure_present(present, held)
        judged = proof.judge(skill, rows, said, marks.acceptable)
        metrics = marks.metrics() | compared.to_json() | {"held_out_rows": float(len(held))}
        metrics |= {"local_share": judged.share, "local_accuracy": judged.delivered, "ece": judged.model.curve.ece}
        apart = f"the exported student is not the trained one: {compared.reason}" if compared.reason else ""
        reason = apart or proof.verdict(skill, judged, marks, before)
        entry |= {**marks.metrics(), "reaches": not reason, "seconds": self.report.seconds.get(f"train {recipe.method}", 0.0)}
        self._tell(marks, before, held, metrics)
        return _Trial(recipe, exported, metrics, judged.model.to_json(), entry, reason)

    def _tell(self, marks: proof.Marks, before: proof.Marks | None, held: Sequence[Example], metrics: dict[str, float]) -> None:
        """Paired tests into the report: against what serves now, and where a person corrected the teacher, against the teacher."""
        report = self.report
        if before is not None:
            report.present_accuracy = before.metrics()["acceptable"]
            report.details["against the present student"] = {**proof.mcnemar(marks.acceptable, before.acceptable), **before.metrics()}
            metrics["present_acceptable"] = report.present_accuracy
        corrected = [index for index, one in enumerate(held) if one.row.corrected and one.row.rejected]
        if corrected:
            mine = marks.acceptable[corrected]
            # The answer that a person corrected was wrong by that person's word.
            report.details["on corrected answers"] = {"rows": len(corrected), "student": float(mine.mean()), "delivered before": 0.0}
        report.details["errors"] = dict(marks.errors)

    # What serves now.

    def _present(self) -> Reference | None:
        """The newest version of the skill, where it can be read."""
        for number in version_numbers(self._students):
            with suppress(UnderstudyError):
                return read_reference(self._students / str(number))
        return None

    def _is_same(self, present: Reference, curated: Curated) -> bool:
        same = {"fingerprint": curated.fingerprint, "asked": self._asked(), "base_sha256": self._base_hash()}
        return all(present.lineage.get(key) == value for key, value in same.items())

    def _asked(self) -> str:
        """What the job was asked to do, in one line."""
        return ",".join(f"{key}={self._spec[key]}" for key in sorted(self._spec) if key not in ("provider", "hub_repo"))

    def _base_hash(self) -> str:
        from server.runtime.lora.layout import base_sha256

        return base_sha256(self._base.manifest)

    async def _measure_present(self, present: Reference | None, held: Sequence[Example]) -> proof.Marks | None:
        """What the present student, or the bare base where there is none, answers to the same rows. Measured once a job."""
        if self._before is not None:
            return self._before
        target = present.target if present is not None else None
        try:
            model = target.model if target is not None else self._base.manifest.name
            adapter = f"{target.adapter}@{target.adapter_version}" if target is not None and target.adapter else ""
            served = await ServedStudent.open(self._config, self._root, model, adapter, target.version if target is not None else None)
        except UnderstudyError as error:
            self._context.log(f"the present student cannot be measured: {error.message}")
            return None
        try:
            rows = [one.row for one in held]
            said = await served.answers(self._skill, rows, lambda *_: self._context.check())
        finally:
            await served.close()
        self.report.present_version = present.version if present is not None else f"base {self._base.shown}"
        self._before = proof.mark(self._skill, said, [row.answer for row in rows])
        return self._before

    # Publication.

    def _publish(self, trial: _Trial, curated: Curated) -> None:
        report, context, skill = self.report, self._context, self._skill
        if context.is_cancelled():
            raise Cancelled(f"job {context.job} was cancelled", job=context.job)
        with Timed(report, "publish"):
            target = export.publish(trial.exported, self._base, skill.name, self._root)
            if target.adapter and not self._unchanged(trial.exported.target, target, trial.exported.root):
                raise ModelRejected(f"the adapter {target.shown} is not the one that was proven. Look at the disk, and train again.")
            used = [(row.interaction_id, row.held_out) for row in curated.rows]
            dataset = self._registry.add_dataset(context.job, curated.table_version, curated.fingerprint, used)
            reference = self._reference(trial, target, curated)
            self._registry.add_adapter(
                Adapter(skill.name, reference.version, reference.kind, self._base.shown, target.sha256, trial.metrics, context.job)
            )
        report.state, report.version, report.model = SUCCEEDED, reference.version, "" if target.adapter else target.shown
        report.parameters = trial.recipe.to_json()
        self._card(target, card.Lineage(dataset, curated.fingerprint, curated.table_version, self._base.manifest.license))
        for done in (trial.exported.root, context.folder / trial.recipe.method / "checkpoints"):
            shutil.rmtree(done, ignore_errors=True)

    def _card(self, target: Target, made_of: card.Lineage) -> None:
        """The model card, and the Hub where the job says so."""
        from server.runtime.lora.repository import ADAPTERS

        folder = self._root / target.model / target.version
        if target.adapter:
            folder = self._root / ADAPTERS / target.model / target.adapter / target.adapter_version
        folders = {"student": self._students / self.report.version, "adapter" if target.adapter else "model": folder}
        card.tell(self._context, self.report, self._skill.task, made_of, card.Published(folders, str(self._spec.get("hub_repo") or "")))

    def _reference(self, trial: _Trial, target: Target, curated: Curated) -> Reference:
        lineage = {
            "job": self._context.job,
            "fingerprint": curated.fingerprint,
            "table_version": curated.table_version,
            "sources": dict(curated.sources),
            "train_rows": self.report.train_rows,
            "method": trial.recipe.method,
            "recipe": trial.recipe.to_json(),
            "asked": self._asked(),
            "base": self._base.shown,
            "base_sha256": self._base_hash(),
        }
        self._students.mkdir(parents=True, exist_ok=True)
        while True:
            number = str(max(version_numbers(self._students), default=0) + 1)
            reference = Reference(
                kind="decoder-adapter" if target.adapter else "model",
                name=self._skill.name,
                version=number,
                task=self._skill.task,
                target=target,
                metrics=trial.metrics,
                quality=trial.quality,
                lineage=lineage,
                license=self._base.manifest.license,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            with suppress(AlreadyExists):  # another run took the number
                return write_reference(self._students / number, reference)

    def _unchanged(self, drafted: Target, published: Target, root: Path) -> bool:
        """The published adapter's weights are those that were proven."""
        from server.runtime.adapter_folder import WEIGHTS
        from server.runtime.lora.folder import read_adapter_manifest
        from server.runtime.lora.repository import ADAPTERS

        def digest(place: Path, target: Target) -> str:
            folder = place / ADAPTERS / target.model / target.adapter / target.adapter_version
            return read_adapter_manifest(folder).files[WEIGHTS].sha256

        return digest(root, drafted) == digest(self._root, published)
