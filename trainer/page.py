"""A job's page: one HTML file with everything in it, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.registry.jobs import Job, JobError, Point


def write_page(folder: Path, job: Job, state: str, report: Mapping[str, Any], error: JobError | None, points: Sequence[Point]) -> None:
    """Writes report.json and report.html into the job's folder."""
    document: dict[str, Any] = {
        "job": job.id,
        "skill": job.skill,
        "kind": job.kind,
        "state": state,
        "spec": dict(job.spec),
        "report": dict(report),
    }
    document |= {"error": asdict(error) if error is not None else None, "curves": curves(points)}
    (folder / "report.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def curves(points: Sequence[Point]) -> dict[str, list[tuple[int, float]]]:
    """Points by curve, in the order of steps."""
    found: dict[str, list[tuple[int, float]]] = {}
    for point in points:
        found.setdefault(point.name, []).append((point.step, point.value))
    return {name: sorted(steps) for name, steps in sorted(found.items())}
