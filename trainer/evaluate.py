"""Judges an adapter by its ONNX file on rows that were held out, against the teacher's labels and the student that serves now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.core import FloatArray
from server.quality import calibration
from server.quality.calibration import BoolArray, Calibration
from server.runtime.heads import LinearHead

# A student that could answer less than this is not worth a take-over.
MIN_SHARE = 0.05


@dataclass(slots=True, frozen=True)
class Evaluation:
    """On `rows` held-out rows. Agreement is with the teacher's label; `share` reaches the bar; cross-fitted: no row judged itself."""

    rows: int
    accuracy: float
    ece: float
    share: float
    delivered_accuracy: float
    calibration: Calibration

    def metrics(self) -> dict[str, float]:
        """For the manifest and the registry."""
        return {
            "held_out_rows": float(self.rows),
            "accuracy": self.accuracy,
            "ece": self.ece,
            "local_share": self.share,
            "local_accuracy": self.delivered_accuracy,
        }


def agreement(head: LinearHead, vectors: FloatArray, labels: Sequence[str]) -> tuple[FloatArray, BoolArray]:
    """The file's probabilities float32[n, labels] and, row by row, whether its best label is the given one."""
    probabilities = head.predict(vectors)
    names = head.manifest.labels
    best = [names[index] for index in probabilities.argmax(axis=1)]
    return probabilities, np.array([mine == theirs for mine, theirs in zip(best, labels, strict=True)], dtype=bool)


def evaluate(head: LinearHead, vectors: FloatArray, labels: Sequence[str], bar: float) -> Evaluation:
    """Runs the head's ONNX file on vectors float32[n, H] and calibrates its quality."""
    probabilities, right = agreement(head, vectors, labels)
    found, qualities = calibration.fit(probabilities, right)
    delivered = qualities >= bar
    return Evaluation(
        rows=len(right),
        accuracy=float(right.mean()),
        ece=found.ece,
        share=float(delivered.mean()),
        delivered_accuracy=float(right[delivered].mean()) if delivered.any() else 0.0,
        calibration=found,
    )


def verdict(new: Evaluation, present_accuracy: float | None, bar: float) -> str:
    """Why the new version is not published, or "" where it is."""
    if new.share < MIN_SHARE:
        return f"only {new.share:.1%} of the held-out rows reach the bar {bar:g}; at least {MIN_SHARE:.0%} must. More traffic may help."
    # The bar is a promise on average; held-out rows are few, and so it has their sampling error of two standard deviations.
    slack = 2 * float(np.sqrt(bar * (1 - bar) / max(new.rows * new.share, 1.0)))
    if new.delivered_accuracy < bar - slack:
        return f"rows that reach the bar {bar:g} agree with the teacher in {new.delivered_accuracy:.1%} only."
    if present_accuracy is not None and new.accuracy < present_accuracy:
        return f"it agrees with the teacher on {new.accuracy:.2%} of the held-out rows, the present student on {present_accuracy:.2%}."
    return ""
