"""The served base, run here with the code and the file that serve: what the trainer sees is what callers will get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from server.config import Config
from server.core import Call, FloatArray, Priority, Task
from server.errors import UnderstudyError
from server.runtime.heads import Base, Features
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.repository import Repository
from server.runtime.runtime import Runtime

# Enough to fill the engine's batches; small enough that a progress bar moves.
_CHUNK = 256


class ServedBase:
    """A base that is loaded for a while. Use: `base = await ServedBase.open(...)`, then `close`."""

    def __init__(self, runtime: Runtime, name: str) -> None:
        self._runtime = runtime
        self.name = name
        manifest = runtime.manifest(name)
        self.base = Base(name=name, version=manifest.version, sha256=manifest.files["model.onnx"].sha256)
        pooling = manifest.pooling if manifest.pooling != "none" else "mean"
        self.features = Features(pooling=pooling, normalize=True, size=manifest.hidden_size)

    @classmethod
    async def open(cls, config: Config, name: str, version: str | None = None, *, root: Path | None = None) -> ServedBase:
        """Loads a version (default: the newest) from the repository at `root` (default: the configured one).

        Raises ModelNotFound, VersionNotFound, ModelRejected, TaskNotSupported.
        """
        runtime = Runtime(Repository(root or Path(config.models.path)), make_loader(config.runtime, NullObserver()))
        try:
            await runtime.load(name, version)
            runtime.get(name, Task.FEATURE_EXTRACTION)
            return cls(runtime, name)
        except BaseException:
            await runtime.close(drain=False)
            raise

    async def embed(
        self, texts: Sequence[str], progress: Callable[[int, int], None]
    ) -> tuple[FloatArray, list[int], list[UnderstudyError]]:
        """Vectors float32[n, H] of the texts that have one, their indices, and the errors of the others."""
        vectors: list[FloatArray] = []
        kept: list[int] = []
        errors: list[UnderstudyError] = []
        call = Call("trainer", priority=Priority.BULK)
        for start in range(0, len(texts), _CHUNK):
            with self._runtime.use(self.name, Task.FEATURE_EXTRACTION) as model:
                results = await model.embed(
                    texts[start : start + _CHUNK], call=call, pooling=self.features.pooling, normalize=self.features.normalize
                )
            for offset, item in enumerate(results.items):
                if isinstance(item, UnderstudyError):
                    errors.append(item)
                elif isinstance(item, Exception):
                    raise item
                else:
                    vectors.append(item)
                    kept.append(start + offset)
            progress(min(start + _CHUNK, len(texts)), len(texts))
        stacked = np.stack(vectors) if vectors else np.zeros((0, self.features.size), np.float32)
        return stacked, kept, errors

    async def close(self) -> None:
        """Unloads it."""
        await self._runtime.close()
