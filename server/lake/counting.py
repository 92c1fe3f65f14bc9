"""How many rows of a skill may be learned from: for schedules, and to refuse a job on too little data at once."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime

from server.config import Config
from server.lake import log, table
from server.lake.place import Place
from server.lake.reading import LakeReader
from server.lake.schema import INTERACTIONS

_COLUMNS = ["teacher_label", "teacher_text", "training_allowed", "correction"]
_LARGE = 200_000  # rows of all skills; counting in so large a table takes seconds, and too few rows are hardly the case
_LARGE_LOG_BYTES = 4 << 20


def good_rows(reader: LakeReader, skill: str, since_ms: int = 0) -> int:
    """Rows of the table from `since_ms` (since 1970) on with a teacher's answer or a correction, that may be trained on."""
    import pyarrow.compute as pc

    rows = reader.interactions(skill=skill, since=datetime.fromtimestamp(since_ms / 1000, UTC), columns=_COLUMNS)
    taught = pc.or_(pc.is_valid(rows["teacher_label"]), pc.is_valid(rows["teacher_text"]))
    allowed = pc.fill_null(rows["training_allowed"], False)
    good = pc.or_(pc.and_(taught, allowed), pc.is_valid(rows["correction"]))
    return int(pc.sum(good).as_py() or 0)


def rows_to_learn_from(config: Config, reader: LakeReader, skill: str) -> int | None:
    """`good_rows` with those that are still in the log, of which sealed ones count whatever they are; None where that is a long count."""
    place = Place.of(config.lake)
    if table.count(place, INTERACTIONS) > _LARGE:
        return None
    waiting, size = 0, 0
    for path in (*place.log(INTERACTIONS).glob("*.open"), *place.log(INTERACTIONS).glob("*.sealed")):
        with suppress(FileNotFoundError):  # it has become rows
            size += path.stat().st_size
            if size > _LARGE_LOG_BYTES:
                return None
            waiting += sum(_good(payload, skill) for payload, _ in log.read_payloads(path))
    return waiting + good_rows(reader, skill)


def _good(payload: bytes, skill: str) -> bool:
    try:
        row = json.loads(payload)
    except ValueError:
        return True  # sealed: nobody knows
    taught = row.get("teacher_label") is not None or row.get("teacher_text") is not None
    return row.get("skill") == skill and bool(row.get("training_allowed")) and taught
