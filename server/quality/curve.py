"""From a score to a probability: calibration by isotonic regression or Platt's sigmoid, and bars that mean an accepted-error rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lgamma, log, log1p
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from server.core import FloatArray
from server.errors import ModelRejected, TooLittleData
from server.quality.calibration import MIN_ROWS, BoolArray, Float64Array, expected_error

_FOLDS = 5
_LEAST, _MOST = 0.005, 0.995  # no finite number of judged answers makes a probability of 0 or 1
_KNOTS = 64


@dataclass(slots=True, frozen=True)
class Curve:
    """Probability that an answer of this score is acceptable.

    `xs`, `ys`: "isotonic": knots, linear between them, constant outside; "platt": xs = (slope, shift), ys = (), sigmoid(slope * score +
    shift). `ece` was measured by cross-fitting on `rows` rows.
    """

    kind: Literal["isotonic", "platt"]
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    ece: float
    rows: int

    def quality(self, scores: npt.ArrayLike) -> FloatArray:
        """float32 in [0.005, 0.995], of the scores' shape."""
        values = np.asarray(scores, np.float64)
        if self.kind == "platt":
            found = 0.5 * (1 + np.tanh(0.5 * (self.xs[0] * values + self.xs[1])))
        else:
            found = np.interp(values, self.xs, self.ys)
        return np.clip(found, _LEAST, _MOST).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {"kind": self.kind, "xs": list(self.xs), "ys": list(self.ys), "ece": self.ece, "rows": self.rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Curve:
        """Raises ModelRejected where something is missing, no finite number, or does not rise."""
        try:
            xs, ys = tuple(float(x) for x in data["xs"]), tuple(float(y) for y in data["ys"])
            kind, ece, rows = data["kind"], float(data["ece"]), int(data["rows"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ModelRejected("a calibration needs kind, xs, ys, ece and rows. Fit it again.", field="curve") from error
        whole = kind == "platt" and len(xs) == 2 and not ys
        rising = kind == "isotonic" and len(xs) == len(ys) > 0 and all(np.diff(xs) >= 0) and all(np.diff(ys) >= 0)
        if not (whole or rising) or not np.isfinite([*xs, *ys, ece]).all():
            raise ModelRejected("the calibration's curve does not rise from score to probability. Fit it again.", field="curve")
        return cls(kind, xs, ys, ece, rows)


def fit_calibration(
    scores: npt.ArrayLike, acceptable: BoolArray, groups: Sequence[int] | None = None, seed: int = 0
) -> tuple[Curve, FloatArray]:
    """The kind of curve of least cross-validated log loss, fitted on all rows.

    Args:
        scores: float[n], more is better, of answers that the scorer was not fitted on.
        acceptable: bool[n].
        groups: int[n]; rows of one group (answers to one question) stay in one part. None: each row is its own.
        seed: of the parts.

    Returns:
        The curve, and the cross-fitted qualities float32[n] of its kind.

    Raises:
        TooLittleData: fewer than MIN_ROWS rows.
    """
    x, y = np.asarray(scores, np.float64), np.asarray(acceptable, np.float64)
    if len(x) < MIN_ROWS:
        message = f"{len(x)} judged answers are too few to calibrate on; {MIN_ROWS} are needed."
        raise TooLittleData(message, rows=len(x), needed=MIN_ROWS)
    part = parts_of(np.arange(len(x)) if groups is None else np.asarray(groups), _FOLDS, seed)
    crossed = {"isotonic": np.zeros(len(x)), "platt": np.zeros(len(x))}
    for fold in range(_FOLDS):
        held = part == fold
        if held.all() or not held.any():
            continue
        crossed["isotonic"][held] = _as_curve("isotonic", x[~held], y[~held]).quality(x[held])
        crossed["platt"][held] = _as_curve("platt", x[~held], y[~held]).quality(x[held])
    losses = {kind: _log_loss(p, y) for kind, p in crossed.items()}
    kind: Literal["isotonic", "platt"] = "isotonic" if losses["isotonic"] < losses["platt"] else "platt"
    qualities = crossed[kind].astype(np.float32)
    fitted = _as_curve(kind, x, y)
    return Curve(kind, fitted.xs, fitted.ys, expected_error(qualities, y > 0.5), len(x)), qualities


def parts_of(groups: npt.NDArray[Any], folds: int, seed: int) -> npt.NDArray[np.int64]:
    """int64[n]: each row's part, the same for rows of one group."""
    known, which = np.unique(groups, return_inverse=True)
    return np.asarray((np.random.default_rng(seed).permutation(len(known)) % folds)[which.ravel()], np.int64)


@dataclass(slots=True, frozen=True)
class Bar:
    """A threshold on quality and what it was seen to mean.

    Of the judged answers, `coverage` reach it and `error` of those are not acceptable; with the stated confidence the true share of
    errors among accepted answers is at most `error_bound`. A threshold above 1 accepts nothing: no bar was safe.
    """

    threshold: float
    coverage: float
    error: float
    error_bound: float


def bar_for(qualities: FloatArray, acceptable: BoolArray, accepted_error_rate: float, confidence: float = 0.95) -> Bar:
    """The lowest bar whose accepted answers are wrong at most so often, with the stated confidence.

    Thresholds are tried from the strictest to the laxest, on a grid that the labels do not touch, and the first whose bound fails ends
    it (fixed-sequence testing: Angelopoulos et al. 2021, "Learn then Test"), so that trying many does not spoil the confidence. The
    bound is Clopper and Pearson's.

    Args:
        qualities: float32[n] of answers that neither the scorer nor its calibration was fitted on.
        acceptable: bool[n].
        accepted_error_rate: in (0, 1).
        confidence: in (0, 1).
    """
    assert 0 < accepted_error_rate < 1 and 0 < confidence < 1, "rates are in (0, 1)"
    order = np.argsort(-qualities, kind="stable")
    ranked, wrong = qualities[order], ~np.asarray(acceptable, bool)[order]
    errors = np.cumsum(wrong)
    # So many without one error are needed before any bound can pass.
    least = int(np.ceil(np.log(1 - confidence) / np.log(1 - accepted_error_rate)))
    best = Bar(float(np.nextafter(np.float32(1), np.float32(2))), 0.0, 0.0, 1.0)
    if len(ranked) < least:
        return best
    # The first try has room for chance errors; where it fails, nothing is safe.
    first = min(max(4 * least, len(ranked) // 10), len(ranked))
    for count in np.unique(np.linspace(first, len(ranked), 50).astype(int)).tolist():
        while count < len(ranked) and ranked[count] == ranked[count - 1]:  # a threshold takes all answers of its quality
            count += 1
        bound = upper_bound(int(errors[count - 1]), count, confidence)
        if bound > accepted_error_rate:
            break
        best = Bar(float(ranked[count - 1]), count / len(ranked), float(errors[count - 1]) / count, bound)
    return best


def upper_bound(errors: int, count: int, confidence: float) -> float:
    """Clopper and Pearson's one-sided upper bound of a share of which `errors` of `count` were seen."""
    if errors >= count:
        return 1.0
    k = np.arange(errors + 1)
    choose = lgamma(count + 1) - np.array([lgamma(i + 1) + lgamma(count - i + 1) for i in k.tolist()])
    low, high = errors / count, 1.0
    for _ in range(40):
        rate = (low + high) / 2
        if np.exp(choose + k * log(rate) + (count - k) * log1p(-rate)).sum() > 1 - confidence:
            low = rate
        else:
            high = rate
    return high


def _as_curve(kind: Literal["isotonic", "platt"], x: Float64Array, y: Float64Array) -> Curve:
    xs, ys = _isotonic(x, y) if kind == "isotonic" else (_platt(x, y), np.zeros(0))
    return Curve(kind, tuple(xs.tolist()), tuple(ys.tolist()), 0.0, len(x))


def _isotonic(x: Float64Array, y: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Pool adjacent violators over bins of scores; each block's mean shrunk by one row towards the whole's. Knots are block means."""
    order = np.argsort(x, kind="stable")
    bins = np.array_split(order, max(min(_KNOTS, len(order) // 20), 1))
    blocks: list[tuple[float, float, int]] = []  # score sum, label sum, rows
    for rows in bins:
        blocks.append((float(x[rows].sum()), float(y[rows].sum()), len(rows)))
        while len(blocks) > 1 and blocks[-2][1] / blocks[-2][2] >= blocks[-1][1] / blocks[-1][2]:
            last, before = blocks.pop(), blocks.pop()
            blocks.append((last[0] + before[0], last[1] + before[1], last[2] + before[2]))
    mean = float(y.mean())
    xs = np.array([s / n for s, _, n in blocks])
    ys = np.maximum.accumulate(np.array([(p + mean) / (n + 1) for _, p, n in blocks]))
    return xs, ys


def _platt(x: Float64Array, y: Float64Array) -> Float64Array:
    """Slope and shift of greatest likelihood, labels softened as Platt (1999) has it, by Newton's method; the slope is not negative."""
    good, bad = float(y.sum()), float(len(y) - y.sum())
    soft = np.where(y > 0.5, (good + 1) / (good + 2), 1 / (bad + 2))
    centre, spread = float(x.mean()), float(x.std()) or 1.0
    rows = np.stack([(x - centre) / spread, np.ones(len(x))], axis=1)
    w = np.array([0.0, np.log((good + 1) / (bad + 1))])
    for _ in range(50):
        p = 0.5 * (1 + np.tanh(0.5 * (rows @ w)))
        step = np.linalg.solve((rows * (p * (1 - p))[:, None]).T @ rows + 1e-6 * np.eye(2), rows.T @ (p - soft))
        w = w - np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    slope = max(float(w[0]), 0.0) / spread
    return np.array([slope, float(w[1]) - slope * centre])


def _log_loss(p: Float64Array, y: Float64Array) -> float:
    held = np.clip(p, _LEAST, _MOST)
    return float(-np.mean(y * np.log(held) + (1 - y) * np.log1p(-held)))
