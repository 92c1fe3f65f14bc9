"""The rows of a job: the same for every attempt, so that a job that is taken up learns what it began to learn.

Only the ids of interactions are kept in the job's folder, no text: what is erased from the lake is nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from typing import Any

from server.config import Config
from server.registry.registry import Registry
from trainer.context import JobContext
from trainer.curate.pipeline import curate
from trainer.curate.rows import Curated, Row
from trainer.generation.base import BASE

_FILE = "dataset.json"


def rows_of_job(config: Config, skill: str, context: JobContext, registry: Registry) -> Curated:
    """Curates, and holds to the rows of the job's first attempt. Where those are no longer what they were (erased, corrected since),
    checkpoints of earlier attempts are removed and the job begins anew with what there is now.
    """
    curated = curate(config, skill, context, registry)
    rows = sorted(curated.rows, key=lambda row: (row.time, row.interaction_id))
    path = context.folder / _FILE
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        first = [row for row in rows if row.interaction_id in set(kept["ids"])]
        if _digest(first) == kept["digest"]:
            return replace(curated, rows=first)
        context.log("rows of the first attempt have changed since; training begins anew")
        for old in context.folder.iterdir():
            if old.is_dir() and old.name != BASE:
                shutil.rmtree(old)
    context.folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"digest": _digest(rows), "ids": [row.interaction_id for row in rows]}))
    part.replace(path)
    return replace(curated, rows=rows)


def _digest(rows: list[Row]) -> str:
    said = [[row.interaction_id, row.text, row.answer, row.rejected, row.thumb, row.weight, row.held_out, row.messages] for row in rows]
    return hashlib.sha256(json.dumps(said, ensure_ascii=True).encode()).hexdigest()
