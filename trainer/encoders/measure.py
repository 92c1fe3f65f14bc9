"""How good answers are, and whether one set of answers is better than another on the same rows: figures with a paired bootstrap.

Entities: micro-averaged F1 over exact spans and labels (CoNLL's measure). Pairs: concordance (the share of pairs of rows with different
wanted scores that are ordered as wanted, ties half: the area under the ROC curve where scores are 0 and 1), Spearman's rank correlation,
and per query nDCG@10 (gain 2^score - 1, discount log2(rank + 1); Jarvelin and Kekalainen 2002) and the reciprocal rank of the first
relevant document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.encoders.examples import RELEVANT, Example, Span

Array = npt.NDArray[Any]
Statistic = Callable[[Array], float]
"""The figure of a resample: int64[n] indices of units, repeats allowed, to a number."""

TIMES = 1000
# Concordance looks at every pair of rows; more rows than this are thinned evenly.
_MOST_ROWS = 1500


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure, or a difference of two, with the interval that holds it in 95 of 100 resamples."""

    value: float
    low: float
    high: float


def bootstrap(statistic: Statistic, units: int, *, minus: Statistic | None = None, seed: int = 0, times: int = TIMES) -> Interval:
    """Percentile bootstrap over `units` rows (or queries); with `minus`, of the difference, both on the same resamples (Efron 1979)."""
    assert units > 0

    def one(rows: Array) -> float:
        return statistic(rows) - (minus(rows) if minus is not None else 0.0)

    rng = np.random.default_rng(seed)
    drawn = [one(rng.integers(0, units, units)) for _ in range(times)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(one(np.arange(units)), float(low), float(high))


def entity_counts(wanted: Sequence[Sequence[Span]], got: Sequence[Sequence[Span]]) -> Array:
    """int64[rows, 3]: right, superfluous and missed entities of each row."""
    counts = []
    for want, have in zip(wanted, got, strict=True):
        right = len(set(want) & set(have))
        counts.append((right, len(set(have)) - right, len(set(want)) - right))
    return np.array(counts, np.int64).reshape(-1, 3)


def f1(counts: Array) -> float:
    """Of summed counts [.., 3]; 1 where there was nothing to find and nothing was found."""
    right, wrong, missed = (float(value) for value in counts.reshape(-1, 3).sum(axis=0))
    return 1.0 if right + wrong + missed == 0 else 2 * right / (2 * right + wrong + missed)


def entity_figures(wanted: Sequence[Sequence[Span]], got: Sequence[Sequence[Span]]) -> dict[str, float]:
    """f1, precision, recall, rows that are right as a whole, and F1 of each label ("f1/<label>")."""
    counts = entity_counts(wanted, got)
    right, wrong, missed = (float(value) for value in counts.sum(axis=0))
    figures = {
        "f1": f1(counts),
        "precision": right / max(right + wrong, 1.0),
        "recall": right / max(right + missed, 1.0),
        "row_exact": float((counts[:, 1:].sum(axis=1) == 0).mean()),
    }
    for label in sorted({span[2] for row in wanted for span in row}):
        only = [[[span for span in row if span[2] == label] for row in side] for side in (wanted, got)]
        figures[f"f1/{label}"] = f1(entity_counts(*only))
    return figures


def entity_statistic(wanted: Sequence[Sequence[Span]], got: Sequence[Sequence[Span]]) -> Statistic:
    """F1 of resampled rows."""
    counts = entity_counts(wanted, got)
    return lambda rows: f1(counts[rows])


def spearman(wanted: Sequence[float], got: Sequence[float]) -> float:
    """Correlation of ranks, ties at their mean; 0 where one side is constant."""
    first, second = _ranks(np.asarray(wanted)), _ranks(np.asarray(got))
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum() / scale) if scale else 0.0


def concordance_statistic(wanted: Sequence[float], got: Sequence[float], groups: Sequence[str] | None = None) -> tuple[Statistic, int]:
    """Concordance of resampled rows and how many rows it looks at; with `groups`, rows are compared within theirs alone.

    0.5 where no two rows can be compared.
    """
    rows = np.linspace(0, len(wanted) - 1, min(len(wanted), _MOST_ROWS)).astype(np.int64)
    want, have = np.asarray(wanted, np.float64)[rows], np.asarray(got, np.float64)[rows]
    above = want[:, None] > want[None, :]
    if groups is not None:
        names = np.asarray(groups, object)[rows]
        above &= names[:, None] == names[None, :]
    valid = above.astype(np.float32)
    right = valid * (np.float32(0.5) + np.float32(0.5) * np.sign(have[:, None] - have[None, :]).astype(np.float32))

    def statistic(drawn: Array) -> float:
        weight = np.bincount(drawn, minlength=len(rows)).astype(np.float32)
        compared = float(weight @ (valid @ weight))
        return float(weight @ (right @ weight)) / compared if compared else 0.5

    return statistic, len(rows)


@dataclass(frozen=True, slots=True)
class Ranking:
    """float64[queries] each: nDCG@10 and the reciprocal rank of the first relevant document (0: none among the first 10)."""

    ndcg: Array
    reciprocal: Array


def ranking(gains: Sequence[Array], scores: Sequence[Array]) -> Ranking:
    """One pair of arrays a query: the wanted scores in [0, 1] of its documents and the given ones. Ties go against the answer."""
    ndcg, reciprocal = [], []
    for gain, score in zip(gains, scores, strict=True):
        order = np.lexsort((gain, -np.asarray(score, np.float64)))[:10]
        ideal = np.sort(gain)[::-1][:10]
        discount = 1 / np.log2(np.arange(2, 12))
        best = float(((2**ideal - 1) * discount[: len(ideal)]).sum())
        ndcg.append(float(((2 ** gain[order] - 1) * discount[: len(order)]).sum()) / best if best else 1.0)
        hits = np.flatnonzero(gain[order] >= RELEVANT)
        reciprocal.append(1.0 / (1 + hits[0]) if len(hits) else 0.0)
    return Ranking(np.array(ndcg), np.array(reciprocal))


def groups_of(rows: Sequence[Example]) -> list[str] | None:
    """The query of each row, or None where too few queries have documents of different scores to be compared within."""
    scores: dict[str, set[float]] = {}
    for row in rows:
        scores.setdefault(row.text, set()).add(row.score)
    comparable = sum(len(found) > 1 for found in scores.values())
    return [row.text for row in rows] if 2 * comparable >= len(scores) else None


def retrieval(rows: Sequence[Example], documents: Sequence[str]) -> tuple[list[str], list[str], list[Array]]:
    """Queries of rows that have a right document, the different documents of `documents` and the rows, and each query's gains."""
    right: dict[str, set[str]] = {}
    for row in rows:
        if row.score >= RELEVANT:
            right.setdefault(row.text, set()).add(row.pair)
    every = sorted({*documents, *(row.pair for row in rows)})
    queries = sorted(right)
    return queries, every, [np.array([float(one in right[query]) for one in every]) for query in queries]


def mean_statistic(values: Array) -> Statistic:
    """The mean of resampled units."""
    return lambda units: float(values[units].mean())


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2.0)[inverse], np.float64)
