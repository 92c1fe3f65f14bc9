"""`understudy lake`: each verb on a real lake, with and without --json."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.commands.lake import app
from server.config import load_config
from server.errors import InvalidArgument
from server.lake.lake import Lake
from server.lake.schema import FEEDBACK, INTERACTIONS
from server.registry.registry import Registry


@pytest.fixture
def flags(tmp_path: Path) -> dict[str, Any]:
    return {"lake.path": str(tmp_path / "lake"), "lake.encrypt": True, "registry.url": f"sqlite:///{tmp_path}/r.db"}


@pytest.fixture
def lake(flags: dict[str, Any]) -> Path:
    config = load_config(environ={}, flags=flags)
    registry = Registry(config.registry)
    made = Lake.of(config, registry)
    made.start()
    now = time.time_ns()
    ada = made.ids.pseudonym("ada")
    for number in range(4):
        row = {"time_ns": now, "interaction_id": f"i{number}", "skill": f"s{number % 2}", "input": f"Grüße {number}", "labels": ["a", "b"]}
        made.append(INTERACTIONS, [{**row, "user_hash": ada if number == 0 else None, "local": True, "cost_micro_usd": 10}])
    made.append(FEEDBACK, [{"time_ns": now, "feedback_id": "f", "interaction_id": "i1", "rating": 5}])
    made.close()
    registry.close()
    return Path(flags["lake.path"])


def run(flags: dict[str, Any], *arguments: str, code: int = 0) -> str:
    settings = [part for key, value in flags.items() for part in ("--set", f"{key}={str(value).lower() if value is True else value}")]
    done = CliRunner().invoke(app, [*arguments, *settings])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def test_the_verbs(lake: Path, flags: dict[str, Any], tmp_path: Path) -> None:
    told = json.loads(run(flags, "stats", "--json"))
    assert told["tables"][INTERACTIONS]["rows"] == 4 and [one["name"] for one in told["skills"]] == ["s0", "s1"]
    assert "interactions" in run(flags, "stats", "--skill", "s1", "--since", "2026-01-01")
    assert json.loads(run(flags, "verify", "--json"))["sound"] is True and "sound" in run(flags, "verify")
    (done, *_) = json.loads(run(flags, "compact", "--keep-hours", "0", "--json"))
    assert done["table"] == INTERACTIONS and done["files_after"] == 1
    assert "files after" in run(flags, "compact")

    for form in ("jsonl", "csv", "parquet"):
        target = tmp_path / f"out.{form}"
        assert json.loads(run(flags, "export", str(target), "--json"))["rows"] == 4
        assert target.stat().st_mode & 0o077 == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["input"] for row in rows} == {f"Grüße {number}" for number in range(4)} and rows[0]["labels"] == ["a", "b"]
    assert next(row for row in rows if row["interaction_id"] == "i1")["rating"] == 5
    with (tmp_path / "out.csv").open(newline="") as file:
        assert {row["labels"] for row in csv.DictReader(file)} == {'["a", "b"]'}
    few = tmp_path / "few.jsonl"
    assert "2 rows" in run(flags, "export", str(few), "--skill", "s1", "--columns", "interaction_id, quality")
    assert all(set(json.loads(line)) == {"interaction_id", "quality"} for line in few.read_text().splitlines())

    erased = json.loads(run(flags, "erase", "--user", "ada", "--json"))
    assert erased["rows"][INTERACTIONS] == 1 and erased["complete"]
    assert "rows 0 of interactions" in run(flags, "erase", "--user-hash", erased["user_hash"])
    assert json.loads(run(flags, "export", str(few), "--json"))["rows"] == 3
    (next((lake / INTERACTIONS).glob("date=*/*.parquet"))).write_bytes(b"no Parquet")
    assert "DAMAGED" in run(flags, "verify", code=3)


def test_what_cannot_be_meant_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    for arguments, words in (
        (["export", str(tmp_path / "x.xlsx")], "parquet, jsonl, csv"),
        (["export", str(tmp_path / "x.csv"), "--columns", "nothing"], "no column 'nothing'"),
        (["stats", "--since", "yesterday"], "no day or time"),
        (["erase"], "either --user or --user-hash"),
        (["erase", "--user-hash", "ada"], "32 hexadecimal"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            run(flags, *arguments)
    assert not (tmp_path / "x.csv").exists()


def test_an_empty_lake_is_told_as_such(flags: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads(run(flags, "stats", "--json"))["tables"][INTERACTIONS]["version"] == -1
    assert json.loads(run(flags, "verify", "--json"))["sound"] is True
    assert json.loads(run(flags, "export", str(tmp_path / "x.parquet"), "--json"))["rows"] == 0
    assert json.loads(run(flags, "compact", "--json"))[0]["files_after"] == 0
    assert json.loads(run(flags, "erase", "--user", "nobody", "--json"))["complete"]
