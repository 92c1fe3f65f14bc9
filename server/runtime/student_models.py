"""Models that students stand on: loaded from the repository where they are not, and let go when no student needs them any more."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from server.errors import Draining, OutOfMemory, UnderstudyError
from server.runtime.adapters import AdapterStore, Stand, stand_of
from server.runtime.runtime import ModelState, Runtime
from server.runtime.verify import MODEL

if TYPE_CHECKING:
    from server.runtime.heads import LinearHead
    from server.runtime.manifest import Manifest
    from server.runtime.references import Reference

_log = logging.getLogger(__name__)


class StudentModels:
    """One a process, on its event loop. What somebody else has loaded is used and never unloaded; what is refused is asked for once."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._ours: set[tuple[str, str]] = set()
        self._refused: dict[Stand, str] = {}
        self._known: dict[tuple[str, str], tuple[Manifest, set[str]]] = {}

    def version(self, stand: Stand) -> str | None:
        """The loaded version that a student may be served by: the one that it names, or the default where that is the same graph."""
        for version in (stand.version, self._runtime.default_version(stand.model)):
            if version is not None and self._runtime.has(stand.model, version) and stand.sha256 in self._graphs(stand.model, version):
                return version
        return None

    def _graphs(self, model: str, version: str) -> set[str]:
        manifest = self._runtime.manifest(model, version)
        known = self._known.get((model, version))
        if known is None or known[0] is not manifest:
            known = self._known[model, version] = (manifest, graphs_of(manifest))
        return known[1]

    def why_not(self, stand: Stand) -> str:
        """Why a stand cannot serve, as far as is known, or ""."""
        return self._refused.get(stand, "")

    async def ensure(self, wanted: Iterable[Stand]) -> None:
        """Loads what is missing, beside what runs, and unloads what was loaded here and is wanted no more."""
        stands = list(dict.fromkeys(wanted))
        for stand in stands:
            try:
                if self.version(stand) is None and stand not in self._refused:
                    await self._load(stand)
                if stand.adapter and self.version(stand) is not None:
                    await self._load_adapter(stand)
            except Draining:
                return
            except UnderstudyError as error:
                if error.retry_after_s is None and not isinstance(error, OutOfMemory):
                    self._refused[stand] = error.message
                _log.error(
                    "a student's model is not loaded", extra={"model": stand.model, "version": stand.version, "error": error.message}
                )
        needed = {(stand.model, stand.version) for stand in stands}
        for model, version in self._ours - needed:
            self._ours.discard((model, version))
            try:
                await self._runtime.unload(model, version)
            except UnderstudyError as error:
                _log.warning("a model that no student needs stays", extra={"model": model, "version": version, "error": error.message})

    async def _load(self, stand: Stand) -> None:
        loaded = {(one.name, one.version) for one in self._runtime.loaded() if one.state is ModelState.READY}
        if (stand.model, stand.version) not in loaded:
            await self._runtime.load(stand.model, stand.version, default=False)
            self._ours.add((stand.model, stand.version))
        if self.version(stand) is None:
            message = f"model {stand.model}@{stand.version} is not the one that the student was made for. Train the student again."
            self._refused[stand] = message
            _log.error("a student's model is another one", extra={"model": stand.model, "version": stand.version, "expected": stand.sha256})

    async def _load_adapter(self, stand: Stand) -> None:
        with self._runtime.use_adapters(stand.model, self.version(stand)) as adapters:
            if f"{stand.adapter}@{stand.adapter_version}" not in adapters.names():
                await adapters.load(stand.adapter, stand.adapter_version)


class ReadyStudents:
    """The students whose models are loaded. See server.routing.skills.Students."""

    def __init__(self, store: AdapterStore, models: StudentModels) -> None:
        self._store = store
        self._models = models

    def ready(self, skill: str) -> Mapping[str, LinearHead | Reference]:
        """By version, newest first."""
        return {str(number): made for number, made in self._store.made(skill).items() if self._models.version(stand_of(made)) is not None}


def graphs_of(manifest: Manifest) -> set[str]:
    """What students may know a model version by: the SHA-256 of its graph, and of its weights together; see adapter_folder.Base."""
    from server.runtime.lora.layout import base_sha256

    found = {base_sha256(manifest)}
    if MODEL in manifest.files:
        found.add(manifest.files[MODEL].sha256)
    return found
