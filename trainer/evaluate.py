"""Judges a student by what will serve it, on rows that were held out: against the teacher's labels and against the present student.

The labels are a teacher's, and a teacher errs. Two different questions are kept apart: `accuracy` and `local_accuracy` are agreement with
the teacher, which can be counted; quality is the probability of being right, for which the teacher's own accuracy must be estimated
(`teacher_accuracy`; server.quality.calibration has the reasoning).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from server.core import FloatArray, IntArray
from server.quality import calibration
from server.quality.calibration import BoolArray, Calibration
from server.runtime.heads import LinearHead

# A student that could answer less than this is not worth a take-over.
MIN_SHARE = 0.05
# A student that answers so much of the traffic at the bar is good enough that no dearer one is tried.
REACHED_SHARE = 0.9
# Teachers that are taken for worse than this are not believed to be: the estimate cannot tell a bad teacher from a bad student.
_WORST_TEACHER = 0.7
_BINS = 10
_MOST_CONFUSED = 20


@dataclass(slots=True, frozen=True)
class Evaluation:
    """On `rows` held-out rows. `accuracy`: agreement with the teacher; of the `share` whose quality reaches the bar, `delivered_accuracy`.

    `right`: an estimate, the mean quality of what is delivered. Cross-fitted: no row judged itself. `details`: tables for the report.
    """

    rows: int
    accuracy: float
    ece: float
    share: float
    delivered_accuracy: float
    right: float
    calibration: Calibration
    correct: BoolArray
    details: dict[str, Any]

    @property
    def teacher(self) -> float:
        """The estimate of the teacher's accuracy that the quality is reckoned with."""
        return self.calibration.teacher

    def metrics(self) -> dict[str, float]:
        """For the manifest and the registry."""
        return {
            "held_out_rows": float(self.rows),
            "accuracy": self.accuracy,
            "ece": self.ece,
            "local_share": self.share,
            "local_accuracy": self.delivered_accuracy,
            "local_right_estimate": self.right,
            "teacher_accuracy_estimate": self.teacher,
        }

    def reaches(self, bar: float) -> bool:
        """Whether enough of the traffic reaches the bar, and what reaches it keeps the promise."""
        return self.share >= REACHED_SHARE and not _broken_promise(self, bar)


def agreement(head: LinearHead, vectors: FloatArray, labels: Sequence[str]) -> tuple[FloatArray, BoolArray]:
    """The file's probabilities float32[n, labels] and, row by row, whether its best label is the given one."""
    probabilities = head.predict(vectors)
    names = head.manifest.labels
    best = [names[index] for index in probabilities.argmax(axis=1)]
    return probabilities, np.array([mine == theirs for mine, theirs in zip(best, labels, strict=True)], dtype=bool)


def evaluate(head: LinearHead, vectors: FloatArray, labels: Sequence[str], bar: float) -> Evaluation:
    """Runs the head's ONNX file on vectors float32[n, H] of held-out rows, and calibrates its quality."""
    probabilities, right = agreement(head, vectors, labels)
    index = {label: number for number, label in enumerate(head.manifest.labels)}
    classes = np.array([index.get(label, -1) for label in labels], dtype=np.int64)
    found, agreements = calibration.fit(probabilities, right)
    known = classes >= 0
    found = replace(found, teacher=max(found.ceiling, teacher_accuracy(probabilities[known], classes[known])))
    qualities = np.minimum(agreements / found.teacher, 1.0)
    delivered = qualities >= bar
    best = [head.manifest.labels[index] for index in probabilities.argmax(axis=1)]
    return Evaluation(
        rows=len(right),
        accuracy=float(right.mean()),
        ece=found.ece,
        share=float(delivered.mean()),
        delivered_accuracy=float(right[delivered].mean()) if delivered.any() else 0.0,
        right=float(qualities[delivered].mean()) if delivered.any() else 0.0,
        calibration=found,
        correct=right,
        details={
            "by_label": by_label(best, labels),
            "confused": confused(best, labels),
            "reliability": reliability(agreements, right),
        },
    )


def teacher_accuracy(probabilities: FloatArray, classes: IntArray) -> float:
    """How often the given labels int64[n] are likely right, by probabilities float32[n, labels] of models that did not see the row.

    Confident learning (Northcutt, Jiang and Chuang 2021, section 3): a row counts for class j where its probability of j reaches the mean
    that rows labelled j have; the share of rows that count for their own label is the estimate. Rows that count for none are left out,
    so hard rows are not taken for wrong ones.
    """
    labels = probabilities.shape[1]
    rows = np.arange(len(classes))
    counts = np.bincount(classes, minlength=labels)
    sums = np.bincount(classes, weights=probabilities[rows, classes].astype(np.float64), minlength=labels)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    reaching = np.where(probabilities >= thresholds, probabilities, -1.0)
    counted = reaching.max(axis=1) > 0
    if not counted.any():
        return 1.0
    own = reaching.argmax(axis=1) == classes
    return float(np.clip(own[counted].mean(), _WORST_TEACHER, 1.0))


def paired(new: BoolArray, present: BoolArray) -> dict[str, float]:
    """McNemar's exact test: rows where one alone is right, and the two-sided probability of so unequal a split by chance."""
    gained, lost = int((new & ~present).sum()), int((present & ~new).sum())
    total = gained + lost
    tail = sum(math.comb(total, k) for k in range(min(gained, lost) + 1)) / 2**total
    return {"gained": float(gained), "lost": float(lost), "p_value": min(1.0, 2.0 * tail) if total else 1.0}


def by_label(given: Sequence[str], wanted: Sequence[str]) -> list[dict[str, Any]]:
    """Rows and accuracy of each label, the worst first."""
    total, right = Counter(wanted), Counter(mine for mine, theirs in zip(given, wanted, strict=True) if mine == theirs)
    found = [{"label": label, "rows": count, "accuracy": right[label] / count} for label, count in total.items()]
    return sorted(found, key=lambda entry: (entry["accuracy"], -int(entry["rows"]), entry["label"]))


def confused(given: Sequence[str], wanted: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of labels that are taken for one another most."""
    pairs = Counter((theirs, mine) for mine, theirs in zip(given, wanted, strict=True) if mine != theirs)
    return [{"label": label, "taken_for": other, "rows": count} for (label, other), count in pairs.most_common(_MOST_CONFUSED)]


def reliability(agreements: FloatArray, right: BoolArray) -> list[dict[str, float]]:
    """Bins of equal counts: what was promised and what was kept."""
    order = np.argsort(agreements, kind="stable")
    parts = [part for part in np.array_split(order, _BINS) if len(part)]
    return [{"rows": float(len(p)), "promised": float(agreements[p].mean()), "kept": float(right[p].mean())} for p in parts]


def verdict(new: Evaluation, present: BoolArray | None, bar: float) -> str:
    """Why the new version is not published, or "" where it is. `present`: the present student's hits on the same rows."""
    if new.share < MIN_SHARE:
        return f"only {new.share:.1%} of the held-out rows reach the bar {bar:g}; at least {MIN_SHARE:.0%} must. More traffic may help."
    if broken := _broken_promise(new, bar):
        return broken
    if present is None:
        return ""
    before = float(present.mean())
    if new.accuracy < before:
        test = paired(new.correct, present)
        return (
            f"it agrees with the teacher on {new.accuracy:.2%} of the held-out rows, the present student on {before:.2%} (right where the "
            f"other is wrong: {test['gained']:.0f} and {test['lost']:.0f} rows, p = {test['p_value']:.2g})."
        )
    return ""


def _broken_promise(new: Evaluation, bar: float) -> str:
    """The bar is a promise on average; held-out rows are few, and so it has their sampling error of two standard deviations."""
    wanted = bar * new.teacher
    slack = 2 * float(np.sqrt(wanted * (1 - wanted) / max(new.rows * new.share, 1.0)))
    if new.delivered_accuracy >= wanted - slack:
        return ""
    of_teacher = f", and with a teacher that is right in {new.teacher:.1%} it should be {wanted:.1%}" if new.teacher < 1 else ""
    return f"rows that reach the bar {bar:g} agree with the teacher in {new.delivered_accuracy:.1%} only{of_teacher}."
