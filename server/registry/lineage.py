"""Where a version came from and what an interaction went into: interaction -> data set -> job -> adapter or model -> answers.

The last step is the lake's: the rows whose `student` is the skill's name and whose `student_version` is the version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.registry.registry import Registry, reaching


@dataclass(slots=True, frozen=True)
class Origin:
    """What a job used and made. `versions`: of the skill's student; `models`: "name@version" in the repository or at a provider.

    `held_out`: of the interaction that was asked for; None where a version was.
    """

    skill: str
    job: str
    state: str
    dataset: str
    table_version: int
    train_rows: int
    held_out_rows: int
    versions: tuple[str, ...]
    models: tuple[str, ...]
    aliases: Mapping[str, str]
    held_out: bool | None = None


def of_interaction(registry: Registry, interaction: str) -> list[Origin]:
    """The jobs that used an interaction, the newest first. Raises Unavailable."""
    from sqlalchemy import select

    from server.registry.schema import DATASET_ROWS, DATASETS, JOBS

    joined = DATASET_ROWS.join(DATASETS, DATASETS.c.id == DATASET_ROWS.c.dataset_id).join(JOBS, JOBS.c.id == DATASETS.c.job_id)
    query = select(DATASETS, JOBS.c.skill, JOBS.c.state, DATASET_ROWS.c.held_out).select_from(joined)
    query = query.where(DATASET_ROWS.c.interaction_id == interaction).order_by(DATASETS.c.create_ms.desc())
    return _origins(registry, query)


def of_version(registry: Registry, skill: str, version: str) -> list[Origin]:
    """The job that made a version of a skill's student: one entry a data set of it. Raises Unavailable."""
    from sqlalchemy import select

    from server.registry.schema import ADAPTERS, DATASETS, JOBS

    joined = ADAPTERS.join(JOBS, JOBS.c.id == ADAPTERS.c.job_id).join(DATASETS, DATASETS.c.job_id == JOBS.c.id)
    query = select(DATASETS, JOBS.c.skill, JOBS.c.state).select_from(joined)
    query = query.where(ADAPTERS.c.skill == skill, ADAPTERS.c.version == version).order_by(DATASETS.c.create_ms.desc())
    return _origins(registry, query)


def interactions_of(registry: Registry, dataset: str) -> list[tuple[str, bool]]:
    """The interactions of a data set with whether they were held out. Raises Unavailable."""
    from sqlalchemy import select

    from server.registry.schema import DATASET_ROWS

    query = select(DATASET_ROWS.c.interaction_id, DATASET_ROWS.c.held_out).where(DATASET_ROWS.c.dataset_id == dataset)
    with reaching(), registry.engine().connect() as connection:
        return [(row.interaction_id, bool(row.held_out)) for row in connection.execute(query.order_by(DATASET_ROWS.c.interaction_id))]


def report_of(registry: Registry, dataset: str) -> dict[str, Any]:
    """What curation said of a data set; empty where nothing is known. Raises Unavailable."""
    from sqlalchemy import select

    from server.registry.schema import DATASETS

    with reaching(), registry.engine().connect() as connection:
        found = connection.execute(select(DATASETS.c.report).where(DATASETS.c.id == dataset)).scalar_one_or_none()
    return dict(json.loads(found)) if found else {}


def _origins(registry: Registry, query: Any) -> list[Origin]:
    from sqlalchemy import select

    from server.registry.schema import ADAPTERS, MODELS

    with reaching(), registry.engine().connect() as connection:
        rows = list(connection.execute(query))
        jobs = {row.job_id for row in rows}
        versions = list(connection.execute(select(ADAPTERS.c.job_id, ADAPTERS.c.version).where(ADAPTERS.c.job_id.in_(jobs))))
        models = list(connection.execute(select(MODELS.c.job_id, MODELS.c.name, MODELS.c.version).where(MODELS.c.job_id.in_(jobs))))
    aliases = {skill: registry.aliases(skill) for skill in {row.skill for row in rows}}
    return [
        Origin(
            row.skill,
            row.job_id,
            row.state,
            row.id,
            row.table_version,
            row.train_rows,
            row.held_out_rows,
            tuple(sorted(one.version for one in versions if one.job_id == row.job_id)),
            tuple(sorted(f"{one.name}@{one.version}" for one in models if one.job_id == row.job_id)),
            aliases[row.skill],
            getattr(row, "held_out", None),
        )
        for row in rows
    ]
