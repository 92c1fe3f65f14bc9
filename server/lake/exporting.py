"""Rows as a file for other tools: joined as trainers read them, payloads in clear, in Parquet, JSON lines or CSV."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import InvalidArgument

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("parquet", "jsonl", "csv")


def format_of(target: Path, given: str | None) -> str:
    """The format that is asked for, or that a file's name ends in. Raises InvalidArgument for others."""
    found = given or target.suffix.removeprefix(".")
    if found not in FORMATS:
        raise InvalidArgument(
            f"An export is {', '.join(FORMATS)}; {found or 'no ending'!r} is none of them. Give --format.", field="format"
        )
    return found


def write(rows: pa.Table, target: Path, kind: str) -> int:
    """Writes rows to a file that only its owner reads, whole or not at all; returns how many. Lists in CSV are JSON, times ISO 8601."""
    draft = target.with_name(f".{target.name}.part")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        if kind == "parquet":
            import pyarrow.parquet as pq

            pq.write_table(rows, file, compression="zstd", row_group_size=20_000)
        elif kind == "csv":
            import pyarrow.csv

            pyarrow.csv.write_csv(_flat(rows), file)
        else:
            for batch in rows.to_batches(max_chunksize=2000):
                file.write("".join(json.dumps(row, ensure_ascii=False, default=_shown) + "\n" for row in batch.to_pylist()).encode())
    draft.rename(target)
    return int(rows.num_rows)


def _flat(rows: pa.Table) -> pa.Table:
    import pyarrow as pa

    for index, field in enumerate(rows.schema):
        if pa.types.is_list(field.type):
            texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in rows[field.name].to_pylist()]
            rows = rows.set_column(index, field.name, pa.array(texts, pa.string()))
    return rows


def _shown(value: Any) -> str:
    return str(value.isoformat())
