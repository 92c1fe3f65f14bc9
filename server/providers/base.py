"""What every vendor's client promises, whatever its wire protocol."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol

from server.core import Usage


@dataclass(slots=True, frozen=True)
class Prompt:
    """What a provider model is asked. `max_tokens` bounds what it may write, and so what it may cost."""

    system: str
    user: str
    max_tokens: int


@dataclass(slots=True, frozen=True)
class Completion:
    """What it answered. `source_model` is the model that the provider says it ran; `attempts` counts requests, the last included."""

    text: str
    usage: Usage
    source_model: str
    cost_micro_usd: int
    attempts: int


class Provider(Protocol):
    """A client of one vendor. Used on one event loop; any number of calls at once.

    `complete` waits for its turn (`max_concurrent`), repeats what is safe to repeat, and ends before `deadline` (monotonic seconds)
    come what may. It repeats a request only where the vendor has certainly not charged for it: refused (429), failed (5xx) or never
    connected; a request that was sent and not answered in time is not sent again.
    """

    name: str
    training_allowed: bool

    async def complete(self, model: str, prompt: Prompt, deadline: float | None) -> Completion:
        """Raises ProviderUnavailable, DeadlineExceeded(stage="provider") or Overloaded; never an exception of the vendor's library."""
        ...

    def worst_cost_micro_usd(self, model: str, prompt: Prompt) -> int | None:
        """What the prompt costs at the very most, or None where the model has no price."""
        ...

    def open_circuit(self) -> str:
        """Why the provider is not asked at the moment, or "" where it is."""
        ...

    async def close(self) -> None:
        """Closes connections. Calls in flight fail."""
        ...


@dataclass(slots=True, frozen=True)
class Price:
    """US dollars a million tokens, which are also millionths of a dollar a token."""

    input: float
    output: float

    def cost_micro_usd(self, usage: Usage) -> int:
        """Rounded up, so that a sum of costs is never less than the bill."""
        # The product of a price like 0.15 and a count is a hair above the true value: without rounding first, ceil would add a unit.
        return math.ceil(round(usage.input * self.input + usage.output * self.output, 6))


class Breaker:
    """Stops asking a vendor that fails: after `threshold` failures in a row for `rest_s`, then one request at a time until one succeeds."""

    def __init__(self, threshold: int = 5, rest_s: float = 5.0) -> None:
        self._threshold = threshold
        self._rest_s = rest_s
        self._failures = 0
        self._next_try = 0.0

    def admits(self) -> bool:
        """Whether a request may go out now; where the rest is over, the one that asks first is the probe."""
        if self._failures < self._threshold:
            return True
        now = time.monotonic()
        if now < self._next_try:
            return False
        self._next_try = now + self._rest_s
        return True

    def open_for_s(self) -> float:
        """Seconds until the next probe may go out; 0 while requests are admitted."""
        return max(self._next_try - time.monotonic(), 0.0) if self._failures >= self._threshold else 0.0

    def succeeded(self) -> None:
        """The vendor answered, be it with a refusal of this one request."""
        self._failures = 0

    def failed(self) -> None:
        """The vendor did not answer."""
        self._failures += 1
        if self._failures == self._threshold:
            self._next_try = time.monotonic() + self._rest_s
