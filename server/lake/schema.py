"""Columns of the lake's tables, as protos/understudy/v1/interaction.proto has them. All are partitioned by `date`, the UTC day of `time`.

A column may be added, never renamed or given another type: readers of old files get null for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

INTERACTIONS = "interactions"
FEEDBACK = "feedback"
SHADOWS = "shadows"  # answers that were asked for comparison and came after the interaction was written down
TABLES = (INTERACTIONS, FEEDBACK, SHADOWS)

# `hops`, `parameters`, `detection`, `tool_calls`, `teacher_tokens`, and `input` of other kinds than text are JSON. Costs are integers of
# 1e-6 US dollars, latencies milliseconds. `role` of a shadow: "student" or "teacher"; `metrics` of feedback: JSON, name to number.
_COLUMNS: dict[str, dict[str, str]] = {
    INTERACTIONS: {
        "interaction_id": "string",
        "date": "string",
        "time": "timestamp",
        "request_id": "string",
        "skill": "string",
        "task": "string",
        "input_kind": "string",
        "input": "string",
        "hops": "string",
        "candidate": "string",
        "local": "bool",
        "output_text": "string",
        "labels": "strings",
        "scores": "floats",
        "quality": "float",
        "error": "string",
        "cost_micro_usd": "int",
        "input_tokens": "int",
        "output_tokens": "int",
        "queue_ms": "float",
        "tokenize_ms": "float",
        "run_ms": "float",
        "post_ms": "float",
        "provider_ms": "float",
        "total_ms": "float",
        "teacher_label": "string",
        "student_label": "string",
        "student_quality": "float",
        "student": "string",
        "student_version": "string",
        "source_model": "string",
        "training_allowed": "bool",
        "rollout_stage": "string",
        "propensity": "float",
        "user_hash": "string",
        "instruction": "string",
        "parameters": "string",
        "detection": "string",
        "preference": "string",
        "difficulty": "float",
        "tool_calls": "string",
        "finish_reason": "string",
        "findings": "strings",
        "first_token_ms": "float",
        "stream": "bool",
        "teacher_text": "string",
        "student_text": "string",
        "tenant": "string",
        "sealed": "string",
        "teacher_tokens": "string",
    },
    FEEDBACK: {
        "feedback_id": "string",
        "date": "string",
        "time": "timestamp",
        "request_id": "string",
        "interaction_id": "string",
        "rating": "int",
        "thumb": "string",
        "correction": "string",
        "comment": "string",
        "user_hash": "string",
        "metrics": "string",
        "sealed": "string",
    },
    SHADOWS: {
        "interaction_id": "string",
        "date": "string",
        "time": "timestamp",
        "skill": "string",
        "candidate": "string",
        "role": "string",
        "label": "string",
        "text": "string",
        "quality": "float",
        "source_model": "string",
        "training_allowed": "bool",
        "cost_micro_usd": "int",
        "total_ms": "float",
        "error": "string",
        "user_hash": "string",
        "sealed": "string",
        "propensity": "float",
    },
}

# What a user said or was told: sealed under the user's key where there is one, gone when the user is erased.
PAYLOADS: dict[str, tuple[str, ...]] = {
    INTERACTIONS: (
        "input",
        "output_text",
        "labels",
        "teacher_label",
        "student_label",
        "instruction",
        "parameters",
        "detection",
        "tool_calls",
        "findings",
        "teacher_text",
        "student_text",
        "teacher_tokens",
    ),
    FEEDBACK: ("correction", "comment"),
    SHADOWS: ("label", "text"),
}
# Columns that are lists of strings.
LISTS: dict[str, frozenset[str]] = {
    table: frozenset(name for name, kind in columns.items() if kind == "strings") for table, columns in _COLUMNS.items()
}


def kinds(table: str) -> dict[str, str]:
    """A table's columns and what each holds: string, strings, float, floats, int, bool, timestamp."""
    return dict(_COLUMNS[table])


def columns(table: str) -> list[str]:
    """Names of a table's columns, in order."""
    return list(_COLUMNS[table])


def arrow_schema(table: str) -> pa.Schema:
    """The Arrow schema of a table."""
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "strings": pa.list_(pa.string()),
        "floats": pa.list_(pa.float32()),
        "float": pa.float64(),
        "int": pa.int64(),
        "bool": pa.bool_(),
        "timestamp": pa.timestamp("us", tz="UTC"),
    }
    return pa.schema([pa.field(name, types[kind]) for name, kind in _COLUMNS[table].items()])


def to_row(table: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A log record as a row: `time_ns` becomes `time` and `date`; unknown keys fall away, missing ones are null.

    Raises:
        ValueError, TypeError, KeyError: the record has no usable `time_ns`.
    """
    time = datetime.fromtimestamp(int(record["time_ns"]) / 1e9, UTC)
    row = {name: record.get(name) for name in _COLUMNS[table]}
    row["time"] = time
    row["date"] = time.date().isoformat()
    return row


def from_payloads(table: str, payloads: Sequence[bytes]) -> tuple[pa.Table, list[bytes]]:
    """An Arrow table of the log's records (JSON) that fit the schema, and the records that do not."""
    import pyarrow as pa

    if not payloads:
        return arrow_schema(table).empty_table(), []
    try:
        return _parsed(table, payloads), []
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        pass  # one of them at least does not fit: look at each
    schema = arrow_schema(table)
    parts: list[pa.Table] = []
    rejected: list[bytes] = []
    for payload in payloads:
        try:
            parts.append(pa.Table.from_pylist([to_row(table, json.loads(payload))], schema=schema))
        except (pa.ArrowException, ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError):
            rejected.append(payload)
    return pa.concat_tables([*parts, schema.empty_table()]).combine_chunks(), rejected


def _parsed(table: str, payloads: Sequence[bytes]) -> pa.Table:
    """All records at once, by Arrow's own reader, some ten times as fast as one by one. Raises where any of them does not fit."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.json

    whole = arrow_schema(table)
    fields = [pa.field("time_ns", pa.int64()), *(field for field in whole if field.name not in ("time", "date"))]
    text = b"\n".join(payloads)
    # A record must not be longer than a block, and a block becomes a chunk.
    block = max(1 << 20, 2 * max(map(len, payloads)) + 2)
    rows = pa.json.read_json(
        pa.BufferReader(text),
        read_options=pa.json.ReadOptions(block_size=min(block, (1 << 31) - 1)),
        parse_options=pa.json.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore"),
    )
    if rows.num_rows != len(payloads) or rows["time_ns"].null_count:
        raise ValueError("a record without time_ns, or more than one object in a record")
    time = pc.cast(pc.divide(rows["time_ns"], 1000), pa.timestamp("us", tz="UTC"))
    date = pc.strftime(time, format="%Y-%m-%d")
    columns = {**{name: rows[name] for name in rows.column_names}, "time": time, "date": date}
    return pa.table([columns[name] for name in whole.names], schema=whole).combine_chunks()
