"""Rows of a skill of entities, ranking or embeddings: curation's, with two things that pairs of texts need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from server.config import Config
from server.lake.reading import LakeReader
from server.registry.registry import Registry
from trainer.context import JobContext
from trainer.curate import drafts, pipeline
from trainer.curate.rows import Curated
from trainer.encoders.examples import EMBEDDING, ENTITIES


def read_rows(config: Config, skill: str, context: JobContext, registry: Registry) -> Curated:
    """The curated rows of a skill.

    Pairs are no near duplicates of each other for the long text that they share. A vector has no words that could be an answer, so for
    feature-extraction a thumb is one: whether the two texts of a pair belong together.
    """
    task = config.skills[skill].task
    if task == ENTITIES:
        return pipeline.curate(config, skill, context, registry)
    settings = config.curation.model_copy(update={"near_duplicates": 1.0})
    if task != EMBEDDING:
        return pipeline.curate(config.model_copy(update={"curation": settings}), skill, context, registry)
    reader = LakeReader(config, registry)
    version = reader.version()
    found = reader.interactions(skill=skill, columns=drafts.COLUMNS)
    curated = pipeline.refine(_thumbs_as_words(drafts.raw_rows(found)), pipeline.Task(), settings, context)
    curated.table_version = max(version, 0)
    return curated


def _thumbs_as_words(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        says = {"up": "1", "down": "0"}.get(str(row.get("thumb") or "")) if row.get("input_kind") == "pair" else None
        yield {**row, "correction": row.get("correction") or says}
