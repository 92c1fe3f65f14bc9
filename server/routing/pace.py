"""How long local candidates take: a fading mean each, so that a route can put the quickest first."""

from __future__ import annotations

_FADE = 0.9


class Paces:
    """One a process, on the event loop."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def took(self, candidate: str, seconds: float) -> None:
        """An answer, or a batch of them, took so long."""
        before = self._seconds.get(candidate)
        self._seconds[candidate] = seconds if before is None else _FADE * before + (1.0 - _FADE) * seconds

    def expected_s(self, candidate: str) -> float | None:
        """Seconds, or None before the first answer."""
        return self._seconds.get(candidate)
