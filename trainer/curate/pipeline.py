"""From the lake's rows to rows worth learning from, with a count and a reason for each that falls away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.lake import schema, table
from trainer.curate.rows import Curated, Row, is_held_out, normalised

COLUMNS = ["interaction_id", "time", "input_kind", "input", "teacher_label", "training_allowed", "source_model"]
NO_TEACHER = "no label from a teacher or a person"
NOT_ALLOWED = "the provider's terms do not allow training (training_allowed)"
FOREIGN_LABEL = "label is not one of the skill's"
DISPUTED = "equal texts with labels that disagree"
REPEATED = "repeats another row's text"
THUMBS_DOWN = "thumbs down without a correction"


@dataclass(slots=True, frozen=True)
class Saying:
    """What people said of one interaction: the last correction and thumb."""

    correction: str | None
    thumb: str | None


def read(lake: Path, skill: str, labels: Iterable[str]) -> Curated:
    """Reads the lake's Parquet and curates it."""
    found = table.open_table(lake, schema.INTERACTIONS)
    rows = table.read(lake, schema.INTERACTIONS, equals={"skill": skill}, names=COLUMNS).to_pylist()
    curated = curate(rows, set(labels), sayings(lake))
    curated.table_version = int(found.version()) if found is not None else 0
    return curated


def sayings(lake: Path) -> dict[str, Saying]:
    """The last word on each interaction that has feedback. A repeated feedback id counts once: it says the same."""
    rows = table.read(lake, schema.FEEDBACK, names=["interaction_id", "time", "correction", "thumb"]).to_pylist()
    found: dict[str, Saying] = {}
    for row in sorted(rows, key=lambda row: row["time"]):
        before = found.get(row["interaction_id"], Saying(None, None))
        found[row["interaction_id"]] = Saying(row["correction"] or before.correction, row["thumb"] or before.thumb)
    return found


def curate(rows: Iterable[Mapping[str, object]], labels: set[str], said: Mapping[str, Saying]) -> Curated:
    """Keeps one row a text: a person's correction before a teacher's label, else the label most of its rows have."""
    result = Curated()
    groups: dict[str, list[Row]] = {}
    for raw in sorted(rows, key=lambda row: (str(row["time"]), str(row["interaction_id"]))):
        result.read += 1
        row, reason = _label(raw, labels, said)
        if row is None:
            result.dropped[reason] += 1
            continue
        result.sources[str(raw.get("source_model") or "unknown")] += 1
        groups.setdefault(normalised(row.text), []).append(row)
    for same in groups.values():
        corrected = [row for row in same if row.corrected]
        votes = Counter(row.label for row in corrected or same).most_common(2)
        if len(votes) == 2 and votes[0][1] == votes[1][1]:
            result.dropped[DISPUTED] += len(same)
            continue
        result.rows.append(next(row for row in reversed(corrected or same) if row.label == votes[0][0]))
        if len(same) > 1:
            result.dropped[REPEATED] += len(same) - 1
    return result


def _label(raw: Mapping[str, object], labels: set[str], said: Mapping[str, Saying]) -> tuple[Row | None, str]:
    """The row with its label, or why it has none."""
    key, text = str(raw["interaction_id"]), str(raw["input"] or "")
    saying = said.get(key)
    if saying is not None and saying.correction is not None and saying.correction in labels:
        # A person's own words: no provider's terms stand in the way.
        return Row(key, text, saying.correction, is_held_out(text), corrected=True), ""
    teacher = raw["teacher_label"]
    if not teacher or raw["input_kind"] != "text" or not text.strip():
        return None, NO_TEACHER
    if not raw["training_allowed"]:
        return None, NOT_ALLOWED
    if teacher not in labels:
        return None, FOREIGN_LABEL
    if saying is not None and saying.thumb == "down":
        return None, THUMBS_DOWN
    return Row(key, text, str(teacher), is_held_out(text)), ""
