"""Bar `budget`: two server processes and 64 callers on a budget for 100 calls, on SQLite and on PostgreSQL; and what a reservation costs.

`python -m bench.measures.routing_budget URL` is one of the processes: it answers commands, one line of JSON each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

from bench.harness import Asked, Row, part, row_of
from server.errors import BudgetExceeded
from server.registry.registry import Registry
from server.routing.budget import Budget, Reservation
from server.routing.budget_windows import Scopes
from server.settings import BudgetConfig, BudgetLimits, RegistryConfig
from tests.postgres_server import postgres_server, why_no_postgres

BUDGET = (
    "64 callers, 2 processes, a budget for 100 calls: never a cent over, >= 95 served; a killed server's reservations end with its lease"
)
RESERVATION = "reported; the aim is <= 1 ms each on average at 64 concurrent callers on SQLite, nothing where no budget is set"
PRICE = 1_000_000
LEASE_S = 2.0
ROUNDS = 5
SCOPES = Scopes("vendor", "triage", "acme")
EIGHT = BudgetLimits(day_usd=1e6, month_usd=1e7)  # a limit in both windows of all four scopes


@contextlib.contextmanager
def _databases() -> Iterator[list[tuple[str, str]]]:
    """("SQLite", url) and, where its binaries are, ("PostgreSQL", url) of servers with their usual settings."""
    with tempfile.TemporaryDirectory(prefix="understudy-budget-") as folder, contextlib.ExitStack() as stack:
        found = [("SQLite", f"sqlite:///{folder}/registry.db")]
        if not why_no_postgres():
            found.append(("PostgreSQL", stack.enter_context(postgres_server())))
        yield found


def budget() -> Row:
    """The bar: served and spent in `ROUNDS` rounds, and the time until a killed process's reservation is free."""
    parts: list[dict[str, Any]] = []
    with _databases() as databases:
        for name, url in databases:
            parts.append(_race(name, url))
            parts.append(_killed(name, url))
    if len(databases) == 1:
        parts.append(part("PostgreSQL", "two processes on it", why_no_postgres(), False))
    return row_of("budget", BUDGET, parts)


def _race(name: str, url: str) -> dict[str, Any]:
    servers = [_process(url) for _ in range(2)]
    served, over, slow = [], 0, 0.0
    try:
        for _ in range(ROUNDS):
            skill = f"s{secrets.token_hex(6)}"
            with ThreadPoolExecutor(2) as pool:
                replies = list(pool.map(lambda one, skill=skill: one.ask(use_up=skill, callers=32), servers))
            state = servers[0].ask(report=skill)
            served.append(sum(reply["served"] for reply in replies))
            over = max(over, state["spent"] + state["reserved"] - 100 * PRICE, PRICE * served[-1] - state["spent"])
            slow = max(slow, *(reply["seconds"] for reply in replies))
    finally:
        for one in servers:
            one.close()
    fine = over <= 0 and min(served) >= 95 and max(served) <= 100
    return part(
        f"{name}: served of 100, {ROUNDS} rounds", ">= 95, never over", served, fine, over_micro_usd=max(over, 0), seconds=round(slow, 2)
    )


def _killed(name: str, url: str) -> dict[str, Any]:
    skill = f"s{secrets.token_hex(6)}"
    holder, other = _process(url), _process(url)
    try:
        assert holder.ask(hold=skill, amount=80 * PRICE)
        time.sleep(1.5 * LEASE_S)  # longer than a lease: who lives renews it
        kept = not other.ask(hold=skill, amount=80 * PRICE)
        holder.popen.kill()
        holder.popen.wait()
        began = time.perf_counter()
        while not other.ask(hold=skill, amount=80 * PRICE) and time.perf_counter() - began < 5 * LEASE_S:
            time.sleep(0.01)
        freed = round(time.perf_counter() - began, 2)
    finally:
        for one in (holder, other):
            if one.popen.poll() is None:
                one.close()
    fine = kept and freed <= LEASE_S + 0.1
    return part(f"{name}: seconds from kill -9 to free", f"<= lease of {LEASE_S:g}", freed, fine, held_while_alive=kept)


def _process(url: str) -> Asked:
    return Asked([sys.executable, "-m", "bench.measures.routing_budget", url])


def reservation() -> Row:
    """Reserve and settle in all windows of all scopes, 64 callers at once and one alone, and with no budget at all."""
    parts: list[dict[str, Any]] = []
    with _databases() as databases:
        for name, url in databases:
            for callers in (64, 1):
                seen = asyncio.run(_cost(url, callers))
                fine = seen["ms_each"] <= 1 or callers == 1
                parts.append(
                    part(f"{name}, {callers} callers: ms each", "<= 1" if callers > 1 else "reported", seen.pop("ms_each"), fine, **seen)
                )
    free = asyncio.run(_free())
    parts.append(part("no budget: us each", "<= 20", free, free <= 20))
    return row_of("reservation", RESERVATION, parts)


async def _cost(url: str, callers: int, calls: int = 6400) -> dict[str, float]:
    """A call's share of the wall clock, its wait for `reserve`, and the processor's time that both ends of it take."""
    calls = calls if callers > 1 else calls // 8
    registry = Registry(RegistryConfig(url=url))
    one = Budget(BudgetConfig(total=EIGHT, providers={"vendor": EIGHT}, skills={"triage": EIGHT}, keys={"acme": EIGHT}), registry)
    await one.start()
    waits: list[float] = []

    async def caller() -> None:
        for _ in range(calls // callers):
            began = time.perf_counter()
            held = await one.reserve(10, SCOPES)
            waits.append(time.perf_counter() - began)
            await one.settle(held, 7)

    await asyncio.gather(*(caller() for _ in range(callers)))  # warm
    waits.clear()
    before, began = psutil.Process().cpu_times(), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    elapsed, after = time.perf_counter() - began, psutil.Process().cpu_times()
    await one.close()
    registry.close()
    waits.sort()
    cpu = after.user + after.system - before.user - before.system
    return {
        "ms_each": round(elapsed / len(waits) * 1e3, 4),
        "cpu_ms_each": round(cpu / len(waits) * 1e3, 4),
        "wait_ms_p50": round(waits[len(waits) // 2] * 1e3, 3),
        "wait_ms_p99": round(waits[int(len(waits) * 0.99)] * 1e3, 3),
    }


async def _free(calls: int = 20_000) -> float:
    one = Budget(BudgetConfig(), Registry(RegistryConfig(url="sqlite:////nowhere/never.db")))
    began = time.perf_counter()
    for _ in range(calls):
        one.blocked(SCOPES)
        await one.settle(await one.reserve(10, SCOPES), 7)
    return round((time.perf_counter() - began) / calls * 1e6, 2)


class _Server:
    """One of the processes."""

    def __init__(self, url: str) -> None:
        self._registry = Registry(RegistryConfig(url=url))
        self._budgets: dict[str, Budget] = {}
        self._held: list[Reservation] = []

    async def answer(self, command: dict[str, Any]) -> Any:
        """One command's reply."""
        if "use_up" in command:
            return await self._use_up(self._of(command["use_up"]), Scopes(skill=command["use_up"]), command["callers"])
        if "report" in command:
            (day,) = await self._of(command["report"]).report()
            return {"spent": day.spent_micro_usd, "reserved": day.reserved_micro_usd}
        try:
            self._held.append(await self._of(command["hold"]).reserve(command["amount"], Scopes(skill=command["hold"])))
        except BudgetExceeded:
            return False
        return True

    def _of(self, skill: str) -> Budget:
        if skill not in self._budgets:
            config = BudgetConfig(skills={skill: BudgetLimits(day_usd=100)}, lease_s=LEASE_S)
            self._budgets[skill] = Budget(config, self._registry)
        return self._budgets[skill]

    async def _use_up(self, one: Budget, scopes: Scopes, callers: int) -> dict[str, float]:
        """Callers that pay the worst case until the budget says that nothing is left before it resets."""
        served, began = 0, time.perf_counter()

        async def caller() -> None:
            nonlocal served
            while True:
                try:
                    held = await one.reserve(PRICE, scopes)
                except BudgetExceeded as error:
                    if (error.retry_after_s or 0) > 1:
                        return
                    await asyncio.sleep(0.01)  # only calls that run are in the way
                    continue
                await asyncio.sleep(0.01)  # the vendor answers
                await one.settle(held, PRICE)
                served += 1

        await asyncio.gather(*(caller() for _ in range(callers)))
        await one.report()  # everything is written
        return {"served": served, "seconds": time.perf_counter() - began}

    async def close(self) -> None:
        """Gives back what is held."""
        for held in self._held:
            held.close(0)
        for one in self._budgets.values():
            await one.close()


async def _serve(url: str) -> None:
    server, loop = _Server(url), asyncio.get_running_loop()
    lines: asyncio.Queue[str] = asyncio.Queue()

    def read(put: Callable[[str], None]) -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(put, line)
        loop.call_soon_threadsafe(put, "")

    threading.Thread(target=read, args=(lines.put_nowait,), daemon=True).start()
    print(json.dumps({"ready": True}), flush=True)
    while line := await lines.get():
        print(json.dumps({"reply": await server.answer(json.loads(line))}), flush=True)
    await server.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
