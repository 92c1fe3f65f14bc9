"""Damage, full disks and mistakes: nothing blocks the rest, nothing is lost without being counted, and no answer fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.config import load_config
from server.errors import Unavailable
from server.lake import segments, table
from server.lake.checking import verify
from server.lake.holding import Holding
from server.lake.lake import Lake
from server.lake.log import MAGIC, Log, frame, salvage, sealed_segments
from server.lake.place import Place
from server.lake.reading import LakeReader
from server.lake.schema import FEEDBACK, INTERACTIONS
from server.lake.stats import backlog, stats
from server.registry.registry import Registry


def record(number: int, **more: object) -> dict[str, Any]:
    return {"time_ns": time.time_ns(), "interaction_id": f"i{number}", "skill": "s", "input": f"text {number}", **more}


def write(lake: Path, numbers: range) -> list[Path]:
    log = Log(table.log_folder(lake, INTERACTIONS), max_bytes=400)
    for number in numbers:
        log.append([record(number)])
    log.close()
    return sealed_segments(table.log_folder(lake, INTERACTIONS))


def ids(lake: Path) -> list[str]:
    return sorted(table.read(lake, INTERACTIONS, names=["interaction_id"])["interaction_id"].to_pylist())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 4), place=st.integers(8, 60), bit=st.integers(0, 7))
def test_records_after_an_altered_one_are_kept(tmp_path: Path, which: int, place: int, bit: int) -> None:
    """An altered byte of a payload costs one record; one of a length may cost those behind it, never those before."""
    originals = [json.dumps({"n": number, "text": "a" * 60}).encode() for number in range(5)]
    data = bytearray(MAGIC + b"".join(map(frame, originals)))
    data[len(MAGIC) + which * len(frame(originals[0])) + place] ^= 1 << bit
    path = tmp_path / "1.sealed"
    path.write_bytes(bytes(data))
    intact, bad = salvage(path)
    assert intact == originals[:which] + originals[which + 1 :] and bad == len(frame(originals[0]))


def test_a_corrupt_segment_is_set_aside_and_blocks_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second, *_ = write(tmp_path, range(12))
    first.write_bytes(b"not a segment at all" * 40)
    data = bytearray(second.read_bytes())
    data[len(MAGIC) + 20] ^= 0xFF  # within its first record
    second.write_bytes(bytes(data))
    lost = len(salvage(second)[0])
    table.convert(tmp_path, INTERACTIONS)
    assert sealed_segments(first.parent) == []
    assert set(ids(tmp_path)) >= {f"i{number}" for number in range(6, 12)} and lost > 0
    assert backlog(Place.at(tmp_path)).damaged == 2
    assert caplog.text.count("is damaged") == 2
    check = verify(Place.at(tmp_path))
    assert not check.sound and len(check.damaged) == 2 and check.tables[INTERACTIONS].sound


def test_a_segment_that_breaks_the_converter_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a release may have overlooked: here a record on which reading fails in an unforeseen way."""
    bad, *_ = write(tmp_path, range(9))
    intact = segments._intact

    def breaks(path: Path) -> list[bytes]:
        if path == bad:
            raise RuntimeError("unforeseen")
        return intact(path)

    monkeypatch.setattr(segments, "_intact", breaks)
    table.convert(tmp_path, INTERACTIONS)
    assert bad.with_suffix(".damaged").exists() and not sealed_segments(bad.parent)
    assert "i8" in ids(tmp_path)


def test_what_is_no_json_object_is_rejected_alone(tmp_path: Path) -> None:
    folder = table.log_folder(tmp_path, INTERACTIONS)
    folder.mkdir(parents=True)
    good = [json.dumps(record(number)).encode() for number in range(2)]
    odd = [b"[1, 2]", b"7", b"{", b'{"time_ns": 1}{"time_ns": 2}', b"\xff\xfe", b'{"time_ns": 1e400}', b'{"time_ns": null, "input": "x"}']
    (folder / "1.sealed").write_bytes(MAGIC + b"".join(map(frame, [good[0], *odd, good[1]])))
    assert table.convert(tmp_path, INTERACTIONS) == 2
    assert ids(tmp_path) == ["i0", "i1"] and backlog(Place.at(tmp_path)).rejected == 1


def test_a_damaged_parquet_file_is_found(tmp_path: Path) -> None:
    write(tmp_path, range(8))
    table.convert(tmp_path, INTERACTIONS)
    assert verify(Place.at(tmp_path)).sound
    (path,) = (tmp_path / INTERACTIONS).glob("date=*/*.parquet")
    data = bytearray(path.read_bytes())
    data[10:60] = bytes(50)
    path.write_bytes(bytes(data))
    check = verify(Place.at(tmp_path))
    assert not check.sound and len(check.tables[INTERACTIONS].unreadable) == 1


def test_an_interaction_that_is_there_twice_is_found(tmp_path: Path) -> None:
    for _ in range(2):
        log = Log(table.log_folder(tmp_path, INTERACTIONS))
        log.append([record(1)])
        log.close()
        table.convert(tmp_path, INTERACTIONS)
    check = verify(Place.at(tmp_path))
    assert check.tables[INTERACTIONS].repeated == 1 and not check.sound


FULL = """
import json, logging, resource, signal, sys, time
from pathlib import Path
from server.lake.lake import Lake
logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file may grow no further: what a full disk does to the log
lake = Lake(Path(sys.argv[1]), flush_s=3600, hold_bytes=60_000)
def one(number, size=500):
    return {"time_ns": time.time_ns(), "interaction_id": f"i{number}", "input": "x" * size}
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
on_disk = [lake.append("interactions", [one(number)]) for number in range(3)]
resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
while_full = [lake.append("interactions", [one(number)]) for number in range(3, 60)]
feedback = [lake.append("feedback", [{"time_ns": 1, "feedback_id": "f", "comment": "x" * 9000}])]
full = lake.counters()
big = lake.append("interactions", [one(1000, 90_000)])
lost = lake.counters().lost
lake._drain()
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
lake._drain()
after = lake.counters()
on_disk.append(lake.append("interactions", [one(60)]))
lake.close()
print(json.dumps({"on_disk": on_disk, "kept": sum(while_full), "feedback": feedback, "held": full.held, "lost": lost, "big": big,
                  "after": [after.held, after.appended, after.lost]}))
"""


def test_what_a_full_disk_refuses_is_held_and_written_later(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["on_disk"] == [True] * 4 and told["feedback"] == [False] and told["big"] is False
    assert told["held"] == 57 - told["kept"] > 20, "those that were on the disk are, the others wait"
    assert told["lost"] == 1 and told["after"] == [0, 60, 1], "the one without room is counted, the others are written"
    assert ids(tmp_path) == sorted(f"i{number}" for number in range(61))
    assert done.stderr.count("ALARM") == 1, "once a minute"
    assert "takes records again" in done.stderr


def test_holding_is_bounded_and_in_order() -> None:
    written: list[tuple[str, bytes]] = []
    full = True

    def write(name: str, data: bytes) -> None:
        if full and len(written) >= 1:
            raise OSError(28, "full")
        written.append((name, data))

    holding = Holding(write, max_bytes=10)
    assert holding.add("a", b"1234", 1) and holding.add("b", b"5678", 2) and not holding.add("a", b"123", 1)
    with pytest.raises(OSError, match="full"):
        holding.drain()
    assert holding.records == 2 and holding.add("a", b"90", 1)
    full = False
    assert holding.drain() == 3 and written == [("a", b"1234"), ("b", b"5678"), ("a", b"90")]
    assert holding.alarm_due() and not holding.alarm_due()


def test_a_record_that_is_no_json_fails_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lake = Lake(tmp_path)
    assert not lake.append(INTERACTIONS, [record(1, input=object())])
    assert lake.append(INTERACTIONS, [record(2, input="half a pair: \ud800")])
    lake.close()
    assert lake.counters().lost == 1 and "are lost" in caplog.text
    assert table.read(tmp_path, INTERACTIONS)["input"].to_pylist() == ["half a pair: ?"]


def test_an_encrypted_lake_needs_its_registry(tmp_path: Path) -> None:
    """It does not start without; once started it takes records, which wait in the log while the registry is away."""
    database = tmp_path / "registry.db"
    flags = {"lake.path": str(tmp_path / "lake"), "lake.encrypt": True, "registry.url": f"sqlite:///{database}", "lake.flush_s": 3600}
    config = load_config(environ={}, flags=flags)
    database.mkdir()  # nothing to open
    with pytest.raises(Unavailable):
        Lake.of(config, Registry(config.registry)).start()
    database.rmdir()
    registry = Registry(config.registry)
    lake = Lake.of(config, registry)
    lake.start()
    registry.close()
    database.rename(tmp_path / "away.db")
    database.mkdir()
    assert lake.append(INTERACTIONS, [record(1, user_hash="0" * 32)])
    lake.close()
    waiting = sealed_segments(table.log_folder(tmp_path / "lake", INTERACTIONS))
    assert len(waiting) == 1 and b"text 1" not in waiting[0].read_bytes()
    database.rmdir()
    (tmp_path / "away.db").rename(database)
    again = Lake.of(config, registry)
    again.start()
    again.close()
    assert LakeReader(config, registry).interactions()["input"].to_pylist() == ["text 1"]
    registry.close()


WRITER = """
import itertools, json, sys, time
from server.config import load_config
from server.lake.lake import Lake
from server.registry.registry import Registry
config = load_config(environ={}, flags=json.loads(sys.argv[1]))
lake = Lake.of(config, Registry(config.registry))
lake.start()
for number in itertools.count():
    name = f"{sys.argv[2]}-{number}"
    user = f"{number % 5:032x}" if number % 2 else None
    if lake.append("interactions", [{"time_ns": time.time_ns(), "interaction_id": name, "input": name, "user_hash": user}]):
        print(name, flush=True)
    time.sleep(0.001)
"""


def test_writers_killed_in_turn_lose_and_double_nothing(tmp_path: Path) -> None:
    """Two at a time on one encrypted lake, whose converters are killed too; `make bench-learn` does it 200 times with whole servers."""
    flags = {"lake.path": str(tmp_path / "lake"), "lake.encrypt": True, "lake.flush_s": 0.3, "registry.url": f"sqlite:///{tmp_path}/r.db"}
    said: list[str] = []
    for life in range(3):
        command = [sys.executable, "-c", WRITER, json.dumps(flags)]
        pair = [
            subprocess.Popen([*command, f"w{life}{number}"], stdout=subprocess.PIPE, text=True, start_new_session=True)
            for number in range(2)
        ]
        for count, writer in zip((150, 400), pair, strict=True):
            assert writer.stdout is not None
            said += [next(writer.stdout).strip() for _ in range(count)]
            os.killpg(writer.pid, signal.SIGKILL)  # its converter dies with it, whatever that was doing
        for writer in pair:
            assert writer.stdout is not None
            said += [line.strip() for line in writer.stdout if line.endswith("\n")]
            writer.wait()
            writer.stdout.close()
    config = load_config(environ={}, flags=flags)
    registry = Registry(config.registry)
    last = Lake.of(config, registry)
    last.start()
    last.close()
    rows = LakeReader(config, registry).interactions(columns=["interaction_id", "input"]).to_pylist()
    registry.close()
    found = [row["interaction_id"] for row in rows]
    assert set(said) <= set(found) and len(found) == len(set(found))
    assert all(row["input"] == row["interaction_id"] for row in rows)
    assert verify(Place.of(config.lake)).sound


class Seen:
    def __init__(self) -> None:
        self.told: list[dict[str, int]] = []
        self.aside: list[tuple[int, int]] = []

    def lake_written(self, **counters: int) -> None:
        self.told.append(counters)

    def lake_set_aside(self, damaged: int, rejected: int) -> None:
        self.aside.append((damaged, rejected))


def test_who_watches_is_told(tmp_path: Path) -> None:
    config = load_config(environ={}, flags={"lake.path": str(tmp_path), "lake.flush_s": 0.05, "registry.url": f"sqlite:///{tmp_path}/r.db"})
    seen = Seen()
    lake = Lake.of(config, Registry(config.registry), observer=seen)
    folder = table.log_folder(tmp_path, INTERACTIONS)
    (folder / "1.damaged").write_bytes(b"x")
    lake.start()
    lake.append(INTERACTIONS, [record(1)])
    end = time.monotonic() + 30
    while not (seen.told and seen.told[-1]["appended"] == 1 and seen.aside) and time.monotonic() < end:
        time.sleep(0.01)
    lake.close()
    assert seen.told[-1] == {"appended": 1, "held": 0, "lost": 0, "refusals": 0} and seen.aside[-1] == (1, 0)


def test_stats_count_by_day_and_skill(tmp_path: Path) -> None:
    day = 1_767_225_600_000_000_000  # 2026-01-01
    log = Log(table.log_folder(tmp_path, INTERACTIONS))
    for number in range(6):
        more = {"local": number % 2 == 0, "cost_micro_usd": 500_000, "skill": f"s{number % 3}", "error": "X" if number == 5 else None}
        log.append([{**record(number, **more), "time_ns": day + (number // 3) * 86_400_000_000_000}])
    log.close()
    table.convert(tmp_path, INTERACTIONS)
    found = stats(Place.at(tmp_path))
    assert [(one.name, one.interactions, one.cost_usd, one.errors) for one in found.days] == [
        ("2026-01-01", 3, 1.5, 0),
        ("2026-01-02", 3, 1.5, 1),
    ]
    assert found.days[0].local_share == pytest.approx(2 / 3) and found.days[1].local_share == pytest.approx(0.5)
    assert [one.name for one in found.skills] == ["s0", "s1", "s2"] and found.tables[INTERACTIONS].rows == 6
    assert stats(Place.at(tmp_path), skill="s1").skills[0].interactions == 2
    assert found.tables[FEEDBACK].version == -1 and found.tables[INTERACTIONS].bytes > 0
