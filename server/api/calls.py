"""What the edge knows of the call that runs now. Each RPC is a task of its own, so a context variable holds it; no signature carries it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.core import Call, Caller, Priority, Results, Timings

if TYPE_CHECKING:
    from server.api.auth_keys import HeldKey
    from server.api.auth_roles import Rule

ANONYMOUS = Caller()
_PRIORITIES = {1: Priority.CRITICAL, 2: Priority.INTERACTIVE, 3: Priority.BULK}


@dataclass(slots=True)
class Scope:
    """One RPC: its `call`, and what servicers note for the access log and the trace. Texts are never noted.

    `key` is the caller's, None where none is asked for; `rule` its method's; `resource` and `peer` are for the audit log; `admit_one` is
    for methods whose messages are admitted one by one.
    """

    method: str
    call: Call
    started: float  # time.monotonic() seconds
    model: str = ""
    items: int = 0
    failed_items: int = 0
    tokens: int = 0
    timings: Timings = field(default_factory=Timings)
    expired: bool = False  # the alarm below rang
    alarm: asyncio.TimerHandle | None = None
    span: Any = None
    caller: Caller = ANONYMOUS
    key: HeldKey | None = None
    rule: Rule | None = None
    resource: str = ""
    peer: str = ""
    admit_one: Callable[[Any], None] | None = None

    def note(self, results: Results[Any]) -> None:
        """Keeps who answered, how many items, and what it took."""
        self.model = f"{results.model}@{results.version}" if results.version else results.model
        self.items = len(results.items)
        self.failed_items = sum(1 for item in results.items if isinstance(item, Exception))
        self.tokens = results.usage.input + results.usage.output
        self.timings = results.timings


_scope: ContextVar[Scope] = ContextVar("scope")


def enter(scope: Scope) -> None:
    """Makes `scope` the current one of this task. For the guard alone."""
    _scope.set(scope)


def current() -> Scope:
    """The scope of the RPC that runs in this task. Raises LookupError outside of one."""
    return _scope.get()


def current_call(priority: int = 0) -> Call:
    """The call of the RPC that runs in this task. `priority` is the request's `understudy.v1.Priority`; 0 leaves what is there."""
    call = _scope.get().call
    if priority:
        call.priority = _PRIORITIES.get(priority, call.priority)
    return call


def admit(request: Any) -> None:
    """Admits one message of a stream whose messages are answered one by one. Raises Unauthenticated, PermissionDenied, RateLimited."""
    admit_one = _scope.get().admit_one
    if admit_one is not None:
        admit_one(request)
