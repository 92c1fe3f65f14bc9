"""Wrong labels: found where they were put, not sought where rows are few, and never a person's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from server.settings import CurationConfig
from trainer.curate import noise
from trainer.curate.pipeline import Task, refine
from trainer.curate.rows import Curated

LABELS = ("card", "password", "transfer")
WORDS = {
    "card": ["card", "lost", "stolen", "plastic", "chip"],
    "password": ["password", "reset", "login", "forgot", "code"],
    "transfer": ["money", "transfer", "late", "sent", "bank"],
}
PLAIN: dict[str, Any] = {"near_duplicates": 1.0, "pii": "off"}


def rows(count: int, wrong: float, seed: int = 1) -> tuple[list[dict[str, Any]], set[str]]:
    """Raw rows, and the interactions whose labels are wrong."""
    rng = random.Random(seed)
    made, bad = [], set()
    for number in range(count):
        gold = rng.choice(LABELS)
        words = [*rng.choices(WORDS[gold], k=4), *rng.choices(["the", "my", "is", "please", "now", "when", "where"], k=3), str(number)]
        rng.shuffle(words)
        label = gold
        if rng.random() < wrong:
            label = rng.choice([one for one in LABELS if one != gold])
            bad.add(f"i{number}")
        made.append({
            "interaction_id": f"i{number}",
            "time": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number),
            "input": " ".join(words),
            "teacher_label": label,
            "training_allowed": True,
            "source_model": "big",
        })  # fmt: skip
    return made, bad


def errors(found: Curated) -> Any:
    return next(step for step in found.steps if step.name == "label errors")


def test_wrong_labels_are_found_by_words_alone() -> None:
    made, bad = rows(400, 0.15)
    found = refine(made, Task(LABELS), CurationConfig(**PLAIN))
    held = {row.interaction_id for row in found.rows if row.held_out}
    left = {row.interaction_id for row in found.rows}
    gone = {one["interaction_id"] for one in made} - left
    sought = bad - held
    assert len(gone & sought) > 0.8 * len(sought) and len(gone & sought) > 0.8 * len(gone)
    assert errors(found).notes["features"] == "hashed words" and errors(found).dropped[noise.MISLABELLED] == len(gone)
    assert held and bad & held, "what the student is measured against is left as it is"


def test_it_can_weigh_or_leave_them() -> None:
    made, bad = rows(400, 0.15)
    weighed = refine(made, Task(LABELS), CurationConfig(label_errors="weigh", **PLAIN))
    doubted = {row.interaction_id for row in weighed.rows if row.weight < 1}
    assert len(weighed.rows) == 400 and doubted and len(doubted & bad) > 0.8 * len(doubted)
    off = refine(made, Task(LABELS), CurationConfig(label_errors="off", **PLAIN))
    assert len(off.rows) == 400 and "off" in errors(off).notes["skipped"]


def test_the_cap_holds_and_the_surest_go_first() -> None:
    made, bad = rows(400, 0.3)
    found = refine(made, Task(LABELS), CurationConfig(label_errors_cap=0.05, **PLAIN))
    train = sum(step.before for step in found.steps if step.name == "label errors") - sum(row.held_out for row in found.rows)
    gone = {one["interaction_id"] for one in made} - {row.interaction_id for row in found.rows}
    assert len(gone) == int(0.05 * train) and len(gone & bad) >= 0.9 * len(gone)


def test_a_persons_label_is_believed() -> None:
    made, bad = rows(400, 0.15)
    for one in made:
        if one["interaction_id"] in bad:
            one["correction"] = one["teacher_label"]
    found = refine(made, Task(LABELS), CurationConfig(**PLAIN))
    assert bad <= {row.interaction_id for row in found.rows}


def test_few_rows_are_left_alone() -> None:
    made, _ = rows(50, 0.2)
    found = refine(made, Task(LABELS), CurationConfig(**PLAIN))
    assert len(found.rows) == 50 and "too few" in errors(found).notes["skipped"]
    assert refine([], Task(LABELS), CurationConfig()).rows == []


def test_the_skills_base_is_asked_where_it_has_one_and_words_where_it_fails() -> None:
    made, _ = rows(300, 0.1)
    asked: list[int] = []

    def embed(texts: Sequence[str], progress: Callable[[int, int], None], /) -> tuple[str, Any, list[int]]:
        asked.append(len(texts))
        progress(len(texts), len(texts))
        return "base@1", noise.hashed(texts)[: len(texts) - 5], list(range(len(texts) - 5))

    found = refine(made, Task(LABELS, embed), CurationConfig(**PLAIN))
    assert asked == [300] and errors(found).notes["features"] == "base@1"
    assert found.base == "base@1" and len(found.vectors) == 295, "for whoever needs them next"

    def refuse(texts: Sequence[str], progress: Callable[[int, int], None], /) -> tuple[str, Any, list[int]]:
        from server.errors import ModelNotFound

        raise ModelNotFound("no such base")

    assert errors(refine(made, Task(LABELS, refuse), CurationConfig(**PLAIN))).notes["features"] == "hashed words"


def test_predictions_never_saw_their_row() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 16)).astype(np.float32)
    classes = rng.integers(0, 2, 400)
    probabilities = noise.held_back(vectors, classes, 2, lambda: None)
    accuracy = (probabilities.argmax(1) == classes).mean()
    assert accuracy == pytest.approx(0.5, abs=0.08), "labels drawn at random cannot be told"
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
