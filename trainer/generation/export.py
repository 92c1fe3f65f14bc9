"""From the trained torch student to what the server loads: an adapter version of the base, or a model of its own, in any repository."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.runtime.lora.convert import ADAPTERS, add_peft
from server.runtime.lora.layout import base_sha256
from server.runtime.pull import pull
from server.runtime.references import Target
from server.runtime.repository import Repository
from server.runtime.verify import MANIFEST
from trainer.generation.base import GeneratorBase
from trainer.generation.recipe import Recipe
from trainer.generation.student import save_student

_TEXT_FILES = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json")


@dataclass(slots=True, frozen=True)
class Exported:
    """What serves: `target` in the repository at `root`. `saved`: the folder that PEFT or transformers wrote."""

    root: Path
    target: Target
    saved: Path

    @property
    def spec(self) -> str:
        """As routes name it: "model" or "model/adapter@version"."""
        return self.target.model + (f"/{self.target.adapter}@{self.target.adapter_version}" if self.target.adapter else "")


def draft(student: Any, base: GeneratorBase, skill: str, recipe: Recipe, scratch: Path, texts: Sequence[str]) -> Exported:
    """Writes the student and what serves it into a repository of its own under `scratch`, for the proof; `texts`: its int8 form is fitted
    to them. Raises ModelRejected where the build fails its own checks.
    """
    saved, root = scratch / "saved", scratch / "repository"
    shutil.rmtree(root, ignore_errors=True)
    save_student(student, saved)
    if recipe.method == "full":
        return _model(base, skill, saved, root, texts)
    _mirror(base, root)
    return _adapter(base, skill, saved, root, base.manifest.license)


def publish(exported: Exported, base: GeneratorBase, skill: str, root: Path) -> Target:
    """The same files as the next version of the served repository."""
    if exported.target.adapter:
        return _adapter(base, skill, exported.saved, root, base.manifest.license).target
    folder = exported.root / exported.target.model / exported.target.version
    files = Repository(root).add(folder, exported.target.model)
    return Target(model=files.manifest.name, version=files.manifest.version, sha256=base_sha256(files.manifest))


def _adapter(base: GeneratorBase, skill: str, saved: Path, root: Path, licence: str) -> Exported:
    # PEFT names its base by the folder that it was trained from, which says nothing: the hash of the served base does.
    manifest = add_peft(saved, base.manifest, root / ADAPTERS, skill, license=licence, any_base=True)
    target = Target(
        model=base.manifest.name,
        version=base.manifest.version,
        sha256=base_sha256(base.manifest),
        adapter=skill,
        adapter_version=manifest.version,
    )
    return Exported(root, target, saved)


def _model(base: GeneratorBase, skill: str, saved: Path, root: Path, texts: Sequence[str]) -> Exported:
    assert base.files.tokenizer is not None, "read when prompts were made"
    shutil.copyfile(base.files.tokenizer, saved / "tokenizer.json")
    for name in _TEXT_FILES:
        source = base.files.paths.get(name) or base.folder / name
        if Path(source).is_file():
            shutil.copyfile(source, saved / name)
    dtype = "float32" if base.exact else "int8"
    fields: Mapping[str, Any] = {"license": base.manifest.license, "max_tokens": base.manifest.max_tokens}
    calibration = list(texts) if dtype == "int8" else None
    files = pull(str(saved), Repository(root), name=f"{skill}-student", dtype=dtype, calibration=calibration, fields=fields)
    target = Target(model=files.manifest.name, version=files.manifest.version, sha256=base_sha256(files.manifest))
    return Exported(root, target, saved)


def _mirror(base: GeneratorBase, root: Path) -> None:
    """The base's version in another repository, by hard links where the disk allows: what loads is the very file."""
    folder = root / base.manifest.name / base.manifest.version
    folder.mkdir(parents=True)
    for name in (*base.manifest.files, MANIFEST):
        source = base.files.folder / name
        try:
            os.link(source, folder / name)
        except OSError:
            shutil.copyfile(source, folder / name)
