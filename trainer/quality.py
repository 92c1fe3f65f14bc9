"""Fits a quality model on judged answers: ridge logistic regression on features and hashed n-grams, everything measured by cross-fitting.

`python -m trainer.quality JUDGED.jsonl --out model.json` does it for a file of {"prompt", "answer", "acceptable"} lines, where lines of one
prompt are answers to one question: they stay together in cross-fitting, and each has the support of the others as its agreement.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Before NumPy: see trainer/__main__.py.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt

from native.score import Pair
from server.core import FloatArray
from server.errors import TooLittleData
from server.quality.agreement import support
from server.quality.calibration import MIN_ROWS, BoolArray
from server.quality.curve import fit_calibration, parts_of
from server.quality.model import GATES, QualityModel, standardised
from server.quality.scorer import Observed, measured, names

FOLDS = 5
BITS = 15
_ITERATIONS = 80
# The loss is _STRENGTH * log loss + |w|^2 / 2 over standardised features times _DENSE, embeddings times _VECTORS, and n-grams times their
# inverse document frequency; found on EVOUNA by cross-fitting.
_STRENGTH = 0.3
_DENSE = 0.15
_VECTORS = 0.35  # of embeddings of length 1
_RAREST = 3  # n-grams of fewer rows are noise
Float64 = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(slots=True, frozen=True)
class Judged:
    """An answer that was judged; `group` is the same for all answers to one question."""

    observed: Observed
    acceptable: bool
    group: int


@dataclass(slots=True, frozen=True)
class Fitted:
    """The model of all rows, and what each row got from a model and a curve that had not seen its group.

    `alone`, `agreed`: float32[n] qualities, the second with the agreement of other answers (NaN for rows that have none; empty where too
    few have).
    """

    model: QualityModel
    alone: FloatArray
    agreed: FloatArray


@dataclass(slots=True, frozen=True)
class Table:
    """Rows as the fit sees them. `dense` float32[n, features], `bag` a sparse [n, 2^bits], `vectors` float32[n, 2 * H] (H = 0 unless all
    rows have them), `agreement` float64[n] with NaN.
    """

    dense: FloatArray
    bag: Any
    vectors: FloatArray
    agreement: Float64

    def take(self, rows: npt.NDArray[Any]) -> Table:
        """Some of the rows."""
        return Table(self.dense[rows], self.bag[rows], self.vectors[rows], self.agreement[rows])


@dataclass(slots=True, frozen=True)
class Linear:
    """The first step: see `server.quality.model.QualityModel`."""

    mean: Float64
    inverse: Float64
    weights: Float64
    bias: float
    hashed: FloatArray
    embedded: FloatArray

    def scores(self, table: Table) -> Float64:
        """float64[n]"""
        held = standardised(table.dense, self.mean, self.inverse)
        vectors = (table.vectors - self.embedded[0]) @ self.embedded[1]
        return np.asarray(held @ self.weights + table.bag @ self.hashed.astype(np.float64) + vectors + self.bias)


def tabulate(rows: Sequence[Observed], bits: int = BITS) -> Table:
    """Features and n-grams of every answer."""
    from scipy.sparse import csr_matrix

    dense = np.empty((len(rows), len(names())), np.float32)
    places, values, starts = [], [], [0]
    for i, observed in enumerate(rows):
        pair = Pair(observed.prompt, observed.answer)
        dense[i] = measured(observed, pair)
        where, what = pair.bag(bits)
        places.append(where)
        values.append(what)
        starts.append(starts[-1] + len(where))
    bag = csr_matrix((np.concatenate(values), np.concatenate(places), starts), shape=(len(rows), 1 << bits), dtype=np.float32)
    bag.sum_duplicates()
    given = np.array([np.nan if o.agreement is None else o.agreement for o in rows], np.float64)
    vectors = [o.vectors for o in rows if o.vectors is not None]
    stacked = np.stack(vectors).astype(np.float32) if len(vectors) == len(rows) else np.zeros((len(rows), 0), np.float32)
    return Table(dense, bag, stacked, given)


def fit(
    judged: Sequence[Judged], *, bits: int = BITS, calibrated: bool = False, about: Mapping[str, Any] | None = None, seed: int = 0
) -> Fitted:
    """Cross-fits, calibrates on the cross-fitted scores, then fits on all rows.

    Args:
        judged: the answers.
        bits: of the table of hashed n-grams.
        calibrated: whether these are answers of the very skill that the model will score.
        about: provenance, kept in the model's file.
        seed: of the assignment of groups to parts.

    Raises:
        TooLittleData: fewer than MIN_ROWS answers, or all judged alike.
    """
    good = np.array([j.acceptable for j in judged], bool)
    if len(judged) < MIN_ROWS or good.all() or not good.any():
        message = f"{len(judged)} judged answers, {int(good.sum())} acceptable: at least {MIN_ROWS} are needed, of both kinds."
        raise TooLittleData(message, rows=len(judged), needed=MIN_ROWS)
    groups = np.array([j.group for j in judged])
    table = tabulate([j.observed for j in judged], bits)
    part = parts_of(groups, FOLDS, seed)
    crossed = np.zeros(len(judged))
    for fold in range(FOLDS):
        held = np.flatnonzero(part == fold)
        rest = np.flatnonzero(part != fold)
        if len(held) and 0 < good[rest].sum() < len(rest):
            crossed[held] = linear(table.take(rest), good[rest]).scores(table.take(held))
    curve, alone = fit_calibration(crossed, good, groups.tolist(), seed)
    whole = linear(table, good)
    model = QualityModel(
        whole.mean, whole.inverse, whole.weights, whole.bias, whole.hashed, curve, calibrated=calibrated, about=about or {}
    )
    given = np.flatnonzero(np.isfinite(table.agreement))
    if len(given) < MIN_ROWS or not 0 < good[given].sum() < len(given):
        return Fitted(model, alone, np.zeros(0, np.float32))
    second, joined = _second(crossed[given], table.agreement[given], good[given], part[given])
    second_curve, qualities = fit_calibration(joined, good[given], groups[given].tolist(), seed)
    agreed = np.full(len(judged), np.nan, np.float32)
    agreed[given] = qualities
    return Fitted(replace(model, second=second, second_curve=second_curve), alone, agreed)


def with_priors(model: QualityModel, priors: Mapping[str, float]) -> QualityModel:
    """Sets the weights, in log-odds a unit, of features that the data never showed at work; `about` says which. Others stay as fitted."""
    inverse, weights = model.inverse.copy(), model.weights.copy()
    unseen = {name: weight for name, weight in priors.items() if not inverse[names().index(name)]}
    for name, weight in unseen.items():
        inverse[names().index(name)], weights[names().index(name)] = 1.0, weight
    return replace(model, inverse=inverse, weights=weights, about={**model.about, "priors": unseen})


def linear(table: Table, good: BoolArray) -> Linear:
    """Ridge logistic regression, rare n-grams left out and frequent ones held back by their inverse document frequency."""
    present = np.where(GATES >= 0, table.dense[:, GATES], 1.0)  # means and spreads of what was measured
    rows = np.maximum(present.sum(axis=0), 1)
    mean = (table.dense * present).sum(axis=0) / rows
    spread = np.sqrt(((table.dense - mean) ** 2 * present).sum(axis=0) / rows)
    inverse = np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 0.0)
    centre = table.vectors.mean(axis=0)
    held = standardised(table.dense, mean, inverse)
    dense = np.hstack([held * _DENSE, (table.vectors - centre) * _VECTORS]).astype(np.float32)
    counts = np.bincount(table.bag.indices, minlength=table.bag.shape[1])
    rarity = np.where(counts >= _RAREST, np.log((1 + len(good)) / (1 + counts)), 0.0)
    usual = np.sqrt(np.mean(rarity[counts >= _RAREST] ** 2)) if (counts >= _RAREST).any() else 1.0
    scale = (rarity / max(usual, 1e-6)).astype(np.float32)
    found = _minimise(dense, table.bag.multiply(scale).tocsr(), good.astype(np.float32))
    size, whole = held.shape[1], dense.shape[1]
    embedded = np.stack([centre, found[size:whole] * _VECTORS]).astype(np.float32)
    hashed = (found[whole:-1] * scale).astype(np.float32)
    return Linear(mean, inverse, found[:size] * _DENSE, float(found[-1]), hashed, embedded)


def _minimise(dense: FloatArray, bag: Any, good: FloatArray) -> Float64:
    """Weights of the dense columns, of the bag's, and the bias, by L-BFGS; the products are float32, the steps float64."""
    from scipy.optimize import minimize

    across, size = bag.T.tocsr(), dense.shape[1]

    def loss(w: Float64) -> tuple[float, Float64]:
        lean = w.astype(np.float32)
        s = dense @ lean[:size] + bag @ lean[size:-1] + lean[-1]
        p = 0.5 * (1 + np.tanh(0.5 * s))
        value = _STRENGTH * float((np.logaddexp(0, s) - good * s).sum()) + 0.5 * float(w[:-1] @ w[:-1])
        slope = (p - good).astype(np.float32)
        gradient = np.concatenate([dense.T @ slope, across @ slope, [slope.sum()]]).astype(np.float64) * _STRENGTH
        gradient[:-1] += w[:-1]
        return value, gradient

    start = np.zeros(size + bag.shape[1] + 1)
    share = float(good.mean())
    start[-1] = np.log(share / (1 - share))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS, "gtol": 1e-3})
    return np.asarray(found.x, np.float64)


def _joining(alone: Float64, agreement: Float64) -> Float64:
    g = np.clip(agreement, 0, 1)
    return np.stack([np.ones(len(g)), alone, g, g * g, alone * g], axis=1)


def _second(alone: Float64, agreement: Float64, good: BoolArray, part: npt.NDArray[np.int64]) -> tuple[Float64, Float64]:
    """The second step's five weights, and each row's score by weights that had not seen its part."""
    x, y = _joining(alone, agreement), good.astype(np.float64)
    crossed = np.zeros(len(y))
    for fold in range(FOLDS):
        held = part == fold
        if held.any() and 0 < y[~held].sum() < (~held).sum():
            crossed[held] = x[held] @ _newton(x[~held], y[~held])
    return _newton(x, y), crossed


def _newton(x: Float64, y: Float64) -> Float64:
    """Logistic regression with a small ridge."""
    w = np.zeros(x.shape[1])
    ridge = np.eye(x.shape[1]) * 1e-2
    for _ in range(30):
        p = 0.5 * (1 + np.tanh(0.5 * (x @ w)))
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge, x.T @ (p - y) + ridge @ w)
        w = w - np.clip(step, -3, 3)
        if np.abs(step).max() < 1e-8:
            break
    return w


def with_support(judged: Sequence[Judged]) -> list[Judged]:
    """The same answers, each with the support of the others of its group; alone in its group, without."""
    members: dict[int, list[int]] = {}
    for i, one in enumerate(judged):
        members.setdefault(one.group, []).append(i)
    out = list(judged)
    for rows in members.values():
        shares = support(judged[rows[0]].observed.prompt, [judged[i].observed.answer for i in rows])
        for i, share in zip(rows, shares.tolist(), strict=True):
            if share == share:
                out[i] = replace(judged[i], observed=replace(judged[i].observed, agreement=share))
    return out


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON-lines file, gzipped or not."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def judged_of(lines: Sequence[Mapping[str, Any]], sources: Mapping[str, str] | None = None) -> list[Judged]:
    """Rows of {"prompt", "answer", "acceptable"}; other names of the three can be given."""
    prompt, answer, acceptable = ({"prompt": "prompt", "answer": "answer", "acceptable": "acceptable"} | dict(sources or {})).values()
    groups: dict[str, int] = {}
    return [
        Judged(
            Observed(str(line[prompt]), str(line[answer] or "")),
            line[acceptable] in (True, "yes", 1),
            groups.setdefault(str(line[prompt]), len(groups)),
        )
        for line in lines
    ]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: written; 1: too little data."""
    parser = argparse.ArgumentParser(prog="trainer.quality", description=__doc__)
    parser.add_argument("data", nargs="+", help="JSON lines; .gz is read too")
    parser.add_argument("--out", required=True)
    parser.add_argument("--bits", type=int, default=BITS, help="of the table of hashed n-grams")
    parser.add_argument("--about", default="{}", help="provenance as a JSON object, kept in the file")
    parser.add_argument("--names", default="{}", help='other names of the fields, as {"prompt": "question"}')
    given = parser.parse_args(arguments)
    judged: list[Judged] = []
    for path in given.data:
        rows = judged_of(list(read(Path(path))), json.loads(given.names))
        shift = 1 + max((j.group for j in judged), default=-1)
        judged += [replace(row, group=row.group + shift) for row in rows]
    try:
        fitted = fit(with_support(judged), bits=given.bits, about=json.loads(given.about))
    except TooLittleData as error:
        print(error.message, file=sys.stderr)
        return 1
    fitted.model.save(Path(given.out))
    print(json.dumps({"rows": len(judged), "ece": fitted.model.curve.ece, "bytes": Path(given.out).stat().st_size}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
