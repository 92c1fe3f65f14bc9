"""The trainer's jobs, for both clients: ordering one, seeing how it goes, ending it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Unpack

from understudy import calls
from understudy.calls import Page, Prepared
from understudy.options import CallOptions
from understudy.v1 import training_pb2
from understudy.v1 import training_service_pb2 as pb

if TYPE_CHECKING:
    from understudy.aio import AsyncClient
    from understudy.client import Client

Curves = dict[str, list[tuple[int, float]]]
_OPEN = ("queued", "running")
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """A run of the trainer. `state`: queued, running, succeeded, rejected (see `reason`), failed (`error_reason`, `error`) or cancelled.

    `progress`: stage to (done, total). `metrics`: figures on held-out rows by name. `version`: what was published.
    """

    id: str
    skill: str
    kind: str
    state: str
    method: str = ""
    attempt: int = 0
    progress: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    version: str = ""
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    error_reason: str = ""
    error_metadata: Mapping[str, str] = field(default_factory=dict)
    created: datetime | None = None
    ended: datetime | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in _OPEN


class Jobs:
    """The trainer's jobs."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(self, skill: str, *, method: str = "", seed: int = 0, job_request_id: str = "", **options: Unpack[CallOptions]) -> Job:
        """Orders the training of a skill. The same `job_request_id` (128 bytes at most) gives the same job."""
        return self._client._send(_create(skill, method, seed, job_request_id, dict(options)))

    def get(self, job: str, **options: Unpack[CallOptions]) -> Job:
        """One job by its id."""
        return self._client._send(_get(job, dict(options)))

    def list(self, skill: str = "", *, limit: int = 100, **options: Unpack[CallOptions]) -> list[Job]:
        """The newest jobs, of one skill or of all."""
        found: list[Job] = []
        token = ""
        while len(found) < limit:
            page = self._client._send(_list(skill, limit - len(found), token, dict(options)))
            found += page.items
            token = page.next_token
            if not token:
                break
        return found

    def cancel(self, job: str, **options: Unpack[CallOptions]) -> Job:
        """Ends a job: one that waits at once, one that runs at its trainer's next step."""
        return self._client._send(_cancel(job, dict(options)))

    def curves(self, job: str, **options: Unpack[CallOptions]) -> Curves:
        """The job's curves as far as they are: name to (step, value)."""
        found: Curves = {}
        token = ""
        while True:
            page = self._client._send(_curves(job, token, dict(options)))
            for point in page.items:
                found.setdefault(point.metric, []).append((point.step, point.value))
            token = page.next_token
            if not token:
                return found

    def wait(self, job: str, *, wait_s: float = 3600.0, **options: Unpack[CallOptions]) -> Job:
        """The job once it is done, or as it is after `wait_s` seconds."""
        until = time.monotonic() + wait_s
        while not (found := self.get(job, **options)).done and time.monotonic() < until:
            time.sleep(_POLL_S)
        return found


class AsyncJobs:
    """The same for asyncio."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(self, skill: str, *, method: str = "", seed: int = 0, job_request_id: str = "", **options: Unpack[CallOptions]) -> Job:
        """Orders the training of a skill. The same `job_request_id` (128 bytes at most) gives the same job."""
        return await self._client._send(_create(skill, method, seed, job_request_id, dict(options)))

    async def get(self, job: str, **options: Unpack[CallOptions]) -> Job:
        """One job by its id."""
        return await self._client._send(_get(job, dict(options)))

    async def list(self, skill: str = "", *, limit: int = 100, **options: Unpack[CallOptions]) -> list[Job]:
        """The newest jobs, of one skill or of all."""
        found: list[Job] = []
        token = ""
        while len(found) < limit:
            page = await self._client._send(_list(skill, limit - len(found), token, dict(options)))
            found += page.items
            token = page.next_token
            if not token:
                break
        return found

    async def cancel(self, job: str, **options: Unpack[CallOptions]) -> Job:
        """Ends a job: one that waits at once, one that runs at its trainer's next step."""
        return await self._client._send(_cancel(job, dict(options)))

    async def curves(self, job: str, **options: Unpack[CallOptions]) -> Curves:
        """The job's curves as far as they are: name to (step, value)."""
        found: Curves = {}
        token = ""
        while True:
            page = await self._client._send(_curves(job, token, dict(options)))
            for point in page.items:
                found.setdefault(point.metric, []).append((point.step, point.value))
            token = page.next_token
            if not token:
                return found

    async def wait(self, job: str, *, wait_s: float = 3600.0, **options: Unpack[CallOptions]) -> Job:
        """The job once it is done, or as it is after `wait_s` seconds."""
        until = time.monotonic() + wait_s
        while not (found := await self.get(job, **options)).done and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
        return found


def _create(skill: str, method: str, seed: int, request_id: str, options: dict[str, Any]) -> Prepared[Job]:
    wanted = training_pb2.TrainingJob(skill=f"skills/{skill}", method=method, seed=seed)
    request = pb.CreateTrainingJobRequest(training_job=wanted, request_id=request_id)
    return _prepared("CreateTrainingJob", request, lambda data: _job(pb.CreateTrainingJobResponse.FromString(data).training_job), options)


def _get(job: str, options: dict[str, Any]) -> Prepared[Job]:
    request = pb.GetTrainingJobRequest(name=f"trainingJobs/{job}")
    return _prepared("GetTrainingJob", request, lambda data: _job(pb.GetTrainingJobResponse.FromString(data).training_job), options)


def _cancel(job: str, options: dict[str, Any]) -> Prepared[Job]:
    request = pb.CancelTrainingJobRequest(name=f"trainingJobs/{job}")
    return _prepared("CancelTrainingJob", request, lambda data: _job(pb.CancelTrainingJobResponse.FromString(data).training_job), options)


def _list(skill: str, size: int, token: str, options: dict[str, Any]) -> Prepared[Page[Job]]:
    request = pb.ListTrainingJobsRequest(skill=f"skills/{skill}" if skill else "", page_size=size, page_token=token)

    def read(data: bytes) -> Page[Job]:
        response = pb.ListTrainingJobsResponse.FromString(data)
        return Page([_job(one) for one in response.training_jobs], response.next_page_token)

    return _prepared("ListTrainingJobs", request, read, options)


def _curves(job: str, token: str, options: dict[str, Any]) -> Prepared[Page[training_pb2.TrainingJobMetric]]:
    request = pb.ListTrainingJobMetricsRequest(parent=f"trainingJobs/{job}", page_token=token)

    def read(data: bytes) -> Page[training_pb2.TrainingJobMetric]:
        response = pb.ListTrainingJobMetricsResponse.FromString(data)
        return Page(list(response.points), response.next_page_token)

    return _prepared("ListTrainingJobMetrics", request, read, options)


def _prepared(method: str, request: Any, read: Any, options: dict[str, Any]) -> Prepared[Any]:
    call = calls._call(options)
    calls._no_more(options)
    return calls._prepare("TrainingService", method, request, read, call)


def _job(message: training_pb2.TrainingJob) -> Job:
    return Job(
        id=message.name.removeprefix("trainingJobs/"),
        skill=message.skill.removeprefix("skills/"),
        kind=training_pb2.TrainingJobKind.Name(message.kind).removeprefix("TRAINING_JOB_KIND_").lower(),
        state=training_pb2.TrainingJobState.Name(message.state).removeprefix("TRAINING_JOB_STATE_").lower(),
        method=message.method,
        attempt=message.attempt,
        progress={one.stage: (one.done, one.total) for one in message.progress},
        version=message.version,
        reason=message.rejection,
        metrics=dict(message.metrics),
        error=message.error.message,
        error_reason=message.error.reason,
        error_metadata=dict(message.error.metadata),
        created=message.create_time.ToDatetime(UTC) if message.HasField("create_time") else None,
        ended=message.end_time.ToDatetime(UTC) if message.HasField("end_time") else None,
    )
