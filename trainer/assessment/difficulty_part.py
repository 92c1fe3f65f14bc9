"""Refits a skill's difficulty model (adapters/<skill>/difficulty/<version>/) on how its student did on live traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from server.core import FloatArray
from server.errors import AlreadyExists, ModelRejected, TooLittleData
from server.routing.difficulty import DifficultyModel, prior
from server.routing.difficulty_book import FOLDER
from server.runtime.adapter_folder import version_numbers
from server.runtime.heads import Base, Features
from trainer.assessment.evidence import Judged
from trainer.assessment.figures import figures, split_by_time, why_not
from trainer.curate.rows import normalised
from trainer.difficulty import About, Labelled, apgr, fit, recovery

MOST_ROWS = 50_000
MIN_LATER = 50
# What the newest student does is what is asked for; where it was judged on fewer texts, its predecessors' answers count too.
ENOUGH_OF_NEWEST = 500


def students(judged: Sequence[Judged]) -> list[Judged]:
    """The answers of students that say most of the present one: its own, where there are enough of them; the latest `MOST_ROWS`."""
    answers = [one for one in judged if one.student]
    if answers:
        newest = [one for one in answers if one.version == answers[-1].version]
        answers = newest if len(newest) >= ENOUGH_OF_NEWEST else answers
    return answers[-MOST_ROWS:]


def merged(judged: Sequence[Judged]) -> tuple[list[Labelled], list[datetime]]:
    """One row a text, its mean outcome and its count as weight, with the time of its first: texts that come back are one piece of news."""
    texts: dict[str, list[Judged]] = {}
    for one in judged:
        texts.setdefault(normalised(one.prompt), []).append(one)
    rows = []
    for same in texts.values():
        strong = [one.strong_ok for one in same if one.strong_ok is not None]
        known = float(np.mean(strong)) if strong else None
        rows.append(Labelled(same[0].prompt, float(np.mean([one.ok for one in same])), known, float(len(same))))
    return rows, [same[0].time for same in texts.values()]


def recalibrate(
    root: Path, skill: str, judged: Sequence[Judged], vectors: Mapping[str, FloatArray], made_by: tuple[Base, Features] | None
) -> dict[str, Any]:
    """As `quality_part.recalibrate`, for difficulty. `vectors` by prompt, made by `made_by`; rows without one are left out."""
    rows, times = merged(judged)
    if made_by is not None:
        kept = [place for place, row in enumerate(rows) if row.text in vectors]
        rows, times = [rows[place] for place in kept], [times[place] for place in kept]
    held = split_by_time(times, np.arange(len(rows))) if rows else np.zeros(0, bool)
    later = [row for row, out in zip(rows, held, strict=True) if out]
    if len(later) < MIN_LATER:
        return _too_little(len(rows), f"{len(later)} later texts are judged; {MIN_LATER} are needed")
    stacked = np.stack([vectors[row.text] for row in rows]) if made_by is not None else None
    earlier = [row for row, out in zip(rows, held, strict=True) if not out]
    base, features = made_by if made_by is not None else (None, None)
    about = About(skill, "1", base, features, datetime.now(UTC).isoformat(timespec="seconds"))
    try:
        model = fit(earlier, stacked[~held] if stacked is not None else None, about)
    except TooLittleData as error:
        return _too_little(len(rows), error.message)
    folder = root / skill / FOLDER
    present = _present(folder)
    known = stacked[held] if stacked is not None else None
    before, after = _measure(present, later, known, base), _measure(model, later, known, base)
    found: dict[str, Any] = {"rows": len(rows), "present_version": present.spec.version if present is not None else ""}
    found |= {"before": before, "after": after}
    reason = why_not(before.pop("figures"), after.pop("figures"))
    if reason:
        return {"state": "kept", "reason": reason, **found}
    metrics = {**model.spec.metrics, "later_ece": after["ece"], "later_brier": after["brier"]}
    spec = model.spec.model_copy(update={"metrics": metrics})
    return {"state": "published", "reason": "", "version": _publish(folder, DifficultyModel(spec, model.parameters)), **found}


def _measure(model: DifficultyModel | None, rows: Sequence[Labelled], vectors: FloatArray | None, base: Base | None) -> dict[str, Any]:
    """Figures of P(the student fails), and the APGR of the gain. A model of another base answers by its words, as in the server."""
    texts = [row.text for row in rows]
    if model is None:
        estimates = prior(texts)
        values, gains = (np.array([getattr(one, name) for one in estimates], np.float32) for name in ("value", "gain"))
    else:
        same = model.spec.base is not None and base is not None and model.spec.base.sha256 == base.sha256
        values, gains = model.scores(texts, vectors if same else None)
    local = np.array([row.local_ok for row in rows])
    strong = np.array([1.0 if row.strong_ok is None else row.strong_ok for row in rows])
    found = figures(values, local < 0.5)
    return {**found.to_json(), "apgr": apgr(recovery(gains, local, strong)) if (strong - local).sum() > 0 else None, "figures": found}


def _present(folder: Path) -> DifficultyModel | None:
    """What the server answers with: the newest that can be read."""
    for number in version_numbers(folder):
        with suppress(ModelRejected, OSError):
            return DifficultyModel.from_folder(folder / str(number))
    return None


def _publish(folder: Path, model: DifficultyModel) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        number = str(1 + max(version_numbers(folder), default=0))
        with suppress(AlreadyExists):  # another run took the number
            DifficultyModel(model.spec.model_copy(update={"version": number}), model.parameters).save(folder / number)
            return number


def _too_little(rows: int, reason: str) -> dict[str, Any]:
    return {"state": "skipped", "reason": reason, "rows": rows}
