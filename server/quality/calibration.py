"""From a classifier's probabilities to a calibrated probability that its best label is acceptable.

Platt's method (Platt 1999) on two features, the log-odds of the best label and its log-ratio to the second, under a ceiling:
agreement = ceiling * sigmoid(weights . features + bias). What is acceptable is judged by a teacher that errs too, so even the surest
answers agree with it only so often; without the ceiling the sure ones are promised more than they keep and the middle less. Fitted by
Fisher scoring with a small ridge, so that a perfect student does not send the weights to infinity. The parameters travel in the
adapter's manifest.

Quality is the probability that an answer is right, which is not the same: an answer that is right disagrees with the teacher where that
errs. Where a share `teacher` of the teacher's answers is right, and its errors do not depend on how sure the student is,
P(agree) = teacher * P(right) + P(both wrong alike), and so quality = min(1, agreement / teacher). `teacher` is estimated, and never below
the ceiling (trainer.evaluate.teacher_accuracy): too high an estimate makes quality too low, which costs money and no answer. It is 1
where nobody estimated it, and quality is the agreement then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from server.core import FloatArray
from server.errors import ModelRejected

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]

# Below it a share is noise: a bar on it would promise what nobody measured.
MIN_ROWS = 50
_RIDGE = 1e-2
_CEILINGS = np.linspace(0.6, 1.0, 21)
_EPSILON = 1e-7


@dataclass(slots=True, frozen=True)
class Calibration:
    """min(1, ceiling * sigmoid(weights . features + bias) / teacher). `ece`, the error of the agreement before it is divided, was measured

    by cross-fitting on `rows` rows that the student never saw.
    """

    weights: tuple[float, float]
    bias: float
    ceiling: float
    ece: float
    rows: int
    teacher: float = 1.0

    def quality(self, probabilities: FloatArray) -> FloatArray:
        """P(right), float32[n] in [0, 1], for probabilities float32[n, labels], labels >= 2."""
        return np.minimum(self.agreement(probabilities) / self.teacher, 1.0).astype(np.float32)

    def agreement(self, probabilities: FloatArray) -> Float64Array:
        """P(agrees with the teacher), float64[n]."""
        return _model(features(probabilities), np.array([*self.weights, self.bias]), self.ceiling)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        plain = {"weights": list(self.weights), "bias": self.bias, "ceiling": self.ceiling, "ece": self.ece, "rows": self.rows}
        return {**plain, "teacher": self.teacher}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Calibration:
        """Raises ModelRejected where a value is missing or is no finite number."""
        try:
            first, second = (float(w) for w in data["weights"])
            teacher = float(data.get("teacher", 1.0))
            found = cls((first, second), float(data["bias"]), float(data["ceiling"]), float(data["ece"]), int(data["rows"]), teacher)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            message = "the calibration needs weights (two numbers), bias, ceiling, ece and rows. Train the adapter again."
            raise ModelRejected(message, field="calibration") from error
        if not np.isfinite([first, second, found.bias, found.ece]).all() or not (0 < found.ceiling <= 1 and 0 < found.teacher <= 1):
            raise ModelRejected("the calibration holds a number out of its range. Train the adapter again.", field="calibration")
        return found


def features(probabilities: FloatArray) -> Float64Array:
    """float64[n, 2]: log-odds of the best label, log-ratio of the best to the second."""
    two = np.clip(np.partition(probabilities.astype(np.float64), -2, axis=1)[:, -2:], _EPSILON, 1 - _EPSILON)
    second, best = two[:, 0], two[:, 1]
    return np.stack([np.log(best) - np.log1p(-best), np.log(best) - np.log(second)], axis=1)


def fit(probabilities: FloatArray, acceptable: BoolArray, *, folds: int = 5, seed: int = 0) -> tuple[Calibration, FloatArray]:
    """Fits on all rows, and measures by cross-fitting: each row is scored by a model that did not see it.

    Args:
        probabilities: float32[n, labels], of rows that the student was not trained on.
        acceptable: bool[n], whether the student's best label was acceptable.
        folds: parts of the cross-fitting.
        seed: of the assignment of rows to parts.

    Returns:
        The calibration (its `teacher` is 1), and the cross-fitted agreements float32[n].
    """
    x = features(probabilities)
    y = acceptable.astype(np.float64)
    part = np.random.default_rng(seed).permutation(len(y)) % folds
    crossed = np.zeros(len(y))
    for fold in range(folds):
        held = part == fold
        crossed[held] = _model(x[held], *_fit(x[~held], y[~held]))
    weights, ceiling = _fit(x, y)
    agreements = crossed.astype(np.float32)
    first, second, bias = (float(weight) for weight in weights)
    return Calibration((first, second), bias, ceiling, expected_error(agreements, acceptable), len(y)), agreements


def expected_error(qualities: FloatArray, acceptable: BoolArray, *, bins: int = 10) -> float:
    """Expected calibration error over bins of equal counts (Nguyen and O'Connor 2015): |mean quality - share acceptable|, weighted.

    A bin has MIN_ROWS rows at least: in smaller ones chance alone looks like an error.
    """
    if not len(qualities):
        return 0.0
    order = np.argsort(qualities, kind="stable")
    total = 0.0
    for rows in np.array_split(order, max(min(bins, len(order) // MIN_ROWS), 1)):
        total += len(rows) * abs(float(qualities[rows].mean()) - float(acceptable[rows].mean()))
    return total / len(qualities)


def _fit(x: Float64Array, y: Float64Array) -> tuple[Float64Array, float]:
    """Weights (bias last) and the ceiling of the greatest penalised likelihood."""
    found = [(*_fit_below(x, y, float(ceiling)), float(ceiling)) for ceiling in _CEILINGS]
    weights, _, ceiling = min(found, key=lambda entry: entry[1])
    return weights, ceiling


def _fit_below(x: Float64Array, y: Float64Array, ceiling: float) -> tuple[Float64Array, float]:
    """Ridge logistic regression under a ceiling; the bias is not shrunk. Returns the weights and the loss."""
    rows = np.hstack([x, np.ones((len(x), 1))])
    ridge = np.diag([_RIDGE, _RIDGE, 1e-9])

    def loss(w: Float64Array) -> float:
        p = np.clip(ceiling * _sigmoid(rows @ w), _EPSILON, 1 - _EPSILON)
        return float(-np.sum(y * np.log(p) + (1 - y) * np.log1p(-p)) + 0.5 * w @ ridge @ w)

    weights = np.zeros(3)
    best = loss(weights)
    for _ in range(30):
        s = _sigmoid(rows @ weights)
        p = np.clip(ceiling * s, _EPSILON, 1 - _EPSILON)
        slope = ceiling * s * (1 - s)
        gradient = -rows.T @ (slope * (y - p) / (p * (1 - p))) + ridge @ weights
        information = (rows * (slope**2 / (p * (1 - p)))[:, None]).T @ rows + ridge
        step = np.linalg.solve(information + 1e-9 * np.eye(3), gradient)
        size = 1.0
        while size > 1e-3 and (trial := loss(weights - size * step)) > best:
            size /= 2
        if size <= 1e-3 or best - trial < 1e-7:
            break
        weights, best = weights - size * step, trial
    return weights, best


def _model(x: Float64Array, weights: Float64Array, ceiling: float) -> Float64Array:
    return np.asarray(ceiling * _sigmoid(x @ weights[:2] + weights[2]))


def _sigmoid(z: Float64Array) -> Float64Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)))
