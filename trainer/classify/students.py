"""The students of the ladder: each is trained, written as it would be served, and judged on rows that it has not seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from server.config import Config
from server.core import FloatArray, IntArray
from server.quality.calibration import BoolArray
from server.runtime.heads import Base, Features, HeadSpec, LinearHead, write_linear_head
from server.runtime.repository import ModelFiles
from trainer import evaluate, linear
from trainer.classify.data import Data
from trainer.classify.recipe import Recipe, second_recipe
from trainer.classify.selftrain import LEAST_RATIO, labelled_by
from trainer.context import JobContext
from trainer.evaluate import Evaluation
from trainer.search import Range
from trainer.serving import ServedBase

LINEAR = "linear-head"
# What a search may change; the recipe is its first trial.
SPACE = {
    "lr": Range(5e-5, 1e-3, log=True),
    "epochs": Range(4, 20, whole=True),
    "dropout": Range(0.0, 0.2),
    "smoothing": Range(0.0, 0.2),
    "contrastive": Range(0.0, 1.0),
}
# A head that is fitted to vectors which were trained for the same labels needs little freedom.
_REFIT_STRENGTH = 1.0


@dataclass(slots=True)
class Trained:
    """A student that was trained and judged. `draft`: its own encoder, not yet published; None where it reads the base's vectors.

    `problem`: why it must not be published, whatever its figures; "" where there is nothing.
    """

    method: str
    spec: HeadSpec
    weight: FloatArray
    bias: FloatArray
    judged: Evaluation
    parameters: Mapping[str, Any]
    seconds: float
    draft: ModelFiles | None = None
    problem: str = ""
    more: dict[str, float] = field(default_factory=dict)

    def told(self, bar: float) -> dict[str, Any]:
        """For Report.tried."""
        figures = self.judged.metrics() | self.more
        plain = {"method": self.method, "seconds": round(self.seconds, 2), "reaches": self.judged.reaches(bar) and not self.problem}
        return {**plain, "problem": self.problem, "parameters": dict(self.parameters), **figures}


@dataclass(slots=True, frozen=True)
class Work:
    """What every student of a run is made from and judged by."""

    config: Config
    skill: str
    bar: float
    data: Data
    context: JobContext
    seed: int
    unlabelled: Sequence[str] = ()  # inputs that nobody labelled, none of them held out

    def judge(
        self, head: tuple[FloatArray, FloatArray], vectors: FloatArray, base: Base, features: Features
    ) -> tuple[HeadSpec, Evaluation]:
        """Writes the head's file and judges what was written. `vectors` float32[n, H] of all rows."""
        data = self.data
        held = data.held_out
        logits = np.asarray(vectors[held] @ head[0].T + head[1], dtype=np.float32)
        spec = HeadSpec(
            name=self.skill,
            version="1",
            base=base,
            features=features,
            labels=data.labels,
            temperature=linear.temperature(logits, data.classes[held]),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        draft = self.context.folder / "heads" / str(time.monotonic_ns())
        write_linear_head(draft, spec, *head)
        judged = evaluate.evaluate(LinearHead.load(draft, base_sha256=base.sha256), vectors[held], data.held_labels, self.bar)
        return spec, judged


def train_linear(work: Work, base: ServedBase, vectors: FloatArray) -> Trained:
    """Logistic regression on the base's own vectors float32[n, H]: seconds."""
    start = time.monotonic()
    data = work.data
    train = ~data.held_out
    fitted = linear.fit(
        vectors[train],
        data.classes[train],
        len(data.labels),
        row_weights=data.weights[train],
        progress=lambda done, total: work.context.progress("fit", done, total),
    )
    spec, judged = work.judge((fitted.weight, fitted.bias), vectors, base.base, base.features)
    parameters = {"strength": fitted.strength, "temperature": spec.temperature}
    return Trained(LINEAR, spec, fitted.weight, fitted.bias, judged, parameters, time.monotonic() - start)


@dataclass(slots=True, frozen=True)
class Weights:
    """The torch part of a training. `training`: the one that the student went through last; `more`: parameters of a second one."""

    source: Any
    student: Any
    tokens: Any
    training: Any
    more: Mapping[str, Any]


def train_encoder_weights(work: Work, recipe: Recipe, name: str) -> Weights:
    """The torch part alone, for a search and for `train_encoder`: one student, and where labels are few and requests many a second."""
    from trainer.classify import encoder
    from trainer.classify.batches import TokenTable
    from trainer.classify.loop import Rows, Training
    from trainer.classify.source import find_source

    data = work.data
    source = find_source(work.config, work.config.skills[work.skill].base)
    student = encoder.open_student(source, len(data.labels), recipe)
    names = [label.replace("_", " ").replace("-", " ") for label in data.labels] if recipe.named else []
    validated = data.validated(recipe.validated)
    trained = np.append(np.flatnonzero(~data.held_out & ~validated), np.arange(len(data.rows), len(data.rows) + len(names)))
    asked = list(work.unlabelled) if recipe.again and len(work.unlabelled) >= LEAST_RATIO * len(trained) else []
    tokens = TokenTable(source.tokenizer, [*data.texts, *names, *asked], min(recipe.max_tokens, source.manifest.max_tokens))
    classes = np.append(data.classes, np.arange(len(names)))
    weights = np.append(data.weights, np.ones(len(names), np.float32)).astype(np.float32)
    encoder.start_head(student, student.embed(tokens, trained), classes[trained])
    rows = Rows(tokens, classes, weights, trained, np.flatnonzero(validated))
    training = Training(student, rows, recipe, work.context, name)
    training.run()
    if not asked or work.context.left_s() <= 0:
        return Weights(source, student, tokens, training, {})
    rows = labelled_by(student, rows, len(classes) + np.arange(len(asked)))
    second = second_recipe(recipe, len(rows.trained), len(data.labels))
    student = encoder.open_student(source, len(data.labels), second)
    encoder.start_head(student, student.embed(tokens, rows.trained), rows.classes[rows.trained])
    training = Training(student, rows, second, work.context, f"{name}-again")
    training.run()
    return Weights(source, student, tokens, training, {"unlabelled_rows": len(asked), "second": second.to_json()})


def validation_accuracy(work: Work, recipe: Recipe, name: str) -> float:
    """A trial of a search: the best accuracy on the validation rows. Leaves no checkpoint of a trial that ended."""
    training = train_encoder_weights(work, recipe.with_({"again": False}), name).training
    (work.context.folder / f"{name}.checkpoint").unlink(missing_ok=True)
    return float(training.validation)


async def train_encoder(work: Work, recipe: Recipe) -> Trained:
    """LoRA or full: trains the encoder, writes it as it will be served, and puts a head on the served vectors."""
    from trainer.classify import encoder, export

    start = time.monotonic()
    data, context = work.data, work.context
    made = train_encoder_weights(work, recipe, recipe.method)
    source, student, tokens, training = made.source, made.student, made.tokens, made.training
    folder = context.folder / f"{recipe.method}-encoder"
    encoder.save_encoder(student, source, folder)
    held = np.flatnonzero(data.held_out)
    trained_vectors = student.embed(tokens, held)
    training_texts = [row.text for row in data.rows if not row.held_out]
    forms = ["int8", "float32"] if source.manifest.dtype == "int8" else ["float32"]
    for form in forms:
        root = context.folder / "drafts" / f"{recipe.method}-{form}"
        draft = export.write_draft(folder, source, root, work.skill + "-encoder", training_texts, form, context)
        served = await _served(work, root, draft)
        head, refit = _better_head(student.linear(), served.vectors, data, data.validated(recipe.validated))
        parity = export.compare(trained_vectors, served.vectors[held], *head)
        if parity.passed:
            break
        context.log(f"{form} gives other labels than the trained model on {parity.different} of {parity.rows} held-out rows")
    spec, judged = work.judge(head, served.vectors, served.base, served.features)
    problem = (
        "" if parity.passed else f"the exported encoder gives other labels than the trained one on {1 - parity.agreement:.2%} of the rows."
    )
    parameters = recipe.to_json() | {"best_epoch": training.best_epoch, "refit": refit, "form": form, "temperature": spec.temperature}
    parameters |= made.more
    more = {"parity_agreement": parity.agreement, "parity_cosine_mean": parity.cosine_mean, "parity_cosine_min": parity.cosine_min}
    more |= {"validation_accuracy": training.validation} if training.validation >= 0 else {}
    return Trained(recipe.method, spec, *head, judged, parameters, time.monotonic() - start, draft, problem, more)


@dataclass(slots=True, frozen=True)
class _Served:
    vectors: FloatArray
    base: Base
    features: Features


async def _served(work: Work, root: Path, draft: ModelFiles) -> _Served:
    """Vectors float32[n, H] of all rows by the draft, loaded by the server's runtime. Its base is as it will be published."""
    served = await ServedBase.open(work.config, draft.manifest.name, draft.manifest.version, root=root)
    try:
        progress: Callable[[int, int], None] = lambda done, total: work.context.progress("embed", done, total)  # noqa: E731
        vectors, kept, errors = await served.embed(work.data.texts, progress)
        if errors:  # the same tokenizer and limits as the base's, which took them all
            raise errors[0]
        assert len(kept) == len(work.data.rows)
        return _Served(vectors, served.base, served.features)
    finally:
        await served.close()


def _better_head(
    trained: tuple[FloatArray, FloatArray], vectors: FloatArray, data: Data, validated: BoolArray
) -> tuple[tuple[FloatArray, FloatArray], bool]:
    """The head that was trained with the encoder, or one fitted to the served vectors where the validation rows prefer it."""
    if not validated.any():
        return trained, False
    train, classes = ~data.held_out & ~validated, data.classes
    refit = linear.fit_at(vectors[train], classes[train], len(data.labels), _REFIT_STRENGTH, row_weights=data.weights[train])
    if _hits(refit, vectors[validated], classes[validated]) > _hits(trained, vectors[validated], classes[validated]):
        return refit, True
    return trained, False


def _hits(head: tuple[FloatArray, FloatArray], vectors: FloatArray, classes: IntArray) -> int:
    return int(((vectors @ head[0].T + head[1]).argmax(axis=1) == classes).sum())
