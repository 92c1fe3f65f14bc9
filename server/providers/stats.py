"""What a provider's last requests were like."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Literal

from server.providers.base import Health

_REMEMBERED = 128


class Stats:
    """Counts and latencies of one provider; used on one event loop."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.waiting = 0
        self._answers: deque[float] = deque(maxlen=_REMEMBERED)
        self._first_tokens: deque[float] = deque(maxlen=_REMEMBERED)
        self._outcomes: deque[bool] = deque(maxlen=_REMEMBERED)

    def answered(self, elapsed_s: float, first_token_s: float | None = None) -> None:
        """A whole answer came; `first_token_s` for streams."""
        self._answers.append(elapsed_s)
        if first_token_s is not None:
            self._first_tokens.append(first_token_s)
        self._outcomes.append(True)

    def failed(self) -> None:
        """The vendor failed."""
        self._outcomes.append(False)

    def median_s(self) -> float:
        """Of whole answers; 0 before the first."""
        return quantile(self._answers, 0.5) or 0.0

    def health(self, circuit: Literal["closed", "open", "half_open"], rest_s: float, room: Mapping[str, float]) -> Health:
        """All of it."""
        return Health(
            circuit,
            rest_s,
            self.in_flight,
            self.waiting,
            quantile(self._answers, 0.5),
            quantile(self._answers, 0.95),
            quantile(self._first_tokens, 0.5),
            len(self._outcomes),
            self._outcomes.count(False),
            room,
        )


def quantile(values: deque[float], share: float) -> float | None:
    """The nearest of the values, or None without any."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else None
