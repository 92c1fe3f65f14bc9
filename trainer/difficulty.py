"""Fits `server.routing.difficulty`: what an input says of how likely the student is to fail on it, and of what the teacher would add.

Both parts of the model are ridge regressions on both targets at once: the words by conjugate gradients on the sparse rows, the neighbours
by Nystroem features of a Gaussian kernel around training rows. Strengths, the blend of the parts and its calibration come from
predictions on rows that the parts were not fitted on, in folds that keep near-identical texts together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from native.text import FORMS, extract
from server.core import FloatArray, IntArray
from server.errors import InvalidArgument, TooLittleData
from server.routing.difficulty import (
    Blend,
    DifficultyModel,
    DifficultySpec,
    Parameters,
    blend,
    kernels,
    located,
    standardised,
)
from server.runtime.heads import Base, Features

Float64Array = npt.NDArray[np.float64]

MIN_ROWS = 50
# A form feature costs the penalty 1 / FORM_WEIGHT^2 as much as a word: it has 26 coefficients against a hundred thousand.
FORM_WEIGHT = 0.1
# Above this share of bytes beyond ASCII words are no longer what spaces part, and runs of characters are read too.
BEYOND_ASCII = 0.05
_NEAR = 0.95  # cosine of embeddings from which two texts count as the same
_ITERATIONS, _TOLERANCE = 60, 1e-3
_NUGGET = 1e-3
_EQUAL = 500
_FAIL, _GAIN = 0, 1

K = TypeVar("K")


@dataclass(slots=True, frozen=True)
class Labelled:
    """A text, how good the student's answer was and the teacher's, in [0, 1]; None: the teacher is the standard, and counts as right."""

    text: str
    local_ok: float
    strong_ok: float | None = None
    weight: float = 1.0


@dataclass(slots=True, frozen=True)
class About:
    """What the manifest says of the model; `base` and `features` of what made the vectors."""

    name: str
    version: str
    base: Base | None = None
    features: Features | None = None
    created: str = ""


@dataclass(slots=True, frozen=True)
class Settings:
    """`words` and `neighbours`: the ridge penalties that are tried, the latter with each of `form_scales`."""

    bits: int = 17
    landmarks: int = 1024
    folds: int = 3
    words: tuple[float, ...] = (30.0, 10.0, 3.0)
    neighbours: tuple[float, ...] = (30.0, 10.0, 3.0)
    form_scales: tuple[float, ...] = (0.1, 0.2)
    gamma: float = 1.0
    seed: int = 0


@dataclass(slots=True, frozen=True)
class _Data:
    """Rows as arrays: matrix csr[n, columns + F], standard float32[n, F], vectors float32[n, H] or None, targets float32[n, 2]."""

    matrix: Any
    standard: FloatArray
    vectors: FloatArray | None
    targets: FloatArray
    weights: FloatArray

    def part(self, rows: npt.NDArray[Any]) -> _Data:
        vectors = None if self.vectors is None else self.vectors[rows]
        return _Data(self.matrix[rows], self.standard[rows], vectors, self.targets[rows], self.weights[rows])


def fit(
    rows: Sequence[Labelled],
    vectors: FloatArray | None,
    about: About,
    *,
    groups: IntArray | None = None,
    settings: Settings | None = None,
) -> DifficultyModel:
    """A model from labelled rows. `vectors` float32[n, H], all finite; None: a model of words alone.

    `groups` int64[n]: rows of one group stay in one fold; None: near-identical texts. The metrics in the manifest are of rows that were
    not fitted on: `apgr`, `ece`, `brier`, beside the penalties. Raises TooLittleData below MIN_ROWS rows, InvalidArgument for labels out
    of [0, 1].
    """
    settings = settings or Settings()
    _check(rows, vectors, about)
    texts = [row.text for row in rows]
    if groups is None:
        groups = near_identical(texts, vectors)
    spec, parameters, data = _prepare(rows, texts, vectors, about, settings)
    fold = folds_of(groups, settings.folds, settings.seed)
    words, penalty = _held_out(data, fold, lambda part, held: _words_held_out(part, held, settings))
    coefficients, bias = _fit_words(data, (penalty,))[penalty]
    columns, parts = spec.columns, [words]
    forms = np.ascontiguousarray(FORM_WEIGHT * coefficients[columns:], dtype=np.float32)
    parameters = replace(parameters, words=coefficients[:columns], forms=forms, bias=bias)
    changed: dict[str, Any] = {"alone": _blend(parts, data)}
    metrics = {"words_penalty": penalty}
    if data.vectors is not None:
        near, (scale, penalty) = _held_out(data, fold, lambda part, held: _near_held_out(part, held, settings))
        landmarks, around, middle = _fit_near(data, scale, (penalty,), settings)
        parameters = replace(parameters, landmarks=landmarks, around=around[penalty], middle=middle)
        parts.append(near)
        changed |= {"both": _blend(parts, data), "form_scale": scale}
        metrics["neighbours_penalty"] = penalty
    blended, value = blend(changed.get("both", changed["alone"]), words, parts[1] if len(parts) > 1 else None)
    metrics |= _metrics(blended[:, _GAIN], value, data)
    return DifficultyModel(spec.model_copy(update={**changed, "metrics": metrics}), parameters)


def near_identical(texts: Sequence[str], vectors: FloatArray | None = None) -> IntArray:
    """A group int64[n] for each text: equal but for case, digits and spaces, or (chained) embeddings of a cosine of 0.95 and more.

    Quadratic in the rows with vectors: 14,000 take some seconds.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    seen: dict[str, int] = {}
    left, right = [], []
    digits = str.maketrans("123456789", "000000000")
    for i, text in enumerate(texts):
        left.append(seen.setdefault(" ".join(text.lower().translate(digits).split()), i))
        right.append(i)
    pairs = [np.array([left, right])]
    if vectors is not None:
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        for start in range(0, len(unit), 1024):
            found = np.argwhere(unit[start : start + 1024] @ unit[start:].T >= _NEAR)
            pairs.append(found.T + start)
    edges = np.concatenate(pairs, axis=1)
    graph = coo_matrix((np.ones(edges.shape[1], np.int8), (edges[0], edges[1])), shape=(len(texts), len(texts)))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def folds_of(groups: IntArray, folds: int, seed: int) -> IntArray:
    """A fold int64[n] for each row; groups stay whole and are dealt out at random."""
    names, inverse = np.unique(groups, return_inverse=True)
    return np.asarray(np.random.default_rng(seed).permutation(len(names))[inverse] % folds, dtype=np.int64)


def recovery(score: npt.NDArray[Any], local: npt.NDArray[Any], strong: npt.NDArray[Any]) -> Float64Array:
    """Share of the quality gap that is recovered when the k rows of the highest score go to the strong model, float64[n + 1], k = 0 .. n.

    PGR of RouteLLM (arXiv 2406.18665); rows of equal score are sent in the mean of all orders.
    """
    _, inverse, count = np.unique(-np.asarray(score, np.float64), return_inverse=True, return_counts=True)
    gain = np.asarray(strong, np.float64) - np.asarray(local, np.float64)
    mean = np.bincount(inverse, gain) / count
    return np.asarray(np.concatenate([[0.0], np.cumsum(np.repeat(mean, count))]) / gain.sum(), dtype=np.float64)


def apgr(curve: Float64Array) -> float:
    """Area under `recovery`: 0.5 for a random order."""
    return float((curve[:-1] + curve[1:]).mean() / 2)


def cpt(curve: Float64Array, share: float) -> float:
    """Least share of rows in [0, 1] for the strong model that recovers `share` of the gap."""
    return int(np.argmax(curve >= share)) / (len(curve) - 1)


def expected_error(value: npt.NDArray[Any], outcome: npt.NDArray[Any], bins: int = 15) -> float:
    """Expected calibration error over bins of equally many rows."""
    order = np.argsort(value, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return float(sum(len(part) * abs(value[part].mean() - outcome[part].mean()) for part in parts) / len(value))


def _check(rows: Sequence[Labelled], vectors: FloatArray | None, about: About) -> None:
    if len(rows) < MIN_ROWS:
        raise TooLittleData(f"{len(rows)} labelled rows; a difficulty model takes at least {MIN_ROWS}.", limit=MIN_ROWS)
    for i, row in enumerate(rows):
        labels = (row.local_ok, 1.0 if row.strong_ok is None else row.strong_ok)
        if not all(0 <= label <= 1 for label in labels) or not 0 <= row.weight < np.inf:
            raise InvalidArgument(f"row {i} has the labels {labels} and weight {row.weight}; expected labels in [0, 1], a weight >= 0.")
    assert (vectors is None) == (about.base is None) == (about.features is None)
    assert vectors is None or (vectors.dtype == np.float32 and len(vectors) == len(rows) and bool(np.isfinite(vectors).all()))


def _prepare(
    rows: Sequence[Labelled], texts: list[str], vectors: FloatArray | None, about: About, settings: Settings
) -> tuple[DifficultySpec, Parameters, _Data]:
    """The model's frame, with nothing learned yet but the spread of the form features, and the rows as it reads them."""
    from scipy.sparse import csr_matrix, hstack

    indptr, indices, values, forms = extract(texts, settings.bits)
    beyond = float(forms[:, FORMS.index("beyond_ascii")].mean())
    nothing = Blend(fail=(0.0, 0.0, 0.0), gain=(0.0, 0.0, 0.0), slope=1.0, shift=0.0)
    spec = DifficultySpec(
        name=about.name,
        version=about.version,
        bits=settings.bits,
        runs=1.0 if beyond > BEYOND_ASCII else 0.0,
        gamma=settings.gamma,
        base=about.base,
        features=about.features,
        alone=nothing,
        both=None if about.base is None else nothing,
        rows=len(rows),
        created=about.created,
    )
    spread = forms.std(axis=0)
    empty = np.zeros((0, 0), np.float32)
    parameters = Parameters(
        words=empty,
        forms=empty,
        bias=empty,
        mean=forms.mean(axis=0),
        scale=np.where(spread > 1e-6, spread, 1).astype(np.float32),
        landmarks=empty,
        around=np.zeros((0, 2), np.float32),
        middle=np.zeros(2, np.float32),
    )
    standard = standardised(parameters, forms)
    words = csr_matrix((values, indices, indptr), shape=(len(rows), 2 << settings.bits))[:, : spec.columns]
    local = np.array([row.local_ok for row in rows], np.float32)
    strong = np.array([1.0 if row.strong_ok is None else row.strong_ok for row in rows], np.float32)
    weights = np.array([row.weight for row in rows], np.float32)
    data = _Data(
        matrix=hstack([words, csr_matrix(FORM_WEIGHT * standard)]).tocsr().astype(np.float32),
        standard=standard,
        vectors=vectors,
        targets=np.stack([1 - local, strong - local], axis=1),
        weights=weights / max(float(weights.mean()), 1e-9),
    )
    return spec, parameters, data


def _held_out(data: _Data, fold: IntArray, predict: Callable[[_Data, _Data], dict[K, FloatArray]]) -> tuple[FloatArray, K]:
    """Predictions float32[n, 2] of a part on rows that it was not fitted on, by the choice whose squared error is least; and that choice.

    `predict` fits on its first argument and predicts its second, by each choice that there is.
    """
    found: dict[K, FloatArray] = {}
    for one in np.unique(fold):
        held = fold == one
        for choice, predicted in predict(data.part(np.flatnonzero(~held)), data.part(np.flatnonzero(held))).items():
            found.setdefault(choice, np.zeros_like(data.targets))[held] = predicted
    spread = data.targets.var(axis=0) + 1e-9
    errors = {choice: float((data.weights[:, None] * (out - data.targets) ** 2 / spread).sum()) for choice, out in found.items()}
    best = min(found, key=lambda choice: errors[choice])
    return found[best], best


def _words_held_out(part: _Data, held: _Data, settings: Settings) -> dict[float, FloatArray]:
    fitted = _fit_words(part, settings.words)
    return {penalty: np.asarray(held.matrix @ coefficients + bias) for penalty, (coefficients, bias) in fitted.items()}


def _near_held_out(part: _Data, held: _Data, settings: Settings) -> dict[tuple[float, float], FloatArray]:
    assert held.vectors is not None
    found: dict[tuple[float, float], FloatArray] = {}
    for scale in settings.form_scales:
        landmarks, around, middle = _fit_near(part, scale, settings.neighbours, settings)
        kernel = kernels(located(scale, held.vectors, held.standard), landmarks, settings.gamma)
        found |= {(scale, penalty): np.asarray(kernel @ coefficients + middle) for penalty, coefficients in around.items()}
    return found


def _mean(data: _Data) -> FloatArray:
    return np.asarray((data.weights[:, None] * data.targets).sum(axis=0) / max(float(data.weights.sum()), 1e-9), dtype=np.float32)


def _fit_words(data: _Data, penalties: Sequence[float]) -> dict[float, tuple[FloatArray, FloatArray]]:
    """Coefficients float32[columns + F, 2] and bias float32[2] by penalty.

    Minimises sum weights * (targets - bias - matrix @ c)^2 + penalty * |c|^2, the bias being the targets' mean, by conjugate gradients on
    the dual, c = matrix^T a, both targets side by side, each penalty from where the one before ended.
    """
    root = np.sqrt(data.weights)
    matrix = data.matrix.multiply(root[:, None]).tocsr()
    turned = matrix.T.tocsr()
    bias = _mean(data)
    right = root[:, None] * (data.targets - bias)
    goal = _TOLERANCE**2 * np.maximum((right * right).sum(axis=0), 1e-20)
    found: dict[float, tuple[FloatArray, FloatArray]] = {}
    dual = np.zeros_like(right)
    for penalty in map(np.float32, penalties):
        rest = right - matrix @ (turned @ dual) - penalty * dual
        direction = rest.copy()
        size = (rest * rest).sum(axis=0)
        for _ in range(_ITERATIONS):
            if (size <= goal).all():
                break
            step = matrix @ (turned @ direction) + penalty * direction
            along = size / np.maximum((direction * step).sum(axis=0), 1e-20)
            dual = dual + along * direction
            rest -= along * step
            after = (rest * rest).sum(axis=0)
            direction = rest + after / np.maximum(size, 1e-20) * direction
            size = after
        found[float(penalty)] = (np.asarray(turned @ dual, dtype=np.float32), bias)
    return found


def _fit_near(
    data: _Data, scale: float, penalties: Sequence[float], settings: Settings
) -> tuple[FloatArray, dict[float, FloatArray], FloatArray]:
    """Landmarks float32[m, H + F], what each adds float32[m, 2] by penalty, and the targets' mean.

    Minimises sum weights * (targets - middle - K_nm c)^2 + penalty * c^T (K_mm + _NUGGET) c; the nugget keeps float32 out of the way of
    landmarks that lie close together.
    """
    assert data.vectors is not None
    points = located(scale, data.vectors, data.standard)
    landmarks = points[np.random.default_rng(settings.seed).permutation(len(points))[: settings.landmarks]]
    features = kernels(points, landmarks, settings.gamma)
    middle = _mean(data)
    weighted = features * data.weights[:, None]
    gram = (features.T @ weighted).astype(np.float64)
    right = (weighted.T @ (data.targets - middle)).astype(np.float64)
    between = kernels(landmarks, landmarks, settings.gamma).astype(np.float64) + _NUGGET * np.eye(len(landmarks))
    around = {penalty: np.linalg.solve(gram + penalty * between, right).astype(np.float32) for penalty in penalties}
    return landmarks, around, middle


def _blend(parts: Sequence[FloatArray], data: _Data) -> Blend:
    """Weights >= 0 of the parts by least squares on held-out predictions, and the logistic on top of the blended fail.

    As if _EQUAL further rows had said that all parts weigh the same: the mean is hard to beat with few rows.
    """
    from scipy.optimize import nnls

    root = np.sqrt(data.weights.astype(np.float64))
    rows: list[tuple[float, float, float]] = []
    for target in (_FAIL, _GAIN):
        columns = np.stack([part[:, target] for part in parts], axis=1).astype(np.float64)
        wanted = data.targets[:, target].astype(np.float64)
        centre, goal = np.average(columns, axis=0, weights=data.weights), float(np.average(wanted, weights=data.weights))
        columns, wanted = (columns - centre) * root[:, None], (wanted - goal) * root
        held = np.sqrt(_EQUAL * (columns**2).mean()) * np.eye(len(parts))
        weights, _ = nnls(np.concatenate([columns, held]), np.concatenate([wanted, held.sum(axis=1) / len(parts)]))
        padded = np.append(weights, 0.0)[:2]
        rows.append((goal - float(weights @ centre), float(padded[0]), float(padded[1])))
    blended = rows[_FAIL][0] + sum(weight * part[:, _FAIL].astype(np.float64) for weight, part in zip(rows[_FAIL][1:], parts, strict=False))
    slope, shift = _platt(np.asarray(blended), data.targets[:, _FAIL].astype(np.float64), data.weights.astype(np.float64))
    return Blend(fail=rows[_FAIL], gain=rows[_GAIN], slope=slope, shift=shift)


def _platt(score: Float64Array, outcome: Float64Array, weights: Float64Array) -> tuple[float, float]:
    """Slope >= 0 and shift of sigmoid(slope * score + shift) by Newton's steps; a ridge of one row holds them where all outcomes agree."""
    columns = np.stack([score, np.ones_like(score)], axis=1)
    beta = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(columns @ beta, -30, 30)))
        gradient = columns.T @ (weights * (p - outcome)) + 0.05 * beta
        hessian = (columns * (weights * p * (1 - p))[:, None]).T @ columns + 0.05 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        beta -= step
        if np.abs(step).max() < 1e-8:
            break
    if beta[0] < 0:  # what was learned is worse than nothing on rows that it has not seen
        share = np.clip(np.average(outcome, weights=weights), 1e-3, 1 - 1e-3)
        return 0.0, float(np.log(share / (1 - share)))
    return float(beta[0]), float(beta[1])


def _metrics(gain: FloatArray, value: FloatArray, data: _Data) -> dict[str, float]:
    fail, difference = data.targets[:, _FAIL], data.targets[:, _GAIN]
    found = {"ece": expected_error(value, fail), "brier": float(((value - fail) ** 2).mean()), "fail": float(fail.mean())}
    if difference.sum() > 0:
        found["apgr"] = apgr(recovery(gain, np.zeros_like(difference), difference))
    return found
