"""The bounded queue between the event loop and an engine's thread: who waits, who is next, and what a full queue answers."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from native.batch import BatchQueue
from server.core import Call
from server.errors import Draining, Overloaded, RequestTooLarge

W = TypeVar("W")
_MARGIN = 1.25  # batches of the same size differ by about as much in time


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What may wait, and how long a low priority waits before it counts as one level higher.

    A call is refused too when what waits before it takes longer than its own deadline leaves, or than `max_wait_s`.
    """

    max_sequences: int = 4096
    max_tokens: int = 262_144
    ageing_s: float = 0.5
    max_wait_s: float = math.inf


@dataclass(slots=True)
class Taken(Generic[W]):
    """A batch, and the entries whose deadline passed while they waited, or would pass before a batch of them is done."""

    batch: list[W]
    expired: list[W]


class DrainRate:
    """Tokens a second that leave the queue when work is waiting: a moving average over well-filled batches."""

    def __init__(self) -> None:
        self._per_second = 0.0

    def record(self, tokens: int, seconds: float, fill: float) -> None:
        """Called after each batch with its tokens, the seconds that it took, and its share of the budget.

        Small batches say what one call costs, not what the engine can do.
        """
        if fill < 0.5:
            return
        rate = tokens / max(seconds, 1e-6)
        self._per_second = rate if self._per_second == 0.0 else 0.9 * self._per_second + 0.1 * rate

    def seconds_for(self, tokens: int) -> float:
        """How long so many tokens take; 0 before anything was measured."""
        return tokens / self._per_second if self._per_second > 0.0 else 0.0


class WorkQueue(Generic[W]):
    """Work items with a size in tokens. `put` and `cancel` never block; `take` blocks a consumer thread until there is work.

    Any thread may call any method. Nothing is dropped silently: an item that was put leaves through `take` (in a batch or expired),
    through `cancel`, or through `close(drain=False)`.
    """

    def __init__(self, name: str, limits: QueueLimits, *, padded: bool = False) -> None:
        self._name = name
        self._limits = limits
        self._queue = BatchQueue(limits.max_sequences, limits.max_tokens, padded, int(limits.ageing_s * 1e9))
        self._items: dict[int, W] = {}
        self._ready = threading.Condition(threading.Lock())
        self._closed = False
        self._budget = 0  # of the latest batch, in tokens
        self.rate = DrainRate()

    @property
    def waiting(self) -> int:
        """Sequences that wait."""
        return len(self._items)

    def put(self, items: Sequence[W], tokens: Sequence[int], call: Call) -> list[int]:
        """Adds all items or none, and returns their tickets, for `cancel`.

        Raises Draining once closed, RequestTooLarge when the items can never fit, Overloaded (with `retry_after_s`) when they do not now.
        """
        deadline_ns = 0 if call.deadline is None else max(1, int(call.deadline * 1e9))
        priority = int(call.priority)
        with self._ready:
            if self._closed:
                raise Draining(f"model {self._name!r} is being stopped; send the request again, to another replica if there is one")
            if not self._queue.fits(len(items), sum(tokens)):
                self._refuse(len(items), sum(tokens))
            self._check_wait(priority, call)
            now_ns = time.monotonic_ns()
            tickets = [self._queue.push(size, priority, deadline_ns, now_ns) for size in tokens]
            self._items.update(zip(tickets, items, strict=True))
            self._ready.notify()
        return tickets

    def _check_wait(self, priority: int, call: Call) -> None:
        """Work that would be late is refused at once: its caller can go elsewhere, and the others keep their time."""
        ahead = self._queue.ahead(priority)
        # Besides what waits: the batch that runs now, and the one that this call will be in.
        wait = self.rate.seconds_for(ahead + min(ahead, self._budget))
        remaining = call.remaining()
        patience = self._limits.max_wait_s if remaining is None else min(self._limits.max_wait_s, remaining)
        if wait > max(0.0, patience):
            raise self._overloaded(f"takes about {wait:.1f} s, the call has {max(0.0, patience):.1f} s", wait - patience)

    def _overloaded(self, why: str, retry_s: float) -> Overloaded:
        retry = min(30.0, max(0.02, retry_s))
        waiting = f"{self._queue.sequences} sequences with {self._queue.tokens} tokens"
        return Overloaded(
            f"model {self._name!r} has too much work: {waiting} wait, which {why}; try again in {retry:.2f} s, or add replicas",
            retry_after_s=retry,
            model=self._name,
        )

    def _refuse(self, sequences: int, tokens: int) -> None:
        limits = self._limits
        if sequences > limits.max_sequences or (tokens > limits.max_tokens and sequences > 1):
            raise RequestTooLarge(
                f"one request of {sequences} sequences and {tokens} tokens is more than model {self._name!r} lets wait "
                f"({limits.max_sequences} sequences, {limits.max_tokens} tokens); split it",
                limit=limits.max_sequences,
                token_limit=limits.max_tokens,
            )
        retry = self.rate.seconds_for(max(tokens, self._queue.tokens + tokens - limits.max_tokens)) or 1.0
        raise self._overloaded("is all that may", retry)

    def take(self, token_budget: int, max_sequences: int) -> Taken[W] | None:
        """The next batch, waiting for work if there is none; None once closed and empty. `batch` is empty if all had expired."""
        with self._ready:
            while not self._items:
                if self._closed:
                    return None
                self._ready.wait()
            self._budget = token_budget
            # Under load a run for those who cannot have its result in time would only make the next ones late too.
            horizon_ns = int(_MARGIN * self.rate.seconds_for(min(self._queue.tokens, token_budget)) * 1e9)
            chosen, expired = self._queue.take(time.monotonic_ns(), token_budget, max_sequences, horizon_ns)
            pop = self._items.pop
            taken = Taken([pop(ticket) for ticket in chosen], [pop(ticket) for ticket in expired])
            if self._items:
                self._ready.notify()  # more than one batch waits: another consumer may start on the next
            return taken

    def cancel(self, tickets: Sequence[int]) -> list[W]:
        """Removes those that still wait, and returns them."""
        with self._ready:
            return [self._items.pop(ticket) for ticket in tickets if self._queue.cancel(ticket)]

    def close(self, *, drain: bool) -> list[W]:
        """Refuses new work. With `drain` what waits is still taken; without it, it is removed and returned. May be called again."""
        with self._ready:
            self._closed = True
            left: list[W] = []
            if not drain:
                for ticket, item in self._items.items():
                    self._queue.cancel(ticket)
                    left.append(item)
                self._items.clear()
            self._ready.notify_all()
            return left
