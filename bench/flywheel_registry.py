"""What the driver of the flywheel sees of the loop from outside: the registry's rows, read and never written."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(slots=True, frozen=True)
class Stage:
    """Where the skill's rollout is; "" where there is none yet."""

    stage: str = ""
    percent: int = 0
    student: str = ""
    champion: str = ""

    @property
    def shown(self) -> str:
        """For people: "canary 50"."""
        return f"{self.stage} {self.percent}" if self.stage == "canary" else self.stage


class Watch:
    """Reads the run's database. Use it as a context."""

    def __init__(self, folder: Path, skill: str) -> None:
        self._path = folder / "registry.db"
        self._skill = skill
        self._told_events = 0
        self._told_jobs: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def busy(self) -> bool:
        """Whether a job waits or runs."""
        return bool(self._rows("SELECT id FROM jobs WHERE state IN ('queued', 'running')"))

    def rollout(self) -> Stage:
        """As it is now."""
        rows = self._rows("SELECT * FROM rollouts WHERE skill = ?", self._skill)
        if not rows:
            return Stage()
        row = rows[0]
        return Stage(row["stage"], row["percent"], row["student"], json.loads(row["state"]).get("champion", ""))

    def events(self) -> list[dict[str, Any]]:
        """Every step, oldest first."""
        return self._rows("SELECT * FROM rollout_events WHERE skill = ? ORDER BY time_ms, id", self._skill)

    def new_events(self) -> list[str]:
        """In words, those since the last call."""
        found = self.events()
        new, self._told_events = found[self._told_events :], len(found)
        return [f"{row['student']}: {row['from_stage']} -> {row['to_stage']} ({row['actor']}): {row['reason'][:200]}" for row in new]

    def jobs(self) -> list[dict[str, Any]]:
        """Those that have ended, oldest first, with their reports."""
        rows = self._rows("SELECT * FROM jobs WHERE state NOT IN ('queued', 'running') ORDER BY create_ms")
        return [{**row, "report": json.loads(row["report"])} for row in rows]

    def new_jobs(self) -> list[str]:
        """In words, those that ended since the last call."""
        new = [job for job in self.jobs() if job["id"] not in self._told_jobs]
        self._told_jobs |= {job["id"] for job in new}
        return [_in_words(job) for job in new]

    def _rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=10)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query, values)]


def _in_words(job: dict[str, Any]) -> str:
    report, seconds = job["report"], (job["end_ms"] - (job["start_ms"] or job["create_ms"])) / 1e3
    if job["state"] == "failed":
        return f"{job['kind']} failed after {seconds:.0f} s: {job['error'][:200]}"
    metrics = report.get("metrics", {})
    figures = f"{metrics.get('accuracy', 0):.1%} agree, {metrics.get('local_share', 0):.1%} at the bar"
    rows = f"{report.get('train_rows', 0)} rows"
    end = f"version {report['version']}" if report.get("version") else f"not published: {report.get('reason', '')[:160]}"
    return f"{job['kind']} {job['state']} in {seconds:.0f} s, {report.get('method', '')} on {rows}, {figures}: {end}"
