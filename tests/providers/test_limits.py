"""Rate limits, the circuit and retries by a clock of ours; then against a vendor."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from server.errors import Overloaded, RequestTooLarge
from server.providers import failures
from server.providers.breaker import Breaker
from server.providers.limits import MinuteWindow, MonthWindow, Rates
from server.settings import ProviderConfig
from tests.providers.loopback import Script
from tests.providers.provider_clients import PROMPT, client, collect, within


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_no_sixty_seconds_ever_hold_more_than_the_limit() -> None:
    chance = random.Random(7)
    for _ in range(100):
        limit = chance.randint(3, 30)
        window = MinuteWindow(limit)
        now = 0.0
        taken = []
        for _ in range(100):
            now += chance.choice([0, 0, 0.1, 1, 5, 30])
            amount = chance.randint(1, limit)
            at = window.room_at(amount, now, now)
            assert at >= now
            entry = window.take(amount, at)
            taken.append(entry)
            if chance.random() < 0.3:
                window.correct(entry, chance.randint(0, amount))
        times = [entry.at for entry in taken]
        assert times == sorted(times), "first come, first served"
        for end in times:
            assert sum(entry.amount for entry in taken if end - 60 <= entry.at <= end) <= limit


def test_room_comes_back_as_soon_as_the_window_has_moved() -> None:
    window = MinuteWindow(2)
    window.take(1, window.room_at(1, 0.0, 0.0))
    window.take(1, window.room_at(1, 10.0, 10.0))
    assert window.room_at(1, 20.0, 20.0) == pytest.approx(60, abs=0.2)
    assert window.room_at(2, 20.0, 20.0) == pytest.approx(70, abs=0.2)
    assert window.room_at(1, 60.2, 60.2) == 60.2
    assert window.share_left(60.2) == 0.5


def test_months_are_of_the_calendar() -> None:
    def at(*date: int) -> float:
        return datetime.datetime(*date, tzinfo=datetime.UTC).timestamp()  # type: ignore[arg-type, misc]

    month = MonthWindow(3)
    month.take(3, at(2026, 12, 31, 23))
    assert month.wait_s(1, at(2026, 12, 31, 23)) == 3600
    assert month.wait_s(1, at(2027, 1, 1)) == 0 and month.share_left(at(2027, 1, 1)) == 1
    month.take(2, at(2027, 1, 31))
    assert month.wait_s(1, at(2027, 1, 31)) == 0 and month.wait_s(2, at(2027, 1, 31)) == 86400
    month.take(-1, at(2027, 1, 31))
    assert month.wait_s(2, at(2027, 1, 31)) == 0


def test_all_limits_hold_together() -> None:
    clock, wall = Clock(), Clock(datetime.datetime(2026, 11, 30, 23, 59, tzinfo=datetime.UTC).timestamp())
    config = ProviderConfig(requests_per_minute=10, tokens_per_minute=100, requests_per_month=4, tokens_per_month=1000)
    rates = Rates(config, clock, wall)
    first = rates.take(90, rates.wait_s(90))
    assert rates.wait_s(20) == pytest.approx(60, abs=0.2), "tokens"
    rates.settle(first, 10)
    assert rates.wait_s(20) == 0, "fewer were used"
    with pytest.raises(RequestTooLarge, match="tokens_per_minute = 100"):
        rates.wait_s(101)
    for _ in range(3):
        rates.take(1, 0.0)
    assert rates.wait_s(1) == pytest.approx(60), "the month ends in a minute"
    assert rates.room()["requests_per_month"] == 0 and rates.room()["tokens_per_month"] == pytest.approx(0.987)
    wall.now += 60
    clock.now += 60
    assert rates.wait_s(1) == 0
    given = rates.take(50, 0.0)
    rates.give_back(given)
    assert rates.room()["requests_per_month"] == 1 and rates.room()["tokens_per_month"] == 1
    assert not Rates(ProviderConfig()).limited


def test_the_circuit_lets_one_probe_through() -> None:
    clock = Clock()
    breaker = Breaker(2, 5.0, clock)
    breaker.failed()
    assert breaker.admits() and breaker.state() == "closed"
    breaker.failed()
    assert not breaker.admits() and breaker.state() == "open" and breaker.open_for_s() == 5
    clock.now += 5
    assert breaker.state() == "half_open" and breaker.open_for_s() == 0
    assert breaker.admits() and not breaker.admits() and breaker.refuses(), "one probe, the others wait"
    breaker.failed()
    assert breaker.state() == "open" and breaker.open_for_s() == 5, "the probe failed"
    clock.now += 5
    assert breaker.admits()
    breaker.undecided()
    assert breaker.admits(), "its caller left: the next one is the probe"
    breaker.answering()
    assert breaker.admits() and breaker.admits(), "a stream that began lets others in"
    breaker.failed()
    assert not breaker.admits(), "it did not end well"
    clock.now += 5
    assert breaker.admits()
    breaker.succeeded()
    breaker.failed()
    assert breaker.state() == "closed" and breaker.admits()


def test_delays_double_and_jitter() -> None:
    failures_first = failures._FIRST_DELAY_S
    delays = [[failures.backoff_s(attempt) for _ in range(50)] for attempt in (1, 2, 3, 30)]
    assert len(set(delays[0])) > 40
    for attempt, found in zip((1, 2, 3), delays, strict=False):
        assert all(failures_first * 2 ** (attempt - 1) * 0.5 <= d <= failures_first * 2 ** (attempt - 1) for d in found)
    assert max(delays[3]) <= 8


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": email.utils.formatdate(time.time() - 100, usegmt=True)}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e9"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert failures.retry_after_s(headers) == seconds


async def test_a_vendor_is_asked_as_often_as_it_allows(kind: str, vendor: Callable[[Script], Any]) -> None:
    server = vendor(lambda number, text: "fine")
    provider = client(kind, server.base_url, requests_per_minute=2, tokens_per_month=1000)
    assert (await provider.complete("m", PROMPT, within(10))).text == "fine"
    assert provider.health().room == pytest.approx({"requests_per_minute": 0.5, "tokens_per_month": 0.89}), "110 tokens were used"
    await collect(provider.stream("m", PROMPT, within(10)))
    assert provider.health().room == pytest.approx({"requests_per_minute": 0.0, "tokens_per_month": 0.78})
    started = time.monotonic()
    for call in (provider.complete("m", PROMPT, within(10)), collect(provider.stream("m", PROMPT, within(10)))):
        with pytest.raises(Overloaded) as caught:
            await call
        assert caught.value.retry_after_s is not None and 50 < caught.value.retry_after_s <= 61
    assert time.monotonic() - started < 5 and len(server.requests) == 2
    await provider.close()


async def test_a_request_waits_where_room_comes_in_time(kind: str, vendor: Callable[[Script], Any]) -> None:
    server = vendor(lambda number, text: "fine")
    provider = client(kind, server.base_url, requests_per_minute=1)
    provider._rates._minute_requests.take(1, time.monotonic() - 59.6)  # type: ignore[union-attr]
    started = time.monotonic()
    both = await asyncio.gather(*(provider.complete("m", PROMPT, within(5)) for _ in range(2)), return_exceptions=True)
    assert 0.3 < time.monotonic() - started < 3
    assert sorted(type(one).__name__ for one in both) == ["Completion", "Overloaded"]
    await provider.close()
