"""The tables are what the proto says, only ever grow, and are read and written across releases."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.lake import schema, table
from server.lake.log import Log
from server.lake.schema import FEEDBACK, INTERACTIONS, SHADOWS, TABLES
from understudy.v1 import interaction_pb2

ROOT = Path(__file__).resolve().parents[2]
MESSAGES: dict[str, Any] = {
    INTERACTIONS: interaction_pb2.Interaction,
    FEEDBACK: interaction_pb2.FeedbackRow,
    SHADOWS: interaction_pb2.Shadow,
}
_TYPES = {"TYPE_STRING": "string", "TYPE_INT64": "int", "TYPE_DOUBLE": "float", "TYPE_BOOL": "bool", "TYPE_MESSAGE": "timestamp"}


def kind_of(field: Any) -> str:
    name = {number: name for name, number in vars(type(field)).items() if name.startswith("TYPE_")}[field.type]
    if field.is_repeated:
        return {"TYPE_STRING": "strings", "TYPE_FLOAT": "floats"}[name]
    return _TYPES[name]


@pytest.mark.parametrize("name", TABLES)
def test_columns_are_the_protos(name: str) -> None:
    fields = MESSAGES[name].DESCRIPTOR.fields
    assert {field.name: kind_of(field) for field in fields} == schema.kinds(name)


@pytest.mark.parametrize("name", TABLES)
def test_released_columns_stay_as_they_are(name: str) -> None:
    """released_columns.json gets a new entry with each release and never loses one."""
    released = json.loads((Path(__file__).parent / "released_columns.json").read_text())
    numbers = {field.name: field.number for field in MESSAGES[name].DESCRIPTOR.fields}
    for release in released.values():
        for column, (kind, number) in release[name].items():
            assert schema.kinds(name).get(column) == kind, f"{name}.{column} was released as {kind}"
            assert numbers[column] == number


def test_payloads_are_those_that_the_proto_calls_so() -> None:
    spec = importlib.util.spec_from_file_location("describe_lake", ROOT / "protos" / "describe_lake.py")
    assert spec is not None and spec.loader is not None
    describe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(describe)
    for name, columns in describe.columns().items():
        assert all(meaning for _, _, meaning in columns), name
        assert {column for column, _, meaning in columns if meaning.startswith("Payload.")} == set(schema.PAYLOADS[name])
    page = (ROOT / "docs" / "lake.md").read_text(encoding="utf-8")
    assert describe.page(page) == page, "run python protos/describe_lake.py"


def append(lake: Path, name: str, *records: dict[str, Any]) -> None:
    log = Log(table.log_folder(lake, name))
    log.append(records)
    log.close()
    table.convert(lake, name)


def test_a_table_of_an_older_release_is_read_and_grows(tmp_path: Path) -> None:
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake

    old = pa.table({"interaction_id": ["old"], "date": ["2026-01-01"], "skill": ["s"], "input": ["x"]})
    write_deltalake(str(tmp_path / INTERACTIONS), old, partition_by=["date"])
    (row,) = table.read(tmp_path, INTERACTIONS).to_pylist()
    assert (
        row["interaction_id"] == "old"
        and row["quality"] is None
        and row["labels"] is None
        and set(row) == set(schema.columns(INTERACTIONS))
    )
    append(tmp_path, INTERACTIONS, {"time_ns": time.time_ns(), "interaction_id": "new", "skill": "s", "quality": 0.5})
    rows = {row["interaction_id"]: row for row in table.read(tmp_path, INTERACTIONS, equals={"skill": "s"}).to_pylist()}
    assert rows["new"]["quality"] == 0.5 and rows["old"]["quality"] is None and rows["old"]["input"] == "x"
    assert {field.name for field in DeltaTable(str(tmp_path / INTERACTIONS)).schema().fields} == set(schema.columns(INTERACTIONS))


def test_an_older_server_writes_to_a_newer_table(tmp_path: Path) -> None:
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake

    append(tmp_path, INTERACTIONS, {"time_ns": time.time_ns(), "interaction_id": "a"})
    newer = pa.table({"interaction_id": ["b"], "date": ["2026-01-01"], "of_a_newer_release": [1]})
    write_deltalake(str(tmp_path / INTERACTIONS), newer, mode="append", schema_mode="merge", partition_by=["date"])
    append(tmp_path, INTERACTIONS, {"time_ns": time.time_ns(), "interaction_id": "c"})
    assert sorted(table.read(tmp_path, INTERACTIONS, names=["interaction_id"])["interaction_id"].to_pylist()) == ["a", "b", "c"]
    assert "of_a_newer_release" in [field.name for field in DeltaTable(str(tmp_path / INTERACTIONS)).schema().fields]


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
RECORD = st.fixed_dictionaries(
    {"time_ns": st.integers(0, 4_000_000_000_000_000_000), "interaction_id": TEXT},
    optional={
        "input": TEXT | st.none(),
        "labels": st.lists(TEXT, max_size=3),
        "scores": st.lists(st.floats(0, 1, width=32), max_size=3),
        "quality": st.floats(0, 1) | st.none() | st.integers(0, 1),
        "local": st.booleans(),
        "cost_micro_usd": st.integers(0, 2**40),
        "later": st.integers() | TEXT,
    },
)


@settings(max_examples=150, deadline=None)
@given(records=st.lists(RECORD, min_size=1, max_size=5))
def test_the_quick_way_to_rows_equals_the_plain_one(records: list[dict[str, Any]]) -> None:
    from server.lake.log import encode

    rows, rejected = schema.from_payloads(INTERACTIONS, [encode(record) for record in records])
    assert not rejected
    found = rows.to_pylist()
    assert [row["interaction_id"] for row in found] == [record["interaction_id"] for record in records]
    for row, record in zip(found, records, strict=True):
        plain = schema.to_row(INTERACTIONS, record)
        assert row["date"] == plain["date"] and int(row["time"].timestamp() * 1e6) // 10 == record["time_ns"] // 10_000
        for name in ("input", "labels", "scores", "local", "cost_micro_usd", "quality"):
            assert row[name] == plain[name], name


def test_examples_of_the_docs_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        record = {"time_ns": time.time_ns(), "interaction_id": f"i{number}", "skill": "s", "local": number > 0, "cost_micro_usd": 7}
        append(tmp_path / "data" / "lake", INTERACTIONS, {**record, "labels": ["a"], "quality": 0.25, "input": "x"})
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "lake.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.S)
    run = [example for example in examples if "spark" not in example and "def opened" not in example]
    assert len(run) == 3, "DuckDB, Polars, pandas"
    for example in run:
        exec(compile(example, "docs/lake.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.count("0.75") == 2 and "0.25" in said and "0.000028" in said.replace("2.8e-05", "0.000028"), said


def test_the_sealed_form_is_what_the_docs_say() -> None:
    from server.lake.sealing import Sealer

    page = (ROOT / "docs" / "lake.md").read_text(encoding="utf-8")
    (example,) = (one for one in re.findall(r"```python\n(.*?)```", page, re.S) if "def opened" in one)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/lake.md", "exec"), names)
    key = bytes(range(32))
    sealed = Sealer(key).seal(INTERACTIONS, "input", "i1", "Wörter")
    assert sealed.startswith("enc:v1:") and names["opened"](key, INTERACTIONS, "input", "i1", sealed) == "Wörter"
    (listed,) = Sealer(key).seal(INTERACTIONS, "labels", "i1", ["a", "b"])
    assert json.loads(names["opened"](key, INTERACTIONS, "labels", "i1", listed)) == ["a", "b"]
