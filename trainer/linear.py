"""A linear head on frozen embeddings: multinomial logistic regression, its strength of regularisation chosen by cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.core import FloatArray, IntArray

# Inverse strength of the penalty, as scikit-learn counts it; vectors of length 1 want little of it.
STRENGTHS = (3.0, 10.0, 30.0)
_ITERATIONS = 80
_TOLERANCE = 3e-4


@dataclass(slots=True, frozen=True)
class Fitted:
    """`weight` float32[labels, H], `bias` float32[labels]; accuracies by strength are the cross-validation's."""

    weight: FloatArray
    bias: FloatArray
    strength: float
    accuracies: dict[float, float]

    def logits(self, vectors: FloatArray) -> FloatArray:
        """float32[n, labels] for vectors float32[n, H]."""
        return np.asarray(vectors @ self.weight.T + self.bias, dtype=np.float32)


def class_weights(classes: IntArray, labels: int) -> FloatArray:
    """float32[n], mean 1: rare classes count for more, by the root of what would make all equal (all of it would overrate noise)."""
    counts = np.maximum(np.bincount(classes, minlength=labels), 1)
    weights = 1.0 / np.sqrt(counts[classes])
    return np.asarray(weights / weights.mean(), dtype=np.float32)


def fit(
    vectors: FloatArray,
    classes: IntArray,
    labels: int,
    *,
    strengths: Sequence[float] = STRENGTHS,
    folds: int = 3,
    row_weights: FloatArray | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fitted:
    """Fits on vectors float32[n, H] of classes int64[n], each with its weight float32[n]; `progress(done, total)` counts fits.

    Ties go to the stronger penalty.
    """
    given = np.ones(len(classes), np.float32) if row_weights is None else row_weights
    part = np.random.default_rng(0).permutation(len(classes)) % folds
    right = dict.fromkeys(strengths, 0)
    total, done = folds * len(strengths) + 1, 0
    for fold in range(folds):
        train, test = part != fold, part == fold
        start: npt.NDArray[np.float64] | None = None
        for strength in strengths:  # from strong to weak: each fit starts where the one before ended
            start = _minimise((vectors[train], classes[train], given[train]), labels, strength, start)
            weight, bias = _split(start, labels)
            right[strength] += int(((vectors[test] @ weight.T + bias).argmax(1) == classes[test]).sum())
            done += 1
            progress(done, total)
    best = max(strengths, key=lambda strength: (right[strength], -strength))
    weight, bias = fit_at(vectors, classes, labels, best, row_weights=given)
    progress(total, total)
    return Fitted(weight, bias, best, {strength: count / len(classes) for strength, count in right.items()})


def fit_at(
    vectors: FloatArray, classes: IntArray, labels: int, strength: float, *, row_weights: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Weight float32[labels, H] and bias float32[labels] at one strength."""
    given = np.ones(len(classes), np.float32) if row_weights is None else row_weights
    return _split(_minimise((vectors, classes, given), labels, strength, None), labels)


def temperature(logits: FloatArray, classes: IntArray) -> float:
    """What to divide logits float32[n, labels] by, for the least log loss on rows that were not trained on (Guo et al. 2017)."""
    rows = np.arange(len(classes))

    def loss(log_temperature: float) -> float:
        scaled = logits.astype(np.float64) / np.exp(log_temperature)
        top = scaled.max(axis=1)
        return float(np.mean(np.log(np.exp(scaled - top[:, None]).sum(axis=1)) + top - scaled[rows, classes]))

    low, high = np.log(0.05), np.log(20.0)
    golden = (np.sqrt(5.0) - 1) / 2
    for _ in range(40):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def _minimise(
    data: tuple[FloatArray, IntArray, FloatArray], labels: int, strength: float, start: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64]:
    """L-BFGS on mean log loss + |weight|^2 / (2 * strength * n); the products are float32, the steps float64."""
    from scipy.optimize import minimize

    vectors, classes, given = data
    count, size = vectors.shape
    weights = class_weights(classes, labels) * given / (given.mean() * count)
    rows = np.arange(count)
    penalty = 1.0 / (strength * count)

    def loss(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        weight, bias = _split(flat, labels)
        logits = vectors @ weight.T + bias
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[rows, classes].copy()
        np.exp(logits, out=logits)
        sums = logits.sum(axis=1)
        value = float(np.dot(weights, np.log(sums) - chosen)) + 0.5 * penalty * float(np.dot(weight.ravel(), weight.ravel()))
        logits /= sums[:, None]
        logits[rows, classes] -= 1.0
        logits *= weights[:, None]
        gradient = np.empty_like(flat)
        gradient[: labels * size] = (logits.T @ vectors + penalty * weight).ravel()
        gradient[labels * size :] = logits.sum(axis=0)
        return value, gradient

    first = np.zeros(labels * (size + 1)) if start is None else start
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS, "gtol": _TOLERANCE / np.sqrt(labels)})
    return np.asarray(found.x, dtype=np.float64)


def _split(flat: npt.NDArray[np.float64], labels: int) -> tuple[FloatArray, FloatArray]:
    values = flat.astype(np.float32)
    return values[:-labels].reshape(labels, -1), values[-labels:]
