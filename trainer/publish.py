"""Puts a proven student where the server sees it: the encoder first where it has one of its own, the head last."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from server.config import Config
from server.core import FloatArray
from server.errors import AlreadyExists
from server.registry.registry import Adapter, ModelRecord, Registry
from server.runtime.adapter_folder import version_numbers
from server.runtime.heads import GRAPH, AdapterManifest, HeadSpec, write_linear_head
from server.runtime.repository import ModelFiles, Repository


def encoder_name(skill: str) -> str:
    """The model of the repository that holds the encoders trained for a skill."""
    return f"{skill}-encoder"


def adapters_folder(config: Config, skill: str) -> Path:
    """Where the versions of a skill's students lie."""
    return Path(config.models.path) / "adapters" / skill


def publish_encoder(config: Config, registry: Registry, draft: ModelFiles, skill: str, job: str) -> ModelFiles:
    """Copies a proven draft into the repository as the next version of the skill's encoder, and writes it down."""
    made = Repository(Path(config.models.path)).add(draft.folder, encoder_name(skill))
    manifest = made.manifest
    digest = manifest.files["model.onnx"].sha256
    source = manifest.source.id if manifest.source is not None else ""
    registry.add_model(ModelRecord(manifest.name, manifest.version, "local", skill, source, digest, dict(manifest.parity or {}), job))
    return made


def publish_head(
    config: Config, registry: Registry, spec: HeadSpec, arrays: tuple[FloatArray, FloatArray], *, kind: str, job: str
) -> AdapterManifest:
    """Writes weight float32[labels, H] and bias float32[labels] as the next version of the skill's head, and writes it down."""
    folder = adapters_folder(config, spec.name)
    folder.mkdir(parents=True, exist_ok=True)
    manifest: AdapterManifest | None = None
    while manifest is None:
        number = 1 + max(version_numbers(folder), default=0)
        with suppress(AlreadyExists):  # another run took the number
            manifest = write_linear_head(folder / str(number), spec.model_copy(update={"version": str(number)}), *arrays)
    base = f"{spec.base.name}@{spec.base.version}"
    registry.add_adapter(Adapter(spec.name, manifest.version, kind, base, manifest.files[GRAPH].sha256, spec.metrics, job))
    return manifest
