"""What stands around every RPC: its id, deadline, cancellation, limits, access line, metrics, span, and its exceptions' way to a status.

Registered through `wire.handlers`. Written as plain wrappers: gRPC's interceptors cost a lookup and a continuation in every call.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc

from server.api import calls, status
from server.api.auth import HEADER, Gate
from server.api.auth_roles import Rule
from server.api.calls import Scope
from server.api.wire import Context, Stream, Unary
from server.core import Call
from server.errors import Cancelled, DeadlineExceeded, Draining, InternalError, Overloaded, PermissionDenied, UnderstudyError
from server.logs import AccessLog, get
from server.metrics import Metrics
from server.tracing import Tracer

REQUEST_ID = "x-request-id"
_GOOD_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# Taken off the caller's deadline, so that our answer, which names the stage, arrives before the caller's own clock runs out.
_MARGIN_S = 0.005
_MARGIN_SHARE = 0.1
_BUSY_RETRY_S = 0.2


class Guard:
    """One for the calls of users; `operator=True` makes one for health and reflection: neither limited nor logged, and without keys.

    `gate` says who may call what; set it before methods are registered. Without one everybody may.
    """

    def __init__(
        self, metrics: Metrics, access: AccessLog, *, max_calls: int = 0, tracer: Tracer | None = None, operator: bool = False
    ) -> None:
        self.active = 0
        self.gate: Gate | None = None
        self.draining = asyncio.Event()
        self._idle = asyncio.Event()
        self._metrics = metrics
        self._access = access
        self._max_calls = max_calls
        self._tracer = tracer
        self._operator = operator
        self._prefix = os.urandom(6).hex()
        self._count = 0
        self._log = get("api")

    def unary(self, method: str, call: Unary) -> Unary:
        """Wraps a method with one response and one request."""
        rule = self.gate.rule(method) if self.gate is not None else None

        async def guarded(data: bytes, context: Context) -> bytes:
            scope, authorization = self._enter(method, context, rule)
            try:
                self._admit(scope, authorization)
                response = await call(data, context)
            except BaseException as error:
                await self._fail(scope, context, error)
                raise  # not reached: _fail raises
            self._leave(scope, "OK", context)
            return response

        return guarded

    def stream(self, method: str, call: Stream) -> Stream:
        """Wraps a method with many responses. While the server drains, a stream of requests ends, so that what came is answered."""
        gate = self.gate
        rule = gate.rule(method) if gate is not None else None

        async def guarded(data: Any, context: Context) -> AsyncIterator[bytes]:
            scope, authorization = self._enter(method, context, rule)
            try:
                self._admit(scope, authorization)
                async for response in call(data if isinstance(data, bytes) else self._until_drain(data), context):
                    if gate is not None and scope.key is not None:
                        gate.still(scope.key)  # what goes on for hours ends with its key
                    yield response
            except GeneratorExit:
                self._leave(scope, "CANCELLED", None)
                raise
            except BaseException as error:
                await self._fail(scope, context, error)
                raise
            self._leave(scope, "OK", context)

        return guarded

    def took(self, request: Any) -> None:
        """See wire.Guard."""
        if self.gate is not None:
            self.gate.took(calls.current(), request)

    def drain(self) -> None:
        """New calls are refused from now on, and open streams are asked to end."""
        self.draining.set()
        if self.active == 0:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> None:
        """Returns when, after `drain`, the last call has ended, or after `timeout_s` seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)

    def _enter(self, method: str, context: Context, rule: Rule | None) -> tuple[Scope, str]:
        """The call's scope, and beside it what it says of its key: that is kept nowhere."""
        request_id = traceparent = authorization = ""
        for key, value in context.invocation_metadata() or ():
            if key == REQUEST_ID and isinstance(value, str) and _GOOD_ID.fullmatch(value):
                request_id = value
            elif key == "traceparent":
                traceparent = str(value)
            elif key == HEADER:  # of several none is better than another: together they are no key
                authorization = f"{authorization},{value!s}" if authorization else str(value)
        if not request_id:
            self._count += 1
            request_id = f"{self._prefix}-{self._count:x}"
        now = time.monotonic()
        left = context.time_remaining()
        deadline = None if left is None else now + left - min(_MARGIN_S, left * _MARGIN_SHARE)
        scope = Scope(method, Call(request_id, deadline), now, rule=rule)
        if rule is not None and rule.audited:
            scope.peer = context.peer()
        calls.enter(scope)
        if self._tracer is not None and not self._operator:
            scope.span = self._tracer.start(method, traceparent)
        self.active += 1
        return scope, authorization

    def _admit(self, scope: Scope, authorization: str) -> None:
        """Refuses what is not to run, and sets the alarm of what is."""
        if self._operator:
            return
        if self.draining.is_set():
            raise Draining("the server is stopping; call another replica, or again after its restart.", retry_after_s=1.0)
        if self._max_calls and self.active > self._max_calls:
            self._metrics.rejected("", "OVERLOADED")
            raise Overloaded(
                f"{self._max_calls} calls are running; expected fewer at once. Call again after the delay.",
                retry_after_s=_BUSY_RETRY_S,
                limit=self._max_calls,
                field="max_concurrent_calls",
            )
        if self.gate is not None:
            self.gate.admit(scope, authorization)
        if scope.call.deadline is not None:
            task = asyncio.current_task()
            assert task is not None
            scope.alarm = asyncio.get_running_loop().call_at(scope.call.deadline, _expire, scope, task)

    async def _fail(self, scope: Scope, context: Context, error: BaseException) -> None:
        """Counts, logs and sends an exception. Always raises: the abort, or the cancellation itself."""
        if isinstance(error, asyncio.CancelledError) or (scope.expired and isinstance(error, Cancelled)):
            scope.call.cancelled = True
            if not scope.expired:
                self._leave(scope, "DEADLINE_EXCEEDED" if _late(scope) else "CANCELLED", None)
                raise error
            task = asyncio.current_task()
            if task is not None and isinstance(error, asyncio.CancelledError):
                task.uncancel()
            stage = scope.call.stage or "run"
            error = DeadlineExceeded(
                f"the deadline passed in the stage {stage!r}; expected more time, or fewer items in one call.", stage=stage
            )
        elif isinstance(error, grpc.aio.AbortError) or not isinstance(error, Exception):
            self._leave(scope, "UNKNOWN", None)
            raise error
        ours = status.to_error(error, scope.call.request_id)
        if isinstance(ours, InternalError):
            self._log.error("call failed", request_id=scope.call.request_id, method=scope.method, exc_info=error)
        elif isinstance(ours, Cancelled):
            scope.call.cancelled = True
        elif isinstance(ours, PermissionDenied):
            scope.peer = context.peer()
        full = status.to_status(ours, scope.call.request_id)
        self._leave(scope, ours.code, None, ours)
        await context.abort(
            status.grpc_code(ours.code),
            full.message,
            trailing_metadata=((REQUEST_ID, scope.call.request_id), *status.trailers(full)),
        )

    def _leave(self, scope: Scope, code: str, context: Context | None, error: UnderstudyError | None = None) -> None:
        """Gives the call's place back and writes it down. With a `context`, the answer carries the request id."""
        self.active -= 1
        if self.active == 0 and self.draining.is_set():
            self._idle.set()
        if scope.alarm is not None:
            scope.alarm.cancel()
            scope.alarm = None
        if context is not None:
            context.set_trailing_metadata(((REQUEST_ID, scope.call.request_id),))
        if self._operator:
            return
        if self.gate is not None:
            self.gate.left(scope, code)
        seconds = time.monotonic() - scope.started
        self._metrics.call_done(scope.method, code, seconds)
        more: dict[str, str | int | float] = {}
        if scope.items:
            more = {"model": scope.model, "items": scope.items, "failed_items": scope.failed_items, "tokens": scope.tokens}
        if error is not None:
            self._metrics.call_failed(scope.method, error.reason)
            more["reason"] = error.reason
            if "stage" in error.metadata:
                more["stage"] = error.metadata["stage"]
        self._access.write(scope.method, code, scope.call.request_id, seconds, **more)
        if scope.span is not None and self._tracer is not None:
            attributes: dict[str, str | int] = {"understudy.request_id": scope.call.request_id}
            if scope.items:
                attributes |= {"understudy.model": scope.model, "understudy.items": scope.items, "understudy.tokens": scope.tokens}
            self._tracer.end(scope.span, code, scope.timings, attributes)

    async def _until_drain(self, data: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The client's messages, until the server drains and none has arrived."""
        draining = asyncio.ensure_future(self.draining.wait())
        arriving: asyncio.Future[bytes] | None = None
        try:
            while True:
                arriving = asyncio.ensure_future(_next(data))
                await asyncio.wait((arriving, draining), return_when=asyncio.FIRST_COMPLETED)
                if not arriving.done():
                    return
                try:
                    yield arriving.result()
                except StopAsyncIteration:
                    return
        finally:
            draining.cancel()
            if arriving is not None:
                arriving.cancel()


async def _next(data: AsyncIterator[bytes]) -> bytes:
    return await anext(data)


def _expire(scope: Scope, task: asyncio.Task[Any]) -> None:
    """The alarm: marks the call, so that engines skip it, and wakes its task."""
    scope.alarm = None
    scope.expired = True
    scope.call.cancelled = True
    task.cancel()


def _late(scope: Scope) -> bool:
    left = scope.call.remaining()
    return left is not None and left <= 0
