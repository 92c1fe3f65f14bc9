"""Finds the task of plain words; see task_detection."""
from __future__ import annotations

from collections.abc import Callable

from server.core import Call, Detected
from server.runtime.runtime import Runtime


class Detection:
    """placeholder until the detector lands"""

    def __init__(self, runtime: Runtime, embedder: Callable[[], str]) -> None:
        self._runtime = runtime
        self._embedder = embedder

    async def detect(self, text: str, call: Call) -> Detected:
        """Nothing."""
        return Detected("")
