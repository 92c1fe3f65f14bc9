"""When to stop asking a vendor that fails, and when to try again."""

from __future__ import annotations

import time


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
