"""Checks what a student promised of its answers against how often live comparisons agreed with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from server.quality.calibration import MIN_ROWS
from trainer.assessment.evidence import TEACHER, Judged
from trainer.assessment.figures import figures

# A promise is said to have drifted where it is off by so much, and by more than chance would have it off.
LEAST, SIGMAS = 0.03, 3.0


def check(judged: Sequence[Judged], stated_ece: float | None, teacher: float = 1.0) -> dict[str, Any]:
    """Of the newest student's answers that carry a quality: what was promised on average and what was kept.

    `teacher`: how often the teacher is right, as the student's calibration has it: quality is of being right, and an answer that is right
    agrees with the teacher only where that is right too (server.quality.calibration).
    Returns "state" ("holds", "drifted" or "skipped"), "reason", "version", and where it was measured "rows", "promised", "kept", the
    figures and "stated_ece", which the student's own evaluation had.
    """
    known = [one for one in judged if one.student and one.quality is not None]
    version = known[-1].version if known else ""
    known = [one for one in known if one.version == version]
    if len(known) < MIN_ROWS:
        reason = f"{len(known)} of the newest student's answers were compared; {MIN_ROWS} are needed"
        return {"state": "skipped", "reason": reason, "rows": len(known), "version": version}
    qualities = np.array([(one.quality or 0.0) * (teacher if one.by == TEACHER else 1.0) for one in known], np.float32)
    outcomes = np.array([one.ok for one in known], bool)
    seen = figures(qualities, outcomes)
    promised, kept = float(qualities.mean()), float(outcomes.mean())
    # Of a sum of independent outcomes whose chances are the qualities.
    spread = math.sqrt(max(float((qualities * (1 - qualities)).sum()), 1e-9)) / len(known)
    off = kept - promised
    drifted = abs(off) > max(LEAST, SIGMAS * spread)
    reason = ""
    if drifted:
        how = "less" if off < 0 else "more"
        reason = f"it promised {promised:.1%} and kept {kept:.1%}, {how} than chance explains. Train again, on newer rows."
    found = {"rows": len(known), "promised": promised, "kept": kept, "stated_ece": stated_ece, "version": version, **seen.to_json()}
    return {"state": "drifted" if drifted else "holds", "reason": reason, **found}
