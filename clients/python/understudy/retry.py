"""When a failed call is sent again: by its status, within its deadline, after a wait with jitter that honours the server's RetryInfo."""

from __future__ import annotations

import random
from dataclasses import dataclass

from understudy.errors import UnderstudyError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`attempts` counts the first one too; 1 never sends again. The wait before attempt n is `initial_s` * 2^(n-2), at most `max_s`."""

    attempts: int = 5
    initial_s: float = 0.05
    max_s: float = 2.0

    def delay(self, error: UnderstudyError, attempt: int, remaining_s: float) -> float | None:
        """Seconds to wait after attempt number `attempt` (from 1) failed, or None when its error is final.

        UNAVAILABLE is sent again, and RESOURCE_EXHAUSTED where the server says when. A wait that would end after the deadline is not begun.
        """
        if attempt >= self.attempts:
            return None
        if error.code != "UNAVAILABLE" and not (error.code == "RESOURCE_EXHAUSTED" and error.retry_after_s is not None):
            return None
        backoff = min(self.max_s, self.initial_s * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)
        wait = backoff if error.retry_after_s is None else error.retry_after_s + backoff * random.random()
        return wait if wait < remaining_s else None
