"""understudy.v1.TrainingService: orders for the trainer, and how its jobs go. Edges only; every look at the registry is a thread's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from server.api.training_desk import TrainingDesk
from server.api.wire import Context
from understudy.v1 import training_service_pb2 as pb

FOLLOW_S = 0.5  # how often a followed job is looked at


class TrainingServicer:
    """`draining` is set when the server stops: streams of logs end then, and callers go on elsewhere from the last number."""

    def __init__(self, desk: TrainingDesk, draining: asyncio.Event | None = None) -> None:
        self._desk = desk
        self._draining = draining or asyncio.Event()

    async def CreateTrainingJob(self, request: pb.CreateTrainingJobRequest, _context: Context) -> pb.CreateTrainingJobResponse:
        """Queues a job."""
        return await asyncio.to_thread(self._desk.CreateTrainingJob, request)

    async def GetTrainingJob(self, request: pb.GetTrainingJobRequest, _context: Context) -> pb.GetTrainingJobResponse:
        """One job."""
        return await asyncio.to_thread(self._desk.GetTrainingJob, request)

    async def ListTrainingJobs(self, request: pb.ListTrainingJobsRequest, _context: Context) -> pb.ListTrainingJobsResponse:
        """A page of jobs."""
        return await asyncio.to_thread(self._desk.ListTrainingJobs, request)

    async def CancelTrainingJob(self, request: pb.CancelTrainingJobRequest, _context: Context) -> pb.CancelTrainingJobResponse:
        """Ends a job, or asks its trainer to."""
        return await asyncio.to_thread(self._desk.CancelTrainingJob, request)

    async def StreamTrainingJobLogs(
        self, request: pb.StreamTrainingJobLogsRequest, _context: Context
    ) -> AsyncIterator[pb.StreamTrainingJobLogsResponse]:
        """Lines as they are said; a message without lines tells that the state has changed."""
        state = None
        while True:
            response, last = await asyncio.to_thread(self._desk.read_logs, request)
            if response.lines or response.state != state:
                yield response
            if last or self._draining.is_set():
                return
            state = response.state
            if response.lines:
                request.after = response.lines[-1].number
            try:
                await asyncio.wait_for(self._draining.wait(), FOLLOW_S)
            except TimeoutError:
                continue

    async def ListTrainingJobMetrics(
        self, request: pb.ListTrainingJobMetricsRequest, _context: Context
    ) -> pb.ListTrainingJobMetricsResponse:
        """A page of points."""
        return await asyncio.to_thread(self._desk.ListTrainingJobMetrics, request)

    async def ListSchedules(self, request: pb.ListSchedulesRequest, _context: Context) -> pb.ListSchedulesResponse:
        """All of them."""
        return await asyncio.to_thread(self._desk.ListSchedules, request)

    async def SetSchedule(self, request: pb.SetScheduleRequest, _context: Context) -> pb.SetScheduleResponse:
        """Over the configuration's."""
        return await asyncio.to_thread(self._desk.SetSchedule, request)

    async def DeleteSchedule(self, request: pb.DeleteScheduleRequest, _context: Context) -> pb.DeleteScheduleResponse:
        """Back to the configuration's."""
        return await asyncio.to_thread(self._desk.DeleteSchedule, request)
