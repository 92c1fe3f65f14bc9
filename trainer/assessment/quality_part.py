"""Recalibrates a skill's quality model (adapters/<skill>/quality.json) on judged answers; the present one stays where it is as good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from server.core import FinishReason, FloatArray, Task
from server.errors import TooLittleData
from server.quality.model import QualityModel, cold_start
from server.quality.scorer import Observed, score
from server.routing.judge import FILE, SCORED
from trainer.assessment.evidence import Judged
from trainer.assessment.figures import figures, split_by_time, why_not
from trainer.quality import Judged as Row
from trainer.quality import fit, with_priors

MOST_ROWS = 50_000
MIN_LATER = 50  # rows to measure on; fewer measure chance
# Judged answers mostly ended by themselves. One that was cut off is worth less; how much less, few labels say.
_PRIORS = {"cut": -1.5}
_TASKS = {task.value: task for task in Task}
_FINISHES = {reason.value: reason for reason in FinishReason}


def recalibrate(root: Path, skill: str, task: str, judged: Sequence[Judged]) -> dict[str, Any]:
    """Fits on the earlier rows, measures both models on the later ones, and writes the better one.

    Returns "state" ("published", "kept" or "skipped"), "reason", "rows", "before" and "after" (see Figures). Raises nothing for little
    data: that is a state.
    """
    if task not in SCORED:
        return {"state": "skipped", "reason": f"answers of {task} have a quality of their student's own", "rows": 0}
    used = list(judged)[-MOST_ROWS:]
    rows = _rows(task, used)
    groups = np.array([row.group for row in rows], np.int64)
    held = split_by_time([one.time for one in used], groups) if rows else np.zeros(0, bool)
    if held.sum() < MIN_LATER:
        return _too_little(len(rows), f"{int(held.sum())} later answers are judged; {MIN_LATER} are needed")
    try:
        fitted = fit([row for row, out in zip(rows, held, strict=True) if not out], calibrated=True, about=_about(skill, used))
    except TooLittleData as error:
        return _too_little(len(rows), error.message)
    model = with_priors(fitted.model, _PRIORS)
    later = [row for row, out in zip(rows, held, strict=True) if out]
    outcomes = np.array([row.acceptable for row in later], bool)
    path = root / skill / FILE
    before = figures(_qualities(_present(path), later), outcomes)
    after = figures(_qualities(model, later), outcomes)
    found = {"rows": len(rows), "before": before.to_json(), "after": after.to_json()}
    reason = why_not(before, after)
    if reason:
        return {"state": "kept", "reason": reason, **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(path)
    return {"state": "published", "reason": "", **found}


def _rows(task: str, judged: Sequence[Judged]) -> list[Row]:
    groups: dict[str, int] = {}
    found = []
    for one in judged:
        seen = Observed(one.prompt, one.answer, task=_TASKS.get(task, Task.TEXT_GENERATION), finish=_FINISHES.get(one.finish))
        found.append(Row(seen, one.ok, groups.setdefault(one.prompt, len(groups))))
    return found


def _present(path: Path) -> QualityModel:
    return QualityModel.load(path) if path.is_file() else cold_start()


def _qualities(model: QualityModel, rows: Sequence[Row]) -> FloatArray:
    """As the server would give them; an answer that its rules refuse has none, and counts as unlikely as can be."""
    return np.array([score(model, row.observed).value or 0.0 for row in rows], np.float32)


def _about(skill: str, judged: Sequence[Judged]) -> dict[str, Any]:
    return {"skill": skill, "rows": len(judged), "until": judged[-1].time.isoformat(timespec="seconds")}


def _too_little(rows: int, reason: str) -> dict[str, Any]:
    return {"state": "skipped", "reason": reason, "rows": rows}
