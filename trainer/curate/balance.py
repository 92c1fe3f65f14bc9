"""How much the labels count: weights for rare ones, a limit for frequent ones."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from trainer.curate.duplicates import better
from trainer.curate.rows import Row

TOO_MANY = "its label has more rows than curation.max_rows_per_label"


def capped(rows: Sequence[Row], most: int | None, drop: Callable[[Row, str], None]) -> list[Row]:
    """At most `most` training rows a label, the best of them; held-out rows stay as they come."""
    if most is None:
        return list(rows)
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.label and not row.held_out:
            by_label[row.label].append(row)
    gone = {id(row) for same in by_label.values() for row in sorted(same, key=better, reverse=True)[most:]}
    kept = []
    for row in rows:
        if id(row) in gone:
            drop(row, TOO_MANY)
        else:
            kept.append(row)
    return kept


def weighted(rows: Sequence[Row], strength: float) -> list[Row]:
    """Weights times (mean count of a label / count of the row's label) ** strength, over training rows; 0 leaves them as they are."""
    counts = Counter(row.label for row in rows if row.label and not row.held_out)
    if not strength or len(counts) < 2:
        return list(rows)
    mean = sum(counts.values()) / len(counts)
    return [
        replace(row, weight=row.weight * (mean / counts[row.label]) ** strength) if row.label in counts and not row.held_out else row
        for row in rows
    ]
