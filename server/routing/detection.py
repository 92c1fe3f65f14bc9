"""The task of plain words, as routing wants it: by the embedder that serves at the moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from server.core import Call, Detected
from server.routing.task_detection import TaskDetector
from server.routing.task_parameters import TaskParameters
from server.runtime.runtime import Runtime


class Detection:
    """See server.routing.briefing.Detector. `embedder` names the model; it raises where there is none, or several.

    The first request in plain words waits some seconds for the phrases to be learned; what is learned is kept in the folder `cache`.
    """

    def __init__(self, runtime: Runtime, embedder: Callable[[], str], cache: Path | None = None) -> None:
        self._runtime = runtime
        self._embedder = embedder
        self._cache = cache
        self._detector: TaskDetector | None = None

    async def detect(self, text: str, call: Call) -> Detected:
        """Raises as `TaskDetector.detect` does, and ModelNotLoaded or InvalidArgument where no embedder can be told."""
        name = self._embedder()
        if self._detector is None or self._detector.model != name:
            self._detector = TaskDetector(self._runtime, name, cache=self._cache)
        found = await self._detector.detect(text, call)
        return Detected(
            found.task or "",
            found.score,
            found.phrase,
            _named(found.parameters),
            tuple(candidate.task for candidate in found.candidates),
            found.instruction,
            found.content,
        )


def _named(parameters: TaskParameters) -> dict[str, str]:
    """Parameters as RunRequest names them; those that were not said are left out."""
    found = {name: value for name, value in dataclasses.asdict(parameters).items() if value}
    return {name: ", ".join(value) if isinstance(value, tuple) else str(value) for name, value in found.items()}
