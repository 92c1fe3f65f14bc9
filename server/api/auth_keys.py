"""The keys as a server knows them: a copy in memory that a thread keeps up to date, so that no request waits for the database."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from server.core import Caller
from server.errors import UnderstudyError
from server.registry.api_keys import ApiKey, ApiKeys

_LOG = logging.getLogger(__name__)
_NOTE_USE_S = 60.0


class TokenBucket:
    """Lets so many through in a minute, and as many at once after a pause. For one thread; time in seconds of any one clock."""

    __slots__ = ("_last", "_left", "_rate", "per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._rate = per_minute / 60.0
        self._left = float(per_minute)
        self._last = now

    def take(self, now: float) -> float:
        """0.0 where there is room, and it is taken; else the seconds until there is."""
        left = min(float(self.per_minute), self._left + max(0.0, now - self._last) * self._rate)
        self._last = now
        if left >= 1.0:
            self._left = left - 1.0
            return 0.0
        self._left = left
        return (1.0 - left) / self._rate


class HeldKey:
    """A key in memory, the same object as long as the server runs. `ended`: why it is none any more, or ""; set once, by the thread."""

    __slots__ = ("bucket", "caller", "ended", "expire_ms", "id", "limits", "refusals", "secret_hash", "used_ms")

    def __init__(self, key: ApiKey, now: float) -> None:
        given = key.settings
        self.id = key.id
        self.secret_hash = key.secret_hash
        self.caller = Caller(key.name, given.role, frozenset(given.skills))
        self.expire_ms = given.expire_ms
        self.ended = ""
        self.used_ms = 0
        self.bucket = TokenBucket(given.requests_per_minute, now) if given.requests_per_minute else None
        self.refusals: TokenBucket | None = None  # of what the audit log says of it; made by whoever writes that
        amounts = {"day": given.budget_day, "month": given.budget_month}
        self.limits = {window: amount for window, amount in amounts.items() if amount is not None}


class KeyBook:
    """`start` and `close` are for other threads than the event loop's, the rest for any. `clock`: milliseconds since 1970.

    Where the database goes away, what is known holds on: keys go on working, and revocations arrive when it is back.
    """

    def __init__(self, store: ApiKeys, *, poll_s: float = 1.0, clock: Callable[[], int] | None = None) -> None:
        self.known = False  # whether the registry has been read once
        self._store = store
        self._poll_s = poll_s
        self._clock = clock or (lambda: time.time_ns() // 1_000_000)
        self._held: Mapping[str, HeldKey] = {}
        self._counts = (-1, -1)
        self._lock = threading.Lock()  # of `refresh`, which the thread and AdminService call
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._away = False
        self._written: dict[str, int] = {}

    def start(self) -> None:
        """Reads the keys, and starts the thread. A database that is away is no reason to fail: no key is known until it answers."""
        self._look()
        self._thread = threading.Thread(target=self._work, name="keys", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Writes when keys were last used, and stops."""
        self._stopping.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def find(self, key: str) -> HeldKey | None:
        """A key by its id."""
        return self._held.get(key)

    def limits_of(self, key: str) -> Mapping[str, int]:
        """A key's own budgets by window ("day", "month"), in 1e-6 US dollars."""
        held = self._held.get(key)
        return held.limits if held is not None else {}

    def any_live(self) -> bool:
        """Whether any key would be let in now."""
        now = self._clock()
        return any(not held.ended and (held.expire_ms is None or now < held.expire_ms) for held in self._held.values())

    def refresh(self) -> None:
        """Brings the copy up to date. Raises Unavailable."""
        with self._lock:
            counts = self._store.count()
            if counts == self._counts:
                return
            fresh: dict[str, HeldKey] = {}
            for key in self._store.current():
                held = self._held.get(key.id) or HeldKey(key, time.monotonic())
                if key.revoke_ms is not None:
                    held.ended = "revoked"
                fresh[key.id] = held
            for gone in self._held.keys() - fresh.keys():
                self._held[gone].ended = "revoked"  # calls that still run must see it
            self._held = fresh
            self._counts = counts
            self.known = True

    def note_use(self) -> None:
        """Writes when keys were last used. Raises Unavailable."""
        used = {held.id: held.used_ms for held in self._held.values() if held.used_ms > self._written.get(held.id, 0)}
        if used:
            self._store.note_use(used)
            self._written |= used

    def _work(self) -> None:
        noted = time.monotonic()
        while not self._stopping.wait(self._poll_s):
            self._look()
            if time.monotonic() - noted >= _NOTE_USE_S:
                noted = time.monotonic()
                with suppress(UnderstudyError):  # the next minute's write says it again
                    self.note_use()
        with suppress(UnderstudyError):
            self.note_use()

    def _look(self) -> None:
        try:
            self.refresh()
        except UnderstudyError as error:
            if not self._away:
                self._away = True
                _LOG.error("the registry does not answer: keys stay as they are known", extra={"error": error.message})
        except Exception:
            _LOG.exception("reading the keys failed; they stay as they are known")
        else:
            if self._away:
                self._away = False
                _LOG.warning("the registry answers again: keys are up to date")
