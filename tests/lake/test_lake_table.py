"""Every segment becomes rows of the Delta table exactly once, whatever dies in between."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.lake import maintenance, table
from server.lake.ids import IdKey
from server.lake.lake import Lake
from server.lake.log import Log, sealed_segments
from server.lake.place import Place
from server.lake.schema import FEEDBACK, INTERACTIONS, arrow_schema, columns


def record(number: int, **more: object) -> dict[str, object]:
    return {"time_ns": time.time_ns(), "interaction_id": f"i{number}", "skill": "s", "input": f"text {number}", "labels": ["a"], **more}


def write(lake: Path, numbers: range) -> list[Path]:
    log = Log(table.log_folder(lake, INTERACTIONS), max_bytes=500)
    for number in numbers:
        log.append([record(number)])
    log.close()
    return sealed_segments(table.log_folder(lake, INTERACTIONS))


def ids(lake: Path) -> list[str]:
    return sorted(table.read(lake, INTERACTIONS, names=["interaction_id"])["interaction_id"].to_pylist())


def test_segments_become_rows_and_are_dropped(tmp_path: Path) -> None:
    assert len(write(tmp_path, range(30))) > 3
    assert table.convert(tmp_path, INTERACTIONS) == 30
    assert sealed_segments(table.log_folder(tmp_path, INTERACTIONS)) == []
    assert table.count(tmp_path, INTERACTIONS) == 30
    assert len(set(ids(tmp_path))) == 30
    found = table.open_table(tmp_path, INTERACTIONS)
    assert found is not None and found.metadata().partition_columns == ["date"]
    assert [field.name for field in arrow_schema(INTERACTIONS)] == columns(INTERACTIONS)


def test_a_segment_that_comes_back_is_not_taken_twice(tmp_path: Path) -> None:
    segments = write(tmp_path, range(10))
    shutil.copytree(segments[0].parent, tmp_path / "copy")  # as a death between the commit and the removal leaves them
    table.convert(tmp_path, INTERACTIONS)
    for path in (tmp_path / "copy").glob("*.sealed"):
        shutil.copy(path, segments[0].parent)
    write(tmp_path, range(10, 12))
    assert table.convert(tmp_path, INTERACTIONS) == 2
    assert ids(tmp_path) == sorted(f"i{n}" for n in range(12))
    assert sealed_segments(segments[0].parent) == []


def test_converters_at_once_take_each_segment_once(tmp_path: Path) -> None:
    write(tmp_path, range(40))
    command = [sys.executable, "-m", "server.lake.convert", str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    table.convert(tmp_path, INTERACTIONS)
    assert ids(tmp_path) == sorted(f"i{n}" for n in range(40))


def test_a_killed_converter_loses_and_doubles_nothing(tmp_path: Path) -> None:
    write(tmp_path, range(60))
    command = [sys.executable, "-m", "server.lake.convert", str(tmp_path)]
    for wait_s in (0.2, 0.5, 0.8):  # somewhere in its start, its write, its clean-up
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            running.wait(wait_s)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
    table.convert(tmp_path, INTERACTIONS)
    assert ids(tmp_path) == sorted(f"i{n}" for n in range(60))


def test_small_files_are_joined_and_no_row_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "FILES", 3)
    for start in range(0, 24, 4):
        write(tmp_path, range(start, start + 4))
        table.convert(tmp_path, INTERACTIONS)
    assert maintenance.crowded(Place.at(tmp_path), INTERACTIONS)
    done = maintenance.compact(Place.at(tmp_path), INTERACTIONS)
    assert done.files_before == 6 and done.files_after == 1 and done.removed_files == 0, "readers of the old version may be at its files"
    assert ids(tmp_path) == sorted(f"i{n}" for n in range(24))
    found = table.open_table(tmp_path, INTERACTIONS)
    assert found is not None and len(found.file_uris()) == 1
    assert maintenance.compact(Place.at(tmp_path), INTERACTIONS, keep_hours=0).removed_files == 6
    assert (
        len(list((tmp_path / INTERACTIONS).rglob("*.parquet"))) - len(list((tmp_path / INTERACTIONS / "_delta_log").glob("*.parquet"))) == 1
    )


def test_a_record_that_does_not_fit_harms_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = Log(table.log_folder(tmp_path, INTERACTIONS))
    log.append([record(1), {"no": "time"}, record(2, cost_micro_usd="dear"), record(3, from_a_newer_release=1)])
    log.close()
    assert table.convert(tmp_path, INTERACTIONS) == 2
    assert ids(tmp_path) == ["i1", "i3"]
    (kept,) = (tmp_path / "log" / "rejected").glob("*.jsonl")
    assert len(kept.read_text().splitlines()) == 2
    assert "do not fit" in caplog.text


def test_a_damaged_segment_is_kept_for_a_person(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path, *_) = write(tmp_path, range(3))
    data = bytearray(path.read_bytes())
    data[-2] ^= 0xFF
    path.write_bytes(bytes(data))
    table.convert(tmp_path, INTERACTIONS)
    assert path.with_suffix(".damaged").exists()
    assert "is damaged" in caplog.text


def test_the_lake_converts_by_itself(tmp_path: Path) -> None:
    lake = Lake(tmp_path, flush_s=0.1)
    lake.start()
    for number in range(20):
        assert lake.append(INTERACTIONS, [record(number)])
    assert lake.append(FEEDBACK, [{"time_ns": time.time_ns(), "feedback_id": "f", "interaction_id": "i1", "rating": 5}])
    lake.close()
    assert len(ids(tmp_path)) == 20
    assert table.read(tmp_path, FEEDBACK)["rating"].to_pylist() == [5]


def test_what_a_dead_process_left_is_taken_up_at_the_next_start(tmp_path: Path) -> None:
    script = """
import os, sys, time
from pathlib import Path
from server.lake.lake import Lake
lake = Lake(Path(sys.argv[1]))
lake.append("interactions", [{"time_ns": time.time_ns(), "interaction_id": "i0"}])
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 9
    lake = Lake(tmp_path)
    lake.close()
    assert ids(tmp_path) == ["i0"]


def test_ids_prove_themselves(tmp_path: Path) -> None:
    key = IdKey.open(tmp_path / "id.key")
    again = IdKey.open(tmp_path / "id.key")
    other = IdKey.open(tmp_path / "other" / "id.key")
    made = [key.new() for _ in range(200)]
    assert len(set(made)) == 200
    assert all(again.valid(one) for one in made)
    assert not any(other.valid(one) for one in made)
    for forged in ("", "x", made[0][:-1], made[0] + "a", made[0].replace(made[0][3], "q" if made[0][3] != "q" else "r", 1), "é" * 32):
        assert not key.valid(forged)
    assert (tmp_path / "id.key").stat().st_mode & 0o077 == 0
    assert repr((tmp_path / "id.key").read_bytes()) not in repr(key)
    assert key.pseudonym("ada") == again.pseudonym("ada") != other.pseudonym("ada")
    assert key.pseudonym("") == ""
