"""What is asked of a student on held-out rows, how its answers are measured, and whether it may be published.

An output is what a student answers to a Judge's rows: entities of each row; a score of each pair; or, for retrieval, float32[queries,
documents]. The torch model, the exported file and the present student answer the same rows, so that they can be compared row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from server.core import Entity, Reply
from server.routing.rollout_agreement import agrees
from trainer.encoders import measure
from trainer.encoders.examples import EMBEDDING, ENTITIES, Example, read_entities, read_score
from trainer.encoders.measure import Interval, Statistic

# How far an exported file may be from the model that was trained, by what `parity` measures.
LEAST_PARITY = {"float32": 0.995, "int8": 0.95}
_MOST_DOCUMENTS = 2000
_MIN_SAID = 20  # rows that people judged, before students are compared on them


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure in [0, 1] with its interval; `statistic` of resamples of `units` rows or queries."""

    name: str
    interval: Interval
    statistic: Statistic
    units: int

    @property
    def value(self) -> float:
        """On all units."""
        return self.interval.value


@dataclass(frozen=True, slots=True)
class Judged:
    """`bar`: the figure that the skill's bar speaks of, how often an answer is the wanted one as a rollout counts it (of retrieval the
    same as `quality`); `quality`: the field's own measure of the task, by which students are compared; `figures`: all of them.
    """

    bar: Figure
    quality: Figure
    figures: dict[str, float]


class Judge:
    """Rows to answer. `documents`: more texts among which retrieval has to find the right one."""

    def __init__(self, task: str, rows: Sequence[Example], documents: Sequence[str] = ()) -> None:
        self.task = task
        self.rows = list(rows)
        self._more = list(dict.fromkeys(documents))[:_MOST_DOCUMENTS]

    @cached_property
    def _retrieval(self) -> tuple[list[str], list[str], list[Any]]:
        return measure.retrieval(self.rows, self._more)

    @property
    def queries(self) -> list[str]:
        """Of retrieval."""
        return self._retrieval[0]

    @property
    def documents(self) -> list[str]:
        """Of retrieval."""
        return self._retrieval[1]

    def judge(self, output: Any) -> Judged:
        """Measures an output."""
        if self.task == ENTITIES:
            wanted = [row.spans for row in self.rows]
            figures = measure.entity_figures(wanted, output)
            quality = _figure("f1", measure.entity_statistic(wanted, output), len(self.rows))
        elif self.task == EMBEDDING:
            found = measure.ranking(self._retrieval[2], list(output))
            figures = {"ndcg": float(found.ndcg.mean()), "mrr": float(found.reciprocal.mean())}
            quality = _figure("ndcg", measure.mean_statistic(found.ndcg), len(self.queries))
            return Judged(quality, quality, figures)
        else:
            figures, quality = self._scored(np.asarray(output, np.float64))
        agreed = np.array([self._agrees(row, mine) for row, mine in zip(self.rows, output, strict=True)], np.float64)
        bar = _figure("agreement", measure.mean_statistic(agreed), len(agreed))
        return Judged(bar, quality, {**figures, "agreement": bar.value})

    def _agrees(self, row: Example, mine: Any) -> bool:
        """As a rollout will count it, so that it knows what to expect of the student."""
        if self.task != ENTITIES:
            return agrees(self.task, "", Reply(score=float(mine)), Reply(score=row.score))
        replies = [Reply(entities=[Entity(label, 1.0, row.text[a:b], a, b) for a, b, label in spans]) for spans in (mine, row.spans)]
        return agrees(self.task, row.text, *replies)

    def _scored(self, scores: Any) -> tuple[dict[str, float], Figure]:
        wanted = [row.score for row in self.rows]
        groups = measure.groups_of(self.rows)
        statistic, units = measure.concordance_statistic(wanted, scores.tolist(), groups)
        figures = {"concordance": statistic(np.arange(units)), "spearman": measure.spearman(wanted, scores.tolist())}
        figures["mean_error"] = float(np.abs(scores - np.array(wanted)).mean())
        if groups is not None:
            places: dict[str, list[int]] = {}
            for place, query in enumerate(groups):
                places.setdefault(query, []).append(place)
            chosen = [rows for rows in places.values() if len(rows) > 1]
            found = measure.ranking([np.array(wanted)[rows] for rows in chosen], [scores[rows] for rows in chosen])
            figures |= {"ndcg": float(found.ndcg.mean()), "mrr": float(found.reciprocal.mean())}
        return figures, _figure("concordance", statistic, units)

    def parity(self, torch_output: Any, served_output: Any) -> dict[str, float]:
        """How far the exported file answers as the torch model does: "agreement" in [0, 1], and the figures behind it."""
        if self.task == ENTITIES:
            same = [a == b for a, b in zip(torch_output, served_output, strict=True)]
            return {"agreement": measure.f1(measure.entity_counts(torch_output, served_output)), "rows_alike": float(np.mean(same))}
        first, second = np.asarray(torch_output, np.float64), np.asarray(served_output, np.float64)
        difference = np.abs(first - second)
        figures = {"agreement": 1 - float(difference.mean()), "max_difference": float(difference.max())}
        figures["rank_correlation"] = measure.spearman(first.ravel()[:5000].tolist(), second.ravel()[:5000].tolist())
        return figures

    def said(self, output: Any) -> dict[str, float]:
        """The student beside what callers got (of a skill without a student: the teacher's answers), on the rows that people judged.

        {} where those are few. A row that was corrected has the answer that was refused; under a thumb up what callers got was right.
        """
        places = [place for place, row in enumerate(self.rows) if row.agreed or (row.corrected and row.rejected)]
        if len(places) < _MIN_SAID or self.task == EMBEDDING:
            return {}
        rows = [self.rows[place] for place in places]
        judge = Judge(self.task, rows)
        mine = judge.judge([output[place] for place in places])
        got = judge.judge([self._delivered(row) for row in rows])
        difference = compared(mine, got)
        figures = {"rows": float(len(rows)), "delivered": got.quality.value, "student": mine.quality.value}
        figures["difference"] = difference.value
        figures |= {"difference_low": difference.low, "difference_high": difference.high}
        return {f"said/{name}": value for name, value in figures.items()}

    def _delivered(self, row: Example) -> Any:
        if self.task == ENTITIES:
            refused = read_entities(row.rejected, row.text) if row.rejected and not row.agreed else row.spans
            return refused if isinstance(refused, tuple) else ()
        score = read_score(row.rejected) if row.rejected and not row.agreed else row.score
        return 1 - row.score if score is None else score


def compared(new: Judged, old: Judged) -> Interval:
    """The new student's quality minus the old one's, on the same rows."""
    assert (new.quality.name, new.quality.units) == (old.quality.name, old.quality.units)
    return measure.bootstrap(new.quality.statistic, new.quality.units, minus=old.quality.statistic)


def verdict(new: Judged, difference: Interval | None, bar: float, present: str) -> str:
    """Why the new student is not published, or "" where it is.

    The bar is held to what the held-out rows can tell: it fails where even the upper end of the interval is below.
    """
    if new.bar.interval.high < bar:
        interval = f"{new.bar.interval.low:.3f} to {new.bar.interval.high:.3f}"
        reached = f"its {new.bar.name} on held-out rows is {new.bar.value:.3f} ({interval}), the bar {bar:g}"
        return f"{reached}. More traffic may help, or a lower deliver_bar."
    if difference is not None and difference.value < 0:
        interval = f"{difference.low:+.3f} to {difference.high:+.3f}"
        quality = new.quality
        return f"its {quality.name} is {quality.value:.3f}, {difference.value:+.3f} ({interval}) against {present} on the same rows."
    return ""


def _figure(name: str, statistic: Statistic, units: int) -> Figure:
    return Figure(name, measure.bootstrap(statistic, units), statistic, units)
