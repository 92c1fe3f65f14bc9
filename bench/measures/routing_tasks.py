"""Bar `tasks`: the detector on requests written apart from its phrases, by the starter embedder.

The requests are in bench/data/task_requests.jsonl. A hash of its text puts each in one of two parts: `dev` (three tenths), whose mistakes
were looked at while phrases and splitting were worked on, and `test`, which is the bar's. Both have the same author as the phrases; no
phrase of a task shares 60 % of its words with a request of that task, or with a clause of one (tests/routing/test_task_detection.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness import ROOT, STARTER, Row, median, part, row_of
from server.config import RuntimeConfig
from server.core import Call
from server.routing.task_detection import Detection, TaskDetector
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.repository import Repository
from server.runtime.runtime import Runtime

TASKS = ">= 92 % right on the 300 requests, >= 85 % of the no-task ones abstained, < 5 ms"
REQUESTS = ROOT / "bench" / "data" / "task_requests.jsonl"
_NONE = "no task"


@dataclass(frozen=True)
class Request:
    text: str
    task: str | None
    language: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def dev(self) -> bool:
        return int(hashlib.sha256(self.text.encode()).hexdigest(), 16) % 10 < 3


def read_requests(path: Path = REQUESTS) -> list[Request]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Request(row["text"], row["task"], row["language"], row.get("parameters", {})) for row in map(json.loads, lines)]


async def _detect(requests: Sequence[Request], models: Path) -> tuple[list[Detection], list[float], float]:
    """Detections one after the other, seconds of each, and of the first call's preparation."""
    runtime = Runtime(Repository(models), make_loader(RuntimeConfig(), NullObserver()))
    await runtime.load(STARTER)
    detector = TaskDetector(runtime, STARTER)
    begun = time.perf_counter()
    await detector.warm()
    prepared = time.perf_counter() - begun
    found, seconds = [], []
    for request in requests:
        begun = time.perf_counter()
        found.append(await detector.detect(request.text, Call("bench")))
        seconds.append(time.perf_counter() - begun)
    await runtime.close()
    return found, seconds, prepared


def _share(rows: Sequence[bool]) -> float:
    return round(sum(rows) / len(rows), 4) if rows else 0.0


def _figures(pairs: Sequence[tuple[Request, Detection]]) -> dict[str, Any]:
    asked = [(r, d) for r, d in pairs if r.task]
    wrong = Counter(f"{r.task or _NONE} -> {d.task or _NONE}" for r, d in pairs if d.task != r.task)
    return {
        "requests": len(pairs),
        "no_task_share": _share([r.task is None for r, _ in pairs]),
        "right": _share([d.task == r.task for r, d in pairs]),
        "abstained_of_no_task": _share([d.task is None for r, d in pairs if r.task is None]),
        "right_of_tasks": _share([d.task == r.task for r, d in asked]),
        "falsely_abstained": _share([d.task is None for _, d in asked]),
        "in_first_three": _share([r.task in [c.task for c in d.candidates[:3]] for r, d in asked]),
        "confused": dict(wrong.most_common(30)),
    }


def _parameters(pairs: Sequence[tuple[Request, Detection]]) -> tuple[int, int]:
    """Of the parameters that the requests say, how many were read right where the task was; and how many those are."""
    seen = [
        (tuple(value) if isinstance(value, list) else value, getattr(detection.parameters, name))
        for request, detection in pairs
        if detection.task == request.task
        for name, value in request.parameters.items()
    ]
    return sum(wanted == got for wanted, got in seen), len(seen)


def tasks() -> Row:
    requests = read_requests()
    models = Path(os.environ.get("UNDERSTUDY_BENCH_MODELS", ROOT / "models"))
    if not (models / STARTER).is_dir():
        raise SystemExit(f"{models / STARTER} is absent; run: understudy models pull starter")
    found, seconds, prepared = asyncio.run(_detect(requests, models))
    pairs = list(zip(requests, found, strict=True))
    english = [(r, d) for r, d in pairs if r.language == "en"]
    test, dev, whole = _figures([p for p in english if not p[0].dev]), _figures([p for p in english if p[0].dev]), _figures(english)
    taken = sorted(s * 1e3 for s, r in zip(seconds, requests, strict=True) if r.language == "en")
    p50, p99 = round(median(taken), 2), round(taken[int(len(taken) * 0.99)], 2)
    long_ms = [s * 1e3 for s, r in zip(seconds, requests, strict=True) if len(r.text) > 200]
    right, said = _parameters(english)
    shares = {key: test[key] for key in ("requests", "no_task_share")}
    languages = {code: _figures([p for p in pairs if p[0].language == code]) for code in ("fr", "es", "de")}
    brief = ("requests", "right", "abstained_of_no_task", "falsely_abstained")
    return row_of(
        "tasks",
        TASKS,
        [
            part("right", ">= 0.92", test["right"], test["right"] >= 0.92, **test),
            part("no-task requests abstained", ">= 0.85", test["abstained_of_no_task"], test["abstained_of_no_task"] >= 0.85),
            part("test requests", ">= 300, >= 0.2 no task", shares, test["requests"] >= 300 and test["no_task_share"] >= 0.2),
            part("p50 ms, embedding included", "< 5", p50, p50 < 5, p99=p99, long_p50=round(median(long_ms), 2), load=os.getloadavg()),
            part("first call's preparation, s", "reported", round(prepared, 2), True),
            part("dev (looked at while tuning)", "reported", {k: dev[k] for k in brief}, True, confused=dev["confused"]),
            part("dev and test", "reported", {k: whole[k] for k in brief}, True),
            part("parameters read", "reported", f"{right} of {said}", True),
            *(part(f"in {code}", "reported", {k: f[k] for k in brief}, True, confused=f["confused"]) for code, f in languages.items()),
        ],
    )


if __name__ == "__main__":
    row = tasks()
    print(json.dumps(row.parts, indent=2))
    print(row.line())
