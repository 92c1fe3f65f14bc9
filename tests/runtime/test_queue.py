"""The bounded queue: what it refuses and why, when to try again, and that nothing put in is ever lost."""

from __future__ import annotations

import threading
import time

import pytest

from server.core import Call, Priority
from server.errors import Draining, Overloaded, RequestTooLarge
from server.runtime.queue import QueueLimits, WorkQueue


def call(priority: Priority = Priority.INTERACTIVE, seconds: float | None = None) -> Call:
    return Call("test", priority=priority, deadline=None if seconds is None else time.monotonic() + seconds)


def test_full_is_refused_with_a_time_to_try_again() -> None:
    queue: WorkQueue[int] = WorkQueue("m", QueueLimits(max_sequences=3, max_tokens=100))
    queue.put([1, 2], [40, 40], call())
    queue.rate.record(1000, 1.0, fill=1.0)
    with pytest.raises(Overloaded, match="2 sequences with 80 tokens") as caught:
        queue.put([3], [70], call())
    assert caught.value.retry_after_s == pytest.approx(0.07)
    with pytest.raises(RequestTooLarge):
        queue.put([3] * 4, [1] * 4, call())
    with pytest.raises(RequestTooLarge):
        queue.put([3, 4], [60, 60], call())
    taken = queue.take(1000, 10)
    assert taken is not None and taken.batch == [1, 2]
    queue.put([9], [5000], call())  # one of any length, alone


def test_what_would_be_late_is_refused_at_once() -> None:
    queue: WorkQueue[int] = WorkQueue("m", QueueLimits(max_wait_s=4))
    queue.put([1], [3000], call())
    queue.put([2], [10], call(seconds=0.5))  # nothing was measured yet: no guess
    queue.rate.record(10, 1.0, fill=0.1)  # a small batch says nothing about what a full one does
    queue.put([3], [10], call(seconds=0.5))
    queue.rate.record(1000, 1.0, fill=0.9)
    with pytest.raises(Overloaded, match=r"about 3\.0 s") as caught:
        queue.put([4], [10], call(seconds=0.5))
    assert caught.value.retry_after_s == pytest.approx(2.5, abs=0.1)
    queue.put([5], [2000], call(seconds=3.5))
    with pytest.raises(Overloaded):
        queue.put([6], [10], call())  # more than max_wait_s
    queue.put([7], [10], call(Priority.CRITICAL, seconds=0.5))  # does not wait for them
    taken = queue.take(100, 10)
    assert taken is not None and taken.batch[0] == 7


def test_a_run_whose_result_would_come_too_late_is_spared() -> None:
    queue: WorkQueue[int] = WorkQueue("m", QueueLimits())
    queue.put([1], [100], call(seconds=0.5))
    queue.put([2], [100], call(seconds=30))
    queue.rate.record(100, 1.0, fill=1.0)
    taken = queue.take(1000, 10)
    assert taken is not None and (taken.batch, taken.expired) == ([2], [1])


def test_closing_with_and_without_draining() -> None:
    queue: WorkQueue[int] = WorkQueue("m", QueueLimits())
    queue.put([1], [1], call())
    assert queue.close(drain=True) == []
    with pytest.raises(Draining):
        queue.put([2], [1], call())
    taken = queue.take(10, 10)
    assert taken is not None and taken.batch == [1]
    assert queue.take(10, 10) is None
    other: WorkQueue[int] = WorkQueue("m", QueueLimits())
    other.put([1, 2], [1, 1], call())
    assert other.close(drain=False) == [1, 2]
    assert other.take(10, 10) is None and other.waiting == 0


def test_nothing_is_lost_between_threads() -> None:
    queue: WorkQueue[int] = WorkQueue("m", QueueLimits())
    left: list[int] = []

    def consume() -> None:
        while (taken := queue.take(50, 7)) is not None:
            left.extend(taken.batch + taken.expired)

    def produce(base: int) -> None:
        for i in range(500):
            tickets = queue.put([base + i], [1 + i % 9], call(Priority(i % 3), seconds=1e-4 if i % 11 == 0 else None))
            if i % 5 == 0:
                left.extend(queue.cancel(tickets))

    consumer = threading.Thread(target=consume)
    consumer.start()
    producers = [threading.Thread(target=produce, args=(base,)) for base in (0, 1000, 2000)]
    for thread in producers:
        thread.start()
    for thread in producers:
        thread.join()
    queue.close(drain=True)
    consumer.join()
    assert sorted(left) == sorted(base + i for base in (0, 1000, 2000) for i in range(500))
