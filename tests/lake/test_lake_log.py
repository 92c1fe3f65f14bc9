"""What has been appended to the log is there after any death; what is torn or altered is not taken for a record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.lake.log import MAGIC, Log, frame, read_records, recover, sealed_segments

WRITER = """
import sys
from pathlib import Path
from server.lake.log import Log

log = Log(Path(sys.argv[1]), max_bytes=20_000)
number = 0
while True:
    log.append([{"n": number, "text": "x" * (number % 700)}])
    print(number, flush=True)
    number += 1
    if number % 97 == 0:
        log.tick()
"""


def records(folder: Path) -> list[dict[str, object]]:
    return [record for path in sealed_segments(folder) for record in read_records(path)]


def seal(log: Log) -> None:
    log.tick(seal=True)


def test_kill_loses_no_record_whose_append_returned(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    said = [int(next(writer.stdout)) for _ in range(500)]
    writer.send_signal(signal.SIGKILL)
    said += [int(line) for line in writer.stdout if line.endswith("\n")]
    writer.wait()
    writer.stdout.close()
    recover(tmp_path)
    found = [record["n"] for record in records(tmp_path)]
    assert found[: len(said)] == said, "every record that was acknowledged, once, in order"
    assert len(found) <= len(said) + 1
    assert not list(tmp_path.glob("*.open"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payloads=st.lists(st.text(max_size=40), min_size=1, max_size=6), data=st.data())
def test_a_torn_tail_is_cut_and_the_rest_kept(tmp_path: Path, payloads: list[str], data: st.DataObject) -> None:
    frames = [frame(json.dumps({"text": text}).encode()) for text in payloads]
    whole = MAGIC + b"".join(frames)
    cut = data.draw(st.integers(0, len(whole)))
    path = tmp_path / "1.open"
    path.write_bytes(whole[:cut])
    recover(tmp_path)
    ends = [len(MAGIC) + sum(map(len, frames[: i + 1])) for i in range(len(frames))]
    kept = sum(end <= cut for end in ends)
    assert [record["text"] for record in records(tmp_path)] == payloads[:kept]
    if kept:
        assert (tmp_path / "1.sealed").stat().st_size == ends[kept - 1]
        (tmp_path / "1.sealed").unlink()
    assert not path.exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_an_altered_byte_is_never_read_as_a_record(tmp_path: Path, position: int, bit: int) -> None:
    originals = [{"n": number, "text": "a" * 20} for number in range(5)]
    data = bytearray(MAGIC + b"".join(frame(json.dumps(record).encode()) for record in originals))
    data[position % len(data)] ^= 1 << bit
    path = tmp_path / "1.sealed"
    path.write_bytes(bytes(data))
    found = list(read_records(path))
    assert found == originals[: len(found)]


def test_a_living_writers_segment_is_left_alone(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.append([{"n": 1}])
    script = "import sys; from pathlib import Path; from server.lake.log import recover; print(recover(Path(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    log.append([{"n": 2}])
    log.close()
    assert [record["n"] for record in records(tmp_path)] == [1, 2]


def test_segments_are_bounded_in_size_and_age(tmp_path: Path) -> None:
    log = Log(tmp_path, max_bytes=1000, max_age_s=3600)
    for number in range(100):
        log.append([{"n": number, "text": "x" * 50}])
    assert log.tick() >= 5
    assert all(path.stat().st_size < 1100 for path in sealed_segments(tmp_path))
    log.close()
    aged = Log(tmp_path / "aged", max_age_s=0.0)
    aged.append([{"n": 1}])
    assert aged.tick() == 1
    aged.close()
    assert [record["n"] for record in records(tmp_path)] == list(range(100))


def test_appends_of_many_threads_are_all_kept(tmp_path: Path) -> None:
    log = Log(tmp_path, max_bytes=4000)
    threads = [threading.Thread(target=lambda t=t: [log.append([{"t": t, "n": n}]) for n in range(200)]) for t in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        log.tick()
    log.close()
    found = [(record["t"], record["n"]) for record in records(tmp_path)]
    assert sorted(found) == [(t, n) for t in range(4) for n in range(200)]


def test_a_full_disk_refuses_whole_batches_and_the_log_stays_readable(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from server.lake.log import Log

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = Log(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
kept = 0
for number in range(20):
    try:
        log.append([{"n": number, "text": "x" * 600}])
        kept += 1
    except OSError:
        break
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append([{"n": 99}])
log.close()
print(kept)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    kept = int(done.stdout)
    assert 0 < kept < 20
    assert [record["n"] for record in records(tmp_path)] == [*range(kept), 99]


def test_segments_are_private(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.append([{"n": 1}])
    (path,) = tmp_path.glob("*.open")
    assert path.stat().st_mode & 0o077 == 0
    log.close()


@pytest.mark.parametrize("garbage", [b"", b"US", MAGIC, b"not a segment at all" * 50])
def test_files_without_records_yield_none(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "1.open"
    path.write_bytes(garbage)
    recover(tmp_path)
    assert os.listdir(tmp_path) == []
