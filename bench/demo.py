"""`make demo`: the whole loop on real text. A teacher answers everything; the server keeps what it said; the trainer makes a student of
it; the running server takes the student over; the same traffic then costs a fraction. The teacher is a SIMULATION
(bench/teacher_simulation.py).

Banking77 is used where UNDERSTUDY_SHARED (default: ../shared) has it, else examples/support_intents.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from bench.teacher_simulation import MODEL, SimulatedTeacher
from server.lake import schema, table
from understudy.v1 import inference_pb2, inference_service_pb2, skill_service_pb2
from understudy.v1.inference_service_pb2_grpc import InferenceServiceStub
from understudy.v1.skill_service_pb2_grpc import SkillServiceStub

ROOT = Path(__file__).resolve().parents[1]
SKILL = "support-intent"
BASE = "all-minilm-l6-v2"
BATCH = 32
IN_FLIGHT = 2
SINGLES = 150  # calls of one text each, for the latency that one caller sees
LATENCY_MS = 30.0
ACCURACY = 0.91
TAKE_OVER_S = 60.0
LAKE_S = 60.0


@dataclass(slots=True, frozen=True)
class Data:
    """Texts with their gold labels."""

    name: str
    train: list[tuple[str, str]]
    test: list[tuple[str, str]]

    @property
    def labels(self) -> list[str]:
        return sorted({label for _, label in self.train})


@dataclass(slots=True)
class Phase:
    """What one stretch of traffic was like. Accuracy is against gold labels; cost in US dollars a thousand requests."""

    name: str
    requests: int
    local_share: float
    accuracy: float
    failed: int
    usd_per_thousand: float
    p50_ms: float
    seconds: float


def shared() -> Path:
    """Where real data may be."""
    return Path(os.environ.get("UNDERSTUDY_SHARED") or ROOT.parent / "shared")


def banking77() -> Data | None:
    """The 77 intents of bank customers, or None where they are not at hand."""
    folder = shared() / "data" / "banking77"
    if not (folder / "train.csv").exists():
        return None
    parts = []
    for name in ("train", "test"):
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            parts.append([(row["text"], row["category"]) for row in csv.DictReader(file)])
    random.Random(7).shuffle(parts[0])  # the file is sorted by label; traffic is not
    return Data("Banking77", *parts)


def example() -> Data:
    """Our own small set; its file says which rows are for testing."""
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    with (ROOT / "examples" / "support_intents.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            parts[row["part"]].append((row["text"], row["label"]))
    random.Random(7).shuffle(parts["train"])
    return Data("examples/support_intents.jsonl", parts["train"], parts["test"])


class Demo:
    """Processes and files of one run, all under `folder`."""

    def __init__(self, data: Data, folder: Path, models: Path, accuracy: float = ACCURACY) -> None:
        self.data = data
        self.folder = folder
        self._models = models
        self.accuracy = accuracy
        self.teacher = SimulatedTeacher(dict(data.train + data.test), accuracy)
        self.config = folder / "understudy.toml"
        self.lake = folder / "lake"

    def prepare(self) -> None:
        """Writes the labels, the repository and the configuration."""
        rows = (json.dumps({"text": text, "label": label}) for text, label in self.data.train + self.data.test)
        (self.folder / "gold.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        # A repository of its own: the demonstration publishes adapters, which are nobody else's business.
        shutil.copytree(self._models / BASE, self.folder / "models" / BASE)

    def configure(self, base_url: str) -> None:
        """The configuration of the server and of the trainer."""
        labels = json.dumps(self.data.labels)
        self.config.write_text(
            f"""
[server]
metrics_port = 0
[log]
format = "json"
access = false
[models]
path = {json.dumps(str(self.folder / "models"))}
[lake]
path = {json.dumps(str(self.lake))}
flush_s = 2
[registry]
url = {json.dumps(f"sqlite:///{self.folder / 'registry.db'}")}
[providers.simulation]
base_url = {json.dumps(base_url)}
max_concurrent = 32
training_allowed = true
prices = {{ "{MODEL}" = {{ input_per_million_usd = 0.15, output_per_million_usd = 0.60 }} }}
[skills.{SKILL}]
instruction = "Say what the customer wants."
labels = {labels}
teacher = "simulation/{MODEL}"
base = "{BASE}"
rollout = "full"  # so few requests leave no time for a shadow and canaries
method = "linear-head"  # seconds; auto would go on to whole encoders where the bar asks for it
""",
            encoding="utf-8",
        )

    @contextmanager
    def teacher_process(self) -> Iterator[str]:
        """The simulated teacher; yields its base URL."""
        arguments = ["--labels", str(self.folder / "gold.jsonl"), "--accuracy", str(self.accuracy), "--latency-ms", str(LATENCY_MS)]
        with process([sys.executable, "-m", "bench.teacher_simulation", *arguments], self.folder / "teacher.log") as running:
            assert running.stdout is not None
            first = running.stdout.readline()
            if not first:
                raise RuntimeError(f"the teacher did not start; see {self.folder / 'teacher.log'}")
            yield json.loads(first)["base_url"]

    @contextmanager
    def server_process(self) -> Iterator[str]:
        """The real server; yields its address once it is ready."""
        log = self.folder / "server.log"
        command = [sys.executable, "-m", "server.cli", "serve", "--config", str(self.config), "--port", "0"]
        with process(command, log, all_to_log=True) as running:
            yield wait_ready(running, log)

    def train(self) -> tuple[dict[str, Any], str]:
        """Runs `understudy train`; returns its report as JSON, and in words."""
        report = self.folder / "report.json"
        command = [sys.executable, "-m", "server.cli", "train", SKILL, "--config", str(self.config), "--json", str(report)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"training ended with code {done.returncode}: {done.stdout}")
        return json.loads(report.read_text()), done.stdout


def environment() -> dict[str, str]:
    """Of our processes: this checkout first."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("UNDERSTUDY_")}
    return {**own, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")]), "ORT_DISABLE_TELEMETRY": "1"}


@contextmanager
def process(command: list[str], log: Path, *, all_to_log: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process that is stopped at the end; its words go to `log`."""
    with log.open("w", encoding="utf-8") as file:
        running = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file if all_to_log else subprocess.PIPE, stderr=file, text=True
        )
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(90)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
            if running.stdout is not None:
                running.stdout.close()


def wait_ready(running: subprocess.Popen[str], log: Path) -> str:
    """The address that the server's log names, once the log says that it is ready."""
    address = ""
    end = time.monotonic() + 90
    while time.monotonic() < end and running.poll() is None:
        for line in log.read_text(encoding="utf-8").splitlines():
            if '"event": "listening"' in line:
                address = json.loads(line)["address"]
            elif '"event": "ready"' in line and address:
                return address
        time.sleep(0.1)
    raise RuntimeError(f"the server did not get ready; see {log}:\n{log.read_text()[-2000:]}")


async def until(done: Callable[[], Awaitable[bool]], seconds: float, what: str) -> float:
    """Polls until `done`; returns how long that took."""
    start = time.monotonic()
    while not await done():
        if time.monotonic() - start > seconds:
            raise RuntimeError(f"{what} did not come within {seconds:.0f} s")
        await asyncio.sleep(0.2)
    return time.monotonic() - start


async def send(
    stub: Any, rows: Sequence[tuple[str, str]], name: str, *, preference: int = 0, show: bool = True
) -> tuple[Phase, list[inference_pb2.RunResult]]:
    """Sends texts, SINGLES of them alone and the rest in batches; returns what came of it, in the order of the rows."""
    started = time.monotonic()
    waits: list[float] = []
    results: list[inference_pb2.RunResult] = []
    bar = Bar(name, len(rows), show)

    async def call(part: Sequence[tuple[str, str]]) -> list[inference_pb2.RunResult]:
        inputs = [inference_pb2.RunInput(text=text) for text, _ in part]
        request = inference_service_pb2.RunRequest(skill=SKILL, inputs=inputs, preference=preference)
        begun = time.perf_counter()
        response = await stub.Run(request, timeout=120)
        if len(part) == 1:
            waits.append(time.perf_counter() - begun)
        bar.add(len(part))
        return list(response.results)

    alone = min(SINGLES, len(rows) // 4)
    for row in rows[:alone]:
        results += await call([row])
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def bounded(part: Sequence[tuple[str, str]]) -> list[inference_pb2.RunResult]:
        async with slots:
            return await call(part)

    parts = [rows[start : start + BATCH] for start in range(alone, len(rows), BATCH)]
    for answered in await asyncio.gather(*(bounded(part) for part in parts)):
        results += answered
    bar.close()
    good = sum(result.output_text == label for result, (_, label) in zip(results, rows, strict=True))
    cost = sum(result.cost.micro_usd for result in results)
    return (
        Phase(
            name=name,
            requests=len(rows),
            local_share=sum(result.decision.local for result in results) / len(rows),
            accuracy=good / len(rows),
            failed=sum(result.HasField("error") for result in results),
            usd_per_thousand=cost / len(rows) / 1e3,
            p50_ms=statistics.median(waits) * 1e3 if waits else 0.0,
            seconds=time.monotonic() - started,
        ),
        results,
    )


class Bar:
    """A progress bar for people, nothing for files."""

    def __init__(self, name: str, total: int, show: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), disable=not (show and sys.stderr.isatty()), transient=True)
        self._task = self._progress.add_task(name, total=total)
        self._progress.start()

    def add(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def close(self) -> None:
        self._progress.stop()


async def run(demo: Demo, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The whole loop; returns what `--json` writes."""
    began = time.monotonic()
    data = demo.data
    demo.prepare()
    say(f"{data.name}: {len(data.train)} requests of traffic, {len(data.test)} to test with, {len(data.labels)} labels")
    with ExitStack() as stack:
        demo.configure(stack.enter_context(demo.teacher_process()))
        say(f"The teacher is a SIMULATION: right on {demo.accuracy:.0%} of the texts by its own dice, {LATENCY_MS:g} ms an answer")
        address = stack.enter_context(demo.server_process())
        async with grpc.aio.insecure_channel(address) as channel:
            stub, skills = InferenceServiceStub(channel), SkillServiceStub(channel)
            before, _ = await send(stub, data.train, "before: traffic")
            say(f"traffic answered by the teacher in {before.seconds:.0f} s; waiting for the lake's Parquet")

            async def landed() -> bool:
                return await asyncio.to_thread(table.count, demo.lake, schema.INTERACTIONS) >= len(data.train)

            lake_s = await until(landed, LAKE_S, "the traffic's Parquet")
            report, words = await asyncio.to_thread(demo.train)
            say(words.rstrip())

            async def taken_over() -> bool:
                request = skill_service_pb2.GetSkillRequest(name=f"skills/{SKILL}")
                return (await skills.GetSkill(request)).skill.student.version == report["version"]

            take_over_s = await until(taken_over, TAKE_OVER_S, "the take-over")
            after, answers = await send(stub, data.test, "after: test")
            only = inference_pb2.ROUTE_PREFERENCE_PROVIDER_ONLY
            alone, _ = await send(stub, data.test, "teacher alone: test", preference=only)
    total = time.monotonic() - began
    local = [(r, gold) for r, (_, gold) in zip(answers, data.test, strict=True) if r.decision.local]
    outcome = {
        "simulation": True,
        "data": data.name,
        "before": asdict(before),
        "after": {**asdict(after), "teacher_accuracy": alone.accuracy},
        "teacher_alone": asdict(alone),
        "local_accuracy": sum(r.output_text == gold for r, gold in local) / max(len(local), 1),
        "lake_s": lake_s,
        "take_over_s": take_over_s,
        "total_s": total,
        "training": report,
        "met": after.local_share >= 0.6 and after.accuracy >= alone.accuracy and total < 300,
    }
    say(as_table(outcome))
    return outcome


def as_table(outcome: dict[str, Any]) -> str:
    """The figures side by side."""
    columns = [("before (traffic)", "before"), ("after (test)", "after"), ("teacher alone (test)", "teacher_alone")]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("requests", lambda p: f"{p['requests']}"),
        ("answered locally", lambda p: f"{p['local_share']:.1%}"),
        ("accuracy of what callers got", lambda p: f"{p['accuracy']:.1%}"),
        ("failed", lambda p: f"{p['failed']}"),
        ("US dollars a thousand", lambda p: f"{p['usd_per_thousand']:.4f}"),
        ("p50 of one call, ms", lambda p: f"{p['p50_ms']:.1f}"),
    ]
    lines = ["", f"{'':30}" + "".join(f"{title:>22}" for title, _ in columns)]
    lines += [f"{name:30}" + "".join(f"{show(outcome[key]):>22}" for _, key in columns) for name, show in rows]
    saved = 1 - outcome["after"]["usd_per_thousand"] / max(outcome["teacher_alone"]["usd_per_thousand"], 1e-12)
    lines += [
        "",
        f"{saved:.0%} of the bill saved; local answers were right on {outcome['local_accuracy']:.1%}.",
        f"The whole loop took {outcome['total_s']:.0f} s.",
        "The teacher was a SIMULATION: its accuracy and prices are assumptions, the student's figures are measured.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Returns the exit code: 0 however the figures are, so that they can be read; 1 where the loop did not close."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "models", help=f"repository that holds {BASE}")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--example", action="store_true", help="use the small set even where Banking77 is at hand")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    options = parser.parse_args()
    if not (options.models / BASE).is_dir():
        print(f"{options.models} has no {BASE}. Run: understudy models pull starter", file=sys.stderr)
        return 1
    data = None if options.example else banking77()
    with ExitStack() as stack:
        if options.keep:
            options.keep.mkdir(parents=True)
            folder = options.keep
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="understudy-demo-")))
        outcome = asyncio.run(run(Demo(data or example(), folder.resolve(), options.models)))
    if options.json:
        options.json.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
