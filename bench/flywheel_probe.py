"""The versions that served at each day's end on texts that were never sent, from their files, by the code that serves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from bench.flywheel import SKILL, Day
from server.config import Config, load_config
from server.runtime.heads import LinearHead
from trainer.evaluate import agreement
from trainer.serving import ServedBase


def probe(config: Path, days: Sequence[Day], rows: Sequence[tuple[str, str]]) -> None:
    """Sets each day's `probe`: the accuracy, against gold labels, of whoever answers callers then without a bar. None: the teacher did."""
    found: dict[str, float | None] = {}
    settings = load_config(config, environ={})
    for day in days:
        version = serving(day)
        if version and version not in found:
            found[version] = asyncio.run(_accuracy(settings, version, rows))
        day.probe = found.get(version)


def serving(day: Day) -> str:
    """The student that answers most callers at a day's end; "" in the shadow and before."""
    if day.stage == "full" or (day.stage.startswith("canary") and not day.champion):
        return day.student
    return day.champion


async def _accuracy(config: Config, version: str, rows: Sequence[tuple[str, str]]) -> float | None:
    folder = Path(config.models.path) / "adapters" / SKILL / version
    head = LinearHead.load(folder, base_sha256=None)
    base = await ServedBase.open(config, head.manifest.base.name, head.manifest.base.version)
    try:
        vectors, kept, _ = await base.embed([text for text, _ in rows], lambda done, total: None)
    finally:
        await base.close()
    _, right = agreement(head, vectors, [rows[place][1] for place in kept])
    return float(right.sum() / len(rows))
