"""`understudy lake verify`: every Parquet file read whole, every id counted, every segment of the log looked through. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.lake import log, schema, table
from server.lake.place import Place

if TYPE_CHECKING:
    from deltalake import DeltaTable

_IDS = {schema.INTERACTIONS: "interaction_id", schema.FEEDBACK: "feedback_id"}  # a shadow has none of its own


@dataclass(slots=True)
class TableCheck:
    """`expected`: rows by the table's own log; `repeated`: rows whose id another row has too (feedback that was sent twice is no fault)."""

    rows: int = 0
    expected: int = 0
    files: int = 0
    unreadable: list[str] = field(default_factory=list)
    repeated: int = 0

    @property
    def sound(self) -> bool:
        """Whether the table is as it should be."""
        return not self.unreadable and self.rows == self.expected


@dataclass(slots=True)
class Check:
    """`damaged`: names of segments that were set aside or hold bytes that cannot be read; `segments`: that wait; `rejected`: files."""

    tables: dict[str, TableCheck] = field(default_factory=dict)
    segments: int = 0
    damaged: list[str] = field(default_factory=list)
    rejected: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged and no interaction is there twice."""
        return not self.damaged and all(one.sound for one in self.tables.values()) and not self.tables[schema.INTERACTIONS].repeated

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "sound": self.sound}


def verify(place: Place) -> Check:
    """Looks at everything. Raises deltalake's errors where a table's log itself cannot be read."""
    check = Check()
    for name in schema.TABLES:
        check.tables[name] = _table(place, name)
        for path in sorted(place.log(name).glob("*")):
            if path.suffix == ".damaged":
                check.damaged.append(path.name)
            elif path.suffix in (".sealed", ".open"):
                check.segments += 1
                if path.suffix == ".sealed" and _unreadable_bytes(path):
                    check.damaged.append(path.name)
    check.rejected = len(list((place.path / "log" / "rejected").glob("*.jsonl")))
    return check


def _unreadable_bytes(path: Path) -> int:
    try:
        return log.salvage(path)[1]
    except FileNotFoundError:  # a row by now
        return 0


def _table(place: Place, name: str) -> TableCheck:
    found = table.open_table(place, name)
    check = TableCheck()
    if found is None:
        return check
    check.expected, check.files = int(found.count()), len(found.file_uris())
    seen: set[str] = set()
    for file, ids in _ids(found, _IDS.get(name, "interaction_id")):
        if ids is None:
            check.unreadable.append(file)
            continue
        check.rows += len(ids)
        if name in _IDS:
            before = len(seen)
            seen.update(ids)
            check.repeated += len(ids) - (len(seen) - before)
    return check


def _ids(found: DeltaTable, column: str) -> Iterator[tuple[str, list[str] | None]]:
    """Each file with its ids, None where it cannot be read. All columns are read, so that every page is looked at."""
    import pyarrow as pa

    for fragment in found.to_pyarrow_dataset().get_fragments():
        ids: list[str] = []
        try:
            for batch in fragment.to_batches(batch_size=16_384):
                ids += batch.column(batch.schema.get_field_index(column)).to_pylist()
        except (pa.ArrowException, OSError, ValueError, KeyError):
            yield fragment.path, None
        else:
            yield fragment.path, ids
