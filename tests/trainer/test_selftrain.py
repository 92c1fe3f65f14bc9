"""Students that label requests for a second student: how labels spread, and what the second one learns from."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the trainer's extra is not installed")

from server.config import Config, load_config
from server.core import FloatArray, IntArray
from server.errors import Cancelled
from server.registry.registry import Registry
from tests.trainer.trainer_process import make_site
from tests.trainer_lake import fill
from trainer.classify.recipe import FEW_A_LABEL, FULL, recipe_for, second_recipe
from trainer.classify.selftrain import spread
from trainer.context import JobContext
from trainer.report import Report
from trainer.train import train

# More labels than a few: of held-out rows there must be fifty, and still fewer than 25 rows a label to learn from.
LABELS = [f"label-{letter}" for letter in "abcdefghijkl"]


CLASSES, SIZE = 5, 16


def clouds(count: int, seed: int) -> tuple[FloatArray, IntArray]:
    """Unit vectors around a centre for each class."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, SIZE))
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, CLASSES, count)
    points = centres[classes] + rng.normal(0, 0.35, (count, SIZE))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), classes.astype(np.int64)


def test_neighbours_correct_a_first_student() -> None:
    given, classes = clouds(10, 2)
    asked, truth = clouds(1500, 1)
    rng = np.random.default_rng(3)
    said = np.where(rng.random(len(truth)) < 0.3, rng.integers(0, CLASSES, len(truth)), truth)
    logits = (2 * np.eye(CLASSES)[said]).astype(np.float32)
    found, sure = spread(given, classes, asked, logits)
    right = found == truth
    assert right.mean() > 0.95 > 0.8 > (said == truth).mean()
    assert sure.dtype == np.float32 and ((sure > 0) & (sure <= 1)).all()
    assert sure[said == truth].mean() > sure[said != truth].mean(), "what neighbours contradict is less sure"


def test_given_labels_reach_a_student_that_says_nothing() -> None:
    given, classes = clouds(50, 2)
    asked, truth = clouds(200, 1)
    found, _ = spread(given, classes, asked, np.zeros((200, CLASSES), np.float32))
    assert (found == truth).mean() > 0.9


@pytest.mark.parametrize("count", [0, 1, 3, 1023, 1024, 1025])
def test_any_number_of_requests_is_labelled(count: int) -> None:
    given, classes = clouds(4, 3)
    asked, _ = clouds(count, 4)
    found, sure = spread(given, classes, asked, np.zeros((count, CLASSES), np.float32))
    assert found.shape == sure.shape == (count,) and np.isfinite(sure).all()


def test_the_second_recipe_takes_fewer_passes_over_more_rows() -> None:
    first = recipe_for(FULL, 10 * 77, 77, seed=5)
    assert first.again and not recipe_for(FULL, FEW_A_LABEL * 77, 77).again
    epochs = [second_recipe(first, rows, 77).epochs for rows in (1_000, 5_000, 10_000, 20_000)]
    assert epochs == sorted(epochs, reverse=True) and epochs[0] == recipe_for(FULL, 10_000, 77).epochs and epochs[-1] >= 2
    second = second_recipe(first, 1_000, 77)
    assert (second.seed, second.again, second.method) == (5, False, FULL), "it labels nothing for a third"


@pytest.fixture
def site(tmp_path: Path, small_models: Path) -> Path:
    skill = 'method = "full"\nmin_rows = 30\ndeliver_bar = 0.5'
    return make_site(tmp_path, small_models, labels=LABELS, skill=skill)


def requests(count: int, seed: int) -> list[tuple[str, str]]:
    """Different texts, each with the label that its words tell."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        label = rng.randrange(len(LABELS))
        own = ["card", "money", "password", "transfer", "late", "lost", "where", "who", "found", "how", "reset", "i"][label]
        words = [own, own, own, own, *(rng.choice("abcdefghijklm") for _ in range(3))]
        rng.shuffle(words)
        found[" ".join(words)] = LABELS[label]
    return list(found.items())


def config(site: Path) -> Config:
    return load_config(site / "understudy.toml", environ={})


def test_a_job_learns_from_requests_without_labels_and_ends_alike_after_a_kill(site: Path) -> None:
    known = requests(750, 1)
    labelled, rest = known[:300], known[300:]
    fill(site / "lake", labelled)
    fill(site / "lake", [(text, "") for text, _ in rest], local=True, student_label="card")
    registry = Registry(config(site).registry)
    points: dict[str, dict[tuple[str, int], float]] = {"whole": {}, "killed": {}}

    def dies() -> bool:
        return ("full-again/loss", 5) in points["killed"] and not died

    def job(run: str, is_cancelled: Callable[[], bool] = lambda: False) -> Report:
        def keep(name: str, step: int, value: float) -> None:
            points[run][name, step] = value

        context = JobContext(names[run], site / "jobs" / run, metric=keep, is_cancelled=is_cancelled)
        return train(config(site), "intent", context, {})

    try:
        names = {run: registry.start_job("intent", "train") for run in points}
        died = False
        with pytest.raises(Cancelled):
            job("killed", dies)
        died = True
        job("killed", dies)
        report = job("whole")
    finally:
        registry.close()
    count = report.parameters["unlabelled_rows"]
    assert 150 < count < 0.9 * len(rest), "a fifth is held out"
    assert report.curation["unlabelled_rows"] == count and report.parameters["second"]["again"] is False
    assert report.metrics["accuracy"] > 3 / len(LABELS), "far above chance, though the base is random"
    curves = {run: {key: value for key, value in found.items() if key[0].endswith("/loss")} for run, found in points.items()}
    assert {name for name, _ in curves["whole"]} == {"full/loss", "full-again/loss"}
    assert curves["whole"] == curves["killed"]


def test_without_requests_there_is_one_student(site: Path) -> None:
    fill(site / "lake", requests(300, 1))
    registry = Registry(config(site).registry)
    try:
        report = train(config(site), "intent", JobContext(registry.start_job("intent", "train"), site / "jobs" / "a"), {})
    finally:
        registry.close()
    assert "second" not in report.parameters and report.curation["unlabelled_rows"] == 0
