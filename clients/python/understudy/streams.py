"""Answers as they are written: what `generate` of the two clients returns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc

from understudy import generation
from understudy.calls import Prepared
from understudy.errors import UnderstudyError, from_rpc_error
from understudy.results import GenerationDelta, GenerationSummary
from understudy.retry import RetryPolicy
from understudy.v1 import inference_service_pb2 as pb

C = TypeVar("C")


class _Stream(Generic[C]):
    """What both kinds share. `start` begins a call with a timeout in seconds."""

    def __init__(self, prepared: Prepared[pb.GenerateResponse], start: Callable[[float], C], timeout_s: float, retry: RetryPolicy) -> None:
        self._prepared = prepared
        self._start = start
        self._timeout_s = timeout_s
        self._retry = retry
        self._call: Any = None
        self._used = False
        self._cancelled = False
        self._summary: GenerationSummary | None = None

    @property
    def summary(self) -> GenerationSummary:
        """Who answered, usage and timings. Raises RuntimeError before the stream has ended."""
        if self._summary is None:
            raise RuntimeError("the summary comes with the end of the stream; iterate to the end first")
        return self._summary

    def cancel(self) -> None:
        """Ends the answer; the server stops working on it. Does nothing when it has ended."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    def _begin(self) -> float:
        """When the stream must have ended, in seconds of the monotonic clock. Raises RuntimeError for a second iteration."""
        if self._used:
            raise RuntimeError("a stream is iterated once; call generate again")
        self._used = True
        return time.monotonic() + self._timeout_s

    def _take(self, data: bytes) -> list[GenerationDelta]:
        response = self._prepared.read(data)
        if response.HasField("model"):
            self._summary = generation.summary(response)
        return [generation.delta(one) for one in response.deltas]

    def _again(self, error: UnderstudyError, attempt: int, begun: bool, end: float) -> float:
        """Seconds to wait before the next attempt; raises the error where there is none, as always once an answer has begun."""
        delay = (
            None if begun or self._cancelled or self._prepared.final(error) else self._retry.delay(error, attempt, end - time.monotonic())
        )
        if delay is None:
            raise error
        return delay


class TextStream(_Stream[Any]):
    """Iterate it for the deltas. Leaving the loop (or the `with` block) ends the call, and the server stops working on it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[GenerationDelta]:
        """Raises the classes of `understudy.errors`, also in the middle of an answer."""
        end = self._begin()
        attempt, begun = 0, False
        try:
            while True:
                attempt += 1
                try:
                    self._call = self._start(max(0.0, end - time.monotonic()))
                    for data in self._call:
                        begun = True
                        yield from self._take(data)
                    return
                except grpc.RpcError as raised:
                    delay = self._again(from_rpc_error(raised), attempt, begun, end)
                time.sleep(delay)
        finally:
            self.cancel()

    def text(self) -> str:
        """The rest of the first answer."""
        return "".join([delta.text for delta in self if delta.index == 0])


class AsyncTextStream(_Stream[Any]):
    """Iterate it with `async for`. Leaving the loop (or the `async with` block) ends the call, and the server stops working on it."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncIterator[GenerationDelta]:
        """Raises the classes of `understudy.errors`, also in the middle of an answer."""
        end = self._begin()
        attempt, begun = 0, False
        try:
            while True:
                attempt += 1
                try:
                    self._call = self._start(max(0.0, end - time.monotonic()))
                    async for data in self._call:
                        begun = True
                        for one in self._take(data):
                            yield one
                    return
                except grpc.aio.AioRpcError as raised:
                    delay = self._again(from_rpc_error(raised), attempt, begun, end)
                await asyncio.sleep(delay)
        finally:
            self.cancel()

    async def text(self) -> str:
        """The rest of the first answer."""
        return "".join([delta.text async for delta in self if delta.index == 0])
