"""What a lake holds and what waits in its log, from few columns and the tables' own lists of files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.lake import schema, table
from server.lake.place import Place

if TYPE_CHECKING:
    import pyarrow as pa

_NAMES = ["date", "skill", "local", "cost_micro_usd", "error", "quality", "total_ms"]


@dataclass(slots=True, frozen=True)
class TableStats:
    """Rows, Parquet files in use, their bytes, and the Delta version; -1 while there is no table."""

    rows: int = 0
    files: int = 0
    bytes: int = 0
    version: int = -1


@dataclass(slots=True, frozen=True)
class Group:
    """Interactions of one day or skill. `local_share`: of those that were answered; `cost_usd`; `errors`: nobody could answer;
    `mean_quality`: where it is known, else None; `mean_ms`: from begin to end.
    """

    name: str
    interactions: int
    local_share: float
    cost_usd: float
    errors: int
    mean_quality: float | None
    mean_ms: float


@dataclass(slots=True, frozen=True)
class Backlog:
    """What is not in the tables: bytes and segments of the log that wait, damaged segments and files of rejected records."""

    segments: int = 0
    bytes: int = 0
    damaged: int = 0
    rejected: int = 0


@dataclass(slots=True, frozen=True)
class LakeStats:
    """See the parts. `days` and `skills` are of the time that was asked for."""

    tables: dict[str, TableStats]
    backlog: Backlog
    days: list[Group] = field(default_factory=list)
    skills: list[Group] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def stats(place: Place, *, since: datetime | None = None, until: datetime | None = None, skill: str | None = None) -> LakeStats:
    """Counts a lake. Raises deltalake's errors where its store does not answer."""
    tables = {name: _table(place, name) for name in schema.TABLES}
    rows = table.read(
        place, schema.INTERACTIONS, equals={"skill": skill} if skill else None, names=_NAMES, where=table.between(since, until)
    )
    return LakeStats(tables, backlog(place), _groups(rows, "date"), _groups(rows, "skill"))


def backlog(place: Place) -> Backlog:
    """What waits in the log of this machine."""
    waiting = [path for name in schema.TABLES for path in _files(place.log(name)) if path.suffix in (".open", ".sealed")]
    damaged = [path for name in schema.TABLES for path in _files(place.log(name)) if path.suffix == ".damaged"]
    return Backlog(len(waiting), sum(map(_size, waiting)), len(damaged), len(_files(place.path / "log" / "rejected")))


def _table(place: Place, name: str) -> TableStats:
    import pyarrow as pa

    found = table.open_table(place, name)
    if found is None:
        return TableStats()
    actions = pa.table(found.get_add_actions(flatten=True))
    sizes = actions["size_bytes"].to_pylist()
    return TableStats(int(found.count()), len(sizes), sum(sizes), int(found.version()))


def _groups(rows: pa.Table, by: str) -> list[Group]:
    import pyarrow as pa
    import pyarrow.compute as pc

    failed = pc.is_valid(rows["error"])
    rows = rows.append_column("failed", failed.cast(pa.int64()))
    rows = rows.append_column("here", pc.and_(pc.fill_null(rows["local"], False), pc.invert(failed)).cast(pa.int64()))
    sums = [("here", "sum"), ("failed", "sum"), ("cost_micro_usd", "sum"), ("quality", "mean"), ("total_ms", "mean"), ([], "count_all")]
    found = rows.group_by(by).aggregate(sums).sort_by(by).to_pylist()
    return [
        Group(
            row[by] or "",
            row["count_all"],
            row["here_sum"] / max(row["count_all"] - row["failed_sum"], 1),
            (row["cost_micro_usd_sum"] or 0) / 1e6,
            row["failed_sum"],
            row["quality_mean"],
            row["total_ms_mean"] or 0.0,
        )
        for row in found
    ]


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # converted meanwhile
        return 0
