"""What a training run tells of itself: for the registry, the page of the job and the person at the terminal."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

SUCCEEDED, REJECTED = "succeeded", "rejected"


@dataclass(slots=True)
class Report:
    """What a run did. `state`: "succeeded" (published), "rejected" (trained, and `reason` says why it was not published).

    `method`: of the student that was chosen; `tried`: one entry a student that was trained, cheapest first, each with "method", "seconds",
    its figures and "reaches" (whether it reached the bar). `metrics` are numbers by name, as the manifest has them; `parameters`, what the
    chosen student was trained with; `details`, tables for the page (per class, most confused, reliability, paired tests).
    `model`: "name@version" of a model that the job put into the repository. `seconds`: by stage.
    """

    skill: str
    job: str
    state: str = "running"
    reason: str = ""
    version: str = ""
    method: str = ""
    base: str = ""
    model: str = ""
    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    train_rows: int = 0
    held_out_rows: int = 0
    labels: int = 0
    labels_without_rows: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)
    present_version: str = ""
    present_accuracy: float | None = None
    curation: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    card: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Timed:
    """Seconds of a stage, into the report; a stage that is entered twice counts both. Use: `with Timed(report, "fit"):`."""

    def __init__(self, report: Report, stage: str) -> None:
        self._report = report
        self._stage = stage
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        seconds = self._report.seconds
        seconds[self._stage] = seconds.get(self._stage, 0.0) + time.monotonic() - self._start
