"""How good probabilities are on a later part of the traffic, and which of two models of them is the better one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from server.core import FloatArray
from server.quality.calibration import BoolArray, expected_error
from server.quality.report import auroc

LATER = 0.25  # share of the rows, the latest, that nothing is fitted on
# What a better Brier score may cost in the two others: they are noisier, and it is made of them.
_ECE_SLACK, _AUROC_SLACK = 0.01, 0.01


@dataclass(slots=True, frozen=True)
class Figures:
    """On `rows` rows, `share` of which came out true. `auroc` None: all came out alike."""

    rows: int
    share: float
    ece: float
    brier: float
    auroc: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def in_words(self) -> str:
        """For a line of a report."""
        order = f"{self.auroc:.3f}" if self.auroc is not None else "none"
        return f"calibration error {self.ece:.3f}, Brier {self.brier:.4f}, AUROC {order} on {self.rows} rows"


def figures(probabilities: FloatArray, outcomes: BoolArray) -> Figures:
    """Of probabilities float32[n] that were made without knowing outcomes bool[n]."""
    values = probabilities.astype(np.float64)
    return Figures(
        rows=len(values),
        share=float(outcomes.mean()),
        ece=expected_error(probabilities, outcomes),
        brier=float(np.mean((values - outcomes) ** 2)),
        auroc=auroc(values, outcomes),
    )


def why_not(before: Figures, after: Figures) -> str:
    """Why the second is not to replace the first, or "": its Brier score must be lower, and the others no worse."""
    if after.brier >= before.brier:
        return f"its Brier score is {after.brier:.4f}, the present one's {before.brier:.4f}"
    if after.ece > before.ece + _ECE_SLACK:
        return f"its calibration error is {after.ece:.3f}, the present one's {before.ece:.3f}"
    if before.auroc is not None and after.auroc is not None and after.auroc < before.auroc - _AUROC_SLACK:
        return f"its AUROC is {after.auroc:.3f}, the present one's {before.auroc:.3f}"
    return ""


def split_by_time(times: Sequence[datetime], groups: npt.NDArray[np.int64], later: float = LATER) -> npt.NDArray[np.bool_]:
    """bool[n]: the rows to measure on, the latest. A group that stands in both parts is fitted on alone: it would know the answer."""
    order = np.argsort(np.array([time.timestamp() for time in times]), kind="stable")
    held = np.zeros(len(times), bool)
    held[order[len(order) - int(len(order) * later) :]] = True
    earlier = np.unique(groups[~held])
    return held & ~np.isin(groups, earlier)
