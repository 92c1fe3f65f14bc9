"""Bar `accuracy`: Banking77's test texts, answered by students that the trainer's own functions made, exported and loaded to serve.

The recipe is the trainer's (trainer/classify/recipe.py). It was settled on a tenth of the training texts, and the one for few rows on 500
training texts outside of an eighth draw of ten a label, before any test text was looked at; the test is read once a run, by the file that
would serve. Three parts:

- all training texts with their gold labels, none held back for validation, one seed;
- ten texts a label, drawn three times: the training texts of each label, in the file's order, are permuted by NumPy's generator with the
  draw's number as its seed, and the first ten are taken;
- all training texts with labels of the simulated teacher of bench/teacher_simulation.py, which is wrong on purpose on 9 % of them with
  names that are near: what the linear head, the cheapest student, gets right of the gold labels of the test.
"""

from __future__ import annotations

import asyncio
import csv
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import BUILD, ROOT, SHARED, STARTER, Row, part, row_of
from bench.teacher_simulation import SimulatedTeacher
from server.config import Config, load_config
from trainer.classify.data import Data
from trainer.classify.recipe import FULL, recipe_for
from trainer.classify.students import Trained, Work, train_encoder, train_linear
from trainer.context import JobContext
from trainer.curate.rows import Row as TextRow
from trainer.serving import ServedBase

ACCURACY = "all training data >= 94.0 % (aim 94.5), 10 a class >= 87 % (aim 90), served = trained on >= 99.5 %, ONNX int8"
DRAWS = (0, 1, 2)
A_CLASS = 10
SKILL = "banking"
_TEACHER = 0.91

Texts = list[tuple[str, str]]


def read_texts(name: str) -> Texts:
    """(text, label) of "train" or "test"."""
    path = SHARED / "data" / "banking77" / f"{name}.csv"
    if not path.is_file():
        raise SystemExit(f"{path} is absent; set UNDERSTUDY_SHARED to the folder that holds data/banking77.")
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def few(texts: Texts, draw: int) -> Texts:
    """Ten texts of each label; see the module."""
    rng = np.random.default_rng(draw)
    found: Texts = []
    for label in sorted({label for _, label in texts}):
        mine = [row for row in texts if row[1] == label]
        found += [mine[at] for at in rng.permutation(len(mine))[:A_CLASS]]
    return found


def work_of(training: Texts, test: Texts, folder: Path, *, unlabelled: Sequence[str] = ()) -> Work:
    """A run of the trainer on exactly these rows: the test is what is held out."""
    models = Path(os.environ.get("UNDERSTUDY_BENCH_MODELS", ROOT / "models"))
    if not (models / STARTER).is_dir():
        raise SystemExit(f"{models / STARTER} is absent; run: understudy models pull starter")
    labels = sorted({label for _, label in test})
    rows = [TextRow(f"train-{n}", text, label, False) for n, (text, label) in enumerate(training)]
    rows += [TextRow(f"test-{n}", text, label, True) for n, (text, label) in enumerate(test)]
    skill = {"labels": labels, "base": STARTER, "teacher": "bench/gold"}
    flags: dict[str, Any] = {"models.path": str(models), "providers.bench.base_url": "http://localhost:1"}
    config: Config = load_config(None, environ={}, flags=flags)
    config = config.model_copy(update={"skills": {SKILL: type_of_skill().model_validate(skill)}})
    return Work(config, SKILL, 0.8, Data(rows, labels), JobContext(f"bench-{folder.name}", folder, log=print), 0, unlabelled)


def type_of_skill() -> Any:
    """The class of a skill's settings."""
    from server.settings import SkillConfig

    return SkillConfig


def train_full(training: Texts, test: Texts, folder: Path, *, seed: int = 0) -> Trained:
    """The last step of the ladder on these rows, without a validation part."""
    work = work_of(training, test, folder)
    recipe = recipe_for(FULL, len(training), len(work.data.labels), seed=seed).with_({"validated": 0.0})
    return asyncio.run(train_encoder(work, recipe))


async def _linear(work: Work) -> Trained:
    base = await ServedBase.open(work.config, STARTER)
    try:
        vectors, kept, _ = await base.embed(work.data.texts, lambda done, total: None)
        assert len(kept) == len(work.data.rows)
        return train_linear(work, base, vectors)
    finally:
        await base.close()


def linear_accuracy(training: Texts, test: Texts, folder: Path) -> float:
    """Test accuracy of the first step of the ladder."""
    return asyncio.run(_linear(work_of(training, test, folder))).judged.accuracy


def by_teacher(texts: Texts) -> Texts:
    """The texts with the simulated teacher's labels."""
    teacher = SimulatedTeacher(dict(texts), _TEACHER)
    return [(text, teacher.answer(text)) for text, _ in texts]


def rows_of(full: Trained, fews: Sequence[Trained], noisy: float, linear: float, seconds: dict[str, float]) -> Row:
    """The bar's row."""
    right = [student.judged.accuracy for student in fews]
    mean = float(np.mean(right))
    parity = min(student.more["parity_agreement"] for student in (full, *fews))
    recipe = dict(full.parameters)
    return row_of(
        "accuracy",
        ACCURACY,
        [
            part(
                "all",
                ">= 0.94",
                round(full.judged.accuracy, 4),
                full.judged.accuracy >= 0.94,
                rows=full.judged.rows,
                recipe=recipe,
                **seconds,
            ),
            part("ten a class", ">= 0.87", round(mean, 4), mean >= 0.87, draws=[round(value, 4) for value in right], rule="see the module"),
            part("served = trained", ">= 0.995", round(parity, 4), parity >= 0.995, form=str(full.parameters["form"])),
            part("linear head alone", "no bar", round(linear, 4), True),
            part("linear head, teacher of 91 % (SIMULATION)", "> 0.91", round(noisy, 4), noisy > _TEACHER),
        ],
    )


def accuracy() -> Row:
    """Trains and measures all of it: about a quarter of an hour on two quiet cores."""
    training, test = read_texts("train"), read_texts("test")
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="learn-accuracy-") as name:
        place = Path(name)
        linear = linear_accuracy(training, test, place / "linear")
        noisy = linear_accuracy(by_teacher(training), test, place / "noisy")
        start = time.perf_counter()
        full = train_full(training, test, place / "full")
        seconds = {"seconds": round(time.perf_counter() - start, 1)}
        fews = [train_full(few(training, draw), test, place / f"few-{draw}") for draw in DRAWS]
    return rows_of(full, fews, noisy, linear, seconds)
