"""Tiny encoder-decoders, exported once for all tests of this folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers

from server.core import Task
from server.runtime.manifest import Manifest
from server.runtime.repository import ModelFiles, Repository
from tests.seq2seq_models import build
from trainer.export.seq2seq import export_seq2seq

SUMMARIZERS = ("bart", "pegasus")


@dataclass(frozen=True)
class Exported:
    """`original`: transformers' model; `source`: its folder; `files`: the version that was published."""

    family: str
    original: Any
    source: Path
    files: ModelFiles

    @property
    def manifest(self) -> Manifest:
        return self.files.manifest

    def tokenizer(self, **options: Any) -> Any:
        return transformers.AutoTokenizer.from_pretrained(str(self.source), **options)


Export = Callable[[str], Exported]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`exported(family)`: builds, exports and publishes it, the first time."""
    base = tmp_path_factory.mktemp("seq2seq")
    repository = Repository(base / "models")
    made: dict[str, Exported] = {}

    def export(family: str) -> Exported:
        if family not in made:
            model = build(family, base / family)
            task = Task.SUMMARIZATION if family in SUMMARIZERS else Task.TRANSLATION
            out = base / f"{family}-out"
            export_seq2seq(base / family, out, task)
            fields = json.loads((out / "manifest.json").read_text())
            with repository.staging() as staged:
                for path in out.iterdir():
                    if path.name != "manifest.json":
                        shutil.copyfile(path, staged / path.name)
                files = repository.publish(staged, family.replace("_", "-"), fields)
            made[family] = Exported(family, model, base / family, files)
        return made[family]

    return export
