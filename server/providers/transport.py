"""HTTP/1.1 for the vendors' libraries: what their client (httpx2) sends, over asyncio's own connections.

httpx2 takes a transport of one's own by design. Its standard one costs some 0.6 ms of processor time a request, more than everything else
on the way of an answer; this one a fifth of that. It speaks what APIs speak: requests with a body in one piece; answers with a length, in
chunks, or until the connection closes. Requests are written once: whatever breaks is raised, as httpx2 would raise it.

Import it in a thread, at a client's first use: it imports httpx2.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2

# Of an answer's status line and headers, and of a line between chunks.
_HEAD_BYTES = 64 << 10
# What is received and not yet read, before the vendor has to wait.
_BUFFER_BYTES = 1 << 20
_BODYLESS = frozenset({204, 304})


class Connection(asyncio.Protocol):
    """One connection, which carries one request at a time. Only its own transport and `exchange` use it."""

    def __init__(self) -> None:
        self.reusable = False  # the last answer was read to its end, and the vendor keeps the connection
        self.idle_since = 0.0
        self._transport: Any = None
        self._buffer = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False  # the vendor closed
        self._broken: BaseException | None = None
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._buffer += data
        if len(self._buffer) > _BUFFER_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """See asyncio.Protocol."""
        self._ended = True
        self.reusable = False
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._ended = True
        self.reusable = False
        self._broken = error
        self._wake()

    def usable(self) -> bool:
        """Whether another request may be sent: bytes that nobody asked for are a reason against it too."""
        return self.reusable and not self._ended and not self._buffer and not self._transport.is_closing()

    def send(self, data: bytes) -> None:
        """Writes a whole request."""
        self.reusable = False
        self._transport.write(data)

    def abort(self) -> None:
        """Closes at once."""
        self._ended = True
        self.reusable = False
        self._transport.abort()

    def finish(self, keep: bool) -> None:
        """The answer was read to its end."""
        self.reusable = keep and not self._ended
        if not self.reusable:
            self._transport.close()

    async def head(self) -> tuple[int, list[tuple[bytes, bytes]], bool]:
        """Status, headers and whether the vendor speaks HTTP/1.1; interim answers (1xx) are passed over."""
        while True:
            while (end := self._buffer.find(b"\r\n\r\n")) < 0:
                if len(self._buffer) > _HEAD_BYTES:
                    raise httpx2.RemoteProtocolError("headers without an end")
                if not await self._more():
                    raise httpx2.RemoteProtocolError("the connection closed before an answer came")
            lines = bytes(self._buffer[:end]).split(b"\r\n")
            del self._buffer[: end + 4]
            version, _, rest = lines[0].partition(b" ")
            code = rest[:3]
            if version not in (b"HTTP/1.1", b"HTTP/1.0") or not code.isdigit() or len(code) != 3:
                raise httpx2.RemoteProtocolError("a status line that is none")
            headers = []
            for line in lines[1:]:
                name, colon, value = line.partition(b":")
                if not colon or not name or name != name.strip():
                    raise httpx2.RemoteProtocolError("a header that is none")
                headers.append((name, value.strip()))
            if not 100 <= int(code) < 200:
                return int(code), headers, version == b"HTTP/1.1"

    async def some(self, most: int) -> bytes:
        """The next bytes, at most so many; none where the vendor closed."""
        if not self._buffer and not await self._more():
            return b""
        found = bytes(self._buffer[:most])
        del self._buffer[:most]
        if self._paused and len(self._buffer) < _BUFFER_BYTES // 2:
            self._paused = False
            self._transport.resume_reading()
        return found

    async def line(self) -> bytes:
        """The next line, without its end."""
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > _HEAD_BYTES:
                raise httpx2.RemoteProtocolError("a line without an end")
            if not await self._more():
                raise httpx2.RemoteProtocolError("the connection closed inside an answer")
        found = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return found

    async def _more(self) -> bool:
        """Waits for bytes; False where none follow."""
        if self._broken is not None:
            raise httpx2.ReadError(type(self._broken).__name__)
        if self._ended:
            return False
        size = len(self._buffer)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if len(self._buffer) > size:
            return True
        if self._broken is not None:
            raise httpx2.ReadError(type(self._broken).__name__)
        return False

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Body(httpx2.AsyncByteStream):
    """An answer's body, as it comes. Closed before its end, it ends the connection."""

    def __init__(self, connection: Connection, transport: Transport, framing: int | None, keep: bool) -> None:
        self._connection = connection
        self._transport = transport
        self._framing = framing  # its length; CHUNKED; None: until the connection closes
        self._keep = keep
        self._done = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """See httpx2.AsyncByteStream."""
        try:
            if self._framing == CHUNKED:
                async for piece in self._chunks():
                    yield piece
            else:
                left = self._framing
                while left is None or left > 0:
                    piece = await self._connection.some(_BUFFER_BYTES if left is None else left)
                    if not piece:
                        if left is None:
                            break
                        raise httpx2.RemoteProtocolError("the connection closed inside an answer")
                    left = None if left is None else left - len(piece)
                    yield piece
        except BaseException:
            self._finish(whole=False)
            raise
        self._finish(whole=True)

    async def aclose(self) -> None:
        """See httpx2.AsyncByteStream."""
        self._finish(whole=self._framing == 0)

    async def _chunks(self) -> AsyncIterator[bytes]:
        connection = self._connection
        while True:
            size = (await connection.line()).partition(b";")[0].strip()
            if not size or len(size) > 12 or any(digit not in b"0123456789abcdefABCDEF" for digit in size):
                raise httpx2.RemoteProtocolError("a chunk without its size")
            left = int(size, 16)
            if not left:
                while await connection.line():  # trailers
                    pass
                return
            while left:
                piece = await connection.some(left)
                if not piece:
                    raise httpx2.RemoteProtocolError("the connection closed inside an answer")
                left -= len(piece)
                yield piece
            if await connection.line():
                raise httpx2.RemoteProtocolError("a chunk longer than its size")

    def _finish(self, *, whole: bool) -> None:
        if self._done:
            return
        self._done = True
        if whole:
            self._connection.finish(self._keep)
        else:
            self._connection.abort()
        self._transport.give_back(self._connection)


CHUNKED = -1


class Transport(httpx2.AsyncBaseTransport):
    """Connections to one vendor, kept for `keepalive_s` after their last use. Used on one event loop."""

    def __init__(self, tls: ssl.SSLContext | None, connect_timeout_s: float, keepalive_s: float) -> None:
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._keepalive_s = keepalive_s
        self._urls: dict[str, httpx2.URL] = {}
        self._origin: tuple[str, bytes, int | None] | None = None
        self._idle: deque[Connection] = deque()
        self._all: set[Connection] = set()

    async def post(self, url: str, headers: Mapping[str, str], content: bytes) -> httpx2.Response:
        """The response to one request as it is, its body still to be read."""
        known = self._urls.get(url)
        if known is None:
            known = self._urls[url] = httpx2.URL(url)
        return await self.handle_async_request(httpx2.Request("POST", known, headers=headers, content=content))

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """See httpx2.AsyncBaseTransport."""
        body = await request.aread()
        lines = [request.method.encode(), b" ", request.url.raw_path, b" HTTP/1.1\r\n"]
        for name, value in request.headers.raw:
            lines += [name, b": ", value, b"\r\n"]
        lines += [b"\r\n", body]
        origin = (request.url.scheme, request.url.raw_host, request.url.port)
        if origin != self._origin:  # connections are of one address
            self._drop_idle()
            self._origin = origin
        connection = self._take() or await self._connect(request)
        self._all.add(connection)
        try:
            connection.send(b"".join(lines))
            status, headers, modern = await connection.head()
            framing, keep = framing_of(status, headers, modern)
        except BaseException:
            connection.abort()
            self._all.discard(connection)
            raise
        return httpx2.Response(status, headers=headers, stream=Body(connection, self, framing, keep), request=request)

    async def aclose(self) -> None:
        """See httpx2.AsyncBaseTransport."""
        for connection in list(self._all):
            connection.abort()
        self._all.clear()
        self._idle.clear()
        await asyncio.sleep(0)  # lets asyncio close the sockets

    def give_back(self, connection: Connection) -> None:
        """The answer that a connection carried has ended."""
        if connection.usable():
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            self._all.discard(connection)

    def _drop_idle(self) -> None:
        while self._idle:
            old = self._idle.popleft()
            old.abort()
            self._all.discard(old)

    def _take(self) -> Connection | None:
        """The connection used last, so that those that are not needed grow old."""
        now = time.monotonic()
        while self._idle and (not self._idle[0].usable() or now - self._idle[0].idle_since > self._keepalive_s):
            old = self._idle.popleft()
            old.abort()
            self._all.discard(old)
        while self._idle:
            connection = self._idle.pop()
            if connection.usable():
                return connection
            self._all.discard(connection)
        return None

    async def _connect(self, request: httpx2.Request) -> Connection:
        url = request.url
        secure = url.scheme == "https"
        assert not secure or self._tls is not None, "a client of http:// was sent to https://"
        try:
            async with asyncio.timeout(self._connect_timeout_s) as scope:
                _, connection = await asyncio.get_running_loop().create_connection(
                    Connection,
                    url.raw_host.decode("ascii"),
                    url.port or (443 if secure else 80),
                    ssl=self._tls if secure else None,
                    server_hostname=url.raw_host.decode("ascii") if secure else None,
                )
        except TimeoutError as error:
            if scope.expired():
                raise httpx2.ConnectTimeout("no connection in time", request=request) from None
            raise httpx2.ConnectError(type(error).__name__, request=request) from None
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError; UnicodeError comes of odd host names
            raise httpx2.ConnectError(type(error).__name__, request=request) from None
        return connection


def framing_of(status: int, headers: list[tuple[bytes, bytes]], modern: bool) -> tuple[int | None, bool]:
    """How the body ends (its length, CHUNKED, or None: with the connection), and whether the connection outlives it (RFC 9112, 6.3)."""
    length: int | None = None
    coding = b""
    keep = modern
    for name, value in headers:
        lowered = name.lower()
        if lowered == b"content-length":
            if not value.isdigit() or len(value) > 15 or (length is not None and length != int(value)):
                raise httpx2.RemoteProtocolError("a length that is none")
            length = int(value)
        elif lowered == b"transfer-encoding":
            coding = value.lower()
        elif lowered == b"connection":
            options = {option.strip().lower() for option in value.split(b",")}
            keep = (keep or b"keep-alive" in options) and b"close" not in options
    if status in _BODYLESS:
        return 0, keep
    if coding:
        if coding != b"chunked":
            raise httpx2.RemoteProtocolError("a transfer coding that is not known")
        return CHUNKED, keep
    return (length, keep) if length is not None else (None, False)
