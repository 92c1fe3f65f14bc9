"""Who may call what: each call's key, role, skills and rate, before anything of it runs; and what of it the audit log keeps.

Everything is decided from memory (server/api/auth_keys.py), in a few microseconds. Where no keys are asked for, every caller is
"anonymous" and may do everything. A key is never part of an error, a log line or a trace.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from typing import Any

from server.api.auth_audit import AuditWriter
from server.api.auth_keys import HeldKey, KeyBook, TokenBucket
from server.api.auth_roles import Rule, refuse_skill, resource_of, rule_of
from server.api.calls import Scope
from server.config import Config
from server.core import Caller
from server.errors import FailedPrecondition, PermissionDenied, RateLimited, Unauthenticated, Unavailable
from server.logs import get
from server.registry.api_keys import is_secret_of, split_key
from server.registry.audit import event_of

HEADER = "authorization"
_SCHEME = "bearer "
_SEEN = 4096
_FAILURES_PER_MINUTE = 60  # events of a caller that changed nothing: a flood of refusals must not fill the disk
_HELP = "Send metadata `authorization: Bearer und_...`; `understudy keys create` makes a key."
_RETRY_S = 1.0


class Gate:
    """One a server, on the event loop. `book` None: no keys are asked for. `clock`: milliseconds since 1970; `ticks`: monotonic seconds."""

    def __init__(
        self,
        book: KeyBook | None,
        audit: AuditWriter,
        *,
        clock: Callable[[], int] | None = None,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.book = book
        self._audit = audit
        self._clock = clock or (lambda: time.time_ns() // 1_000_000)
        self._ticks = ticks
        # What was sent by those that were let in: to split and hash it again in every call would be most of a check's time. It is found by
        # Python's keyed hash, so that the time tells nothing of it, and is in memory alone, as in gRPC's own buffers.
        self._seen: dict[str, HeldKey] = {}
        self._anonymous = TokenBucket(_FAILURES_PER_MINUTE, ticks())
        self._unwritten = 0
        self._log = get("auth")

    def rule(self, path: str) -> Rule:
        """What is to be known of a method; for when it is registered. Raises TypeError where it has no role."""
        return rule_of(path)

    def admit(self, scope: Scope, authorization: str) -> None:
        """Lets a call in, and tells its scope who calls. `authorization`: the metadata's value, "" for none.

        Raises Unauthenticated, PermissionDenied, RateLimited, and Unavailable as long as the registry has never been read.
        """
        if self.book is None:
            return
        rule = scope.rule
        assert rule is not None, "the guard has its gate before methods are registered"
        held = self._seen.get(authorization) or self._verify(self.book, authorization)
        self.still(held)
        held.used_ms = self._clock()
        scope.key = held
        scope.caller = caller = held.caller
        scope.call.tenant = held.id
        self._take(held)
        if caller.role < rule.role:
            message = f"the key's role is {caller.role.name}; {rule.method} takes {rule.role.name} or more. Ask an admin for another key."
            raise PermissionDenied(message, role=caller.role.name, required_role=rule.role.name)
        if rule.each:
            scope.admit_one = partial(self._admit_one, held, rule)

    def took(self, scope: Scope, request: Any) -> None:
        """Looks at a request that was parsed: what it is about, and whether the key may ask that skill. Raises PermissionDenied."""
        rule, held = scope.rule, scope.key
        if rule is None:
            return
        if rule.audited and not scope.resource:
            scope.resource = resource_of(request)
        if held is None or rule.each:
            return
        if rule.streams:
            self.again(held)
        if held.caller.skills and rule.skill_of is not None:
            _check_skill(held.caller, rule.skill_of(request))

    def again(self, held: HeldKey) -> None:
        """For one more message of a stream: the key must still be one, and have room. Raises Unauthenticated, RateLimited."""
        self.still(held)
        self._take(held)

    def still(self, held: HeldKey) -> None:
        """Raises Unauthenticated where a key has ended meanwhile."""
        if held.ended:
            raise _refused("revoked", "this API key was revoked.")
        if held.expire_ms is not None and self._clock() >= held.expire_ms:
            raise _refused("expired", "this API key has expired.")

    def left(self, scope: Scope, code: str) -> None:
        """Keeps a call that is over for the audit log, where it belongs there."""
        rule = scope.rule
        if rule is None or not (rule.audited or code == "PERMISSION_DENIED"):
            return
        if self.book is not None and scope.key is None:
            return  # of nobody: the access log and the metrics have it
        if code != "OK" and not self._room(scope.key):
            self._unwritten += 1
            if self._unwritten & (self._unwritten - 1) == 0:  # 1, 2, 4, 8 ...: as many lines as doublings
                self._log.warning("refused calls are too many for the audit log", unwritten=self._unwritten, actor=scope.caller.name)
            return
        peer = scope.peer
        self._audit.put(event_of(scope.caller.name, rule.method, scope.resource, code, request_id=scope.call.request_id, peer=peer))

    async def close(self) -> None:
        """Writes what waits. After the last call."""
        await asyncio.to_thread(self._audit.close)
        if self.book is not None:
            await asyncio.to_thread(self.book.close)

    def _admit_one(self, held: HeldKey, rule: Rule, request: Any) -> None:
        self.again(held)
        if held.caller.skills and rule.skill_of is not None:
            _check_skill(held.caller, rule.skill_of(request))

    def _verify(self, book: KeyBook, authorization: str) -> HeldKey:
        if not authorization:
            raise _refused("missing", f"no API key came with the call. {_HELP}")
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise _refused("malformed", f"the metadata `authorization` is no bearer token. {_HELP}")
        parts = split_key(authorization[len(_SCHEME) :].strip())
        if parts is None:
            raise _refused("malformed", f"the bearer token is no API key of this server. {_HELP}")
        held = book.find(parts[0])
        if held is None or not is_secret_of(parts[1], held.secret_hash):
            if not book.known:
                raise Unavailable("the registry has not answered yet, so no key is known. Try again.", retry_after_s=_RETRY_S)
            raise _refused("unknown", "this API key is not known; a new one is within seconds. Ask an admin for another.")
        if len(self._seen) >= _SEEN:
            self._seen.clear()
        self._seen[authorization] = held
        return held

    def _take(self, held: HeldKey) -> None:
        if held.bucket is None:
            return
        wait_s = held.bucket.take(self._ticks())
        if wait_s:
            limit = held.bucket.per_minute
            message = f"the key may call {limit} times a minute, and has; expected fewer. Call again after the delay."
            raise RateLimited(message, retry_after_s=wait_s, limit=limit, field="requests_per_minute")

    def _room(self, held: HeldKey | None) -> bool:
        if held is None:
            return not self._anonymous.take(self._ticks())
        if held.refusals is None:
            held.refusals = TokenBucket(_FAILURES_PER_MINUTE, self._ticks())
        return not held.refusals.take(self._ticks())


def keys_asked(config: Config) -> bool:
    """Whether callers must have a key: by default wherever others than this machine can call."""
    if config.auth.keys == "auto":
        return not is_loopback(config.server.host)
    return config.auth.keys == "required"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. A name other than localhost may mean anything, and is taken for an address of all."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def check_listening(config: Config, book: KeyBook | None) -> None:
    """Raises FailedPrecondition where others could call and there is no key, and nobody said so; else warns of what was chosen."""
    log, host = get("auth"), config.server.host
    near, secure = is_loopback(host), bool(config.server.tls.cert_file)
    if book is None:
        if not near:
            log.warning("no keys are asked for: whoever reaches the server may do everything", host=host)
        return
    if book.known and not book.any_live():
        if config.auth.keys == "auto":
            message = (
                f"the server is to listen on {host}, where others reach it, and there is no API key yet. Make one with "
                "`understudy keys create --role admin`, which prints it once. "
                'Or set auth.keys = "required" to start without one, or auth.keys = "off" to let everybody do everything.'
            )
            raise FailedPrecondition(message, host=host, field="auth.keys")
        log.warning("there is no API key yet, so every call is refused", hint="understudy keys create --role admin")
    if not near and not secure:
        log.warning("keys travel without encryption: set server.tls, or let only a gateway with TLS reach this address", host=host)


def _check_skill(caller: Caller, skill: str) -> None:
    if skill not in caller.skills:
        raise refuse_skill(caller.skills, skill)


def _refused(problem: str, message: str) -> Unauthenticated:
    return Unauthenticated(message, problem=problem)
