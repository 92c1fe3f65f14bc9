"""Upkeep of the tables: joining small files, deleting what is too old, removing files that nobody reads any more. Memory stays bounded."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from server.lake import table
from server.lake.place import Place
from server.lake.segments import only_one, prepare

if TYPE_CHECKING:
    from deltalake import DeltaTable, WriterProperties

# Every flush makes a file a day that it touches; readers want few.
FILES = 200
TARGET_BYTES = 128 << 20
# A row group is in memory while it is written.
ROW_GROUP = 20_000
# Readers of an older version may be at its files for so long.
KEEP_HOURS = 168

_log = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class Upkeep:
    """What was done to one table. `expired`: rows older than the retention; `busy`: another process is at it, so nothing was done."""

    table: str
    files_before: int = 0
    files_after: int = 0
    expired: int = 0
    removed_files: int = 0
    busy: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def crowded(place: Place, name: str) -> bool:
    """Whether a table has so many files that joining them pays."""
    found = table.open_table(place, name)
    return found is not None and len(found.file_uris()) > FILES


def compact(place: Place, name: str, *, retention_days: int | None = None, keep_hours: int = KEEP_HOURS) -> Upkeep:
    """Deletes rows older than `retention_days` (whole days), joins small files within a day, and removes files that went out of use
    `keep_hours` ago. Readers and writers go on meanwhile. Raises deltalake's errors where the store does not answer.
    """
    place.path.mkdir(parents=True, exist_ok=True)
    with only_one(place.path, f".{name}.compact.lock") as mine:
        if not mine:
            return Upkeep(name, busy=True)
        found = table.open_table(place, name)
        if found is None:
            return Upkeep(name)
        before = len(found.file_uris())
        expired = _expire(found, retention_days) if retention_days else 0
        prepare(found, name)
        joined = joinable(found)
        if joined:
            found.optimize.compact(
                partition_filters=[("date", "in", joined)],
                target_size=TARGET_BYTES,
                max_concurrent_tasks=1,
                writer_properties=writer(),
            )
        removed = found.vacuum(retention_hours=keep_hours, dry_run=False, enforce_retention_duration=False)
        found.create_checkpoint()
        found.cleanup_metadata()
        return Upkeep(name, before, len(found.file_uris()), expired, len(removed))


def writer() -> WriterProperties:
    """How Parquet is written where many rows are: small row groups, so that memory is bounded by one of them."""
    from deltalake import WriterProperties

    return WriterProperties(max_row_group_size=ROW_GROUP, compression="ZSTD", compression_level=3)


def joinable(found: DeltaTable) -> list[str]:
    """Days that have more than one file that is not full."""
    import pyarrow as pa

    actions = pa.table(found.get_add_actions(flatten=True))
    small: dict[str, int] = {}
    for day, size in zip(actions["partition.date"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True):
        small[day] = small.get(day, 0) + (size < TARGET_BYTES)
    return sorted(day for day, number in small.items() if number > 1)


def _expire(found: DeltaTable, days: int) -> int:
    first = (datetime.now(UTC) - timedelta(days=days)).date().isoformat()
    deleted = int(found.delete(f"date < '{first}'").get("num_deleted_rows") or 0)
    found.update_incremental()
    return deleted
