"""Sealed log segments become rows of a Delta table, each segment exactly once, and are then dropped.

A Parquet file that the table's log does not name is invisible, so a death at any point leaves either the segment or the commit, or both;
the segment's id is recorded in the commit as an application transaction, and a segment whose id the table already holds is dropped unread.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.lake import log, schema
from server.lake.place import Place

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable

# One commit takes at most so much log, so that a long backlog does not have to fit in memory.
COMMIT_BYTES = 64 << 20
# Every flush makes a file; readers want few.
FILES = 200
# A replayed segment is at most as old as a backup; ids older than that may be forgotten by the table.
_PROPERTIES = {"delta.setTransactionRetentionDuration": "interval 90 days", "delta.logRetentionDuration": "interval 30 days"}

_log = logging.getLogger(__name__)


def log_folder(lake: Path, table: str) -> Path:
    """Where a table's segments are."""
    return lake / "log" / table


def open_table(lake: Path | Place, table: str) -> DeltaTable | None:
    """The Delta table, or None while it has no commit."""
    from deltalake import DeltaTable

    place = Place.at(lake)
    uri, options = place.table(table), dict(place.options)
    return DeltaTable(uri, storage_options=options) if DeltaTable.is_deltatable(uri, options) else None


def read(
    lake: Path | Place, table: str, *, equals: Mapping[str, str] | None = None, names: Sequence[str] | None = None, where: Any = None
) -> pa.Table:
    """The rows whose columns equal `equals` and that a pyarrow expression `where` lets through, with the columns `names` (None: all).

    A table of an older release lacks columns: they are null. Empty while there is no commit.
    """
    wanted = list(names) if names is not None else schema.columns(table)
    found = open_table(lake, table)
    if found is None:
        return schema.arrow_schema(table).empty_table().select(wanted)
    return scan(found, table, equals=equals, names=wanted, where=where)


def scan(found: DeltaTable, table: str, *, equals: Mapping[str, str] | None = None, names: Sequence[str], where: Any = None) -> pa.Table:
    """As `read`, of a table that is open, so that several scans see one version."""
    import pyarrow as pa
    import pyarrow.dataset as ds

    data = found.to_pyarrow_dataset()
    for name, value in (equals or {}).items():
        term = ds.field(name) == value
        where = term if where is None else where & term
    there = [name for name in names if name in data.schema.names]
    rows = data.to_table(columns=there, filter=where)
    whole = schema.arrow_schema(table)
    columns = [
        rows[name].cast(whole.field(name).type) if name in there else pa.nulls(rows.num_rows, whole.field(name).type) for name in names
    ]
    return pa.table(columns, schema=pa.schema([whole.field(name) for name in names]))


def count(lake: Path | Place, table: str) -> int:
    """Rows in the table, from its log alone."""
    found = open_table(lake, table)
    return int(found.count()) if found is not None else 0


@contextmanager
def _only_one(folder: Path) -> Iterator[bool]:
    """Whether this process may convert: one at a time a folder, and the lock falls with its holder."""
    fd = os.open(folder / ".convert.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        yield False
        return
    try:
        yield True
    finally:
        os.close(fd)


def convert(lake: Path, table: str) -> int:
    """Turns all sealed segments of a table (and those of dead writers) into rows; returns how many rows it committed.

    Does nothing where another process is at it.
    """
    folder = log_folder(lake, table)
    if not folder.exists():
        return 0
    with _only_one(folder) as mine:
        if not mine:
            return 0
        log.recover(folder)
        total = 0
        batch: list[Path] = []
        size = 0
        for path in log.sealed_segments(folder):
            batch.append(path)
            size += path.stat().st_size
            if size >= COMMIT_BYTES:
                total += _commit(lake, table, batch)
                batch, size = [], 0
        total += _commit(lake, table, batch) if batch else 0
        if total:
            _tidy(lake, table)
        return total


def _commit(lake: Path, table: str, segments: list[Path]) -> int:
    from deltalake import CommitProperties, Transaction, write_deltalake

    current = open_table(lake, table)
    fresh = [path for path in segments if current is None or current.transaction_version(path.stem) is None]
    records: list[dict[str, Any]] = []
    for path in fresh:
        records += _intact(path)
    data, rejected = schema.to_arrow(table, records)
    if rejected:
        _keep_rejected(lake, table, fresh[0].stem, rejected)
    if data.num_rows:
        write_deltalake(
            str(lake / table),
            data,
            mode="append",
            partition_by=["date"],
            configuration=_PROPERTIES if current is None else None,
            commit_properties=CommitProperties(app_transactions=[Transaction(app_id=path.stem, version=1) for path in fresh]),
        )
    for path in segments:
        path.unlink(missing_ok=True)
    return int(data.num_rows)


def _tidy(lake: Path, table: str) -> None:
    """Joins small files once there are many, and removes those that were joined a week ago: a reader may still be at the newer ones."""
    found = open_table(lake, table)
    if found is not None and len(found.file_uris()) > FILES:
        found.optimize.compact()
        found.vacuum(dry_run=False)


def _intact(path: Path) -> list[dict[str, Any]]:
    """The records before the first damage. A sealed segment has none; where a disk made some, the file is kept for a person to look at."""
    intact = list(log.read_payloads(path))
    end = intact[-1][1] if intact else 0
    if end < path.stat().st_size:
        damaged = path.with_suffix(".damaged")
        if not damaged.exists():
            os.link(path, damaged)
        _log.error("log segment %s is damaged after byte %d; kept it as %s", path.name, end, damaged.name)
    return [json.loads(payload) for payload, _ in intact]


def _keep_rejected(lake: Path, table: str, segment: str, records: list[Any]) -> None:
    folder = lake / "log" / "rejected"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{table}-{segment}.jsonl"
    draft = target.with_suffix(".part")
    draft.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    draft.rename(target)
    _log.error("%d records of log segment %s do not fit the table %s; kept them in %s", len(records), segment, table, target)
