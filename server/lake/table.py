"""The lake's tables: opening, reading, counting. Writing is in server.lake.segments, upkeep in server.lake.maintenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import reduce
from operator import and_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.lake import schema
from server.lake.place import Place

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable


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


def between(since: datetime | None, until: datetime | None) -> Any:
    """A condition on `time`, from `since` on and before `until` (aware); on the day too, so that other partitions are not opened."""
    import pyarrow.dataset as ds

    terms = []
    if since is not None:
        terms.append((ds.field("time") >= since) & (ds.field("date") >= since.astimezone(UTC).date().isoformat()))
    if until is not None:
        terms.append((ds.field("time") < until) & (ds.field("date") <= until.astimezone(UTC).date().isoformat()))
    return reduce(and_, terms) if terms else None


def count(lake: Path | Place, table: str) -> int:
    """Rows in the table, from its log alone."""
    found = open_table(lake, table)
    return int(found.count()) if found is not None else 0


def convert(lake: Path | Place, table: str) -> int:
    """Turns the log's sealed segments into rows, without asking a registry about users; returns how many (see server.lake.segments)."""
    from server.lake.segments import Converter

    return Converter(Place.at(lake)).run(table)
