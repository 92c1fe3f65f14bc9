"""The difficulty models of all skills: `<root>/<skill>/difficulty/<version>/`, found on the disk and taken over while the server runs."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from server.core import Call, FloatArray, Task
from server.errors import ModelRejected, UnderstudyError
from server.routing.difficulty import DifficultyEstimate, DifficultyModel, prior
from server.runtime.adapter_folder import MANIFEST, Base, version_numbers
from server.runtime.heads import Features
from server.runtime.runtime import Runtime
from server.runtime.watch import Watch

_log = logging.getLogger(__name__)
FOLDER = "difficulty"
# Larger batches leave the event loop: a text takes up to half a millisecond.
_INLINE = 4


class DifficultyBook:
    """The newest good model of each skill. `refresh` may block and belongs into a thread; everything else belongs to the event loop."""

    def __init__(self, root: Path, runtime: Runtime | None = None, *, poll_s: float = 1.0) -> None:
        """`root`: where the skills' adapters are; `runtime` embeds for models that want it, which answer by their words without."""
        self.root = root
        self._runtime = runtime
        self._models: dict[str, DifficultyModel] = {}
        self._refused: dict[tuple[str, int], int] = {}
        self._watch = Watch(self.refresh, poll_s, "difficulty models")

    def current(self, skill: str) -> DifficultyModel | None:
        """The model that answers for a skill now."""
        return self._models.get(skill)

    async def estimate(self, skill: str, texts: Sequence[str]) -> list[DifficultyEstimate] | None:
        """The estimate of each text; None where nothing was learned of the skill."""
        return await self.estimates(skill, texts) if skill in self._models else None

    async def estimates(self, skill: str, texts: Sequence[str]) -> list[DifficultyEstimate]:
        """The whole estimate of each text; the prior where nothing was learned of the skill."""
        model = self._models.get(skill)
        if model is None:
            return prior(texts)
        vectors = None
        if self._runtime is not None and model.spec.base is not None and model.spec.features is not None:
            vectors = await embed(self._runtime, model.spec.base, model.spec.features, texts)
        if len(texts) <= _INLINE:
            return model.predict(texts, vectors)
        return await asyncio.to_thread(model.predict, texts, vectors)

    def refresh(self) -> None:
        """One look at the disk: takes over what is new, forgets what is gone. A broken version is logged once; the next lower serves."""
        found: dict[str, DifficultyModel] = {}
        for skill in _names(self.root):
            for number in version_numbers(self.root / skill / FOLDER):
                model = self._load(skill, number)
                if model is not None:
                    found[skill] = model
                    break
        self._models = found

    async def start(self) -> None:
        """Looks once, then every `poll_s` seconds until `stop`."""
        await self._watch.start()

    async def stop(self) -> None:
        """Ends the watch; what is loaded stays."""
        await self._watch.stop()

    def _load(self, skill: str, number: int) -> DifficultyModel | None:
        """The version, from memory where it is the one that answers: versions are written once."""
        model = self._models.get(skill)
        if model is not None and model.spec.version == str(number):
            return model
        folder = self.root / skill / FOLDER / str(number)
        try:
            changed = (folder / MANIFEST).stat().st_mtime_ns
        except OSError:
            return None
        if self._refused.get((skill, number)) == changed:
            return None
        try:
            model = DifficultyModel.from_folder(folder)
            if (model.spec.name, model.spec.version) != (skill, str(number)):
                raise ModelRejected(f"{folder}: the manifest says {model.spec.name}/{model.spec.version}. Publish it under that name.")
        except (UnderstudyError, OSError) as error:
            self._refused[skill, number] = changed
            _log.error("difficulty model refused", extra={"skill": skill, "version": number, "error": str(error)})
            return None
        _log.info("difficulty model changed", extra={"skill": skill, "version": number})
        return model


async def embed(runtime: Runtime, base: Base, features: Features, texts: Sequence[str]) -> FloatArray | None:
    """Vectors float32[n, H] as a model was trained on them, long texts cut, rows of NaN for texts that have none (blank ones).

    None where the base is not loaded, or not in that version: its vectors would mean something else.
    """
    try:
        with runtime.use(base.name, Task.FEATURE_EXTRACTION) as model:
            if runtime.manifest(base.name).files["model.onnx"].sha256 != base.sha256:
                return None
            results = await model.embed(
                texts,
                call=Call("difficulty"),
                pooling=features.pooling,
                normalize=features.normalize,
                truncate=True,
            )
    except UnderstudyError:  # not loaded, overloaded, draining: the words answer alone
        return None
    vectors = np.full((len(texts), features.size), np.nan, np.float32)
    for row, item in enumerate(results.items):
        if not isinstance(item, Exception):
            vectors[row] = item
    return vectors


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False))
    except OSError:
        return []
