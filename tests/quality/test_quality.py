"""A quality is a probability: rows that score q are acceptable in a share of q, and a bar means an accepted accuracy."""

from __future__ import annotations

import numpy as np
import pytest

from server.core import FloatArray
from server.errors import ModelRejected
from server.quality import calibration
from server.quality.calibration import BoolArray, Calibration


def student(rows: int, seed: int, *, teacher: float = 1.0, labels: int = 12) -> tuple[FloatArray, BoolArray]:
    """Overconfident probabilities of a student, and whether they agree with a teacher who is right with probability `teacher`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, labels)) * 1.2
    gold = np.array([rng.choice(labels, p=row) for row in np.exp(logits) / np.exp(logits).sum(1, keepdims=True)])
    sharp = np.exp(2.5 * (logits - logits.max(1, keepdims=True)))
    right = (sharp.argmax(1) == gold) & (rng.random(rows) < teacher)
    return (sharp / sharp.sum(1, keepdims=True)).astype(np.float32), right


@pytest.mark.parametrize("teacher", [1.0, 0.9])
def test_quality_is_calibrated_on_rows_that_were_not_seen(teacher: float) -> None:
    found, _ = calibration.fit(*student(3000, 1, teacher=teacher))
    probabilities, right = student(20_000, 2, teacher=teacher)
    qualities = found.quality(probabilities)
    assert calibration.expected_error(qualities, right) < 0.03
    assert calibration.expected_error(probabilities.max(1), right) > 0.1, "the raw probability is far off here"
    assert found.ece < 0.05
    for bar in (0.5, 0.6, 0.7, 0.8):
        if (qualities >= bar).sum() > 200:
            assert right[qualities >= bar].mean() >= bar


def test_the_ceiling_finds_how_often_the_teacher_can_be_met() -> None:
    rng = np.random.default_rng(0)
    sure = np.full((4000, 3), 5e-4, dtype=np.float32)
    sure[:, 0] = 0.999
    unsure = rng.dirichlet([1, 1, 1], 2000).astype(np.float32)
    probabilities = np.concatenate([sure, unsure])
    right = np.concatenate([rng.random(4000) < 0.9, rng.random(2000) < 0.4])
    found, _ = calibration.fit(probabilities, right)
    assert found.quality(sure[:1])[0] == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_student_that_is_always_right_or_wrong_gives_finite_numbers(share: float) -> None:
    probabilities, _ = student(100, 3)
    found, qualities = calibration.fit(probabilities, np.full(100, bool(share)))
    assert np.isfinite(qualities).all() and np.isfinite([*found.weights, found.bias, found.ece]).all()
    assert abs(float(found.quality(probabilities).mean()) - share) < 0.1


def test_parameters_survive_the_manifest_and_broken_ones_are_refused() -> None:
    found, _ = calibration.fit(*student(500, 4))
    probabilities, _ = student(50, 5)
    again = Calibration.from_json(found.to_json())
    assert np.array_equal(again.quality(probabilities), found.quality(probabilities))
    good = found.to_json()
    for change in ({"weights": [1]}, {"bias": "x"}, {"bias": float("nan")}, {"ceiling": 1.5}, {"ceiling": 0.0}, {"ece": None}):
        with pytest.raises(ModelRejected):
            Calibration.from_json({**good, **change})
    with pytest.raises(ModelRejected):
        Calibration.from_json({})
