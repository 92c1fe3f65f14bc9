"""The adapters' part of understudy.v1.ModelService: what is in the repository for a model, and what of it requests can name."""

from __future__ import annotations

import asyncio
import re

from server.api.paging import page_token, read_page, seconds
from server.api.wire import Context
from server.errors import InvalidArgument, UnderstudyError
from server.runtime.lora.folder import AdapterManifest
from server.runtime.lora.repository import ADAPTERS, AdapterEntry, entries
from server.runtime.lora.store import AdapterStatus
from server.runtime.runtime import Runtime
from understudy.v1 import adapter_pb2
from understudy.v1 import model_service_pb2 as pb

_NAME = re.compile(r"models/([^/]+)/adapters/([^/]+)(?:/versions/([^/]+))?")
_PARENT = re.compile(r"models/([^/]+)")
_KINDS = {
    "lora": adapter_pb2.ADAPTER_KIND_LORA,
    "prefix": adapter_pb2.ADAPTER_KIND_PREFIX,
    "prompt": adapter_pb2.ADAPTER_KIND_PROMPT,
}
_GRACE_S = 30.0


class AdapterServicer:
    """The disk is read in threads; who is loaded is the model's AdapterSet's to say."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def ListAdapters(self, request: pb.ListAdaptersRequest, _context: Context) -> pb.ListAdaptersResponse:
        """Versions by name and version, a page at a time."""
        match = _PARENT.fullmatch(request.parent)
        if match is None:
            raise InvalidArgument(f"parent is {request.parent[:200]!r}; expected models/{{model}}.", field="parent")
        model = match[1]
        size, after = read_page(request.page_size, request.page_token)
        self._runtime.repository.versions(model)  # raises ModelNotFound with the near names
        found = await asyncio.to_thread(entries, self._runtime.repository.root / ADAPTERS, model)
        statuses = self._loaded(model)
        rows = [one for one in found if not request.loaded_only or (one.name, one.version) in statuses]
        rest = [one for one in rows if after is None or (one.name, int(one.version)) > after]
        page = rest[:size]
        token = page_token(page[-1].name, int(page[-1].version)) if len(rest) > size else ""
        shown = [_entry(model, one, statuses.get((one.name, one.version))) for one in page]
        return pb.ListAdaptersResponse(adapters=shown, next_page_token=token)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, _context: Context) -> pb.LoadAdapterResponse:
        """Brings a version in beside running requests."""
        model, name, version = _parse(request.name)
        with self._runtime.use_adapters(model) as adapters:
            status = await adapters.load(name, version)
        return pb.LoadAdapterResponse(adapter=to_adapter(model, status.manifest, status))

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, _context: Context) -> pb.UnloadAdapterResponse:
        """Takes a version, or all of a name's, from new requests."""
        model, name, version = _parse(request.name)
        grace = seconds(request.grace) if request.HasField("grace") else _GRACE_S
        with self._runtime.use_adapters(model) as adapters:
            gone = await adapters.unload(name, version, grace_s=grace)
        shown = [to_adapter(model, one.manifest, one) for one in gone]
        for adapter in shown:
            adapter.state = adapter_pb2.ADAPTER_STATE_UNLOADED
        return pb.UnloadAdapterResponse(adapters=shown)

    def _loaded(self, model: str) -> dict[tuple[str, str], AdapterStatus]:
        """By name and version; empty where the model is not loaded or takes no adapters."""
        try:
            with self._runtime.use_adapters(model) as adapters:
                return {(one.manifest.name, one.manifest.version): one for one in adapters.loaded()}
        except UnderstudyError:
            return {}


def to_adapter(model: str, manifest: AdapterManifest, status: AdapterStatus | None) -> adapter_pb2.Adapter:
    """The resource: what the manifest says, and where it stands."""
    return adapter_pb2.Adapter(
        name=f"models/{model}/adapters/{manifest.name}/versions/{manifest.version}",
        adapter_id=manifest.name,
        version=manifest.version,
        state=adapter_pb2.ADAPTER_STATE_READY if status else adapter_pb2.ADAPTER_STATE_UNLOADED,
        kind=_KINDS[manifest.kind],
        rank=manifest.rank,
        positions=manifest.positions,
        current=bool(status and status.default),
        resident=bool(status and status.resident),
        active_requests=status.users if status else 0,
        base=f"models/{manifest.base.name}/versions/{manifest.base.version}",
        license=manifest.license,
        size_bytes=sum(entry.size for entry in manifest.files.values()),
    )


def _entry(model: str, entry: AdapterEntry, status: AdapterStatus | None) -> adapter_pb2.Adapter:
    if entry.manifest is not None:
        return to_adapter(model, entry.manifest, status)
    return adapter_pb2.Adapter(
        name=f"models/{model}/adapters/{entry.name}/versions/{entry.version}",
        adapter_id=entry.name,
        version=entry.version,
        state=adapter_pb2.ADAPTER_STATE_FAILED,
        state_message=entry.error[:1000],
    )


def _parse(name: str) -> tuple[str, str, str | None]:
    """(model, adapter, version or None) of a resource name."""
    match = _NAME.fullmatch(name)
    if match is None:
        form = "models/{model}/adapters/{adapter} or models/{model}/adapters/{adapter}/versions/{version}"
        raise InvalidArgument(f"name is {name[:200]!r}; expected {form}.", field="name")
    return match[1], match[2], match[3]
