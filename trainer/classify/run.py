"""One training run of a classifying skill, from the lake to a published adapter: curate, embed, fit, write, evaluate the file, publish."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from server.config import Config
from server.core import FloatArray, IntArray
from server.errors import AlreadyExists, FailedPrecondition, TooLittleData
from server.quality.calibration import MIN_ROWS
from server.registry.registry import Adapter, Registry
from server.runtime.adapters import AdapterStore
from server.runtime.heads import GRAPH, HeadSpec, LinearHead, write_linear_head
from trainer import evaluate, linear
from trainer.context import JobContext
from trainer.curate import pipeline as curate
from trainer.curate.rows import Curated, Row
from trainer.evaluate import Evaluation
from trainer.report import Report, Timed
from trainer.serving import ServedBase

KIND = "linear-head"
# With one row alone a label can be trained on or checked, not both.
MIN_ROWS_A_LABEL = 2


@dataclass(slots=True, frozen=True)
class _Data:
    """Embedded rows: vectors float32[n, H], labels and texts' fate by index."""

    rows: list[Row]
    vectors: FloatArray
    held_out: np.ndarray[Any, np.dtype[np.bool_]]
    labels: list[str]

    def classes(self) -> IntArray:
        index = {label: number for number, label in enumerate(self.labels)}
        return np.array([index[row.label] for row in self.rows], dtype=np.int64)


def train(config: Config, skill: str, context: JobContext, spec: Mapping[str, Any]) -> Report:
    """Trains a classifying skill's student. Errors as in `trainer.train`."""
    settings = config.skills[skill]
    if not settings.base:
        message = f"The skill {skill!r} has no base to learn on. Set skills.{skill}.base to an embedding model of the repository."
        raise FailedPrecondition(message, skill=skill)
    if find_spec("scipy") is None:
        raise FailedPrecondition(
            "Training needs scipy, which is not installed. Run: pip install 'understudy-server[learn]'", package="scipy"
        )
    registry = Registry(config.registry)
    report = Report(skill, context.job, method=KIND)
    try:
        asyncio.run(_Run(config, skill, registry, report, context).run())
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
        self._adapters = Path(config.models.path) / "adapters"
        self._present_lineage: Mapping[str, Any] = {}

    async def run(self) -> None:
        report = self._report
        known = self._settings.read_labels()
        with Timed(report, "curate"):
            curated = curate.read(Path(self._config.lake.path), self._skill, known)
        self._note(curated)
        rows = self._enough(curated)
        base = await ServedBase.open(self._config, self._settings.base)
        try:
            report.base = f"{base.base.name}@{base.base.version}"
            with Timed(report, "embed"):
                data = await self._embed(base, rows, known)
            self._context.check()
            with Timed(report, "fit"):
                fitted, temperature = self._fit(data)
            self._context.check()
            spec = self._spec(base, data, temperature)
            with Timed(report, "evaluate"):
                judged = self._evaluate(spec, fitted, data, base)
            used = [(row.interaction_id, bool(out)) for row, out in zip(data.rows, data.held_out, strict=True)]
            self._registry.add_dataset(report.job, curated.table_version, curated.fingerprint, used)
            lineage = {"job": report.job, "fingerprint": curated.fingerprint, "table_version": curated.table_version}
            lineage |= {"sources": dict(curated.sources), "train_rows": report.train_rows, "skill_labels": known}
            metrics, calibration = judged.metrics(), judged.calibration.to_json()
            final = spec.model_copy(update={"metrics": metrics, "calibration": calibration, "lineage": lineage})
            self._decide(final, fitted, judged)
        finally:
            await base.close()

    def _note(self, curated: Curated) -> None:
        report = self._report
        report.read = curated.read
        report.dropped = dict(curated.dropped)
        report.sources = dict(curated.sources)

    def _enough(self, curated: Curated) -> list[Row]:
        """The rows of labels that have some in both parts. Raises TooLittleData."""
        train = Counter(row.label for row in curated.rows if not row.held_out)
        rows = [row for row in curated.rows if train[row.label] >= MIN_ROWS_A_LABEL]
        rare = len(curated.rows) - len(rows)
        if rare:
            self._report.dropped["label has too few rows"] = rare
        minimum = self._settings.min_rows
        held = sum(row.held_out for row in rows)
        dropped = "; ".join(f"{count} rows: {why}" for why, count in self._report.dropped.items()) or "none were dropped"
        for count, least, what in ((len(rows), minimum, "rows"), (held, MIN_ROWS, "held-out rows"), (len(set(train)), 2, "labels")):
            if count < least:
                message = f"{self._skill!r} has {count} {what} to learn from; {least} are needed ({curated.read} were read, {dropped})."
                raise TooLittleData(f"{message} Let more traffic pass, or lower min_rows.", count=count, minimum=least, skill=self._skill)
        return rows

    async def _embed(self, base: ServedBase, rows: list[Row], known: list[str]) -> _Data:
        vectors, kept, errors = await base.embed(
            [row.text for row in rows], lambda done, total: self._context.progress("embed", done, total)
        )
        for error in errors:
            reason = f"the base refuses the text ({error.reason})"
            self._report.dropped[reason] = self._report.dropped.get(reason, 0) + 1
        left = [rows[index] for index in kept]
        present = {row.label for row in left}
        labels = [label for label in known if label in present]
        held_out = np.array([row.held_out for row in left], dtype=bool)
        report = self._report
        report.train_rows, report.held_out_rows = int((~held_out).sum()), int(held_out.sum())
        report.labels, report.labels_without_rows = len(labels), [label for label in known if label not in present]
        return _Data(left, vectors, held_out, labels)

    def _fit(self, data: _Data) -> tuple[linear.Fitted, float]:
        classes, train = data.classes(), ~data.held_out
        fitted = linear.fit(
            data.vectors[train], classes[train], len(data.labels), progress=lambda done, total: self._context.progress("fit", done, total)
        )
        logits = fitted.logits(data.vectors[data.held_out])
        temperature = linear.temperature(logits, classes[data.held_out])
        self._report.parameters = {"strength": fitted.strength, "temperature": temperature}
        return fitted, temperature

    def _spec(self, base: ServedBase, data: _Data, temperature: float) -> HeadSpec:
        return HeadSpec(
            name=self._skill,
            version="1",
            base=base.base,
            features=base.features,
            labels=data.labels,
            temperature=temperature,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _evaluate(self, spec: HeadSpec, fitted: linear.Fitted, data: _Data, base: ServedBase) -> Evaluation:
        """Writes the file, and judges what was written."""
        vectors = data.vectors[data.held_out]
        labels = [row.label for row in data.rows if row.held_out]
        with tempfile.TemporaryDirectory() as folder:
            draft = Path(folder) / "draft"
            write_linear_head(draft, spec, fitted.weight, fitted.bias)
            judged = evaluate.evaluate(LinearHead.load(draft, base_sha256=base.base.sha256), vectors, labels, self._settings.deliver_bar)
        self._report.metrics = judged.metrics()
        present = self._present(base)
        if present is not None:
            _, right = evaluate.agreement(present, vectors, labels)
            self._present_lineage = present.manifest.lineage
            self._report.present_version = present.manifest.version
            self._report.present_accuracy = float(right.mean())
        return judged

    def _present(self, base: ServedBase) -> LinearHead | None:
        store = AdapterStore(self._adapters, base_sha256=lambda name: base.base.sha256 if name == base.name else None)
        store.refresh()
        return store.current(self._skill)

    def _decide(self, spec: HeadSpec, fitted: linear.Fitted, judged: Evaluation) -> None:
        report = self._report
        same = ("fingerprint", "skill_labels")
        if self._present_lineage and all(self._present_lineage.get(key) == spec.lineage[key] for key in same):
            report.reason = f"version {report.present_version} was made of the same rows. Let new traffic pass."
        else:
            report.reason = evaluate.verdict(judged, report.present_accuracy, self._settings.deliver_bar)
        if report.reason:
            report.state = "rejected"
            return
        manifest = None
        while manifest is None:
            number = 1 + max((int(path.name) for path in self._folder().glob("[0-9]*") if path.name.isdigit()), default=0)
            versioned = spec.model_copy(update={"version": str(number)})
            with suppress(AlreadyExists):  # another run took the number
                manifest = write_linear_head(self._folder() / str(number), versioned, fitted.weight, fitted.bias)
        digest = manifest.files[GRAPH].sha256
        base = f"{spec.base.name}@{spec.base.version}"
        self._registry.add_adapter(Adapter(self._skill, manifest.version, KIND, base, digest, judged.metrics(), report.job))
        report.state, report.version = "succeeded", manifest.version

    def _folder(self) -> Path:
        folder = self._adapters / self._skill
        folder.mkdir(parents=True, exist_ok=True)
        return folder
