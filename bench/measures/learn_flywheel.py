"""Bars `flywheel`, `bad_teacher`, `drift`: ten days of Banking77's training texts through the whole system (bench/flywheel.py).

About 1,000 requests a day, sent one by one; nobody gives a command. The teacher is a SIMULATION that answers from gold labels, right on
91 % of the texts. The 3,080 test texts never enter the traffic: published versions are measured on them after the last day.
`bad_teacher`: from day 6 on the teacher is right on 50 %. `drift`: 26 of the 77 intents come from day 6 on only.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from bench.demo import Data, banking77
from bench.flywheel import Day, Flywheel, Outcome, Plan
from bench.flywheel_plot import draw
from bench.flywheel_probe import probe
from bench.harness import BUILD, ROOT, Row, part, row_of

FLYWHEEL = (
    "by day 10, without a human, at a SIMULATED teacher right on 91 %: >= 90 % local, callers' accuracy >= the teacher's, "
    "cost cut >= 85 %, local p50 <= 20 ms"
)
BAD_TEACHER = (
    "the SIMULATED teacher turns bad (50 %) on day 6: the rollout notices and steps back or holds; nothing worse is put into service"
)
DRIFT = "a third of the intents appears on day 6 (SIMULATED teacher): an alarm and a step back within 2 days; >= 85 % local again by day 10"
DAYS, A_DAY = 10, 1000
ACCURACY, BAD = 0.91, 0.50
TURN = 6  # the day on which something changes
LATE = 26  # intents


def flywheel() -> Row:
    """The bar."""
    data = banking77()
    if data is None:
        return _absent("flywheel", FLYWHEEL)
    # Chosen by looking at earlier runs of the same days; docs/flywheel.md has them.
    plan = Plan(
        "flywheel",
        _days(data),
        data.labels,
        {1: ACCURACY},
        deliver_bar=0.53,
        rollout="margin = 0.06\nteacher_share = 0.03",
    )
    outcome = _run(plan, data)
    last = outcome.days[-1]
    local_ms = last.local_p50_ms if last.local_p50_ms is not None else float("inf")
    parts = [
        part("local", ">= 0.90", round(last.local_share, 3), last.local_share >= 0.90),
        part("accuracy", f">= the teacher's {last.teacher_accuracy:.3f}", round(last.accuracy, 3), last.accuracy >= last.teacher_accuracy),
        part("cost cut", ">= 0.85", round(last.saved, 3), last.saved >= 0.85),
        part("local p50 ms", "<= 20", round(local_ms, 1), local_ms <= 20),
        part("without a human", "every step by `auto`, every job by schedule", *_unattended(outcome)),
        part("failed requests", "0", sum(day.failed for day in outcome.days), not sum(day.failed for day in outcome.days)),
    ]
    return row_of("flywheel", FLYWHEEL, [*parts, _told(outcome)])


def bad_teacher() -> Row:
    """The bar. A teacher that turns bad disagrees with the student: the student must not be retrained into service on its words."""
    data = banking77()
    if data is None:
        return _absent("bad_teacher", BAD_TEACHER)
    outcome = _run(Plan("bad_teacher", _days(data), data.labels, {1: ACCURACY, TURN: BAD}), data)
    before = next((day for day in reversed(outcome.days) if day.number < TURN and day.probe is not None), None)
    noticed = _steps_from(outcome, TURN)
    worst = min((day.probe for day in outcome.days if day.number >= TURN and day.probe is not None), default=None)
    good = before is not None and before.probe is not None and (worst is None or worst >= before.probe - 0.03)
    after = outcome.days[TURN - 1 :]
    callers = sum(day.accuracy * day.requests for day in after) / sum(day.requests for day in after)
    parts = [
        part("noticed", f"a step back, a hold or an alarm from day {TURN} on", noticed[:6], bool(noticed)),
        part(
            "students in service",
            "none more than 3 points worse on the test texts than before",
            worst,
            good,
            before=before and before.probe,
        ),
        part("callers", f"more accurate than the bad teacher ({BAD:.0%})", round(callers, 3), callers > BAD),
    ]
    return row_of("bad_teacher", BAD_TEACHER, [*parts, _told(outcome)])


def drift() -> Row:
    """The bar. What the student has never seen must not be answered by it with confidence for long."""
    data = banking77()
    if data is None:
        return _absent("drift", DRIFT)
    outcome = _run(Plan("drift", _drifting(data), data.labels, {1: ACCURACY}), data)
    noticed = [text for day in outcome.days[TURN - 1 : TURN + 1] for text in day.events if _is_back(text)]
    last = outcome.days[-1]
    parts = [
        part("alarm", f"a step back or an alarm by day {TURN + 1}", noticed[:4], bool(noticed)),
        part("retrained", f"a version published after day {TURN}", *_published_from(outcome, TURN)),
        part("local again", ">= 0.85 on day 10", round(last.local_share, 3), last.local_share >= 0.85),
        part("accuracy again", ">= the teacher's on day 10", round(last.accuracy, 3), last.accuracy >= last.teacher_accuracy),
    ]
    return row_of("drift", DRIFT, [*parts, _told(outcome)])


def _run(plan: Plan, data: Data) -> Outcome:
    """The days, then the versions on the test texts, then the picture and the figures behind it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{plan.name}-", dir=BUILD, ignore_cleanup_errors=True) as work:
        running = Flywheel(plan, Path(work), ROOT / "models")
        try:
            outcome = asyncio.run(running.run())
        except BaseException:
            _keep_logs(Path(work), plan.name)
            raise
        probe(running.config, outcome.days, data.test)
        _keep_logs(Path(work), plan.name)
    (BUILD / f"{plan.name}.json").write_text(json.dumps(outcome.to_json(), indent=1, default=str) + "\n", encoding="utf-8")
    draw(outcome, ROOT / "docs" / "images" / f"{plan.name}.svg", turn=TURN if plan.name != "flywheel" else None)
    return outcome


def _keep_logs(work: Path, name: str) -> None:
    kept = BUILD / f"{name}-logs"
    kept.mkdir(exist_ok=True)
    for log in [*work.glob("*.log"), work / "understudy.toml"]:
        if log.is_file():
            (kept / log.name).write_bytes(log.read_bytes())


def _days(data: Data) -> list[list[tuple[str, str]]]:
    """Banking77's training texts, shuffled with a fixed seed by bench.demo, as they come."""
    size = -(-len(data.train) // DAYS)
    return [data.train[start : start + size] for start in range(0, len(data.train), size)]


def _drifting(data: Data) -> list[list[tuple[str, str]]]:
    """The late intents' texts all come from day TURN on, mixed with what the others have left."""
    rng = random.Random(11)
    late = set(rng.sample(data.labels, LATE))
    early_rows = [row for row in data.train if row[1] not in late]
    first = early_rows[: A_DAY * (TURN - 1)]
    rest = early_rows[A_DAY * (TURN - 1) :] + [row for row in data.train if row[1] in late]
    rng.shuffle(rest)
    days = [first[start : start + A_DAY] for start in range(0, len(first), A_DAY)]
    size = -(-len(rest) // (DAYS - len(days)))
    return days + [rest[start : start + size] for start in range(0, len(rest), size)]


def _unattended(outcome: Outcome) -> tuple[Any, bool]:
    """Who took the steps, and what made the jobs."""
    actors = sorted({str(event["actor"]) for event in outcome.events})
    jobs = len(outcome.jobs)
    return {"actors": actors, "jobs": jobs}, bool(jobs) and actors == ["auto"]


def _is_back(text: str) -> bool:
    """Whether an event (see Watch.new_events) is a step back, or an alarm, which leads from a stage to the same."""
    before, _, after = text.partition(": ")[2].partition(" (")[0].partition(" -> ")
    return before == after or after in ("rolled_back", "held")


def _steps_from(outcome: Outcome, day: int) -> list[str]:
    told = [text for one in outcome.days[day - 1 :] for text in one.events if _is_back(text)]
    refused = [text for one in outcome.days[day - 1 :] for text in one.trained if "not published" in text]
    return told + refused


def _published_from(outcome: Outcome, day: int) -> tuple[Any, bool]:
    found = [text for one in outcome.days[day - 1 :] for text in one.trained if ": version " in text]
    return len(found), bool(found)


def _told(outcome: Outcome) -> dict[str, Any]:
    """The days as they were: not a bar of its own."""
    return part(
        "days", "see docs/flywheel.md", [_brief(day) for day in outcome.days], True, seconds=round(outcome.seconds), note=outcome.note
    )


def _brief(day: Day) -> dict[str, Any]:
    return {
        "day": day.number,
        "local": round(day.local_share, 3),
        "accuracy": round(day.accuracy, 3),
        "teacher": round(day.teacher_accuracy, 3),
        "student_on_test": None if day.probe is None else round(day.probe, 4),
        "saved": round(day.saved, 3),
        "local_p50_ms": None if day.local_p50_ms is None else round(day.local_p50_ms, 1),
        "stage": day.stage,
        "version": day.student,
        "events": day.events,
        "trained": day.trained,
    }


def _absent(name: str, bar: str) -> Row:
    return Row(name, bar, "not measured: Banking77 is not at hand (UNDERSTUDY_SHARED or ../shared would hold data/banking77)", False)
