"""understudy.v1.StatsService: how the server is doing."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol

from google.protobuf.duration_pb2 import Duration

from server.api.guard import Guard
from server.api.interactions import Interactions
from server.api.models import timestamp, to_model
from server.api.wire import Context
from server.errors import FailedPrecondition, NotFound, near_names
from server.metrics import Metrics
from server.runtime import kernels
from server.runtime.runtime import Runtime
from server.settings import BudgetConfig
from server.stats import SkillStats, together
from understudy.v1 import budget_pb2, common_pb2
from understudy.v1 import stats_service_pb2 as pb

if TYPE_CHECKING:
    from server.routing.budget import Budget, BudgetStatus

_CIRCUITS = {"closed": pb.CIRCUIT_STATE_CLOSED, "open": pb.CIRCUIT_STATE_OPEN, "half_open": pb.CIRCUIT_STATE_HALF_OPEN}
_WINDOWS = {"day": budget_pb2.BUDGET_WINDOW_DAY, "month": budget_pb2.BUDGET_WINDOW_MONTH}
_STATES = {
    "ok": budget_pb2.BUDGET_STATE_OK,
    "alert": budget_pb2.BUDGET_STATE_ALERT,
    "stopped": budget_pb2.BUDGET_STATE_STOPPED,
    "exhausted": budget_pb2.BUDGET_STATE_EXHAUSTED,
}


class Healthy(Protocol):
    """What is asked of a provider here; see server.providers.base."""

    def open_circuit(self) -> str:
        """Why it is not asked."""
        ...

    def health(self) -> Any:
        """A server.providers.base.Health."""
        ...


class StatsServicer:
    """Reads what others count."""

    def __init__(
        self,
        runtime: Runtime,
        metrics: Metrics,
        guard: Guard,
        *,
        budget: Budget | None = None,
        providers: Mapping[str, Healthy] | None = None,
        interactions: Interactions | None = None,
    ) -> None:
        self._runtime = runtime
        self._budget = budget
        self._providers = providers or {}
        self._interactions = interactions
        self._metrics = metrics
        self._guard = guard
        self._build = kernels.describe()
        self._started_ns = time.time_ns()
        self._started = time.monotonic()

    async def GetStatus(self, _request: pb.GetStatusRequest, _context: Context) -> pb.GetStatusResponse:
        """The server, its models, its queues, its skills."""
        up = time.monotonic() - self._started
        models = []
        for status in self._runtime.loaded():
            if status.manifest is None:
                continue
            counts = self._metrics.counts(status.name, status.version)
            models.append(
                pb.LoadedModelStatus(
                    model=to_model(status.manifest, status),
                    queued_sequences=counts.queued,
                    answered_sequences=counts.sequences,
                    batches=counts.batches,
                )
            )
        return pb.GetStatusResponse(
            server_version=server_version(),
            start_time=timestamp(self._started_ns),
            uptime=_duration(up),
            draining=self._guard.draining.is_set(),
            kernel_isa=self._build["isa"],
            onnxruntime_version=self._build["ort"],
            resident_bytes=resident_bytes(),
            models=models,
            skills=[
                pb.SkillStatus(skill=name, requests=one.requests, local=one.local, failed=one.failed, cost_micro_usd=one.cost)
                for name, one in sorted(self._metrics.stats.skills.items())
            ],
            providers=[to_provider(name, one) for name, one in sorted(self._providers.items())],
        )

    async def GetStats(self, _request: pb.GetStatsRequest, _context: Context) -> pb.GetStatsResponse:
        """Skills since the start."""
        skills = self._metrics.stats.skills
        total = to_stats("", together(skills.values()))
        # Each skill has a teacher of its own, so what was saved is the sum of the skills'.
        known = [one.all_to_teacher for one in skills.values()]
        total.ClearField("all_to_teacher")
        total.ClearField("saved")
        if known and None not in known:
            teacher = sum(cost for cost in known if cost is not None)
            total.all_to_teacher.micro_usd = teacher
            total.saved.micro_usd = teacher - total.cost.micro_usd
        return pb.GetStatsResponse(
            start_time=timestamp(self._started_ns),
            total=total,
            skills=[to_stats(name, one) for name, one in sorted(skills.items())],
        )

    async def GetBudget(self, request: pb.GetBudgetRequest, _context: Context) -> pb.GetBudgetResponse:
        """Limits and their use."""
        config = self._budget.config if self._budget is not None else BudgetConfig()
        found = await self._budget.report() if self._budget is not None else []
        if request.scope:
            scopes = sorted({one.scope for one in found})
            found = [one for one in found if one.scope == request.scope]
            if not found:
                asked = request.scope[:200]
                raise NotFound(f"No budget limits {asked!r}; {near_names(asked, scopes)}", field="scope", scope=asked)
        return pb.GetBudgetResponse(
            budgets=[to_budget(one) for one in found],
            time_zone=config.time_zone,
            alert_at=config.alert_at,
            stop_at=config.stop_at,
        )

    async def GetTimeline(self, request: pb.GetTimelineRequest, _context: Context) -> pb.GetTimelineResponse:
        """How skills did over time."""
        return await self._recorded().timeline(request)

    async def ListInteractions(self, request: pb.ListInteractionsRequest, _context: Context) -> pb.ListInteractionsResponse:
        """What is recorded, newest first."""
        return await self._recorded().page(request)

    async def GetInteraction(self, request: pb.GetInteractionRequest, _context: Context) -> pb.GetInteractionResponse:
        """One of them."""
        return await self._recorded().get(request)

    def _recorded(self) -> Interactions:
        if self._interactions is None:
            raise FailedPrecondition("This server does not read its lake; ask one that does.")
        return self._interactions


def to_budget(status: BudgetStatus) -> budget_pb2.Budget:
    """A limit and its use."""
    return budget_pb2.Budget(
        scope=status.scope,
        window=_WINDOWS[status.window],
        limit=common_pb2.Cost(micro_usd=status.limit_micro_usd),
        spent=common_pb2.Cost(micro_usd=status.spent_micro_usd),
        reserved=common_pb2.Cost(micro_usd=status.reserved_micro_usd),
        remaining=common_pb2.Cost(micro_usd=status.remaining_micro_usd),
        used_ratio=status.used_ratio,
        state=_STATES[status.state],
        reset_time=timestamp(status.resets_at_ms * 1_000_000),
    )


def to_provider(name: str, provider: Healthy) -> pb.ProviderStatus:
    """A provider's health."""
    health = provider.health()
    return pb.ProviderStatus(
        provider=name,
        circuit=_CIRCUITS[health.circuit],
        rest=_duration(health.rest_s) if health.circuit == "open" else None,
        message=provider.open_circuit(),
        in_flight=health.in_flight,
        waiting=health.waiting,
        recent=health.recent,
        failures=health.failures,
        latency_p50=_duration(health.latency_p50_s),
        latency_p95=_duration(health.latency_p95_s),
        first_token_p50=_duration(health.first_token_p50_s),
        room=dict(health.room),
    )


def to_stats(skill: str, one: SkillStats) -> pb.SkillStats:
    """Sums as a message."""
    teacher, saved = one.all_to_teacher, one.saved
    return pb.SkillStats(
        skill=skill,
        requests=one.requests,
        local=one.local,
        provider=one.provider,
        failed=one.failed,
        local_share=one.local_share,
        escalations=one.escalated,
        second_tries=one.second_tries,
        cost=common_pb2.Cost(micro_usd=one.cost),
        all_to_teacher=None if teacher is None else common_pb2.Cost(micro_usd=teacher),
        saved=None if saved is None else common_pb2.Cost(micro_usd=saved),
        quality_mean=one.quality_mean,
        quality_count=one.quality_count,
        latency_p50=_duration(one.latencies.quantile(0.5)),
        latency_p95=_duration(one.latencies.quantile(0.95)),
    )


def _duration(seconds: float | None) -> Duration | None:
    return None if seconds is None else Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def server_version() -> str:
    """The installed release, or "0" in a tree that is not installed."""
    try:
        return version("understudy-server")
    except PackageNotFoundError:
        return "0"


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
