"""Reading a table in pieces, the newest first, beside a serving loop.

Memory is bounded by one piece, one core is used, and the reader can be stopped.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from server.lake import schema, table
from server.lake.place import Place

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 16_384
# Larger files are read by row groups, so that a page out of a day's one large file does not read the whole day.
_SPLIT_ROWS = 40_000
# A table's log has times to the millisecond, cut off.
_ROUNDING = timedelta(milliseconds=2)

# Raises where the reader should give up: its caller has left, or its time is over.
Check = Callable[[], None]


class Scan:
    """One version of a table. `check` is called between batches. Blocking; raises OSError or deltalake's errors where the store fails."""

    def __init__(self, place: Place, name: str, check: Check) -> None:
        self._name = name
        self._check = check
        self._found = table.open_table(place, name)
        self._data = self._found.to_pyarrow_dataset() if self._found is not None else None

    def batches(self, names: Sequence[str], where: Any) -> Iterator[pa.Table]:
        """Rows that a pyarrow expression lets through, with these columns; in no order."""
        if self._data is not None:
            for fragment in self._data.get_fragments(filter=where):
                yield from self.read(fragment, names, where)

    def rows(self, names: Sequence[str], where: Any) -> pa.Table:
        """All of them at once: for few."""
        import pyarrow as pa

        whole = schema.arrow_schema(self._name)
        empty = pa.schema([whole.field(name) for name in names]).empty_table()
        return pa.concat_tables([empty, *self.batches(names, where)])

    def newest_first(self, where: Any) -> Iterator[tuple[datetime, Any]]:
        """Pieces that may hold rows, each with a time that none of its rows is later than, in the order of that time."""
        if self._data is None or self._found is None:
            return
        latest, sizes = self._ends()
        order = itertools.count()  # times may be equal, and fragments do not compare
        heap: list[tuple[float, int, datetime, Any]] = []

        def push(end: datetime, piece: Any) -> None:
            heapq.heappush(heap, (-end.timestamp(), next(order), end, piece))

        for fragment in self._data.get_fragments(filter=where):
            push(latest[fragment.path], fragment)
        while heap:
            _, _, end, piece = heapq.heappop(heap)
            self._check()
            if sizes.pop(piece.path, 0) > _SPLIT_ROWS:
                for group in piece.split_by_row_group(where, schema=self._data.schema):
                    push(_end_of(group, end), group)
            else:
                yield end, piece

    def read(self, piece: Any, names: Sequence[str], where: Any) -> Iterator[pa.Table]:
        """One piece's rows. Columns that a table of an older release lacks are null."""
        import pyarrow as pa

        assert self._data is not None, "a piece has a table"
        whole = schema.arrow_schema(self._name)
        there = [name for name in names if name in self._data.schema.names]
        wanted = pa.schema([whole.field(name) for name in names])
        scanner = piece.scanner(
            schema=self._data.schema,
            columns=there,
            filter=where,
            batch_size=BATCH_ROWS,
            batch_readahead=1,
            fragment_readahead=1,
            use_threads=False,
        )
        for batch in scanner.to_batches():
            self._check()
            if batch.num_rows:
                columns = [
                    batch.column(field.name).cast(field.type) if field.name in there else pa.nulls(batch.num_rows, field.type)
                    for field in wanted
                ]
                yield pa.table(columns, schema=wanted)

    def _ends(self) -> tuple[dict[str, datetime], dict[str, int]]:
        """By file: its last time, and its rows where they are many."""
        import pyarrow as pa

        assert self._found is not None
        actions = pa.table(self._found.get_add_actions(flatten=True))
        days = actions["partition.date"].to_pylist()
        times = actions["max.time"].to_pylist() if "max.time" in actions.column_names else [None] * len(days)
        ends: dict[str, datetime] = {}
        sizes: dict[str, int] = {}
        for path, day, time, rows in zip(actions["path"].to_pylist(), days, times, actions["num_records"].to_pylist(), strict=True):
            end = datetime.fromisoformat(day).replace(tzinfo=UTC) + timedelta(days=1) if time is None else time + _ROUNDING
            ends[path], sizes[path] = end, rows or 0
        return ends, sizes


def _end_of(group: Any, otherwise: datetime) -> datetime:
    """The last time in a row group."""
    statistics = group.row_groups[0].statistics or {}
    end = statistics.get("time", {}).get("max")
    return end.astimezone(UTC) if isinstance(end, datetime) and end.tzinfo is not None else otherwise
