"""understudy.v1.AdminService: API keys, who the caller is, and the audit log."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from server.api import calls
from server.api.auth_keys import KeyBook
from server.api.paging import page_token, read_page
from server.api.wire import Context
from server.core import Role
from server.errors import InvalidArgument
from server.registry.api_keys import MAX_SKILLS, ApiKey, KeySettings, read_name
from understudy.v1 import admin_pb2
from understudy.v1 import admin_service_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from server.registry.api_keys import ApiKeys
    from server.registry.audit import AuditEvent, AuditLog

_SKILLS = "skills/"


class AdminServicer:
    """Reads and writes the registry; what it changes, this server knows at once and the others within moments."""

    def __init__(self, keys: ApiKeys, audit: AuditLog, book: KeyBook | None) -> None:
        self._keys = keys
        self._audit = audit
        self._book = book

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, _context: Context) -> pb.CreateApiKeyResponse:
        """A new key, which is shown this once."""
        scope = calls.current()
        scope.resource = ""  # what the request may say of a name is not it
        if not request.HasField("api_key"):
            raise InvalidArgument("api_key is not set; expected the settings of the key that is to be made.", field="api_key")
        key, text = await asyncio.to_thread(self._keys.create, settings_of(request.api_key), scope.caller.name)
        scope.resource = key.name
        await self._refresh()
        return pb.CreateApiKeyResponse(api_key=to_message(key), secret=text)

    async def GetApiKey(self, request: pb.GetApiKeyRequest, _context: Context) -> pb.GetApiKeyResponse:
        """One key."""
        return pb.GetApiKeyResponse(api_key=to_message(await asyncio.to_thread(self._keys.get, read_name(request.name))))

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, _context: Context) -> pb.ListApiKeysResponse:
        """The newest first; a token is the id and the time of the last key that was seen."""
        size, after = read_page(request.page_size, request.page_token)
        found = await asyncio.to_thread(self._keys.page, size + 1, None if after is None else (after[1], after[0]))
        more = page_token(found[size - 1].id, found[size - 1].create_ms) if len(found) > size else ""
        return pb.ListApiKeysResponse(api_keys=[to_message(key) for key in found[:size]], next_page_token=more)

    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, _context: Context) -> pb.RevokeApiKeyResponse:
        """Its end."""
        key = await asyncio.to_thread(self._keys.revoke, read_name(request.name))
        await self._refresh()
        return pb.RevokeApiKeyResponse(api_key=to_message(key))

    async def GetCaller(self, _request: pb.GetCallerRequest, _context: Context) -> pb.GetCallerResponse:
        """Who calls."""
        caller = calls.current().caller
        return pb.GetCallerResponse(
            name=caller.name,
            role=_role(caller.role),
            skills=[_SKILLS + name for name in sorted(caller.skills)],
            keys_required=self._book is not None,
        )

    async def ListAuditEvents(self, request: pb.ListAuditEventsRequest, _context: Context) -> pb.ListAuditEventsResponse:
        """The newest first; a token is the id of the last event that was seen."""
        size, after = read_page(request.page_size, request.page_token)
        since = request.since_time.ToMilliseconds() if request.HasField("since_time") else None
        before = after[0] if after is not None else ""
        found = await asyncio.to_thread(self._audit.page, size + 1, before=before, actor=request.actor, since_ms=since)
        more = page_token(found[size - 1].id, 0) if len(found) > size else ""
        return pb.ListAuditEventsResponse(audit_events=[to_event(event) for event in found[:size]], next_page_token=more)

    async def _refresh(self) -> None:
        if self._book is not None:
            await asyncio.to_thread(self._book.refresh)


def settings_of(message: admin_pb2.ApiKey) -> KeySettings:
    """What a message says that a key may do; output-only fields are left out. Raises InvalidArgument."""
    if message.role not in {int(role) for role in Role}:
        known = ", ".join(f"ROLE_{role.name}" for role in Role)
        raise InvalidArgument(f"role is {message.role}; expected one of {known}.", field="api_key.role")
    for index, name in enumerate(message.skills[: MAX_SKILLS + 1]):
        if not name.startswith(_SKILLS):
            raise InvalidArgument(f"skills[{index}] is {name[:80]!r}; expected skills/<skill>.", field=f"api_key.skills[{index}]")
    return KeySettings(
        Role(message.role),
        message.display_name,
        tuple(dict.fromkeys(name.removeprefix(_SKILLS) for name in message.skills)),
        _milliseconds(message.expire_time) if message.HasField("expire_time") else None,
        message.requests_per_minute,
        message.budget_day_micro_usd if message.HasField("budget_day_micro_usd") else None,
        message.budget_month_micro_usd if message.HasField("budget_month_micro_usd") else None,
    )


def to_message(key: ApiKey) -> admin_pb2.ApiKey:
    """A key as callers see it."""
    given = key.settings
    message = admin_pb2.ApiKey(
        name=key.name,
        display_name=given.display_name,
        role=_role(given.role),
        skills=[_SKILLS + name for name in given.skills],
        requests_per_minute=given.requests_per_minute,
        budget_day_micro_usd=given.budget_day,
        budget_month_micro_usd=given.budget_month,
        creator=key.creator,
    )
    for field, when in (
        ("expire_time", given.expire_ms),
        ("create_time", key.create_ms),
        ("last_use_time", key.last_use_ms),
        ("revoke_time", key.revoke_ms),
    ):
        if when is not None:
            getattr(message, field).FromMilliseconds(when)
    return message


def to_event(event: AuditEvent) -> admin_pb2.AuditEvent:
    """An event as callers see it."""
    message = admin_pb2.AuditEvent(
        actor=event.actor,
        method=event.method,
        resource=event.resource,
        code=event.code,
        request_id=event.request_id,
        peer=event.peer,
    )
    message.time.FromMilliseconds(event.time_ms)
    return message


def _role(role: Role) -> Any:
    return int(role)


def _milliseconds(stamp: Timestamp) -> int:
    """Raises InvalidArgument outside of the years that a timestamp may have."""
    if not 0 <= stamp.seconds < 253_402_300_800 or not 0 <= stamp.nanos < 1_000_000_000:
        raise InvalidArgument("expire_time is no time from 1970 to 9999; expected a time to come, or none.", field="api_key.expire_time")
    return stamp.seconds * 1000 + stamp.nanos // 1_000_000
