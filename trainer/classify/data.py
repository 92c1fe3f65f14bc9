"""The rows of a run as arrays."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from server.core import FloatArray, IntArray
from server.errors import TooLittleData
from server.quality.calibration import MIN_ROWS, BoolArray
from trainer.curate.rows import Curated, Row, normalised
from trainer.report import Report

# With one row alone a label can be trained on or checked, not both.
MIN_ROWS_A_LABEL = 2


@dataclass(slots=True, frozen=True)
class Data:
    """Rows that the base takes, and the skill's labels that they have, in the skill's order. Parts are masks over the rows."""

    rows: list[Row]
    labels: list[str]

    @property
    def texts(self) -> list[str]:
        return [row.text for row in self.rows]

    @property
    def classes(self) -> IntArray:
        """int64[n]."""
        index = {label: number for number, label in enumerate(self.labels)}
        return np.array([index[row.label] for row in self.rows], dtype=np.int64)

    @property
    def weights(self) -> FloatArray:
        """float32[n]: how much a row counts."""
        return np.array([row.weight for row in self.rows], dtype=np.float32)

    @property
    def held_out(self) -> BoolArray:
        """bool[n]: for the evaluation alone."""
        return np.array([row.held_out for row in self.rows], dtype=bool)

    def validated(self, share: float) -> BoolArray:
        """bool[n]: about `share` of the training rows, for early stopping; by a hash of the text that has nothing to do with `held_out`."""
        picked = np.array([_share_of(row.text) < share for row in self.rows], dtype=bool)
        return np.asarray(picked & ~self.held_out)

    @property
    def held_labels(self) -> list[str]:
        """The teacher's labels of the held-out rows."""
        return [row.label for row in self.rows if row.held_out]


def _share_of(text: str) -> float:
    return int.from_bytes(hashlib.sha256(b"validation\0" + normalised(text).encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def enough(curated: Curated, skill: str, minimum: int, report: Report) -> list[Row]:
    """The rows of labels that have some to train on. Raises TooLittleData with the count and the minimum."""
    train = Counter(row.label for row in curated.rows if not row.held_out)
    rows = [row for row in curated.rows if train[row.label] >= MIN_ROWS_A_LABEL]
    rare = len(curated.rows) - len(rows)
    if rare:
        report.dropped["label has too few rows"] = rare
    held = sum(row.held_out for row in rows)
    dropped = "; ".join(f"{count} rows: {why}" for why, count in report.dropped.items()) or "none were dropped"
    for count, least, what in ((len(rows), minimum, "rows"), (held, MIN_ROWS, "held-out rows"), (len(set(train)), 2, "labels")):
        if count < least:
            message = f"{skill!r} has {count} {what} to learn from; {least} are needed ({curated.read} were read, {dropped})."
            raise TooLittleData(f"{message} Let more traffic pass, or lower min_rows.", count=count, rows=count, minimum=least, skill=skill)
    return rows
