"""How much a vendor lets us ask: requests and tokens a minute and a month.

A minute is any sixty seconds, not a bucket that refills: a vendor that counts by sliding or by fixed windows sees no more than its limit.
Months are calendar months in UTC, as the free tiers count them. The counts live in memory: a restart forgets what its month has used.
"""

from __future__ import annotations

import datetime
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from server.errors import RequestTooLarge
from server.settings import ProviderConfig

# A little more: the vendor's clock sees our requests arrive closer together than they left.
_MINUTE_S = 60.1


@dataclass(slots=True)
class _Entry:
    """An amount and when it is used; later than now for those that wait."""

    at: float
    amount: int


class MinuteWindow:
    """At most `limit` in any sixty seconds; first come, first served, because each place is given out at once, in the future if need be."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: deque[_Entry] = deque()
        self._sum = 0

    def room_at(self, amount: int, earliest: float, now: float) -> float:
        """The first moment, not before `earliest`, at which `amount` fits behind everything that was given out."""
        while self._entries and self._entries[0].at <= now - _MINUTE_S:
            self._sum -= self._entries.popleft().amount
        at = max(earliest, self._entries[-1].at) if self._entries else earliest
        used = self._sum
        for entry in self._entries:  # the oldest leave first
            if entry.at > at - _MINUTE_S and used + amount <= self.limit:
                break
            at = max(at, entry.at + _MINUTE_S)
            used -= entry.amount
        return at

    def take(self, amount: int, at: float) -> _Entry:
        """Uses `amount` at the moment that `room_at` gave."""
        entry = _Entry(at, amount)
        self._entries.append(entry)
        self._sum += amount
        return entry

    def correct(self, entry: _Entry, amount: int) -> None:
        """The entry used `amount` in the end."""
        # An entry that has left the window no longer counts in the sum.
        if self._entries and entry.at >= self._entries[0].at:
            self._sum += amount - entry.amount
            entry.amount = amount

    def share_left(self, now: float) -> float:
        """Of the limit, in [0, 1]."""
        used = sum(entry.amount for entry in self._entries if now - _MINUTE_S < entry.at)
        return max(1.0 - used / self.limit, 0.0)


class MonthWindow:
    """At most `limit` in a calendar month (UTC). Times are seconds since 1970."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._resets_at = 0.0

    def wait_s(self, amount: int, now: float) -> float:
        """0 where `amount` fits, else the seconds until the month ends."""
        self._turn(now)
        return 0.0 if self._used + amount <= self.limit else self._resets_at - now

    def take(self, amount: int, now: float) -> None:
        """Uses `amount`, which may be negative where less was used than was taken."""
        self._turn(now)
        self._used = max(self._used + amount, 0)

    def share_left(self, now: float) -> float:
        """Of the limit, in [0, 1]."""
        self._turn(now)
        return max(1.0 - self._used / self.limit, 0.0)

    def _turn(self, now: float) -> None:
        if now >= self._resets_at:
            self._used = 0
            day = datetime.datetime.fromtimestamp(now, datetime.UTC)
            year, month = divmod(day.year * 12 + day.month, 12)
            self._resets_at = datetime.datetime(year, month + 1, 1, tzinfo=datetime.UTC).timestamp()


@dataclass(slots=True)
class Place:
    """Room for one request. `at`: when it may go out (the clock's seconds). Corrected when the tokens are known, or given back."""

    at: float
    tokens: int
    entries: list[tuple[MinuteWindow, _Entry, bool]] = field(default_factory=list)


class Rates:
    """All limits of one provider. `clock` and `wall` are replaced by tests."""

    def __init__(self, config: ProviderConfig, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._wall = wall
        self._minute_requests = MinuteWindow(config.requests_per_minute) if config.requests_per_minute else None
        self._minute_tokens = MinuteWindow(config.tokens_per_minute) if config.tokens_per_minute else None
        self._month_requests = MonthWindow(config.requests_per_month) if config.requests_per_month else None
        self._month_tokens = MonthWindow(config.tokens_per_month) if config.tokens_per_month else None
        self.limited = any((self._minute_requests, self._minute_tokens, self._month_requests, self._month_tokens))
        self.counts_tokens = bool(self._minute_tokens or self._month_tokens)

    def wait_s(self, tokens: int) -> float:
        """Seconds until a request of so many tokens may go out; 0: now. Raises RequestTooLarge where it never may."""
        for window, name in ((self._minute_tokens, "tokens_per_minute"), (self._month_tokens, "tokens_per_month")):
            if window is not None and tokens > window.limit:
                message = f"The request may take {tokens} tokens; {name} = {window.limit}. Shorten it, lower max_tokens or raise {name}."
                raise RequestTooLarge(message, field=name, limit=window.limit, tokens=tokens)
        wall = self._wall()
        months = ((self._month_requests, 1), (self._month_tokens, tokens))
        wait = max((month.wait_s(amount, wall) for month, amount in months if month is not None), default=0.0)
        now = self._clock()
        at = now + wait
        for window, amount in self._minutes(tokens):
            at = window.room_at(amount, at, now)
        for window, amount in self._minutes(tokens):  # the second window may have moved beyond what the first one gave: later has room too
            at = window.room_at(amount, at, now)
        return max(at - now, 0.0)

    def take(self, tokens: int, wait_s: float) -> Place:
        """The place that `wait_s` found, with no await in between."""
        place = Place(self._clock() + wait_s, tokens)
        for window, amount in self._minutes(tokens):
            place.entries.append((window, window.take(amount, place.at), window is self._minute_tokens))
        self._take_month(1, tokens)
        return place

    def settle(self, place: Place, tokens: int) -> None:
        """The request used so many tokens in the end (0: none of them, but it was sent and counts as one)."""
        for window, entry, counts_tokens in place.entries:
            if counts_tokens:
                window.correct(entry, tokens)
        self._take_month(0, tokens - place.tokens)
        place.tokens = tokens

    def give_back(self, place: Place) -> None:
        """The request was never sent."""
        for window, entry, _ in place.entries:
            window.correct(entry, 0)
        self._take_month(-1, -place.tokens)

    def room(self) -> dict[str, float]:
        """Of each limit the share that is left."""
        now, wall = self._clock(), self._wall()
        minutes = (("requests_per_minute", self._minute_requests), ("tokens_per_minute", self._minute_tokens))
        months = (("requests_per_month", self._month_requests), ("tokens_per_month", self._month_tokens))
        left = {name: window.share_left(now) for name, window in minutes if window is not None}
        return left | {name: window.share_left(wall) for name, window in months if window is not None}

    def _minutes(self, tokens: int) -> Iterable[tuple[MinuteWindow, int]]:
        return [(w, n) for w, n in ((self._minute_requests, 1), (self._minute_tokens, tokens)) if w is not None]

    def _take_month(self, requests: int, tokens: int) -> None:
        wall = self._wall()
        for window, amount in ((self._month_requests, requests), (self._month_tokens, tokens)):
            if window is not None:
                window.take(amount, wall)
