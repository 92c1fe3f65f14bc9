"""Rows of a skill of entities, ranking or embeddings from the lake, until curation has them for these tasks too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.config import Config
from server.lake.reading import LakeReader
from server.registry.registry import Registry
from trainer.context import JobContext
from trainer.curate.rows import Curated, Row, is_held_out, normalised

COLUMNS = ["interaction_id", "time", "input", "input_kind", "teacher_text", "training_allowed", "source_model", "output_text"]
JOINED = ["rating", "thumb", "correction"]
NOT_ALLOWED = "the provider's terms do not allow training (training_allowed)"
NO_ANSWER = "no answer from a teacher or a person"
DISLIKED = "a person disliked the answer and gave no other"
REPEATED = "repeats another row's input"
_LEAST_RATING = 4


def read_rows(config: Config, skill: str, context: JobContext, registry: Registry) -> Curated:
    """The rows with the answer that is wanted of each; a person's word before a teacher's, the last of equal inputs."""
    reader = LakeReader(config, registry)
    curated = Curated(table_version=max(0, reader.version()))
    kept: dict[str, Row] = {}
    for raw in reader.interactions(skill=skill, columns=[*COLUMNS, *JOINED]).to_pylist():
        curated.read += 1
        row = _row(raw, config.skills[skill].task)
        if isinstance(row, str):
            curated.dropped[row] += 1
            continue
        curated.sources[str(raw["source_model"] or "unknown")] += 1
        key = normalised(row.text)
        if key in kept:
            curated.dropped[REPEATED] += 1
            if kept[key].corrected and not row.corrected:
                continue
        kept[key] = row
    curated.rows = list(kept.values())
    return curated


def _row(raw: Mapping[str, Any], task: str) -> Row | str:
    text, thumb, teacher = str(raw["input"] or ""), str(raw["thumb"] or ""), str(raw["teacher_text"] or "")
    about: dict[str, Any] = {"thumb": thumb, "time": raw["time"]}
    delivered = str(raw["output_text"] or "")
    if raw["correction"]:
        refused = delivered if delivered != raw["correction"] else ""
        return Row(raw["interaction_id"], text, "", is_held_out(text), True, raw["correction"], rejected=refused, **about)
    if task == "feature-extraction" and thumb:
        return Row(raw["interaction_id"], text, "", is_held_out(text), answer="", **about)
    if thumb == "down" or (raw["rating"] or _LEAST_RATING) < _LEAST_RATING:
        return DISLIKED
    if not teacher:
        return NO_ANSWER
    if not raw["training_allowed"]:
        return NOT_ALLOWED
    return Row(raw["interaction_id"], text, "", is_held_out(text), answer=teacher, **about)
