"""Servers, their converters and a trainer that are killed at random under load, and what the lake holds afterwards.

Several real servers share one encrypted lake and one registry; clients keep the ids of the answers that they got whole. The vendor behind
the servers is the loopback SIMULATION of bench.teacher_simulation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

from bench.demo import environment, process
from bench.harness import ROOT, STARTER
from bench.teacher_simulation import MODEL
from server.config import Config, load_config
from server.lake import schema, table
from server.lake.checking import verify
from server.lake.place import Place
from server.lake.reading import LakeReader
from server.lake.segments import Converter
from server.registry.keys import UserKeys
from server.registry.registry import Registry
from tests.server_process import ServerProcess
from understudy.v1 import inference_pb2
from understudy.v1 import inference_service_pb2 as pb
from understudy.v1.inference_service_pb2_grpc import InferenceServiceStub

IN_FLIGHT = 6
FLUSH_S = 0.7
START_S = 300.0  # a machine that does other things is slow to start servers
SKILL = "support-intent"


@dataclass
class Crashes:
    """What was killed, what callers got, and what the lake has of it. `missing` and `repeated` are interactions; both are to be 0."""

    kills: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    rows: int = 0
    missing: int = 0
    repeated: int = 0
    altered: int = 0
    unreadable: int = 0
    damaged: int = 0
    errors_to_callers: int = 0
    trainer_runs: int = 0
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        return not (self.missing or self.repeated or self.altered or self.unreadable or self.damaged or self.errors_to_callers)


class Scene:
    """A folder with a lake, a registry, an empty repository and a configuration for servers and trainers."""

    def __init__(self, folder: Path, *, encrypt: bool = True) -> None:
        self.folder = folder
        self.lake = folder / "lake"
        self.file = folder / "understudy.toml"
        self.texts = {f"Where is card number {number}?": f"label_{number % 7}" for number in range(400)}
        self._encrypt = encrypt
        (folder / "models").mkdir(parents=True)
        self._base = (ROOT / "models" / STARTER).is_dir()
        if self._base:  # for the trainer; the servers do not load it, so that they start quickly
            shutil.copytree(ROOT / "models" / STARTER, folder / "models" / STARTER)
        rows = (json.dumps({"text": text, "label": label}) for text, label in self.texts.items())
        (folder / "gold.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

    def toml(self, base_url: str) -> str:
        return f"""
[models]
path = {json.dumps(str(self.folder / "models"))}
load = []
[log]
access = false
[lake]
path = {json.dumps(str(self.lake))}
flush_s = {FLUSH_S}
encrypt = {str(self._encrypt).lower()}
[registry]
url = {json.dumps(f"sqlite:///{self.folder / 'registry.db'}")}
[training]
path = {json.dumps(str(self.folder / "training"))}
[providers.simulation]
base_url = {json.dumps(base_url)}
max_concurrent = 64
training_allowed = true
prices = {{ "{MODEL}" = {{ input_per_million_usd = 0.15, output_per_million_usd = 0.60 }} }}
[skills.{SKILL}]
instruction = "Say what the customer wants."
labels = {json.dumps(sorted(set(self.texts.values())))}
teacher = "simulation/{MODEL}"
{f'base = "{STARTER}"' if self._base else ""}
"""

    @contextlib.contextmanager
    def vendor(self) -> Iterator[str]:
        """The simulated vendor; yields its address."""
        command = [sys.executable, "-m", "bench.teacher_simulation", "--labels", str(self.folder / "gold.jsonl")]
        with process([*command, "--accuracy", "1.0", "--latency-ms", "15"], self.folder / "vendor.log") as running:
            assert running.stdout is not None
            yield json.loads(running.stdout.readline())["base_url"]

    def config(self, toml: str) -> Config:
        self.file.write_text(toml, encoding="utf-8")
        return load_config(self.file, environ={})


class Client:
    """Loads one server, through all its restarts, until it is told to stop; keeps the ids and texts of whole answers."""

    def __init__(self, scene: Scene, name: str) -> None:
        self.got: dict[str, str] = {}
        self.failed = 0
        self.address = ""
        self._scene, self._name = scene, name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        await asyncio.gather(*(self._caller(number) for number in range(IN_FLIGHT)))

    async def _caller(self, number: int) -> None:
        chance = random.Random(f"{self._name}-{number}")
        texts = list(self._scene.texts)
        while not self._stop.is_set():
            address = self.address
            if not address:
                await asyncio.sleep(0.02)
                continue
            async with grpc.aio.insecure_channel(address) as channel:
                stub = InferenceServiceStub(channel)
                while not self._stop.is_set() and self.address == address:
                    asked = chance.sample(texts, chance.choice((1, 1, 1, 3)))
                    inputs = [inference_pb2.RunInput(text=text) for text in asked]
                    user = f"user-{chance.randrange(40)}" if chance.random() < 0.5 else ""
                    try:
                        response = await stub.Run(pb.RunRequest(skill=SKILL, inputs=inputs, user=user), timeout=30)
                    except grpc.aio.AioRpcError as error:
                        # A killed server's callers see a broken connection, or one that is not there yet; anything else is ours.
                        self.failed += error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
                        await asyncio.sleep(0.02)
                        continue
                    for text, result in zip(asked, response.results, strict=True):
                        self.got[result.interaction_id] = text
                        self.failed += not result.output_text


def crash(folder: Path, *, kills: int, servers: int = 3, trainer: bool = True, seed: int = 7, every_s: float = 0.8) -> Crashes:
    """Kills `kills` times at random moments, then compares the lake with what the clients got."""
    scene, seen, chance = Scene(folder), Crashes(), random.Random(seed)
    began = time.monotonic()
    with scene.vendor() as base_url:
        toml = scene.toml(base_url)
        config = scene.config(toml)
        running = [ServerProcess(folder / f"server{number}", toml) for number in range(servers)]
        clients = [Client(scene, f"client{number}") for number in range(servers)]
        learner = Trainer(folder, seen) if trainer else None
        try:
            for client, server in zip(clients, running, strict=True):
                _serve(client, server)
            until(lambda: all(client.address for client in clients), START_S)
            while sum(seen.kills.values()) < kills:
                time.sleep(chance.uniform(0.2, 2 * every_s - 0.2))
                _kill_one(scene, running, clients, learner, chance, seen)
            until(lambda: all(client.address for client in clients), START_S)
        finally:
            for client in clients:
                client.stop()
            if learner is not None:
                learner.close()
            for server in running:
                server.signal()  # all at once: each converts what is left
            for server in running:
                server.stop(allow_errors=True)
    _compare(config, clients, seen)
    seen.seconds = time.monotonic() - began
    return seen


def _kill_one(
    scene: Scene,
    running: list[ServerProcess],
    clients: list[Client],
    learner: Trainer | None,
    chance: random.Random,
    seen: Crashes,
) -> None:
    index = chance.randrange(len(running))
    what = chance.choices(("server", "converter", "trainer"), (6, 3, 1))[0]
    if what == "trainer" and learner is not None:
        seen.kills["trainer"] += learner.kill()
        return
    if what == "converter" and clients[index].address and _kill_converter(running[index].process.pid):
        seen.kills["converter"] += 1
        return
    server = running[index]
    converters = _converters(server.process.pid)
    server.process.send_signal(signal.SIGKILL)
    if chance.random() < 0.5:  # else they outlive their server and work beside the next one's
        for one in converters:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    server.process.wait()
    seen.kills["server"] += 1
    clients[index].address = ""
    with contextlib.suppress(AssertionError):  # it did not end well, as it was meant to
        server.stop(allow_errors=True)
    running[index] = ServerProcess(scene.folder / f"server{index}", scene.file.read_text(encoding="utf-8"))
    _serve(clients[index], running[index])
    if chance.random() < 0.85:  # else the next may die while it starts
        until(lambda: any(client.address for client in clients), START_S)


def _serve(client: Client, server: ServerProcess) -> None:
    """Lets a client at a server once that is ready, without waiting for it here."""

    def ready() -> None:
        while server.process.poll() is None:  # it may be killed while it starts
            if server.events("ready"):
                client.address = server.address
                return
            time.sleep(0.02)

    threading.Thread(target=ready, daemon=True).start()


def _converters(pid: int) -> list[psutil.Process]:
    try:
        return [one for one in psutil.Process(pid).children() if "server.lake.convert" in one.cmdline()]
    except psutil.NoSuchProcess:
        return []


def _kill_converter(pid: int) -> bool:
    """Waits for the next converter of a server, lets it work for a moment, and kills it."""
    end = time.monotonic() + 2 * FLUSH_S + 1
    while time.monotonic() < end:
        for one in _converters(pid):
            time.sleep(random.random())
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
                return True
        time.sleep(0.01)
    return False


class Trainer:
    """A trainer that trains the skill again and again."""

    def __init__(self, folder: Path, seen: Crashes) -> None:
        self._folder, self._seen = folder, seen
        self._popen = self._start()

    def kill(self) -> bool:
        """Kills it, and starts the next; whether it lived."""
        lived = self._popen.poll() is None
        self._popen.kill()
        self._popen.wait()
        self._popen = self._start()
        return lived

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        self._seen.trainer_runs += 1
        command = ["nice", "-n", "15", sys.executable, "-m", "trainer", "train", SKILL, "--config", str(self._folder / "understudy.toml")]
        with (self._folder / "trainer.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env={**environment(), "OMP_NUM_THREADS": "1"}, cwd=self._folder)


def _compare(config: Config, clients: list[Client], seen: Crashes) -> None:
    """Brings the log to its end as the next server would, and counts."""
    place, registry = Place.of(config.lake), Registry(config.registry)
    for name in schema.TABLES:
        Converter(place, UserKeys(registry), config.lake.encrypt).run(name, wait=True)
    check = verify(place)
    got = {key: text for client in clients for key, text in client.got.items()}
    there = Counter(table.read(place, schema.INTERACTIONS, names=["interaction_id"])["interaction_id"].to_pylist())
    rows = LakeReader(config, registry).interactions(columns=["interaction_id", "input"]).to_pylist()
    words = {row["interaction_id"]: row["input"] for row in rows}
    registry.close()
    seen.answered, seen.rows = len(got), sum(there.values())
    seen.missing = sum(key not in there for key in got)
    seen.repeated = sum(number > 1 for number in there.values())
    seen.altered = sum(key in there and words.get(key) != text for key, text in got.items())
    seen.unreadable = sum(len(one.unreadable) for one in check.tables.values())
    seen.damaged = len(check.damaged) + check.rejected
    seen.errors_to_callers = sum(client.failed for client in clients)


def full_disk(folder: Path, kib: int = 700) -> dict[str, Any]:
    """A server whose lake is on a file system of `kib` KiB, which fills up under load and is emptied again. Needs root, for the mount."""
    scene = Scene(folder)
    scene.lake.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(scene.lake)], check=True)
    try:
        with scene.vendor() as base_url:
            toml = scene.toml(base_url)
            config = scene.config(toml)
            server = ServerProcess(folder / "server", toml)
            client = Client(scene, "client")
            try:
                _serve(client, server)
                ballast = scene.lake / "ballast"
                until(lambda: len(client.got) > 50)
                fill(ballast)
                before = len(client.got)
                until(lambda: any("ALARM" in line for line in server.lines))
                until(lambda: len(client.got) > before + 200)
                while_full = len(client.got) - before
                ballast.unlink()
                subprocess.run(["mount", "-o", "remount,size=64m", str(scene.lake)], check=True)
                until(lambda: any("takes records again" in line for line in server.lines))
                until(lambda: len(client.got) > before + while_full + 50)
            finally:
                client.stop()
                server.stop(allow_errors=True)
        seen = Crashes()
        _compare(config, [client], seen)
        return {"answered_while_full": while_full, "failed": client.failed, "missing": seen.missing, "repeated": seen.repeated}
    finally:
        subprocess.run(["umount", "-l", str(scene.lake)], check=True)


def fill(ballast: Path) -> None:
    """Leaves no room on a file system."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(os.urandom(512))


def until(done: Any, seconds: float = START_S) -> None:
    """Polls. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError("it did not come about")
        time.sleep(0.05)
