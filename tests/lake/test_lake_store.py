"""Tables in an object store (a local server that speaks S3), written by the converters of several machines at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import Config, load_config
from server.errors import InvalidArgument
from server.lake import maintenance, table
from server.lake.checking import verify
from server.lake.erasing import Eraser
from server.lake.log import Log
from server.lake.place import Place
from server.lake.reading import LakeReader
from server.lake.schema import INTERACTIONS
from server.registry.keys import UserKeys
from server.registry.registry import Registry

OPTIONS = {
    "aws_endpoint_url": "LAKE_TEST_ENDPOINT",
    "aws_access_key_id": "LAKE_TEST_KEY",
    "aws_secret_access_key": "LAKE_TEST_SECRET",
    "aws_region": "LAKE_TEST_REGION",
    "aws_allow_http": "LAKE_TEST_HTTP",
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    pytest.importorskip("moto", reason="the local S3 server is in the dev extra")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-c", "from moto.server import main; import sys; main(sys.argv[1:])", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    request = urllib.request.Request(f"{url}/bucket", method="PUT")
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(request, timeout=5).close()
            break
        except urllib.error.URLError:
            assert time.monotonic() < end and server.poll() is None, "the S3 server did not start"
            time.sleep(0.05)
    yield url
    server.terminate()
    server.wait()


@pytest.fixture
def environment(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(OPTIONS.values(), (endpoint, "key", "a-secret-of-the-store", "us-east-1", "true"), strict=True):
        monkeypatch.setenv(name, value)


def machine(tmp_path: Path, name: str, store: str) -> Config:
    flags = {"lake.path": str(tmp_path / name), "lake.store": store, "lake.store_options_env": OPTIONS}
    return load_config(
        environ={}, flags={**flags, "registry.url": f"sqlite:///{tmp_path}/registry.db", "training.path": str(tmp_path / "t")}
    )


def write(config: Config, name: str, numbers: range, user: str | None = None) -> None:
    log = Log(table.log_folder(Path(config.lake.path), INTERACTIONS), max_bytes=300)
    for number in numbers:
        log.append([{"time_ns": time.time_ns(), "interaction_id": f"{name}{number}", "input": f"text {number}", "user_hash": user}])
    log.close()


def converter(config: Config) -> subprocess.Popen[str]:
    sections = {name: getattr(config, name).model_dump(mode="json") for name in ("lake", "registry")}
    command = [sys.executable, "-m", "server.lake.convert", "-"]
    running = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert running.stdin is not None
    running.stdin.write(json.dumps(sections))
    running.stdin.close()
    running.stdin = None
    return running


@pytest.mark.usefixtures("environment")
def test_several_machines_write_one_lake(tmp_path: Path) -> None:
    machines = [machine(tmp_path, name, "s3://bucket/lake") for name in "abc"]
    user = "0" * 31 + "1"
    for one, name in zip(machines, "abc", strict=True):
        write(one, name, range(12), user if name == "a" else None)
    running = [converter(one) for one in machines]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert sum(json.loads(out)[INTERACTIONS] for out, _ in outputs) == 36
    place = Place.of(machines[0].lake)
    ids = Counter(table.read(place, INTERACTIONS, names=["interaction_id"])["interaction_id"].to_pylist())
    assert ids == Counter(f"{name}{number}" for name in "abc" for number in range(12))
    assert maintenance.compact(place, INTERACTIONS, keep_hours=0).files_after == 1
    assert verify(place).sound
    registry = Registry(machines[0].registry)
    done = Eraser(machines[0], UserKeys(registry)).erase(user)
    assert done.rows[INTERACTIONS] == 12 and done.complete
    left = LakeReader(machines[1], registry).interactions()["interaction_id"].to_pylist()
    assert sorted(left) == sorted(f"{name}{number}" for name in "bc" for number in range(12))
    registry.close()


@pytest.mark.usefixtures("environment")
def test_the_stores_secrets_are_in_no_repr_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = machine(tmp_path, "a", "s3://no-such-bucket/lake")
    assert "a-secret-of-the-store" not in repr(Place.of(config.lake)) + repr(config)
    write(config, "a", range(2))
    process = converter(config)
    _, error = process.communicate(timeout=120)
    assert process.returncode and "a-secret-of-the-store" not in error
    assert list(table.log_folder(Path(config.lake.path), INTERACTIONS).glob("*.sealed")), "what a store does not take stays in the log"
    monkeypatch.delenv("LAKE_TEST_SECRET")
    with pytest.raises(InvalidArgument, match="LAKE_TEST_SECRET"):
        Place.of(config.lake)


def test_a_store_may_be_another_folder(tmp_path: Path) -> None:
    config = load_config(environ={}, flags={"lake.path": str(tmp_path / "log"), "lake.store": f"file://{tmp_path}/tables"})
    write(config, "x", range(3))
    place = Place.of(config.lake)
    assert table.convert(place, INTERACTIONS) == 3
    assert (tmp_path / "tables" / INTERACTIONS / "_delta_log").is_dir() and not (tmp_path / "log" / INTERACTIONS).exists()
