"""When to stop asking a vendor that fails, and when to try again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal


class Breaker:
    """Stops asking after `threshold` failures in a row, for `rest_s`; then one probe, and everybody again once a probe succeeded.

    Each request that `admits` let through ends in exactly one of `succeeded`, `failed` and `undecided`.
    """

    def __init__(self, threshold: int = 5, rest_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold = threshold
        self._rest_s = rest_s
        self._clock = clock
        self._failures = 0
        self._next_try = 0.0
        self._probing = False

    def state(self) -> Literal["closed", "open", "half_open"]:
        """half_open: the rest is over, and a probe is out or may go out."""
        if self._failures < self._threshold:
            return "closed"
        return "open" if self._clock() < self._next_try else "half_open"

    def refuses(self) -> bool:
        """Whether a request would not be let through now."""
        return self._failures >= self._threshold and (self._probing or self._clock() < self._next_try)

    def admits(self) -> bool:
        """Whether a request may go out now; where the rest is over, the one that asks first is the probe, and the others wait for it."""
        if self.refuses():
            return False
        self._probing = self._failures >= self._threshold
        return True

    def open_for_s(self) -> float:
        """Seconds until the next probe may go out, or until the one that is out should be back; 0 while requests are admitted."""
        if not self.refuses():
            return 0.0
        return max(self._next_try - self._clock(), 0.1)

    def succeeded(self) -> None:
        """The vendor answered, be it with a refusal of this one request."""
        self._failures = 0
        self._probing = False

    def answering(self) -> None:
        """The vendor began an answer that is still to end well: enough for a probe to let others in, not to forget what failed."""
        self._failures = min(self._failures, self._threshold - 1)
        self._probing = False

    def failed(self) -> None:
        """The vendor did not answer."""
        self._failures += 1
        self._probing = False
        if self._failures >= self._threshold:
            self._next_try = self._clock() + self._rest_s

    def undecided(self) -> None:
        """The request ended for reasons of ours, such as a caller that left; where it was the probe, the next one is."""
        self._probing = False
