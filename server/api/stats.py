"""understudy.v1.StatsService: how the server is doing."""

from __future__ import annotations

import os
import time
from importlib.metadata import PackageNotFoundError, version

from google.protobuf.duration_pb2 import Duration

from server.api.guard import Guard
from server.api.models import timestamp, to_model
from server.api.wire import Context
from server.metrics import Metrics
from server.runtime import kernels
from server.runtime.runtime import Runtime
from understudy.v1 import stats_service_pb2 as pb


class StatsServicer:
    """Reads what others count."""

    def __init__(self, runtime: Runtime, metrics: Metrics, guard: Guard) -> None:
        self._runtime = runtime
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
            uptime=Duration(seconds=int(up), nanos=int(up % 1 * 1e9)),
            draining=self._guard.draining.is_set(),
            kernel_isa=self._build["isa"],
            onnxruntime_version=self._build["ort"],
            resident_bytes=resident_bytes(),
            models=models,
            skills=[
                pb.SkillStatus(skill=name, requests=one.requests, local=one.local, failed=one.failed, cost_micro_usd=one.cost)
                for name, one in sorted(self._metrics.skills.items())
            ],
        )


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
