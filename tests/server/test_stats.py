"""What StatsService shows: sums of items, budgets, providers' health."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.api.guard import Guard
from server.api.stats import StatsServicer
from server.config import LogConfig, RuntimeConfig
from server.errors import NotFound
from server.logs import AccessLog
from server.metrics import Metrics
from server.providers.base import Health
from server.registry.registry import Registry
from server.routing.budget import Budget
from server.routing.budget_windows import Scopes
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.repository import Repository
from server.runtime.runtime import Runtime
from server.settings import BudgetConfig, BudgetLimits, RegistryConfig
from server.stats import ItemReport, Latencies, SkillStats, together
from understudy.v1 import budget_pb2
from understudy.v1 import stats_service_pb2 as pb


class Vendor:
    """A provider as StatsService knows it."""

    def __init__(self, health: Health, why: str = "") -> None:
        self._health, self._why = health, why

    def health(self) -> Health:
        return self._health

    def open_circuit(self) -> str:
        return self._why


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    opened = Registry(RegistryConfig(url=f"sqlite:///{tmp_path}/registry.db"))
    yield opened
    opened.close()


def servicer(tmp_path: Path, metrics: Metrics, **more: Any) -> StatsServicer:
    runtime = Runtime(Repository(tmp_path), make_loader(RuntimeConfig(threads=1), NullObserver()))
    return StatsServicer(runtime, metrics, Guard(metrics, AccessLog(LogConfig(access=False))), **more)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


async def test_stats_tell_shares_costs_savings_and_latency(tmp_path: Path, metrics: Metrics) -> None:
    for _ in range(8):
        metrics.item("triage", ItemReport("local", 0, 0.010, 0.9, teacher_cost_micro_usd=100))
    metrics.item("triage", ItemReport("provider", 100, 1.0, None, teacher_cost_micro_usd=100, escalated=True))
    metrics.item("triage", ItemReport("nobody", 40, 3.0))
    metrics.item("french", ItemReport("local", 0, 0.5, 0.7, tries=2))
    got = await servicer(tmp_path, metrics).GetStats(pb.GetStatsRequest(), None)  # type: ignore[arg-type]
    french, triage = got.skills
    assert (triage.requests, triage.local, triage.provider, triage.failed, triage.escalations) == (10, 8, 1, 1, 1)
    assert triage.local_share == pytest.approx(8 / 9) and triage.quality_mean == pytest.approx(0.9) and triage.quality_count == 8
    assert (triage.cost.micro_usd, triage.all_to_teacher.micro_usd, triage.saved.micro_usd) == (140, 900, 760)
    assert triage.latency_p50.ToMilliseconds() == pytest.approx(10, abs=1)
    assert triage.latency_p95.ToMilliseconds() == pytest.approx(1000, rel=0.05)
    assert (french.second_tries, french.HasField("all_to_teacher"), french.HasField("saved")) == (1, False, False)
    assert (got.total.requests, got.total.local, got.total.cost.micro_usd) == (11, 9, 140)
    assert not got.total.HasField("saved"), "of one skill it is not known"
    assert value(metrics, "understudy_skill_items_total", skill="triage", answered_by="local") == 8
    assert value(metrics, "understudy_skill_cost_usd_total", skill="triage") == pytest.approx(140e-6)
    assert value(metrics, "understudy_skill_escalations_total", skill="triage") == 1


async def test_nothing_asked_yet_is_shown_as_unknown(tmp_path: Path, metrics: Metrics) -> None:
    got = await servicer(tmp_path, metrics).GetStats(pb.GetStatsRequest(), None)  # type: ignore[arg-type]
    assert not got.skills and got.start_time.seconds
    for field in ("local_share", "quality_mean", "latency_p50", "latency_p95", "all_to_teacher", "saved"):
        assert not got.total.HasField(field)


@pytest.mark.parametrize(
    ("items", "all_to_teacher"),
    [
        ([ItemReport("local")], None),
        ([ItemReport("local"), ItemReport("provider", 60)], 120),  # at the mean of what providers cost
        ([ItemReport("local"), ItemReport("provider", 60), ItemReport("local", 0, teacher_cost_micro_usd=40)], 120),  # of the known ones
        ([ItemReport("local"), ItemReport("nobody", 5)], None),
    ],
)
def test_savings_fall_back_on_what_is_known(items: list[ItemReport], all_to_teacher: int | None) -> None:
    one = SkillStats()
    for item in items:
        one.add(item)
    assert one.all_to_teacher == all_to_teacher
    assert one.saved == (None if all_to_teacher is None else all_to_teacher - one.cost)


def test_quantiles_are_right_to_a_few_percent_and_add_up() -> None:
    rng = random.Random(3)
    times = [rng.lognormvariate(-3, 1.5) for _ in range(4000)]
    parts = [SkillStats(), SkillStats()]
    for index, seconds in enumerate(times):
        parts[index % 2].add(ItemReport("local", seconds=seconds))
    found = together(parts).latencies
    for share in (0.5, 0.95, 0.99):
        assert found.quantile(share) == pytest.approx(sorted(times)[int(share * 4000)], rel=0.05)
    extreme = Latencies()
    assert extreme.quantile(0.5) is None
    for seconds in (0.0, 1e9):
        extreme.add(seconds)
    assert extreme.quantile(0.1) == pytest.approx(1e-4) and (extreme.quantile(1.0) or 0) > 200


async def test_budgets_are_shown_and_metered(tmp_path: Path, metrics: Metrics, registry: Registry) -> None:
    config = BudgetConfig(
        total=BudgetLimits(day_usd=1, month_usd=10), skills={"triage": BudgetLimits(day_usd=0.5)}, time_zone="Europe/Oslo"
    )
    budget = Budget(config, registry, observer=metrics)
    try:
        await budget.settle(await budget.reserve(400_000, Scopes(skill="triage")), 360_000)
        held = await budget.reserve(100_000, Scopes("vendor"))
        shown = servicer(tmp_path, metrics, budget=budget)
        got = await shown.GetBudget(pb.GetBudgetRequest(), None)  # type: ignore[arg-type]
        assert (got.time_zone, got.alert_at, got.stop_at) == ("Europe/Oslo", 0.7, 0.95)
        assert [(one.scope, one.window) for one in got.budgets] == [
            ("total", budget_pb2.BUDGET_WINDOW_DAY),
            ("total", budget_pb2.BUDGET_WINDOW_MONTH),
            ("skill:triage", budget_pb2.BUDGET_WINDOW_DAY),
        ]
        day, _, triage = got.budgets
        assert [one.micro_usd for one in (day.limit, day.spent, day.reserved, day.remaining)] == [1_000_000, 360_000, 100_000, 540_000]
        assert (day.state, triage.state) == (budget_pb2.BUDGET_STATE_OK, budget_pb2.BUDGET_STATE_ALERT)
        assert triage.used_ratio == pytest.approx(0.72) and triage.reset_time.ToSeconds() % 3600 == 0
        one = await shown.GetBudget(pb.GetBudgetRequest(scope="skill:triage"), None)  # type: ignore[arg-type]
        assert list(one.budgets) == [triage]
        with pytest.raises(NotFound, match="did you mean 'skill:triage'"):
            await shown.GetBudget(pb.GetBudgetRequest(scope="skill:triagee"), None)  # type: ignore[arg-type]
        await budget.release(held)
    finally:
        await budget.close()
    assert value(metrics, "understudy_budget_used_ratio", scope="skill:triage", window="day") is not None


async def test_without_budgets_and_providers_nothing_is_shown(tmp_path: Path, metrics: Metrics) -> None:
    shown = servicer(tmp_path, metrics)
    assert not (await shown.GetBudget(pb.GetBudgetRequest(), None)).budgets  # type: ignore[arg-type]
    assert not (await shown.GetStatus(pb.GetStatusRequest(), None)).providers  # type: ignore[arg-type]


async def test_status_shows_providers(tmp_path: Path, metrics: Metrics) -> None:
    vendors = {
        "b": Vendor(Health("open", 2.5, recent=20, failures=7), "it failed 5 times in a row"),
        "a": Vendor(Health(in_flight=3, waiting=2, latency_p50_s=0.25, latency_p95_s=1.5, room={"requests_per_minute": 0.4})),
    }
    got = await servicer(tmp_path, metrics, providers=vendors).GetStatus(pb.GetStatusRequest(), None)  # type: ignore[arg-type]
    good, bad = got.providers
    assert (good.provider, good.circuit, good.in_flight, good.waiting, good.message) == ("a", pb.CIRCUIT_STATE_CLOSED, 3, 2, "")
    assert (good.latency_p95.ToMilliseconds(), good.HasField("first_token_p50"), dict(good.room)) == (
        1500,
        False,
        {"requests_per_minute": 0.4},
    )
    assert (bad.circuit, bad.rest.ToMilliseconds(), bad.failures, bad.recent) == (pb.CIRCUIT_STATE_OPEN, 2500, 7, 20)
    assert bad.message == "it failed 5 times in a row"
