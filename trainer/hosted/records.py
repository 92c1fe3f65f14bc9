"""Models that a vendor trained, in the registry's table of models."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from server.registry.registry import Registry


def add_hosted_model(registry: Registry, name: str, skill: str, base: str, sha256: str, metrics: Mapping[str, float], job: str) -> None:
    """Writes down "provider/ft:..." once; a trainer that was killed after it did so may come again. `sha256`: of the training file."""
    from sqlalchemy.exc import IntegrityError

    from server.registry.schema import MODELS

    row = {"name": name, "version": "1", "kind": "provider", "skill": skill, "base": base, "sha256": sha256, "job_id": job}
    try:
        with registry.engine().begin() as connection:
            connection.execute(MODELS.insert().values(**row, metrics=json.dumps(dict(metrics)), create_ms=time.time_ns() // 1_000_000))
    except IntegrityError:
        return
