"""Who answers a skill at present, before a new student: its last version, the local model that it names, or its untrained base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.config import Config
from server.core import Task
from server.errors import UnderstudyError
from server.runtime.adapter_folder import version_numbers
from server.runtime.references import read_reference
from server.runtime.repository import Repository
from trainer.encoders.examples import ENTITIES, RANKING


@dataclass(frozen=True, slots=True)
class Present:
    """A model of the repository. `number`: of the skill's version that points to it, "" where none does; `lineage`, `metrics` and `sha256`:
    of that version.
    """

    model: str
    version: str
    number: str = ""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    sha256: str = ""

    @property
    def shown(self) -> str:
        """For people."""
        return f"{self.model}@{self.version}"


def find_present(config: Config, skill: str) -> Present | None:
    """The present student, or None where nothing local can answer the skill's task."""
    folder = Path(config.models.path) / "adapters" / skill
    repository = Repository(Path(config.models.path))
    task = config.skills[skill].task
    for number in version_numbers(folder):
        try:
            reference = read_reference(folder / str(number))
        except UnderstudyError:  # a head, or a folder that is broken: the server does not serve it either
            continue
        if reference.kind == "model" and _can(repository, reference.target.model, reference.target.version, task):
            target = reference.target
            return Present(target.model, target.version, str(number), reference.lineage, reference.metrics, target.sha256)
    for name in (config.skills[skill].student_model, config.skills[skill].base):
        if name and "/" not in name and repository.exists(name) and _can(repository, name, None, task):
            return Present(name, repository.latest(name))
    return None


def _can(repository: Repository, name: str, version: str | None, task: str) -> bool:
    """Whether a model's file does the task; embedders rank by cosine."""
    try:
        found = repository.manifest(name, version).task
    except UnderstudyError:
        return False
    if task == ENTITIES:
        return found is Task.TOKEN_CLASSIFICATION
    return found is Task.FEATURE_EXTRACTION or (task == RANKING and found is Task.TEXT_RANKING)
