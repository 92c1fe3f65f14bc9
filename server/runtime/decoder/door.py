"""Between the event loop and the engine's thread: what has come in, how much may wait, and what a full queue answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from server.errors import Draining, Overloaded, UnderstudyError
from server.runtime.decoder.sequence import Flight
from server.runtime.decoder.settings import GenerationSettings

_FADE = 0.9
_LONGEST_RETRY_S = 30.0
_SHORTEST_RETRY_S = 0.05


# Something to do between two steps, or the reason why it will not be done.
Order = Callable[[UnderstudyError | None], None]


@dataclass(slots=True)
class Arrived:
    """What came in since the last look, in order."""

    flights: list[Flight] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)


class Door:
    """Any thread may call any method; only the engine's calls `collect`, `left` and `turned_over`."""

    def __init__(self, name: str, settings: GenerationSettings) -> None:
        self._name = name
        self._settings = settings
        self._changed = threading.Condition(threading.Lock())
        self._arrived = Arrived()
        self._waiting = 0  # candidates that have not run yet, here and in the scheduler
        self._tokens = 0
        self._closed = False
        self._drain = True
        self._place_s = 0.0  # seconds until one more candidate may run, while others wait
        self._last_place = 0.0

    @property
    def waiting(self) -> int:
        """Candidates that have not run yet."""
        return self._waiting

    def put(self, flight: Flight) -> None:
        """Lets a job in. Raises Draining, or Overloaded with the time after which there may be room."""
        size, tokens = flight.job.n, len(flight.job.prompt)
        settings = self._settings
        with self._changed:
            if self._closed:
                raise Draining(f"model {self._name!r} is being stopped; send the request again, to another replica if there is one")
            over = self._waiting + size - settings.max_waiting
            if self._waiting and (over > 0 or self._tokens + tokens > settings.max_waiting_tokens):
                raise self._overloaded("which is all that may", max(1, over) * self._place_s)
            remaining = flight.call.remaining()
            wait = self._waiting * self._place_s
            if remaining is not None and wait > remaining:
                raise self._overloaded(f"and would do so for {wait:.1f} s, the call has {max(0.0, remaining):.1f} s", wait - remaining)
            self._waiting += size
            self._tokens += tokens
            self._arrived.flights.append(flight)
            self._changed.notify()

    def order(self, action: Order) -> None:
        """Has the engine's thread do something between two steps. Raises Draining once closed."""
        with self._changed:
            if self._closed:
                raise Draining(f"model {self._name!r} is being stopped")
            self._arrived.orders.append(action)
            self._changed.notify()

    def collect(self, *, idle: bool) -> Arrived | None:
        """What has arrived; waits for it where the engine is idle. None when it is time to end."""
        with self._changed:
            while idle and not self._closed and not self._arrived.flights and not self._arrived.orders:
                self._changed.wait()
            nothing = not self._arrived.flights and not self._arrived.orders
            if self._closed and (not self._drain or (idle and nothing)):
                return None
            if nothing:
                return _NOTHING
            arrived, self._arrived = self._arrived, Arrived()
            return arrived

    def left(self, flight: Flight) -> None:
        """A job runs, or is not going to."""
        with self._changed:
            self._waiting -= flight.job.n
            self._tokens -= len(flight.job.prompt)

    def turned_over(self, candidates: int, now: float) -> None:
        """So many candidates got a place just now; while others wait, that is how fast the queue moves."""
        if self._waiting and self._last_place:
            each = (now - self._last_place) / candidates
            self._place_s = each if self._place_s == 0.0 else _FADE * self._place_s + (1.0 - _FADE) * each
        self._last_place = now if self._waiting else 0.0

    def nudge(self) -> None:
        """Wakes the engine's thread, for a job that was cancelled while everything slept."""
        with self._changed:
            self._changed.notify()

    def close(self, *, drain: bool) -> None:
        """Lets nothing in any more. May be called again, with `drain` False after True."""
        with self._changed:
            self._closed = True
            self._drain = self._drain and drain
            self._changed.notify()

    def rest(self) -> Arrived:
        """What came in and was not collected yet."""
        with self._changed:
            rest, self._arrived = self._arrived, Arrived()
            return rest

    def _overloaded(self, why: str, retry_s: float) -> Overloaded:
        retry = min(_LONGEST_RETRY_S, max(_SHORTEST_RETRY_S, retry_s or 1.0))
        return Overloaded(
            f"model {self._name!r} has too much work: {self._waiting} answers with {self._tokens} prompt tokens wait, {why}; "
            f"try again in {retry:.2f} s, or add replicas",
            retry_after_s=retry,
            model=self._name,
            waiting=self._waiting,
        )


_NOTHING = Arrived()
