"""What a training method gets from the job that it runs in: a place to keep things, a clock, somebody to tell, and an end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from server.errors import Cancelled


def _nothing(*_: object) -> None:
    pass


@dataclass(slots=True)
class JobContext:
    """One a job attempt. `folder` outlives a killed trainer: the next attempt finds its checkpoints there.

    `log(text)` keeps a line of words; `metric(name, step, value)` a point of a curve, such as ("train/loss", 120, 0.31);
    `progress(stage, done, total)` says how far a stage is. All three are quick and never raise. `deadline`: of time.monotonic().
    """

    job: str
    folder: Path
    seed: int = 0
    attempt: int = 1
    deadline: float = float("inf")
    checkpoint_s: float = 30.0
    log: Callable[[str], None] = _nothing
    metric: Callable[[str, int, float], None] = _nothing
    progress: Callable[[str, int, int], None] = _nothing
    is_cancelled: Callable[[], bool] = field(default=lambda: False)

    def check(self) -> None:
        """Between steps: raises Cancelled where somebody cancelled the job or its lease is lost."""
        if self.is_cancelled():
            raise Cancelled(f"job {self.job} was cancelled", job=self.job)

    def left_s(self) -> float:
        """Seconds of the budget that are left; at least 0."""
        return max(0.0, self.deadline - time.monotonic())
