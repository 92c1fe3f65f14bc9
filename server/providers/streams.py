"""One streamed answer while it is being read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from server.core import Usage
from server.errors import DeadlineExceeded, ProviderUnavailable, UnderstudyError
from server.providers.base import Part
from server.providers.failures import Refusal, refusal_of
from server.providers.prices import output_estimate
from server.providers.wire import Events, Reply, StreamReader

# What follows the last event is read, so that the connection serves again; it is there already, or not worth waiting for.
_FAREWELL_S = 0.05
# After the vendor said why it ended, its count of tokens may still follow; nobody waits long for it.
_COUNT_S = 1.0


@dataclass(slots=True, frozen=True)
class Times:
    """How long a stream may take, in seconds: to its first token, between two, as a whole."""

    first_token_s: float
    between_tokens_s: float
    total_s: float


@dataclass(slots=True, frozen=True)
class Origin:
    """What a stream needs to know of its call. `key` is kept out of what the vendor's errors say; `input_tokens` is our own estimate."""

    who: str
    sdk: ModuleType
    key: str
    deadline: float | None
    input_tokens: int

    def __repr__(self) -> str:
        return f"Origin({self.who!r})"


class LiveStream:
    """Reads a response piece by piece under three timeouts and the deadline. Pings and comments are no progress."""

    def __init__(self, reader: StreamReader, times: Times, origin: Origin) -> None:
        self.reader = reader
        self.first_at = 0.0  # when the first part came
        self._times = times
        self._origin = origin
        self._events = Events()
        self._response: Any = None
        self._chunks: AsyncIterator[bytes] | None = None
        self._first: list[Part] = []
        self._sent = self._last = time.monotonic()
        self._started = False
        self._over = False

    async def open(self, answer: Awaitable[Any]) -> LiveStream:
        """Awaits the response and its first token, so that whatever fails before it can still be repeated. Raises as `more`."""
        refusal: Refusal | None = None
        try:
            async with asyncio.timeout(self._times.first_token_s) as scope:
                self._response = await answer
            self._chunks = self._response.aiter_bytes()
            while not self._started and not self._over:
                self._first += await self._advance()
            if self._over:
                self._check()
            return self
        except TimeoutError as error:
            refusal = self._stalled("first_token_timeout_s") if scope.expired() else self._refusal(error)
        except UnderstudyError:
            await self.close()
            raise
        except Exception as error:
            refusal = self._refusal(error)
        except BaseException:
            await self.close()
            raise
        await self.close()
        raise refusal

    async def more(self) -> list[Part] | None:
        """The next parts, or None where the answer is complete. Raises Refusal, or DeadlineExceeded."""
        if self._first:
            first, self._first = self._first, []
            return first
        refusal: Refusal | None = None
        try:
            if not self._over:
                return await self._advance()
            self._check()
            return None
        except UnderstudyError:
            raise
        except Exception as error:
            refusal = self._refusal(error)
        # Raised out here: the library's exception, which holds the request and its key, stays behind.
        raise refusal

    def received(self) -> Usage:
        """Tokens so far: the vendor's count where it gave one, else an estimate on the safe side."""
        said = self.reader.usage or Usage()
        text = self.reader.text
        return Usage(said.input or self._origin.input_tokens, max(said.output, output_estimate(text) if text else 0), said.cached)

    async def close(self) -> None:
        """Ends the connection, unless the answer was read to its end."""
        if self._response is None:
            return
        try:
            if self.reader.ended and self._chunks is not None:
                async with asyncio.timeout(_FAREWELL_S):
                    while await anext(self._chunks, b""):
                        pass
        except Exception:  # the answer is whole
            pass
        finally:
            # Left to the garbage collector, the generator would be ended by whatever thread collects.
            if isinstance(self._chunks, AsyncGenerator):
                with suppress(Exception):
                    await self._chunks.aclose()
            await self._response.aclose()

    async def _advance(self) -> list[Part]:
        while True:
            chunk = await self._chunk()
            if not chunk:
                self._over = True
                return []
            parts = []
            progress = False
            for event, data in self._events.feed(chunk):
                if event == "ping":
                    continue
                part = self.reader.take(event, data)
                progress = True
                if part is not None:
                    parts.append(part)
                if self.reader.ended:
                    self._over = True
                    break
            if parts and not self.first_at:
                self.first_at = time.monotonic()
            if not self._started and (parts or self.reader.finished() or self.reader.text):
                self._started = True
            if progress:
                self._last = time.monotonic()
                return parts

    async def _chunk(self) -> bytes:
        """The next bytes; none at the end."""
        assert self._chunks is not None
        done = self.reader.finished()
        now = time.monotonic()
        limit, name = self._sent + self._times.total_s, "timeout_s"
        if not self._started and self._sent + self._times.first_token_s < limit:
            limit, name = self._sent + self._times.first_token_s, "first_token_timeout_s"
        if self._started and self._last + self._times.between_tokens_s < limit:
            limit, name = self._last + self._times.between_tokens_s, "between_tokens_timeout_s"
        if self._origin.deadline is not None and self._origin.deadline < limit:
            limit, name = self._origin.deadline, "deadline"
        if done:
            limit = min(limit, now + _COUNT_S)
        try:
            async with asyncio.timeout(limit - now) as scope:
                return await anext(self._chunks, b"")
        except Exception as error:
            if done:  # the answer is whole; what broke was only the vendor's farewell
                return b""
            if not (isinstance(error, TimeoutError) and scope.expired()):
                raise
        if name == "deadline":
            raise DeadlineExceeded(f"The deadline passed while {self._origin.who} was answering.", stage="provider")
        raise self._stalled(name)

    def _check(self) -> None:
        """Whether the answer that has ended is one. Raises Refusal."""
        who = self._origin.who
        if not self.reader.finished():
            message = f"{who} cut its answer off. Try again later."
            raise Refusal(ProviderUnavailable(message, cause="cut"), charged=True)
        reply = self.reader.reply()
        if not reply.text and not reply.tool_calls:
            raise nothing_said(who, reply)

    def _stalled(self, name: str) -> Refusal:
        seconds = {
            "first_token_timeout_s": self._times.first_token_s,
            "between_tokens_timeout_s": self._times.between_tokens_s,
            "timeout_s": self._times.total_s,
        }[name]
        message = f"{self._origin.who} did not go on within {name} = {seconds:g}. Raise it or ask another model."
        refusal = Refusal(ProviderUnavailable(message, cause=name), charged=True)
        refusal.usage = self.received()
        return refusal

    def _refusal(self, error: BaseException) -> Refusal:
        refusal = refusal_of(error, self._origin.sdk, self._origin.who, self._origin.key)
        if self._started:
            refusal.charged, refusal.repeatable = True, False
        if refusal.charged and refusal.usage is None:
            refusal.usage = self.received()
        return refusal


def nothing_said(who: str, reply: Reply) -> Refusal:
    """The failure of an answer that has no token."""
    why = "spent max_tokens before its first word: raise it" if reply.finish == "length" else "answered nothing at all: try again later"
    refusal = Refusal(ProviderUnavailable(f"{who} {why}, or ask another model.", cause="empty"), charged=True)
    refusal.usage = reply.usage
    return refusal
