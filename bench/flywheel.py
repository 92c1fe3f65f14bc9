"""The whole system for ten days in ten minutes: real server, real trainer, real traffic; the API model is a SIMULATION.

`understudy serve`, `python -m trainer work` and the simulated API model (bench/teacher_simulation.py) are processes of their own. The
driver is the callers: it sends each day's requests one by one at a fixed rate, and says of some answers what users would say. It gives no
command to anybody; the skill's schedule makes the trainings, the rollout moves by what it measures. A day's traffic takes seconds, and its
night as long as the trainer needs.

Texts that measure the students (the test part) are never sent: the published versions are measured on them after the last day, from
their files. What callers got is measured on the traffic itself, against its gold labels, which only the simulation and the driver know.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import shutil
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc

from bench.demo import BASE, ROOT, process, wait_ready
from bench.flywheel_registry import Watch
from bench.teacher_simulation import MODEL, SimulatedTeacher
from server.lake import schema, table
from understudy.v1 import feedback_pb2, feedback_service_pb2, inference_pb2, inference_service_pb2
from understudy.v1.feedback_service_pb2_grpc import FeedbackServiceStub
from understudy.v1.inference_service_pb2_grpc import InferenceServiceStub

SKILL = "support-intent"
IN_PER_MILLION, OUT_PER_MILLION = 0.15, 0.60  # US dollars; the simulation's price
USERS = 200
IN_FLIGHT = 32  # a machine that is too slow for the rate has its requests later, and not all at once
LAKE_S, NIGHT_S = 300.0, 600.0


@dataclass(slots=True, frozen=True)
class Plan:
    """A run: the traffic of each day as (text, gold label), and what happens meanwhile.

    `accuracy`: of the simulated teacher, by the day (from 1) that it holds from. `feedback`: share of answers that a user says something
    of; `flipped`: share of that which is wrong. `quiet_s`: how long the trainer must have had nothing to do for a night to end.
    """

    name: str
    days: Sequence[Sequence[tuple[str, str]]]
    labels: Sequence[str]
    accuracy: dict[int, float]
    schedule: str = "when 500 new good rows"
    deliver_bar: float = 0.6
    min_rows: int = 100
    rate: float = 80.0
    latency_ms: float = 100.0
    feedback: float = 0.05
    flipped: float = 0.10
    quiet_s: float = 18.0
    nights: int = 1000  # so many; after those the next day begins as soon as the rows are Parquet
    train_budget_s: float = 120.0
    method: str = "linear-head"  # a night of seconds; whole encoders take minutes
    rollout: str = "margin = 0.06"  # lines of [rollout]; 1,000 requests a day cannot show less of a difference soon
    nice: int = 10  # of the trainer: it shares the machine with the server
    instruction: str = "Say what the customer wants."


@dataclass(slots=True)
class Day:
    """What one day was like. Shares and accuracies are of its requests, against gold labels; money in US dollars, times in milliseconds.

    `teacher_accuracy`: what callers would have got from the teacher alone. `usd`: what the vendor charged, comparisons included;
    `usd_alone`: what it would have charged for all requests.
    """

    number: int
    requests: int = 0
    failed: int = 0
    local_share: float = 0.0
    accuracy: float = 0.0
    local_accuracy: float | None = None
    teacher_accuracy: float = 0.0
    usd: float = 0.0
    usd_alone: float = 0.0
    saved: float = 0.0
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    local_p50_ms: float | None = None
    local_p95_ms: float | None = None
    teacher_calls: int = 0
    feedback: int = 0
    stage: str = ""
    student: str = ""
    champion: str = ""
    events: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    seconds: float = 0.0
    night_s: float = 0.0
    probe: float | None = None


@dataclass(slots=True)
class Outcome:
    """A run's days, its rollout's steps and its jobs."""

    name: str
    days: list[Day]
    events: list[dict[str, Any]]
    jobs: list[dict[str, Any]]
    seconds: float
    note: str = "the API model is a SIMULATION that answers from gold labels"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True, frozen=True)
class Sent:
    """One request and what came of it."""

    text: str
    gold: str
    answer: str
    local: bool
    failed: bool
    interaction: str
    ms: float


class Flywheel:
    """Processes and files of one run, all under `folder`."""

    def __init__(self, plan: Plan, folder: Path, models: Path, say: Callable[[str], None] = print) -> None:
        self.plan = plan
        self.folder = folder
        self.config = folder / "understudy.toml"
        self.models = folder / "models"
        self._from = models
        self._say = say
        gold = {text: label for day in plan.days for text, label in day}
        self._teacher = SimulatedTeacher(gold, plan.accuracy[1])
        self._base_url = ""
        self._usd_each = 0.0  # what a request costs at the vendor, as the first day has it, on which nobody else can answer
        self._sent = 0

    def prepare(self) -> None:
        """The simulation's labels and a repository of its own: versions are published into it."""
        rows = [json.dumps({"text": text, "label": label}) for day in self.plan.days for text, label in day]
        (self.folder / "gold.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        shutil.copytree(self._from / BASE, self.models / BASE)

    def configure(self, base_url: str) -> None:
        """One file for the server and the trainer."""
        plan = self.plan
        self._base_url = base_url
        self.config.write_text(
            f"""
[server]
metrics_port = 0
[log]
format = "json"
access = false
[models]
path = {json.dumps(str(self.models))}
[lake]
path = {json.dumps(str(self.folder / "lake"))}
flush_s = 1
[registry]
url = {json.dumps(f"sqlite:///{self.folder / 'registry.db'}")}
[training]
path = {json.dumps(str(self.folder / "training"))}
poll_s = 0.5
[rollout]
{plan.rollout}
[providers.simulation]
base_url = {json.dumps(base_url)}
max_concurrent = 64
training_allowed = true
prices = {{ "{MODEL}" = {{ input_per_million_usd = {IN_PER_MILLION}, output_per_million_usd = {OUT_PER_MILLION} }} }}
[skills.{SKILL}]
instruction = {json.dumps(plan.instruction)}
labels = {json.dumps(list(plan.labels))}
teacher = "simulation/{MODEL}"
base = "{BASE}"
deliver_bar = {plan.deliver_bar}
min_rows = {plan.min_rows}
schedule = {json.dumps(plan.schedule)}
method = {json.dumps(plan.method)}
train_budget_s = {plan.train_budget_s}
""",
            encoding="utf-8",
        )

    async def run(self) -> Outcome:
        """All days."""
        began = time.monotonic()
        plan = self.plan
        self.prepare()
        days: list[Day] = []
        with ExitStack() as stack:
            arguments = [
                "--labels",
                str(self.folder / "gold.jsonl"),
                "--accuracy",
                str(plan.accuracy[1]),
                "--latency-ms",
                str(plan.latency_ms),
            ]
            teacher = stack.enter_context(
                process([sys.executable, "-m", "bench.teacher_simulation", *arguments], self.folder / "teacher.log")
            )
            assert teacher.stdout is not None
            self.configure(json.loads(teacher.stdout.readline())["base_url"])
            serve = [sys.executable, "-m", "server.cli", "serve", "--config", str(self.config), "--port", "0"]
            server = stack.enter_context(process(serve, self.folder / "server.log", all_to_log=True))
            address = wait_ready(server, self.folder / "server.log")
            work = ["nice", "-n", str(plan.nice), sys.executable, "-m", "trainer", "work", "--config", str(self.config)]
            trainer = stack.enter_context(process(work, self.folder / "trainer.log", all_to_log=True))
            watch = stack.enter_context(Watch(self.folder, SKILL))
            self._say(f"{plan.name}: {len(plan.days)} days, {sum(map(len, plan.days))} requests. The API model is a SIMULATION.")
            async with grpc.aio.insecure_channel(address) as channel:
                for number, rows in enumerate(plan.days, 1):
                    if number in plan.accuracy and number > 1:
                        await asyncio.to_thread(self._ask, "control", {"accuracy": plan.accuracy[number]})
                        self._teacher.accuracy = plan.accuracy[number]
                        self._say(f"day {number}: the simulated API model is now right on {plan.accuracy[number]:.0%}, and tells nobody")
                    day = await self._day(channel, number, rows)
                    day.night_s = await self._night(watch, number)
                    assert server.poll() is None and trainer.poll() is None, "a process ended; see its log"
                    self._after(day, watch)
                    days.append(day)
                    self._say(in_words(day))
            events, jobs = watch.events(), watch.jobs()
        return Outcome(plan.name, days, events, jobs, time.monotonic() - began)

    async def _day(self, channel: grpc.aio.Channel, number: int, rows: Sequence[tuple[str, str]]) -> Day:
        """A day's requests, each due at its moment, whatever became of the others but for IN_FLIGHT."""
        before = await asyncio.to_thread(self._ask, "bill")
        start = time.monotonic()
        stub = InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        tasks: list[asyncio.Task[Sent]] = []
        slots = asyncio.Semaphore(IN_FLIGHT)
        for place, (text, gold) in enumerate(rows):
            wait = start + place / self.plan.rate - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            await slots.acquire()
            task = asyncio.create_task(_ask(stub, text, gold))
            task.add_done_callback(lambda _: slots.release())
            tasks.append(task)
        sent = list(await asyncio.gather(*tasks))
        seconds = time.monotonic() - start
        said = await self._say_something(channel, number, sent)
        self._sent += sum(bool(one.interaction) for one in sent)
        after = await asyncio.to_thread(self._ask, "bill")
        return self._counted(number, sent, said, seconds, (before, after))

    async def _say_something(self, channel: grpc.aio.Channel, number: int, sent: Sequence[Sent]) -> int:
        """Some users put the answer right or a thumb up; some of them are wrong."""
        stub = FeedbackServiceStub(channel)  # type: ignore[no-untyped-call]
        rng = random.Random(number)
        calls = []
        for one in sent:
            if one.failed or rng.random() >= self.plan.feedback:
                continue
            wrong = rng.random() < self.plan.flipped
            given = feedback_pb2.Feedback(interaction_id=one.interaction)
            if (one.answer == one.gold) != wrong:
                given.thumb = feedback_pb2.THUMB_UP
            elif wrong:
                given.correction = rng.choice(list(self.plan.labels))
            else:
                given.correction = one.gold
            calls.append(stub.CreateFeedback(feedback_service_pb2.CreateFeedbackRequest(feedback=given), timeout=30))
        for call in calls:
            await call
        return len(calls)

    def _counted(self, number: int, sent: Sequence[Sent], said: int, seconds: float, bills: tuple[dict[str, Any], dict[str, Any]]) -> Day:
        before, after = bills
        right = [one.answer == one.gold for one in sent]
        local = [one for one in sent if one.local]
        usd = _usd(after) - _usd(before)
        calls = after["requests"] - before["requests"]
        if number == 1:
            self._usd_each = usd / max(calls, 1)
        alone = self._usd_each * len(sent)
        times, local_times = sorted(one.ms for one in sent), sorted(one.ms for one in local)
        return Day(
            number=number,
            requests=len(sent),
            failed=sum(one.failed for one in sent),
            local_share=len(local) / len(sent),
            accuracy=sum(right) / len(sent),
            local_accuracy=sum(one.answer == one.gold for one in local) / len(local) if local else None,
            teacher_accuracy=sum(self._teacher.answer(one.text) == one.gold for one in sent) / len(sent),
            usd=usd,
            usd_alone=alone,
            saved=1 - usd / alone,
            p50_ms=statistics.median(times),
            p95_ms=times[int(len(times) * 0.95)],
            local_p50_ms=statistics.median(local_times) if local else None,
            local_p95_ms=local_times[int(len(local_times) * 0.95)] if local else None,
            teacher_calls=calls,
            feedback=said,
            seconds=seconds,
        )

    async def _night(self, watch: Watch, number: int) -> float:
        """Until the day's rows are Parquet and the trainer has had nothing to do for a while."""
        start = time.monotonic()
        lake = self.folder / "lake"
        while await asyncio.to_thread(table.count, lake, schema.INTERACTIONS) < self._sent:
            if time.monotonic() - start > LAKE_S:
                raise RuntimeError(f"the day's rows did not come to the lake within {LAKE_S:.0f} s")
            await asyncio.sleep(0.25)
        quiet = time.monotonic()
        while number <= self.plan.nights and time.monotonic() - quiet < self.plan.quiet_s:
            if await asyncio.to_thread(watch.busy):
                quiet = time.monotonic() - self.plan.quiet_s + 3.0  # after its end the server has three seconds to take it over
            if time.monotonic() - start > NIGHT_S:
                raise RuntimeError(f"the trainer was busy for over {NIGHT_S:.0f} s")
            await asyncio.sleep(0.25)
        return time.monotonic() - start

    def _after(self, day: Day, watch: Watch) -> None:
        now = watch.rollout()
        day.stage = now.shown
        day.student, day.champion = now.student, now.champion
        day.events = watch.new_events()
        day.trained = watch.new_jobs()

    def _ask(self, what: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = json.dumps(body).encode() if body is not None else None
        with urllib.request.urlopen(f"{self._base_url.removesuffix('/v1')}/{what}", data=data, timeout=10) as answer:
            return dict(json.loads(answer.read()))


async def _ask(stub: Any, text: str, gold: str) -> Sent:
    user = f"user-{int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], 'big') % USERS}"
    request = inference_service_pb2.RunRequest(skill=SKILL, inputs=[inference_pb2.RunInput(text=text)], user=user)
    start = time.perf_counter()
    try:
        response = await stub.Run(request, timeout=60)
    except grpc.RpcError:
        return Sent(text, gold, "", False, True, "", (time.perf_counter() - start) * 1e3)
    ms = (time.perf_counter() - start) * 1e3
    result = response.results[0]
    return Sent(text, gold, result.output_text, result.decision.local, result.HasField("error"), result.interaction_id, ms)


def _usd(bill: dict[str, Any]) -> float:
    return float(bill["prompt_tokens"] * IN_PER_MILLION + bill["completion_tokens"] * OUT_PER_MILLION) / 1e6


def in_words(day: Day) -> str:
    """One line a day, and its events below."""
    local = f"{day.local_p50_ms:5.1f}" if day.local_p50_ms is not None else "    -"
    line = (
        f"day {day.number:2d}  local {day.local_share:6.1%}  right {day.accuracy:6.1%} (teacher {day.teacher_accuracy:6.1%})  "
        f"cost {day.usd:.4f} of {day.usd_alone:.4f} USD (saved {day.saved:6.1%})  p50 {day.p50_ms:6.1f} ms, local {local} ms  "
        f"{day.stage} {day.student}  [{day.seconds:.0f} s, night {day.night_s:.0f} s]{f'  FAILED {day.failed}' if day.failed else ''}"
    )
    return "\n".join([line, *(f"          {text}" for text in (*day.trained, *day.events))])


__all__ = ["ROOT", "Day", "Flywheel", "Outcome", "Plan", "in_words"]
