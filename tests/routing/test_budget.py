"""Budgets under concurrency: never a cent over, and what is left can be used; by many callers, processes, time zones and deaths."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from server.errors import BudgetExceeded
from server.registry.registry import Registry
from server.routing.budget import Budget
from server.routing.budget_windows import Period, Scopes, Windows, periods
from server.routing.webhook import Webhook
from server.settings import BudgetConfig, BudgetLimits, RegistryConfig

ROOT = Path(__file__).resolve().parents[2]
PRICE = 1_000_000  # a call's worst case, in 1e-6 US dollars
START_MS = 1_795_003_200_000  # 2026-11-18T12:00:00Z


class Clock:
    def __init__(self, ms: int = START_MS) -> None:
        self.ms = ms

    def __call__(self) -> int:
        return self.ms


class Counted:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.ratios: dict[tuple[str, str], float] = {}
        self.refused: list[tuple[str, str]] = []

    def budget_used(self, scope: str, window: str, ratio: float) -> None:
        self.ratios[scope, window] = ratio

    def budget_refused(self, scope: str, window: str) -> None:
        self.refused.append((scope, window))


Make = Callable[..., Budget]


@pytest_asyncio.fixture
async def make(registry_url: str) -> AsyncIterator[Make]:
    """Makes budgets on one database, as many servers would: `make(config, clock=None, observer=None)`."""
    registry = Registry(RegistryConfig(url=registry_url))
    made: list[Budget] = []

    def one(config: BudgetConfig, **more: Any) -> Budget:
        made.append(Budget(config, registry, **more))
        return made[-1]

    yield one
    for budget in made:
        await budget.close()
    registry.close()


@pytest.fixture
def skill() -> str:
    """A name that no other test on the same database has."""
    return f"s{secrets.token_hex(6)}"


def of_skill(skill: str, **limits: float) -> BudgetConfig:
    return BudgetConfig(skills={skill: BudgetLimits(**limits)})


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.01)


async def use_up(budget: Budget, skill: str, callers: int) -> int:
    """Callers that ask until they are refused, and pay the worst case; how many calls they paid."""
    served = 0

    async def caller() -> None:
        nonlocal served
        while True:
            try:
                reservation = await budget.reserve(PRICE, Scopes(skill=skill))
            except BudgetExceeded:
                return
            await asyncio.sleep(0)
            await budget.settle(reservation, PRICE)
            served += 1

    await asyncio.gather(*(caller() for _ in range(callers)))
    return served


async def test_64_callers_on_a_budget_for_100_calls(make: Make, skill: str) -> None:
    budget = make(of_skill(skill, day_usd=100, month_usd=1000))
    assert 95 <= await use_up(budget, skill, 64) <= 100
    day, month = await budget.report()
    assert (day.scope, day.window, day.limit_micro_usd) == (f"skill:{skill}", "day", 100 * PRICE)
    assert 95 * PRICE <= day.spent_micro_usd <= 100 * PRICE and day.reserved_micro_usd == 0
    assert (month.spent_micro_usd, month.state, day.state) == (day.spent_micro_usd, "ok", "stopped")


CALLERS = """
import asyncio, sys
from server.errors import BudgetExceeded
from server.registry.registry import Registry
from server.routing.budget import Budget
from server.routing.budget_windows import Scopes
from server.settings import BudgetConfig, BudgetLimits, RegistryConfig
url, skill, callers = sys.argv[1], sys.argv[2], int(sys.argv[3])

async def main():
    served = 0
    budget = Budget(BudgetConfig(skills={skill: BudgetLimits(day_usd=100)}), Registry(RegistryConfig(url=url)))
    await budget.start()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)

    async def caller():
        nonlocal served
        while True:
            try:
                reservation = await budget.reserve(1_000_000, Scopes(skill=skill))
            except BudgetExceeded as error:
                if error.retry_after_s > 1:
                    return
                await asyncio.sleep(0.01)  # others' running calls are in the way
                continue
            await asyncio.sleep(0.002)
            await budget.settle(reservation, 1_000_000)
            served += 1

    await asyncio.gather(*(caller() for _ in range(callers)))
    await budget.close()
    print(served, flush=True)

asyncio.run(main())
"""


def python(script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


async def test_two_processes_with_64_callers_share_a_budget_for_100_calls(make: Make, registry_url: str, skill: str) -> None:
    running = [python(CALLERS, registry_url, skill, "32") for _ in range(2)]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in running:  # at once
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    served = [int(process.communicate()[0]) for process in running]
    (day,) = await make(of_skill(skill, day_usd=100)).report()
    assert 95 <= sum(served) <= 100, served
    assert (day.spent_micro_usd, day.reserved_micro_usd) == (sum(served) * PRICE, 0)


HOLDER = CALLERS.replace(
    'print("ready", flush=True)', 'held = await budget.reserve(80_000_000, Scopes(skill=skill)); print("ready", flush=True)'
)
HOLDER = HOLDER.replace("day_usd=100)}", "day_usd=100)}, lease_s=1")


async def test_a_killed_server_leaves_no_reservation_for_longer_than_its_lease(make: Make, registry_url: str, skill: str) -> None:
    holder = python(HOLDER, registry_url, skill, "0")
    assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
    budget = make(of_skill(skill, day_usd=100))
    with pytest.raises(BudgetExceeded) as caught:
        await budget.reserve(80 * PRICE, Scopes(skill=skill))
    assert caught.value.retry_after_s == 1.0, "only a running call is in the way"
    lives = time.monotonic() + 2.0
    while time.monotonic() < lives:  # twice its lease: a live holder keeps what it holds
        await asyncio.sleep(0.1)
        with pytest.raises(BudgetExceeded):
            await budget.reserve(80 * PRICE, Scopes(skill=skill))
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    killed = time.monotonic()
    while True:
        try:
            reservation = await budget.reserve(80 * PRICE, Scopes(skill=skill))
            break
        except BudgetExceeded:
            assert time.monotonic() - killed < 1.5, "the lease of 1 s is over"
            await asyncio.sleep(0.02)
    await budget.release(reservation)


async def test_a_refusal_names_scope_window_and_reset(make: Make, skill: str) -> None:
    observer = Counted()
    config = BudgetConfig(
        skills={skill: BudgetLimits(day_usd=1, month_usd=1.5)}, time_zone="Europe/Oslo", default_key=BudgetLimits(month_usd=2)
    )
    budget = make(config, clock=Clock(), observer=observer)
    with pytest.raises(BudgetExceeded, match=f"skill '{skill}' for the day has no room") as caught:
        await budget.reserve(1_200_000, Scopes(skill=skill))
    assert caught.value.metadata == {"scope": f"skill:{skill}", "window": "day", "resets_at": "2026-11-18T23:00:00Z"}
    assert caught.value.retry_after_s == 11 * 3600
    with pytest.raises(BudgetExceeded) as caught:
        await budget.reserve(3_000_000, Scopes(skill=skill))
    assert caught.value.metadata["window"] in ("day", "month")
    await budget.reserve(900_000, Scopes(skill=skill, key=skill))
    with pytest.raises(BudgetExceeded) as caught:
        await budget.reserve(1_500_000, Scopes(key=skill))
    assert caught.value.metadata["scope"] == f"key:{skill}" and observer.refused[-1] == ("key:*", "month")
    gc.collect()


async def test_paid_candidates_stop_and_free_ones_do_not(make: Make, skill: str) -> None:
    budget, scopes = make(of_skill(skill, day_usd=1), clock=Clock()), Scopes("vendor", skill)
    assert budget.blocked(scopes) == ""
    first = await budget.reserve(940_000, scopes)
    second = await budget.reserve(60_000, scopes)
    assert budget.blocked(scopes).startswith("95 % of the budget of skill")
    await budget.release(second)
    await budget.settle(first, 940_000)
    await until(lambda: budget.blocked(scopes) == "")
    await budget.settle(await budget.reserve(15_000, scopes), 15_000)
    assert (await budget.report())[0].state == "stopped"
    with pytest.raises(BudgetExceeded):
        await budget.reserve(1, scopes)
    free = await budget.reserve(0, scopes)
    await budget.settle(free, 20_000)  # it was not free after all
    assert (await budget.report())[0].spent_micro_usd == 975_000
    assert budget.blocked(Scopes("vendor", "another")) == ""


async def test_more_than_the_worst_case_is_debited_and_logged(make: Make, skill: str, caplog: pytest.LogCaptureFixture) -> None:
    budget, scopes = make(of_skill(skill, day_usd=1)), Scopes(skill=skill)
    await budget.settle(await budget.reserve(100, scopes), 250)
    assert (await budget.report())[0].spent_micro_usd == 250
    assert "more than its worst case" in caplog.text


async def test_only_the_first_end_of_a_reservation_counts(make: Make, skill: str) -> None:
    budget, scopes = make(of_skill(skill, day_usd=1)), Scopes(skill=skill)
    reservation = await budget.reserve(100, scopes)
    await budget.settle(reservation, 30)
    await budget.release(reservation)
    await budget.settle(reservation, 30)
    (day,) = await budget.report()
    assert (day.spent_micro_usd, day.reserved_micro_usd) == (30, 0)


async def test_callers_that_leave_hold_nothing(make: Make, skill: str) -> None:
    budget, scopes = make(of_skill(skill, day_usd=1)), Scopes(skill=skill)
    await budget.start()
    for turns in range(4):  # before the thread sees it, and after
        tasks = [asyncio.ensure_future(budget.reserve(1000, scopes)) for _ in range(20)]
        for _ in range(turns):
            await asyncio.sleep(0.0005 * turns)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(result, BaseException):
                await budget.release(result)
    (day,) = await budget.report()
    (day,) = await budget.report()
    assert (day.spent_micro_usd, day.reserved_micro_usd) == (0, 0)


async def test_a_reservation_that_is_forgotten_counts_as_spent(make: Make, skill: str, caplog: pytest.LogCaptureFixture) -> None:
    budget = make(of_skill(skill, day_usd=1))
    await budget.reserve(1000, Scopes(skill=skill))
    gc.collect()
    await budget.report()  # the thread has let go of it
    assert (await budget.report())[0].spent_micro_usd == 1000
    assert "was lost" in caplog.text


async def test_what_is_spent_counts_in_the_window_of_its_reservation(make: Make, skill: str) -> None:
    clock = Clock()
    budget, scopes = make(of_skill(skill, day_usd=1, month_usd=2), clock=clock), Scopes(skill=skill)
    before = await budget.reserve(900_000, scopes)
    clock.ms += 12 * 3_600_000  # midnight
    await budget.reserve(0, scopes)
    after = await budget.reserve(900_000, scopes)
    await budget.settle(before, 900_000)
    await budget.settle(after, 100_000)
    day, month = await budget.report()
    assert (day.spent_micro_usd, month.spent_micro_usd) == (100_000, 1_000_000)


async def test_keys_share_a_default_and_have_limits_of_their_own(make: Make, skill: str) -> None:
    other = f"{skill}-b"
    config = BudgetConfig(keys={skill: BudgetLimits(day_usd=5), f"{skill}-free": BudgetLimits()}, default_key=BudgetLimits(day_usd=1))
    budget = make(config)
    for key, amount, fits in ((skill, 4, True), (other, 2, False), (other, 0.5, True), (f"{skill}-free", 99, True), ("", 99, True)):
        try:
            await budget.settle(await budget.reserve(int(amount * 1e6), Scopes(key=key)), int(amount * 1e6))
            assert fits
        except BudgetExceeded:
            assert not fits
    shown = {one.scope: one.spent_micro_usd for one in await budget.report()}
    assert shown[f"key:{skill}"] == 4_000_000 and shown[f"key:{other}"] == 500_000 and f"key:{skill}-free" not in shown


async def test_without_limits_nothing_runs(tmp_path: Path) -> None:
    budget = Budget(BudgetConfig(), Registry(RegistryConfig(url=f"sqlite:///{tmp_path}/none.db")))
    await budget.start()
    reservation = await budget.reserve(10**12, Scopes("a", "b", "c"))
    await budget.settle(reservation, 10**12)
    assert budget.blocked(Scopes("a", "b", "c")) == "" and await budget.report() == []
    assert not [thread for thread in threading.enumerate() if thread.name == "budget"] and not list(tmp_path.iterdir())
    await budget.close()


class Hook:
    """A web server that refuses the first posts and keeps the others."""

    def __init__(self, statuses: list[int]) -> None:
        hook = self
        self.events: list[dict[str, Any]] = []
        self.tries = 0

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.tries += 1
                status = statuses.pop(0) if statuses else 204
                body = self.rfile.read(int(self.headers["content-length"]))
                if status < 300:
                    hook.events.append(json.loads(body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hooks/very-secret-token"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def hook() -> Iterator[Hook]:
    one = Hook([500])
    yield one
    one.close()


async def test_an_alert_is_given_once_over_all_servers(
    make: Make, skill: str, hook: Hook, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "url").write_text(hook.url)
    config = BudgetConfig(skills={skill: BudgetLimits(day_usd=1)}, webhook_url_file=str(tmp_path / "url"))
    observers = [Counted(), Counted()]
    first, second = (make(config, observer=one) for one in observers)
    await first.start()
    await second.start()
    await first.settle(await first.reserve(700_000, Scopes(skill=skill)), 690_000)
    for one in (first, second):  # what one has settled is written when its next question is answered
        assert (await one.report())[0].state == "ok"
    await second.settle(await second.reserve(20_000, Scopes(skill=skill)), 20_000)
    for one in (second, first):
        assert (await one.report())[0].state == "alert"
    label = (f"skill:{skill}", "day")
    await until(lambda: all(one.ratios.get(label) == 0.71 for one in observers) and bool(hook.events))
    assert [one["event"] for one in hook.events] == ["budget.alert"] and hook.tries == 2
    assert (hook.events[0]["scope"], hook.events[0]["spent_micro_usd"], hook.events[0]["limit_micro_usd"]) == (label[0], 710_000, 10**6)
    await first.settle(await first.reserve(250_000, Scopes(skill=skill)), 250_000)
    await until(lambda: all(one.ratios.get(label) == 0.96 for one in observers) and len(hook.events) == 2)
    assert hook.events[1]["event"] == "budget.stopped"
    assert caplog.text.count("a budget is nearly used up") == 1 and caplog.text.count("paid calls stop") == 1
    assert "very-secret" not in caplog.text + repr(first.__dict__) + repr(config)


async def test_a_webhook_that_is_away_is_logged_without_its_address(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    webhook = Webhook("http://127.0.0.1:1/very-secret-token", first_pause_s=0.001)
    webhook.post({"event": "budget.alert"})
    await webhook.close()
    refusing = Hook([404])
    webhook = Webhook(refusing.url)
    webhook.post({"event": "budget.alert"})
    await webhook.close()
    refusing.close()
    assert refusing.tries == 1, "what the address refuses is not repeated"
    assert caplog.text.count("was not delivered") == 2 and "very-secret" not in caplog.text
    assert [record.__dict__["failure"] for record in caplog.records] == ["ConnectError", "status 404"]


@pytest.mark.parametrize(
    ("zone", "instant", "day", "month"),
    [
        ("UTC", "2026-12-31T23:59:59+00:00", ("2026-12-31", "2027-01-01T00:00:00Z"), ("2026-12", "2027-01-01T00:00:00Z")),
        ("UTC", "2028-02-29T00:00:00+00:00", ("2028-02-29", "2028-03-01T00:00:00Z"), ("2028-02", "2028-03-01T00:00:00Z")),
        # The clocks go forward on 29 March 2026 in Oslo: a day of 23 hours, a month that begins and ends at different offsets.
        ("Europe/Oslo", "2026-03-28T23:00:00+00:00", ("2026-03-29", "2026-03-29T22:00:00Z"), ("2026-03", "2026-03-31T22:00:00Z")),
        ("Europe/Oslo", "2026-10-24T22:00:00+00:00", ("2026-10-25", "2026-10-25T23:00:00Z"), ("2026-10", "2026-10-31T23:00:00Z")),
        # Midnight of 24 April 2026, a Friday, does not exist in Cairo: the clocks jump over it.
        ("Africa/Cairo", "2026-04-23T12:00:00+00:00", ("2026-04-23", "2026-04-23T22:00:00Z"), ("2026-04", "2026-04-30T21:00:00Z")),
        ("America/New_York", "2026-03-01T04:59:59+00:00", ("2026-02-28", "2026-03-01T05:00:00Z"), ("2026-02", "2026-03-01T05:00:00Z")),
        # Samoa had no 30 December 2011.
        ("Pacific/Apia", "2011-12-30T09:59:59+00:00", ("2011-12-29", "2011-12-30T10:00:00Z"), ("2011-12", "2011-12-31T10:00:00Z")),
    ],
)
def test_windows_end_at_local_midnight(zone: str, instant: str, day: tuple[str, str], month: tuple[str, str]) -> None:
    now = int(datetime.fromisoformat(instant).timestamp() * 1000)
    found = periods(now, UTC if zone == "UTC" else ZoneInfo(zone))
    assert [(one.name, datetime.fromtimestamp(one.ends_ms / 1000, UTC).isoformat().replace("+00:00", "Z")) for one in found] == [day, month]


ZONES = ["Europe/Oslo", "America/New_York", "Africa/Cairo", "Asia/Kathmandu", "Australia/Lord_Howe", "America/Santiago", "Pacific/Apia"]


@given(st.integers(1_600_000_000, 2_200_000_000), st.sampled_from(ZONES))
def test_every_instant_has_one_day_and_month(seconds: int, zone: str) -> None:
    now = seconds * 1000
    for index, one in enumerate(periods(now, ZoneInfo(zone))):

        def at(ms: int, index: int = index) -> Period:
            return periods(ms, ZoneInfo(zone))[index]

        assert one.starts_ms <= now < one.ends_ms
        assert at(one.ends_ms).name != one.name and at(one.ends_ms).starts_ms == one.ends_ms
        assert at(one.starts_ms) == at(one.ends_ms - 1) == one


def test_a_share_of_a_limit_is_exact() -> None:
    (one,) = _windows(total=BudgetLimits(day_usd=0.0007)).of(Scopes(), START_MS)
    assert (one.limit, one.stop, one.alert) == (700, 665, 490)
    (one,) = _windows(total=BudgetLimits(day_usd=1e9)).of(Scopes("a", "b", "c"), START_MS)
    assert (one.limit, one.stop) == (10**15, 950_000_000_000_000)


def _windows(**config: Any) -> Windows:
    return Windows(BudgetConfig(**config))
