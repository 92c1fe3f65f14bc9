"""Bars `lossless`, `recording` and `erasure`: what the lake keeps, how fast, and that it forgets.

`python -m bench.measures.learn_lake compact FOLDER` is the child whose memory is measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bench.harness import ROOT, Row, part, row_of, short_texts, tests_pass

LOSSLESS = (
    "200 random kill -9 of server and trainer under load: every interaction whose response completed is in the lake exactly once; every "
    "Parquet file readable; a full disk gives errors to nobody's answer, an alarm, and recovery"
)
RECORDING = (
    "added p50 <= 50 us a request; >= 20,000 rows/s through the log; 1,000,000 rows compacted in < 500 MB; a month's stats query < 2 s"
)
ERASURE = "after erasing a user nothing of theirs can be read from any file, and datasets built later exclude them"
KILLS = int(os.environ.get("UNDERSTUDY_BENCH_KILLS", "200"))
ROWS = 1_000_000
DAYS = 30
MIB = 1 << 20


def lossless() -> Row:
    """Kills, then a disk that is full."""
    from bench.lake_crashes import crash, full_disk

    with tempfile.TemporaryDirectory(prefix="understudy-crash-") as folder:
        seen = crash(Path(folder) / "crash", kills=KILLS, servers=4)
        told = {name: getattr(seen, name) for name in ("answered", "missing", "repeated", "altered", "unreadable", "damaged")}
        more = {"kills": dict(seen.kills), "rows": seen.rows, "trainer_runs": seen.trainer_runs, "seconds": round(seen.seconds)}
        enough = sum(seen.kills.values()) >= 200 and seen.answered > 1000
        kills = part(
            "random kill -9 under load, an encrypted lake, 4 servers", "0 missing, repeated, altered, unreadable", told, False, **more
        )
        kills["met"] = seen.sound and enough
        if os.geteuid():
            disk = part("full disk", "answers, alarm, recovery", "needs root, to mount a small file system", False)
        else:
            found = full_disk(Path(folder) / "full")
            fine = found["answered_while_full"] >= 200 and not (found["failed"] or found["missing"] or found["repeated"])
            disk = part("full disk: answers go on, an alarm, all rows there afterwards", "0 failed, 0 missing", found, fine)
    return row_of("lossless", LOSSLESS, [kills, disk])


def recording() -> Row:
    """The append, the log, the converter, compaction and a query."""
    with tempfile.TemporaryDirectory(prefix="understudy-recording-") as name:
        folder = Path(name)
        parts = [_added(folder / "added", encrypt=False), _added(folder / "sealed", encrypt=True)]
        parts += _through(folder / "through")
        parts += _million(folder / "million")
    return row_of("recording", RECORDING, parts)


def erasure() -> Row:
    """The tests that hold the bar, run here: they look for a canary in the bytes of every file, in clear and encrypted lakes."""
    return row_of(
        "erasure", ERASURE, [tests_pass("canary in every file, both modes, old versions included", "tests/lake/test_lake_erasure.py")]
    )


def interaction(number: int, texts: list[str], chance: random.Random) -> dict[str, Any]:
    """A row as the router makes it, of usual size."""
    local = chance.random() < 0.6
    label = f"label_{number % 77}"
    hops = [
        {"candidate": "local:s@3", "outcome": "below_bar", "reason": "quality 0.61 is below 0.8", "quality": 0.61, "tries": 1},
        {"candidate": "openai/gpt-4o-mini", "outcome": "delivered", "reason": "", "quality": None, "cost_micro_usd": 31, "tries": 1},
    ]
    return {
        "time_ns": time.time_ns(),
        "interaction_id": f"{number:032x}",
        "request_id": f"{chance.getrandbits(128):032x}",
        "skill": f"skill-{number % 5}",
        "task": "text-classification",
        "input_kind": "text",
        "input": texts[number % len(texts)],
        "preference": "local_first",
        "hops": json.dumps(hops),
        "candidate": "local:s@3" if local else "openai/gpt-4o-mini",
        "local": local,
        "output_text": label,
        "labels": [label],
        "scores": [0.9],
        "quality": chance.random(),
        "cost_micro_usd": 0 if local else 31,
        "input_tokens": 20,
        "output_tokens": 4,
        **{f"{stage}_ms": chance.random() for stage in ("queue", "tokenize", "run", "post", "provider", "total")},
        "teacher_label": label,
        "training_allowed": True,
        "rollout_stage": "canary",
        "propensity": 0.5,
        "user_hash": f"{chance.getrandbits(12):032x}" if number % 2 else None,
        "stream": False,
    }


def _rows(number: int) -> list[dict[str, Any]]:
    texts, chance = short_texts(), random.Random(5)
    return [interaction(index, texts, chance) for index in range(number)]


def _lake(folder: Path, *, encrypt: bool, flush_s: float = 10.0) -> Any:
    from server.config import load_config
    from server.lake.lake import Lake
    from server.registry.registry import Registry

    flags = {"lake.path": str(folder), "lake.encrypt": encrypt, "lake.flush_s": flush_s, "registry.url": f"sqlite:///{folder}.db"}
    config = load_config(environ={}, flags=flags)
    return Lake.of(config, Registry(config.registry))


def _added(folder: Path, *, encrypt: bool) -> dict[str, Any]:
    """What one request pays on the event loop: its row handed to the log, with nothing else in between."""
    from server.lake.schema import INTERACTIONS

    rows = _rows(4000)
    lake = _lake(folder, encrypt=encrypt, flush_s=3600.0)
    lake.start()
    times: list[float] = []

    async def requests() -> None:
        for row in rows:
            begun = time.perf_counter()
            lake.append(INTERACTIONS, [row])
            times.append(time.perf_counter() - begun)
            await asyncio.sleep(0)

    asyncio.run(requests())
    lake.close()
    times.sort()
    p50, p99 = times[len(times) // 2] * 1e6, times[int(len(times) * 0.99)] * 1e6
    name = "added to a request" + (", encrypted" if encrypt else "")
    return part(f"{name}, us p50", "<= 50", round(p50, 1), p50 <= 50, p99_us=round(p99, 1))


def _through(folder: Path) -> list[dict[str, Any]]:
    """Rows a second into the log, and from the log into Parquet by one converter."""
    from server.lake import table
    from server.lake.log import Log
    from server.lake.place import Place
    from server.lake.schema import INTERACTIONS
    from server.lake.segments import Converter

    rows = _rows(20_000)
    log = Log(table.log_folder(folder, INTERACTIONS), max_bytes=8 * MIB)
    begun = time.perf_counter()
    number = 0
    while number < 100_000:
        for row in rows:
            log.append([row])
        number += len(rows)
        log.tick()
    log.tick(seal=True)
    seconds = time.perf_counter() - begun
    log.close()
    begun = time.perf_counter()
    converted = Converter(Place.at(folder)).run(INTERACTIONS)
    parquet = time.perf_counter() - begun
    assert converted == number
    return [
        part("rows/s into the log, synced and sealed", ">= 20000", round(number / seconds), number / seconds >= 20_000),
        part("rows/s from the log into Parquet", "reported", round(number / parquet), True),
        part("rows/s through the log, one after the other on one thread", "reported", round(number / (seconds + parquet)), True),
    ]


def _million(folder: Path) -> list[dict[str, Any]]:
    """A month of rows in small files, joined by a child whose memory is measured; then `understudy lake stats` over the month."""
    _write_month(folder)
    command = [sys.executable, "-m", "bench.measures.learn_lake", "compact", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=_environment())
    child = json.loads(done.stdout)
    fine = child["peak_mb"] < 500 and child["rows"] == ROWS and child["files_after"] < child["files_before"]
    return [
        part("compaction of 1,000,000 rows, peak resident MB", "< 500", child["peak_mb"], fine, **child),
        _stats(folder),
    ]


def _write_month(folder: Path) -> None:
    """`ROWS` rows over `DAYS` days, 10 files a day, written as the converter writes them."""
    import pyarrow as pa
    from deltalake import write_deltalake

    from server.lake import schema
    from server.lake.segments import properties

    texts, chance = short_texts(), random.Random(5)
    per_file = ROWS // (DAYS * 10)
    first = datetime(2026, 10, 1, tzinfo=UTC)
    number = 0
    for index in range(DAYS * 10):
        day = first + timedelta(days=index // 10)
        size = per_file if index < DAYS * 10 - 1 else ROWS - number
        payloads = []
        for _ in range(size):
            moment = day + timedelta(seconds=chance.random() * 86_000)
            row = {**interaction(number, texts, chance), "time_ns": int(moment.timestamp() * 1e9)}
            payloads.append(json.dumps(row).encode())
            number += 1
        data, rejected = schema.from_payloads(schema.INTERACTIONS, payloads)
        assert not rejected and isinstance(data, pa.Table)
        uri = str(folder / schema.INTERACTIONS)
        write_deltalake(
            uri, data, mode="append", partition_by=["date"], configuration=properties(schema.INTERACTIONS) if not index else None
        )


def _stats(folder: Path) -> dict[str, Any]:
    """The query alone, and the whole command with its start."""
    from server.lake.place import Place
    from server.lake.stats import stats

    since, until = datetime(2026, 10, 1, tzinfo=UTC), datetime(2026, 10, 31, tzinfo=UTC)
    begun = time.perf_counter()
    found = stats(Place.at(folder), since=since, until=until)
    query = time.perf_counter() - begun
    command = [sys.executable, "-m", "server.cli", "lake", "stats", "--since", "2026-10-01", "--until", "2026-10-31", "--json"]
    begun = time.perf_counter()
    subprocess.run([*command, "--set", f"lake.path={folder}"], cwd=ROOT, capture_output=True, check=True, env=_environment())
    whole = time.perf_counter() - begun
    assert sum(day.interactions for day in found.days) == ROWS and len(found.days) == DAYS
    return part("a month's stats query over 1,000,000 rows, s", "< 2", round(query, 2), query < 2, whole_command_s=round(whole, 2))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'clients' / 'python'}", "ORT_DISABLE_TELEMETRY": "1"}


def _compact(folder: Path) -> None:
    """Prints what compaction did and the most memory that this process ever had."""
    from server.lake import maintenance, table
    from server.lake.place import Place
    from server.lake.schema import INTERACTIONS

    begun = time.perf_counter()
    done = maintenance.compact(Place.at(folder), INTERACTIONS)
    seconds = time.perf_counter() - begun
    # Not getrusage's ru_maxrss, in which a process begins with what its parent had.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    told = {"peak_mb": round(peak), "seconds": round(seconds, 1), "rows": table.count(folder, INTERACTIONS)}
    print(json.dumps({**told, "files_before": done.files_before, "files_after": done.files_after}))


if __name__ == "__main__":
    assert sys.argv[1] == "compact", __doc__
    _compact(Path(sys.argv[2]))
