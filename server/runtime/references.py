"""Students that are no linear head: a version folder under `<adapters>/<skill>/` that points to what serves.

`model`: a version of a model in the repository that answers the skill's task by itself (entities, ranking, embeddings, a whole generator).
`decoder-adapter`: an adapter of a decoder, e.g. a LoRA. So every student of a skill has a version in one sequence, with its calibration,
metrics and lineage in one place, whatever it is made of.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from server.runtime.adapter_folder import MANIFEST, read_manifest, write_folder
from server.runtime.manifest import Name, Sha256, Version

KINDS = ("model", "decoder-adapter")
_MOST_BYTES = 1 << 20


class Target(BaseModel):
    """What serves. `sha256`: of the model's graph, as in server.runtime.adapter_folder.Base. `adapter` with its version where it is one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: Name
    version: Version
    sha256: Sha256
    adapter: Name | Literal[""] = ""
    adapter_version: Version | Literal[""] = ""

    @property
    def shown(self) -> str:
        """For people: "model@1" or "model@1/adapter@2"."""
        return f"{self.model}@{self.version}" + (f"/{self.adapter}@{self.adapter_version}" if self.adapter else "")


class Reference(BaseModel):
    """`manifest.json` of such a folder, its only file. `quality`: what `quality.json` of server.routing.judge would hold; empty: none of
    its own, and the general model judges it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    kind: Literal["model", "decoder-adapter"]
    name: Name
    version: Version
    task: str
    target: Target
    metrics: dict[str, float] = {}
    quality: dict[str, Any] = {}
    lineage: dict[str, Any] = {}
    license: str = ""
    created: str = ""  # RFC 3339

    @model_validator(mode="after")
    def _whole(self) -> Reference:
        if (self.kind == "decoder-adapter") != bool(self.target.adapter) or bool(self.target.adapter) != bool(self.target.adapter_version):
            raise ValueError("a decoder-adapter names the adapter and its version, a model neither")
        return self


def kind_of(folder: Path) -> str:
    """What a version folder says that it is, or "" where it says nothing that can be read; whoever loads it looks closer."""
    try:
        with (folder / MANIFEST).open("rb") as handle:
            kind = json.loads(handle.read(_MOST_BYTES)).get("kind", "")
    except (OSError, ValueError, RecursionError, AttributeError):
        return ""
    return kind if isinstance(kind, str) else ""


def read_reference(folder: Path) -> Reference:
    """Raises ManifestInvalid."""
    return read_manifest(folder, Reference, "student")


def write_reference(folder: Path, reference: Reference) -> Reference:
    """Writes the folder at once and only once. Raises AlreadyExists."""

    def fill(part: Path) -> None:
        (part / MANIFEST).write_text(reference.model_dump_json(indent=2) + "\n", encoding="utf-8")

    write_folder(folder, fill)
    return read_reference(folder)
