"""After erasing a user no file holds anything of theirs, in clear and encrypted lakes; others lose nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.config import Config, load_config
from server.errors import FailedPrecondition
from server.lake import maintenance, table
from server.lake.erasing import Eraser
from server.lake.lake import Lake
from server.lake.place import Place
from server.lake.reading import LakeReader
from server.lake.schema import FEEDBACK, INTERACTIONS, SHADOWS
from server.registry.keys import UserKeys
from server.registry.registry import Adapter, Registry

CANARY = b"Canary-7391"


@pytest.fixture(params=[False, True], ids=["clear", "encrypted"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    return load_config(
        environ={},
        flags={
            "lake.path": str(tmp_path / "lake"),
            "lake.encrypt": request.param,
            "lake.flush_s": 0.2,
            "registry.url": f"sqlite:///{tmp_path}/registry.db",
            "training.path": str(tmp_path / "training"),
        },
    )


@pytest.fixture
def registry(config: Config) -> Iterator[Registry]:
    made = Registry(config.registry)
    yield made
    made.close()


def interaction(key: str, user: str | None, words: str) -> dict[str, Any]:
    return {
        "time_ns": time.time_ns(),
        "interaction_id": key,
        "skill": "s",
        "input_kind": "text",
        "input": words,
        "labels": [words],
        "scores": [0.5],
        "teacher_label": words,
        "teacher_text": words,
        "teacher_tokens": json.dumps([[words, -0.1, [[words, -0.1]]]]),
        "parameters": json.dumps({"who": words}),
        "output_text": words,
        "findings": [words, "short"],
        "training_allowed": True,
        "user_hash": user,
    }


def fill(config: Config, registry: Registry) -> tuple[str, str]:
    """Two users' interactions, feedback and shadows as rows; returns their hashes."""
    lake = Lake.of(config, registry)
    lake.start()
    ada, bob = lake.ids.pseudonym("ada"), lake.ids.pseudonym("bob")
    for number in range(6):
        lake.append(
            INTERACTIONS, [interaction(f"a{number}", ada, f"{CANARY.decode()} {number}"), interaction(f"b{number}", bob, f"bob {number}")]
        )
    lake.append(INTERACTIONS, [interaction("n0", None, "nobody")])
    now = time.time_ns()
    words = CANARY.decode()
    lake.append(FEEDBACK, [{"time_ns": now, "feedback_id": "f1", "interaction_id": "a1", "correction": words, "user_hash": ada}])
    lake.append(FEEDBACK, [{"time_ns": now, "feedback_id": "f2", "interaction_id": "b1", "comment": "fine", "rating": 4, "user_hash": bob}])
    shadow = {"time_ns": now, "skill": "s", "role": "student", "candidate": "local:s@2"}
    lake.append(SHADOWS, [{**shadow, "interaction_id": "a1", "label": words, "user_hash": ada}])
    lake.append(SHADOWS, [{**shadow, "interaction_id": "b1", "label": "card", "user_hash": bob}])
    lake.close()
    return ada, bob


def files_with(folder: Path, words: bytes) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file() and words in path.read_bytes()]


def as_parquet_text(folder: Path) -> str:
    """All values of all Parquet files, whichever version of a table names them."""
    import pyarrow.parquet as pq

    return "\n".join(str(pq.read_table(path, partitioning=None).to_pylist()) for path in folder.rglob("*.parquet"))


def test_what_is_read_is_what_was_written(config: Config, registry: Registry) -> None:
    ada, _ = fill(config, registry)
    rows = {row["interaction_id"]: row for row in LakeReader(config, registry).interactions(skill="s").to_pylist()}
    assert len(rows) == 13
    one = rows["a1"]
    words = f"{CANARY.decode()} 1"
    assert one["input"] == one["teacher_label"] == words and one["labels"] == [words] and one["findings"] == [words, "short"]
    assert json.loads(one["parameters"]) == {"who": words} and one["user_hash"] == ada
    assert one["correction"] == CANARY.decode() and one["student_label"] == CANARY.decode() and one["student_version"] == "2"
    assert rows["b1"]["rating"] == 4 and rows["b1"]["comment"] == "fine" and rows["n0"]["input"] == "nobody"
    everything = as_parquet_text(Path(config.lake.path))
    assert (CANARY.decode() in everything) is not config.lake.encrypt
    assert "nobody" in everything, "who names no user has no key"
    if config.lake.encrypt:
        assert not files_with(Path(config.lake.path), CANARY)
        assert {row["sealed"] for row in rows.values()} == {"v1", None}
        assert one["scores"] == [0.5], "numbers are no payload"


def test_nothing_of_an_erased_user_is_left(config: Config, registry: Registry, tmp_path: Path) -> None:
    ada, bob = fill(config, registry)
    lake = Path(config.lake.path)
    reader, keys = LakeReader(config, registry), UserKeys(registry)
    key = keys.find([ada]).get(ada)
    job = registry.start_job("s", "train")
    registry.add_dataset(job, reader.version(), "f", [("a1", False), ("b1", True)])
    registry.add_adapter(Adapter("s", "1", "linear", "base@1", "0" * 64, {}, job))
    registry.end_job(job, "succeeded")
    other = registry.start_job("s", "train")
    registry.add_dataset(other, reader.version(), "f", [("b1", True)])
    registry.end_job(other, "succeeded")
    for one in (job, other):
        (tmp_path / "training" / one).mkdir(parents=True)
        (tmp_path / "training" / one / "rows.jsonl").write_bytes(CANARY if one == job else b"bob")
    registry.keep_feedback("r1", {"interaction_id": "a1", "correction": CANARY.decode()})
    registry.keep_feedback("r2", {"interaction_id": "b1", "comment": "fine"})
    maintenance.compact(Place.of(config.lake), INTERACTIONS)  # leaves the old files for readers of the old version
    (lake / INTERACTIONS / "date=2026-01-01").mkdir()
    (lake / INTERACTIONS / "date=2026-01-01" / "orphan.parquet").write_bytes(CANARY)  # as a converter that died leaves it
    done = Eraser(config, keys).erase(ada)
    assert done.rows == {INTERACTIONS: 6, FEEDBACK: 1, SHADOWS: 1} and done.complete
    assert done.retrain == ["s@1"] and done.remembered == 1 and done.job_folders == 1
    registry.close()
    assert files_with(tmp_path, CANARY) == []
    assert CANARY.decode() not in as_parquet_text(lake)
    assert (tmp_path / "training" / other / "rows.jsonl").exists()
    if key is not None:
        assert files_with(tmp_path, key) == [], "the key's bytes are written over"
    found = table.open_table(lake, INTERACTIONS)
    assert found is not None
    for version in range(found.version() + 1):  # what an older version can still read is not theirs
        found.load_as_version(version)
        try:
            assert CANARY.decode() not in str(found.to_pyarrow_table().to_pylist())
        except (FileNotFoundError, OSError):
            continue
    after = reader.interactions(skill="s")
    assert sorted(after["interaction_id"].to_pylist()) == [*(f"b{n}" for n in range(6)), "n0"]
    assert {row["input"] for row in after.to_pylist() if row["user_hash"] == bob} == {f"bob {n}" for n in range(6)}
    again = Eraser(config, keys).erase(ada)
    assert again.complete and sum(again.rows.values()) == 0


def test_what_an_erased_user_says_later_is_not_kept(config: Config, registry: Registry, tmp_path: Path) -> None:
    ada, _ = fill(config, registry)
    Eraser(config, UserKeys(registry)).erase(ada)
    lake = Lake.of(config, registry)
    lake.start()
    lake.append(INTERACTIONS, [interaction("a9", ada, CANARY.decode())])
    lake.close()
    assert files_with(tmp_path, CANARY) == [] and CANARY.decode() not in as_parquet_text(tmp_path)
    reader = LakeReader(config, registry)
    assert "a9" not in reader.interactions()["interaction_id"].to_pylist()
    (row,) = [row for row in reader.interactions(include_erased=True).to_pylist() if row["interaction_id"] == "a9"]
    assert row["input"] is None and row["labels"] is None and row["skill"] == "s", "what it cost stays known"


def test_a_living_servers_log_is_erased_too(config: Config, registry: Registry, tmp_path: Path) -> None:
    """The server is another process, and goes on writing."""
    script = """
import json, sys, time
from server.config import load_config
from server.lake.lake import Lake
from server.registry.registry import Registry
config = load_config(environ={}, flags=json.loads(sys.argv[1]))
lake = Lake.of(config, Registry(config.registry))
lake.start()
user = lake.ids.pseudonym("ada")
for number in range(5):
    lake.append("interactions", [{"time_ns": time.time_ns(), "interaction_id": f"x{number}", "input": sys.argv[2], "user_hash": user}])
print(user, flush=True)
sys.stdin.read()
lake.close()
"""
    flags = {f"lake.{name}": value for name, value in config.lake.model_dump(include={"path", "encrypt"}).items()}
    given = flags | {"lake.flush_s": 1.0, "registry.url": config.registry.url}
    with subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(given), CANARY.decode()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        user = server.stdout.readline().strip()
        assert bool(files_with(tmp_path / "lake", CANARY)) is not config.lake.encrypt, "the log of an encrypted lake shows nothing"
        done = Eraser(config, UserKeys(registry)).erase(user)
        assert done.complete and done.waiting == 0
        assert files_with(tmp_path, CANARY) == [] and CANARY.decode() not in as_parquet_text(tmp_path)
        server.communicate("")
    assert server.returncode == 0
    if config.lake.encrypt:
        assert not list((tmp_path / "lake" / "log" / "keys").iterdir()), "the key of the log went with the process"


def test_rejected_and_damaged_records_go_too(config: Config, registry: Registry, tmp_path: Path) -> None:
    lake = Lake.of(config, registry)
    lake.start()
    ada = lake.ids.pseudonym("ada")
    bad = {"interaction_id": "x", "user_hash": ada, "input": CANARY.decode(), "cost_micro_usd": "dear", "time_ns": time.time_ns()}
    lake.append(INTERACTIONS, [bad, {**bad, "interaction_id": "y", "user_hash": "0" * 32, "input": "bob"}])
    lake.close()
    (kept,) = (tmp_path / "lake" / "log" / "rejected").iterdir()
    assert (CANARY in kept.read_bytes()) is not config.lake.encrypt and len(kept.read_text().splitlines()) == 2
    (tmp_path / "lake" / "log" / INTERACTIONS / "1.damaged").write_bytes(CANARY)
    done = Eraser(config, UserKeys(registry)).erase(ada)
    assert done.log_files == 2 and files_with(tmp_path, CANARY) == []
    assert len(kept.read_text().splitlines()) == 1, "the other user's stays"


def test_another_registry_opens_nothing(tmp_path: Path) -> None:
    flags = {"lake.path": str(tmp_path / "lake"), "lake.encrypt": True, "registry.url": f"sqlite:///{tmp_path}/registry.db"}
    config = load_config(environ={}, flags=flags)
    registry = Registry(config.registry)
    ada, _ = fill(config, registry)
    registry.close()
    strange = Registry(load_config(environ={}, flags={"registry.url": f"sqlite:///{tmp_path}/other.db"}).registry)
    reader = LakeReader(config, strange)
    with pytest.raises(FailedPrecondition, match="registry"):
        reader.interactions()
    UserKeys(strange).make([ada, *reader_users(config)])
    with pytest.raises(FailedPrecondition, match="does not open"):
        reader.interactions()
    strange.close()


def reader_users(config: Config) -> list[str]:
    users = table.read(Place.of(config.lake), INTERACTIONS, names=["user_hash"])["user_hash"].to_pylist()
    return sorted({user for user in users if user})
