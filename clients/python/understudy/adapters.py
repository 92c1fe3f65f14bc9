"""The adapters of the server's models, for both clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

from understudy import calls
from understudy.calls import Page, Prepared
from understudy.options import CallOptions
from understudy.results import Adapter
from understudy.v1 import adapter_pb2
from understudy.v1 import model_service_pb2 as pb

if TYPE_CHECKING:
    from understudy.aio import AsyncClient
    from understudy.client import Client


class Adapters:
    """The adapters of a server's models: which there are, and which requests may name."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, model: str, *, loaded_only: bool = False, **options: Unpack[CallOptions]) -> list[Adapter]:
        """All versions of a model's adapters, by name and version."""
        found: list[Adapter] = []
        token = ""
        while True:
            page = self._client._send(_list(model, loaded_only, token, dict(options)))
            found += page.items
            token = page.next_token
            if not token:
                return found

    def load(self, model: str, name: str, version: str = "", **options: Unpack[CallOptions]) -> Adapter:
        """Verifies a version (the newest without `version`) and brings it in, beside running requests."""
        return self._client._send(_load(model, name, version, dict(options)))

    def unload(
        self, model: str, name: str, version: str = "", *, grace_s: float | None = None, **options: Unpack[CallOptions]
    ) -> Sequence[Adapter]:
        """Takes a version (all without `version`) from new requests, and waits up to `grace_s` for those that hold it."""
        return self._client._send(_unload(model, (name, version), grace_s, dict(options)))


class AsyncAdapters:
    """The same for asyncio."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, model: str, *, loaded_only: bool = False, **options: Unpack[CallOptions]) -> list[Adapter]:
        """All versions of a model's adapters, by name and version."""
        found: list[Adapter] = []
        token = ""
        while True:
            page = await self._client._send(_list(model, loaded_only, token, dict(options)))
            found += page.items
            token = page.next_token
            if not token:
                return found

    async def load(self, model: str, name: str, version: str = "", **options: Unpack[CallOptions]) -> Adapter:
        """Verifies a version (the newest without `version`) and brings it in, beside running requests."""
        return await self._client._send(_load(model, name, version, dict(options)))

    async def unload(
        self, model: str, name: str, version: str = "", *, grace_s: float | None = None, **options: Unpack[CallOptions]
    ) -> Sequence[Adapter]:
        """Takes a version (all without `version`) from new requests, and waits up to `grace_s` for those that hold it."""
        return await self._client._send(_unload(model, (name, version), grace_s, dict(options)))


def _list(model: str, loaded_only: bool, token: str, options: dict[str, Any]) -> Prepared[Page[Adapter]]:
    request = pb.ListAdaptersRequest(parent=f"models/{model}", page_size=1000, page_token=token, loaded_only=loaded_only)
    return _prepared(
        "ListAdapters",
        request,
        lambda data: _page(pb.ListAdaptersResponse.FromString(data)),
        options,
    )


def _load(model: str, name: str, version: str, options: dict[str, Any]) -> Prepared[Adapter]:
    request = pb.LoadAdapterRequest(name=_resource(model, name, version))
    return _prepared("LoadAdapter", request, lambda data: _adapter(pb.LoadAdapterResponse.FromString(data).adapter), options)


def _unload(model: str, adapter: tuple[str, str], grace_s: float | None, options: dict[str, Any]) -> Prepared[list[Adapter]]:
    request = pb.UnloadAdapterRequest(name=_resource(model, *adapter))
    if grace_s is not None:
        request.grace.FromNanoseconds(round(grace_s * 1e9))
    return _prepared(
        "UnloadAdapter", request, lambda data: [_adapter(one) for one in pb.UnloadAdapterResponse.FromString(data).adapters], options
    )


def _prepared(method: str, request: Any, read: Any, options: dict[str, Any]) -> Prepared[Any]:
    call = calls._call(options)
    calls._no_more(options)
    return calls._prepare("ModelService", method, request, read, call)


def _resource(model: str, name: str, version: str) -> str:
    return f"models/{model}/adapters/{name}" + (f"/versions/{version}" if version else "")


def _page(response: pb.ListAdaptersResponse) -> Page[Adapter]:
    return Page([_adapter(one) for one in response.adapters], response.next_page_token)


def _adapter(message: adapter_pb2.Adapter) -> Adapter:
    return Adapter(
        model=message.name.split("/")[1],
        name=message.adapter_id,
        version=message.version,
        state=adapter_pb2.AdapterState.Name(message.state).removeprefix("ADAPTER_STATE_").lower(),
        state_message=message.state_message,
        kind=adapter_pb2.AdapterKind.Name(message.kind).removeprefix("ADAPTER_KIND_").lower().replace("unspecified", ""),
        rank=message.rank,
        positions=message.positions,
        current=message.current,
        resident=message.resident,
        active_requests=message.active_requests,
        base=message.base.removeprefix("models/").replace("/versions/", "@"),
        license=message.license,
        size_bytes=message.size_bytes,
    )
