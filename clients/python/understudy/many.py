"""What `run_many` of the two clients returns: replies as they are ready, while requests are still being sent."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import grpc

from understudy.errors import DeadlineExceeded, Unavailable, UnderstudyError, from_rpc_error
from understudy.routing import RunReply, RunRequest, one_of_many, reply

_FORGOTTEN = "Internal error from Core"
# gRPC's clock may be a little before ours.
_EARLY_S = 0.02


def run_many(requests: Iterable[RunRequest], start: Callable[[Iterator[bytes]], Any]) -> Iterator[RunReply]:
    """`start` begins the call with the messages that it is to send, which gRPC takes in a thread of its own, as the server reads them."""
    raised: list[Exception] = []

    def messages() -> Iterator[bytes]:
        try:
            for request in requests:
                yield one_of_many(request)
        except Exception as error:  # GeneratorExit is gRPC's, which closes it when the call has ended
            raised.append(error)
            raise

    call = start(messages())
    try:
        for data in call:
            yield reply(data)
    except grpc.RpcError as error:
        if raised:  # what the caller's own iterator raised is what the caller wants to know
            raise raised[0] from None
        raise from_rpc_error(error) from None
    finally:
        call.cancel()


async def run_many_aio(
    requests: Iterable[RunRequest] | AsyncIterable[RunRequest], start: Callable[[], Any], timeout_s: float | None
) -> AsyncIterator[RunReply]:
    """`start` begins the call, which ends after `timeout_s`."""
    late = math.inf if timeout_s is None else time.monotonic() + timeout_s - _EARLY_S
    call = start()
    writing = asyncio.ensure_future(_write(requests, call))
    try:
        async for data in call:
            yield reply(data)
        await writing
    except grpc.aio.AioRpcError as error:
        raise _error(error, late) from None
    except asyncio.CancelledError:
        # The call was ended by `_write`, unless this very task is to end.
        mistake = writing.exception() if writing.done() and not writing.cancelled() else None
        if mistake is None:
            raise
        raise mistake from None
    finally:
        call.cancel()
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


def _error(error: grpc.aio.AioRpcError, late: float) -> UnderstudyError:
    """grpc.aio forgets why a call has ended where something was being written at that moment."""
    if error.code() is not grpc.StatusCode.INTERNAL or error.details() != _FORGOTTEN:
        return from_rpc_error(error)
    if time.monotonic() >= late:
        return DeadlineExceeded("the stream's time was up")
    return Unavailable("the server ended the stream while requests were being sent; those without a reply may be sent again")


async def _write(requests: Iterable[RunRequest] | AsyncIterable[RunRequest], call: Any) -> None:
    """Sends the requests. What the caller's iterator raises ends the call, and is raised here."""
    try:
        if isinstance(requests, AsyncIterable):
            async for request in requests:
                await call.write(one_of_many(request))
        else:
            for request in requests:
                await call.write(one_of_many(request))
        await call.done_writing()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return  # the call has ended, and its reader knows why
    except BaseException:
        call.cancel()
        raise
