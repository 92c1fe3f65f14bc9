"""grpc.health.v1 by service: a service without a loaded model is NOT_SERVING, and all are while the server drains.

Services: "" (the server), each RPC service by its full name and, finer, each task as "understudy.v1.InferenceService/<task>".
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from grpc_health.v1 import health_pb2 as pb

from server.api.wire import Context
from server.core import Task
from server.errors import NotFound, near_names
from server.runtime.runtime import Runtime

INFERENCE = "understudy.v1.InferenceService"
OPEN_INFERENCE = "inference.GRPCInferenceService"
TASKS = tuple(task for task in Task if task is not Task.TENSOR)
_SERVING = pb.HealthCheckResponse.SERVING
_NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING


class HealthServicer:
    """Used on the event loop alone."""

    def __init__(self, services: list[str]) -> None:
        """`services`: full names of what is registered; those that need a model start as NOT_SERVING."""
        needs_model = {INFERENCE, OPEN_INFERENCE, *(f"{INFERENCE}/{task}" for task in TASKS), ""}
        names = {*services, *needs_model}
        self._status = {name: _NOT_SERVING if name in needs_model else _SERVING for name in sorted(names)}
        self._watchers: set[asyncio.Event] = set()
        self._draining = False
        self._closed = False

    def update(self, runtime: Runtime, *, skills: bool = False) -> None:
        """Derives every status from what is loaded. `skills`: Run can answer without a local model, through a provider."""
        if self._draining:
            return
        tasks = {task: bool(runtime.models_for(task)) for task in TASKS}
        anything = bool(runtime.models_for(Task.TENSOR))
        fresh = {f"{INFERENCE}/{task}": ready for task, ready in tasks.items()}
        fresh |= {INFERENCE: any(tasks.values()) or skills, OPEN_INFERENCE: anything, "": anything or skills}
        self._set({name: _SERVING if ready else _NOT_SERVING for name, ready in fresh.items()})

    def drain(self) -> None:
        """Everything is NOT_SERVING from now on, for good, and watchers are told."""
        self._draining = True
        self._set(dict.fromkeys(self._status, _NOT_SERVING))

    def close(self) -> None:
        """Ends the watchers' streams. Some time after `drain`: clients may lose a message that the end of its stream is upon."""
        self._closed = True
        self._set({})

    def _set(self, fresh: dict[str, pb.HealthCheckResponse.ServingStatus]) -> None:
        self._status.update(fresh)
        for watcher in self._watchers:
            watcher.set()

    async def Check(self, request: pb.HealthCheckRequest, _context: Context) -> pb.HealthCheckResponse:
        """One service's status."""
        found = self._status.get(request.service)
        if found is None:
            raise NotFound(f"no service is called {request.service[:200]!r}; {near_names(request.service[:200], list(self._status))}")
        return pb.HealthCheckResponse(status=found)

    async def Watch(self, request: pb.HealthCheckRequest, _context: Context) -> AsyncIterator[pb.HealthCheckResponse]:
        """A service's status now and after every change, until `close`."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        last = None
        try:
            while True:
                now = self._status.get(request.service, pb.HealthCheckResponse.SERVICE_UNKNOWN)
                if now != last:
                    last = now
                    yield pb.HealthCheckResponse(status=now)
                if self._closed:
                    return
                await changed.wait()
                changed.clear()
        finally:
            self._watchers.discard(changed)
