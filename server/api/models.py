"""understudy.v1.ModelService: what is in the repository, and what of it is in memory."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from server.api.adapters import AdapterServicer
from server.api.paging import page_token, read_page, seconds
from server.api.wire import Context
from server.core import Task
from server.errors import InvalidArgument, near_names
from server.runtime.manifest import Manifest
from server.runtime.runtime import ModelState, ModelStatus, Runtime
from understudy.v1 import model_pb2
from understudy.v1 import model_service_pb2 as pb

_NAME = re.compile(r"models/([^/]+)(?:/versions/([^/]+))?")
CURRENT = "current"
_STATES = {
    ModelState.LOADING: model_pb2.MODEL_STATE_LOADING,
    ModelState.READY: model_pb2.MODEL_STATE_READY,
    ModelState.UNLOADING: model_pb2.MODEL_STATE_UNLOADING,
    ModelState.FAILED: model_pb2.MODEL_STATE_FAILED,
    ModelState.UNLOADED: model_pb2.MODEL_STATE_UNLOADED,
}


class ModelServicer:
    """The disk is read in threads; states are the runtime's."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        adapters = AdapterServicer(runtime)
        self.ListAdapters, self.LoadAdapter, self.UnloadAdapter = adapters.ListAdapters, adapters.LoadAdapter, adapters.UnloadAdapter

    async def GetModel(self, request: pb.GetModelRequest, _context: Context) -> pb.GetModelResponse:
        """One version."""
        name, version = parse_name(request.name, version_required=True)
        if version == CURRENT:
            manifest = self._runtime.manifest(name)
        else:
            manifest = await asyncio.to_thread(self._runtime.repository.manifest, name, version)
        return pb.GetModelResponse(model=to_model(manifest, self._status(name, manifest.version)))

    async def ListModels(self, request: pb.ListModelsRequest, _context: Context) -> pb.ListModelsResponse:
        """Versions by name and version, a page at a time."""
        size, after = read_page(request.page_size, request.page_token)
        tasks = [task.value for task in Task]
        if request.task and request.task not in tasks:
            raise InvalidArgument(f"task {request.task[:100]!r} does not exist; {near_names(request.task[:100], tasks)}", field="task")
        entries = await asyncio.to_thread(self._runtime.repository.entries)
        statuses = {(one.name, one.version): one for one in self._runtime.loaded()}
        models = []
        for entry in entries:
            status = statuses.get((entry.name, entry.version))
            if request.loaded_only and (status is None or status.state is ModelState.FAILED):
                continue
            if request.task and (entry.manifest is None or entry.manifest.task.value != request.task):
                continue
            models.append((entry.name, int(entry.version), entry, status))
        models.sort(key=lambda one: one[:2])
        rest = [one for one in models if after is None or one[:2] > after]
        page = rest[:size]
        token = page_token(page[-1][0], page[-1][1]) if len(rest) > size else ""
        shown = [
            to_model(entry.manifest, status) if entry.manifest else broken(entry.name, entry.version, entry.error)
            for _, _, entry, status in page
        ]
        return pb.ListModelsResponse(models=shown, next_page_token=token)

    async def LoadModel(self, request: pb.LoadModelRequest, _context: Context) -> pb.LoadModelResponse:
        """Loads a version beside what runs; then it is current."""
        name, version = parse_name(request.name)
        status = await self._runtime.load(name, version, replace=request.replace)
        manifest = status.manifest or self._runtime.manifest(name, status.version)
        return pb.LoadModelResponse(model=to_model(manifest, status))

    async def UnloadModel(self, request: pb.UnloadModelRequest, _context: Context) -> pb.UnloadModelResponse:
        """Drains a version, or all of a model's, and frees its memory."""
        name, version = parse_name(request.name)
        grace = seconds(request.grace) if request.HasField("grace") else None
        statuses = await self._runtime.unload(name, version, grace_s=grace)
        return pb.UnloadModelResponse(models=[to_model(status.manifest, status) for status in statuses if status.manifest])

    async def DeleteModel(self, request: pb.DeleteModelRequest, _context: Context) -> pb.DeleteModelResponse:
        """Deletes a version that is not loaded."""
        name, version = parse_name(request.name, version_required=True)
        await self._runtime.delete(name, version or "")
        return pb.DeleteModelResponse()

    def _status(self, name: str, version: str) -> ModelStatus | None:
        return next((one for one in self._runtime.loaded() if (one.name, one.version) == (name, version)), None)


def parse_name(name: str, *, version_required: bool = False) -> tuple[str, str | None]:
    """(model, version or None) of a resource name. Whether they could exist is the repository's to say."""
    match = _NAME.fullmatch(name)
    if match is None or (version_required and match[2] is None):
        form = "models/{model}/versions/{version}" + ("" if version_required else " or models/{model}")
        raise InvalidArgument(f"name is {name[:200]!r}; expected {form}.", field="name")
    return match[1], match[2]


def to_model(manifest: Manifest, status: ModelStatus | None) -> model_pb2.Model:
    """The resource: what the manifest says, and the state."""
    source = manifest.source
    model = model_pb2.Model(
        name=f"models/{manifest.name}/versions/{manifest.version}",
        model_id=manifest.name,
        version=manifest.version,
        task=manifest.task.value,
        state=_STATES[status.state] if status else model_pb2.MODEL_STATE_UNLOADED,
        state_message=status.error if status else "",
        current=bool(status and status.default),
        architecture=manifest.architecture,
        dtype=manifest.dtype,
        max_tokens=manifest.max_tokens,
        hidden_size=manifest.hidden_size,
        labels=manifest.labels,
        size_bytes=sum(entry.size for entry in manifest.files.values()),
        license=manifest.license,
        source=f"{source.kind}:{source.id}{'@' + source.revision if source.revision else ''}" if source else "",
    )
    if status and status.loaded_ns:
        model.load_time.CopyFrom(timestamp(status.loaded_ns))
    return model


def broken(name: str, version: str, error: str) -> model_pb2.Model:
    """A version whose manifest cannot be read."""
    return model_pb2.Model(
        name=f"models/{name}/versions/{version}",
        model_id=name,
        version=version,
        state=model_pb2.MODEL_STATE_FAILED,
        state_message=error[:1000],
    )


def timestamp(ns: int) -> Any:
    """Wall-clock nanoseconds since 1970 as a Timestamp."""
    return Timestamp(seconds=ns // 1_000_000_000, nanos=ns % 1_000_000_000)
