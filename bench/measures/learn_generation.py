"""Generation: a small LLaMA learns to fill in a form from a teacher's recorded answers, and takes over from it under load.

The base is stories260K, a trained LLaMA of 260K parameters that knows children's stories and no JSON. Task and sentences are made here: a
wish in plain words becomes a JSON object of three fields. No held-out sentence is among those that are learnt. The teacher is a SIMULATION:
bench.teacher_simulation answers from a file with the right objects; all else is real: server, lake, trainer and the takeover.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness import ROOT, SHARED, Row, part, row_of, serve

BAR = "held-out exact match < 10 % -> > 90 % by LoRA on two cores in < 10 min; taken over under load, no failed call; PEFT = served to 1e-3"
SKILL, BASE = "wishes", "stories260k"
ROWS, PROBES = 2000, 200
CALLERS = 3
SPEC = {"method": "lora", "epochs": 2.0}
_WHO = ["Lily", "Tom", "Anna", "Ben", "Mia", "Sam", "Sue", "Max", "Jane", "Tim", "Lucy", "Jack"]
_WHAT = ["apple", "ball", "book", "cake", "cup", "doll", "egg", "hat", "kite", "lamp", "pen", "toy"]
_COLOR = ["red", "blue", "green", "black", "white", "pink"]
_SENTENCES = (
    "{who} wants a {color} {what}.",
    "{who} has a {color} {what}.",
    "Give {who} a {color} {what}.",
    "A {color} {what} is for {who}.",
    '{who} said, "I want a {color} {what}."',
    "The {what} of {who} is {color}.",
    "{who} saw a {what}. It was {color}.",
    "Mom gave {who} a {color} {what}.",
)
_FIELDS = ("who", "color", "what")
SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in _FIELDS},
    "required": list(_FIELDS),
    "additionalProperties": False,
}


def wishes(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different sentences with the object that each stands for."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        values = {"who": rng.choice(_WHO), "color": rng.choice(_COLOR), "what": rng.choice(_WHAT)}
        found[rng.choice(_SENTENCES).format(**values)] = json.dumps(values, separators=(",", ":"))
    return list(found.items())


@dataclass
class Seen:
    """What the callers saw. `local`: by second, how many answers were the student's."""

    calls: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    local: Counter[bool] = field(default_factory=Counter)
    wrong: int = 0


class Load:
    """Callers that ask without a pause until they are stopped."""

    def __init__(self, address: str, rows: Sequence[tuple[str, str]]) -> None:
        self.seen = Seen()
        self._rows = rows
        self._address = address
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(CALLERS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, number: int) -> None:
        from understudy.client import Client

        with Client(self._address) as client:
            at = number
            while not self._end.is_set():
                text, wanted = self._rows[at % len(self._rows)]
                at += CALLERS
                try:
                    answer: Any = client.run(SKILL, [text], timeout_s=120).items[0]
                except Exception as failure:  # whatever a caller would see
                    answer = failure
                with self._lock:
                    self.seen.calls += 1
                    if isinstance(answer, Exception):
                        self.seen.failed[type(answer).__name__] += 1
                    else:
                        self.seen.local[answer.decision.local] += 1
                        self.seen.wrong += answer.text.strip() != wanted
                time.sleep(0.1)


def generation() -> Row:
    """The bar: see the module."""
    source = SHARED / "data" / "tiny_weights" / "stories260K"
    if not (source / "stories260K.bin").is_file():
        return Row("generation", BAR, f"not measured: {source} is not on this machine", False)
    folder = Path(tempfile.mkdtemp(prefix="understudy-generation-"))
    try:
        return _measure(folder, source)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(folder: Path, source: Path) -> Row:
    rows = wishes(ROWS + 2 * PROBES)
    # What is asked while the job runs may be learnt from; the probes are asked once, at the end.
    recorded, asked, probes = rows[:ROWS], rows[ROWS : ROWS + PROBES], rows[ROWS + PROBES :]
    (folder / "gold.jsonl").write_text("".join(json.dumps({"text": text, "label": answer}) + "\n" for text, answer in rows))
    _pull(folder, source)
    teacher = subprocess.Popen(
        [sys.executable, "-m", "bench.teacher_simulation", "--labels", str(folder / "gold.jsonl"), "--accuracy", "1", "--latency-ms", "5"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert teacher.stdout is not None
        config = _config(folder, source, json.loads(teacher.stdout.readline())["base_url"])
        with serve(folder / "models", config=config) as server:
            _record(server.address, recorded)
            _await_rows(folder)
            with Load(server.address, asked) as load:
                report, wall, cpu = _train(folder)
                local = _await_takeover(load) if report["state"] == "succeeded" else 0
            right, mine = _probe(server.address, probes)
        logits = _logits(folder, [text for text, _ in probes[:16]]) if report["state"] == "succeeded" else float("inf")
    finally:
        teacher.terminate()
        teacher.wait()
    return _row(report, load.seen, {"wall": wall, "cpu": cpu, "local": local, "right": right, "mine": mine, "logits": logits})


def _row(report: dict[str, Any], seen: Seen, figures: dict[str, float]) -> Row:
    before = report["details"].get("against the present student", {}).get("exact_match", float("nan"))
    after = report["metrics"].get("exact_match", 0.0)
    failed = sum(seen.failed.values())
    minutes = {"wall_min": round(figures["wall"] / 60, 1), "processor_min": round(figures["cpu"] / 60, 1)}
    error, texts, right = report["metrics"].get("parity_max_error", 1.0), report["metrics"].get("parity_same_texts"), figures["right"]
    probed = f"{right:.1%} ({figures['mine']:.0%} local)"
    parts = [
        part("exact match of the base, held out", "< 10 %", f"{before:.1%}", before < 0.1),
        part("exact match of the exported student, held out", "> 90 %", f"{after:.1%}", after > 0.9),
        part("probes never asked before, through the server", "> 90 %", probed, right > 0.9),
        part("job, curation to publication", "< 10 min on two cores", minutes, figures["wall"] < 600, load_average=os.getloadavg()),
        part("calls under load, failed", "0", f"{failed} of {seen.calls}", failed == 0, reasons=dict(seen.failed)),
        part("local answers after the takeover, while the load went on", "> 0", figures["local"], figures["local"] > 0),
        part("largest difference of a logit, PEFT against served", "<= 1e-3", float(figures["logits"]), figures["logits"] <= 1e-3),
        part("largest difference of a log-probability, through the engine", "<= 1e-3", error, error <= 1e-3),
        part("greedy texts equal to PEFT's", "all", texts, texts == 1.0),
    ]  # fmt: skip
    parts.append(
        part("report", "", {key: report[key] for key in ("state", "reason", "train_rows", "held_out_rows", "seconds", "tried")}, True)
    )
    return row_of("generation", BAR, parts)


def _pull(folder: Path, source: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "models", "pull", str(source), "--task", "text-generation", "--dtype", "float32"]
    done = subprocess.run([*command, "--name", BASE, "--models", str(folder / "models")], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the base could not be pulled: {(done.stdout + done.stderr)[-1500:]}")


def _config(folder: Path, source: Path, teacher: str) -> str:
    """Of the server and the trainer alike. A student is taken over at once (rollout full): how it gets there is another bar's."""
    text = f"""
[server]
metrics_port = 0
[models]
path = {json.dumps(str(folder / "models"))}
[lake]
path = {json.dumps(str(folder / "lake"))}
flush_s = 1
[registry]
url = {json.dumps(f"sqlite:///{folder / 'registry.db'}")}
[training]
path = {json.dumps(str(folder / "training"))}
[training.sources]
{BASE} = {json.dumps(str(source))}
[curation]
near_duplicates = 1.0  # sentences of one pattern that differ in a word are different rows here
[providers.simulation]
base_url = {json.dumps(teacher)}
api_key_env = "SIMULATION_KEY"
training_allowed = true
[skills.{SKILL}]
task = "text-generation"
json_schema = {json.dumps(json.dumps(SCHEMA))}
teacher = "simulation/simulated-teacher"
base = "{BASE}"
rollout = "full"
max_tokens = 64
train_budget_s = 7200
"""
    os.environ.setdefault("SIMULATION_KEY", "none")
    (folder / "understudy.toml").write_text(text)
    return text


def _record(address: str, rows: Sequence[tuple[str, str]]) -> None:
    """The teacher's answers come into the lake as any traffic does."""
    from understudy.client import Client

    with Client(address) as client:
        for start in range(0, len(rows), 50):
            for answer in client.run(SKILL, [text for text, _ in rows[start : start + 50]], timeout_s=120).items:
                if isinstance(answer, Exception):
                    raise answer


def _await_rows(folder: Path, most_s: float = 600.0) -> None:
    """Until the lake's files have all of them."""
    from server.config import load_config
    from server.lake.reading import LakeReader

    end, config = time.monotonic() + most_s, load_config(folder / "understudy.toml")
    while LakeReader(config).interactions(skill=SKILL, columns=["interaction_id"]).num_rows < ROWS:
        if time.monotonic() > end:
            raise RuntimeError(f"after {most_s:g} s the lake has fewer than the {ROWS} rows that were recorded")
        time.sleep(1.0)


def _train(folder: Path) -> tuple[dict[str, Any], float, float]:
    """The job in a process of its own: its report, seconds on the clock and of the processor."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "trainer.generation.launch", SKILL, "--config", str(folder / "understudy.toml")]
    command += ["--folder", str(folder / "job"), "--spec", json.dumps(SPEC)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not done.stdout.strip():
        raise RuntimeError("the training ended without a report; its messages are above")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout.strip().splitlines()[-1]), time.monotonic() - began, cpu


def _await_takeover(load: Load, most_s: float = 120.0, answers: int = 50) -> int:
    """Local answers that callers got within a while."""
    end = time.monotonic() + most_s
    while time.monotonic() < end and load.seen.local[True] < answers:
        time.sleep(0.2)
    return load.seen.local[True]


def _probe(address: str, probes: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Shares of right answers and of local ones, over sentences that no training saw."""
    from understudy.client import Client

    with Client(address) as client:
        answers: list[Any] = []
        for start in range(0, len(probes), 50):
            answers += client.run(SKILL, [text for text, _ in probes[start : start + 50]], timeout_s=300).items
    good = [not isinstance(one, Exception) and one.text.strip() == wanted for one, (_, wanted) in zip(answers, probes, strict=True)]
    local = [not isinstance(one, Exception) and one.decision.local for one in answers]
    return sum(good) / len(good), sum(local) / len(local)


def _logits(folder: Path, texts: Sequence[str]) -> float:
    """The largest difference between a logit of PEFT's model and one of the served graph with the published adapter in its bank."""
    import asyncio

    import numpy as np
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint
    from server.runtime.graphs.decoder.parity import Runner
    from server.runtime.lora.bank import AdapterBank
    from server.runtime.lora.layout import layout_of
    from server.runtime.lora.repository import ADAPTERS
    from server.runtime.lora.store import AdapterSet
    from server.runtime.repository import Repository
    from server.runtime.tokenizers import TextTokenizer

    checkpoint = folder / "job" / "work" / "base"
    files = Repository(folder / "models").open(BASE)
    layout = layout_of(files.manifest)
    assert layout is not None and files.tokenizer is not None, "a decoder"
    student = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), str(folder / "job" / "work" / "lora" / "export" / "saved")
    ).eval()
    bank = AdapterBank(layout, 2, 16)

    async def slot() -> int:
        adapters = AdapterSet(files.manifest, folder / "models" / ADAPTERS, bank)
        await adapters.start()
        return (await adapters.acquire(SKILL)).slot

    number = asyncio.run(slot())
    runner = Runner(files.model, DecoderCheckpoint.open(checkpoint), sequences=len(texts), length=128, kv_dtype="float32")
    runner.adapters = dict(bank.feeds())
    tokenizer = TextTokenizer.load(files.tokenizer, max_tokens=files.manifest.max_tokens)
    worst = 0.0
    for index, text in enumerate(texts):
        ids = tokenizer.ids(text + "\n", special=True)
        got = runner.run([index], [ids], slots=np.full(len(ids), number))
        with torch.no_grad():
            want = student(torch.tensor([ids])).logits[0].numpy()
        worst = max(worst, float(np.abs(got - want).max()))
    runner.close()
    return worst
