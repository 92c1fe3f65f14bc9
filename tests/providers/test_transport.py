"""HTTP/1.1 in every framing and in any pieces, broken and whole; connections that are kept, and those that are not."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio

from server.providers.transport import Transport
from tests.providers.loopback import OpenAIServer, Reply, Script
from tests.providers.provider_clients import PROMPT, client, collect, within

OK = b"HTTP/1.1 200 OK\r\n"
HELLO = [
    OK + b"content-length: 5\r\n\r\nhello",
    OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\ntrailer: 1\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + OK + b"content-length:5\r\n\r\nhello",
    OK + b"connection: close\r\n\r\nhello",
    b"HTTP/1.0 200 OK\r\n\r\nhello",
]
BROKEN = [
    b"",
    b"HTTP/1.1 200",
    b"SSH-2.0-OpenSSH\r\n\r\n",
    b"HTTP/1.1 2x0 OK\r\n\r\n",
    OK + b"no colon\r\n\r\n",
    OK + b"content-length: -5\r\n\r\nhello",
    OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    OK + b"content-length: 9\r\n\r\nhello",
    OK + b"transfer-encoding: gzip\r\n\r\nhello",
    OK + b"transfer-encoding: chunked\r\n\r\nhello\r\n",
    OK + b"transfer-encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    OK + b"transfer-encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n",
    OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhel",
    OK + b"x: " + b"y" * (70 << 10),
]


class Raw:
    """Answers each connection's requests with the bytes it is given, in pieces of `size`, then closes where `close`."""

    def __init__(self, data: bytes, size: int, close: bool) -> None:
        self.connections = 0
        self.received: list[bytes] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._data, self._size, self._close = data, size, close

    async def start(self, tls: ssl.SSLContext | None = None) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        scheme = "https" if tls else "http"
        return f"{scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/x?a=1"

    async def stop(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)  # asyncio closes the sockets
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                self.received.append(head + await reader.readexactly(length))
                for start in range(0, len(self._data), self._size):
                    writer.write(self._data[start : start + self._size])
                    await writer.drain()
                    if self._size < 100:
                        await asyncio.sleep(0)
                if self._close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Callable[..., Raw]]:
    made: list[Raw] = []

    def make(data: bytes, size: int = 1 << 20, *, close: bool = True) -> Raw:
        made.append(Raw(data, size, close))
        return made[-1]

    yield make
    for one in made:
        await one.stop()


def http(transport: Transport) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=transport, timeout=None, verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("data", HELLO, ids=range(len(HELLO)))
async def test_every_framing_in_any_pieces(serve: Callable[..., Raw], data: bytes, size: int) -> None:
    server = serve(data, size)
    address = await server.start()
    async with http(Transport(None, 5, 30)) as session:
        for number in range(2):
            answer = await session.post(address, content=b"body", headers={"x-n": str(number)})
            assert (answer.status_code, answer.content) == (200, b"hello")
            await asyncio.sleep(0.02)  # the vendor closes without having said so
    assert server.received[0].startswith(b"POST /x?a=1 HTTP/1.1\r\n") and server.received[0].endswith(b"\r\n\r\nbody")
    assert b"x-n: 1" in server.received[1]


@pytest.mark.parametrize("data", BROKEN, ids=range(len(BROKEN)))
async def test_what_is_no_http_is_said_so(serve: Callable[..., Raw], data: bytes) -> None:
    server = serve(data)
    address = await server.start()
    async with http(Transport(None, 5, 30)) as session:
        with pytest.raises(httpx2.TransportError):
            await session.post(address, content=b"body")
        assert not session._transport._all  # type: ignore[attr-defined]


async def test_connections_are_kept_while_they_are_good(serve: Callable[..., Raw]) -> None:
    kept, chatty, closing = serve(HELLO[0], close=False), serve(HELLO[0] + b"more", close=False), serve(HELLO[0])
    for server, connections in ((kept, 1), (chatty, 3), (closing, 3)):
        address = await server.start()
        async with http(Transport(None, 5, 30)) as session:
            for _ in range(3):
                assert (await session.post(address, content=b"body")).content == b"hello"
                await asyncio.sleep(0.02)  # the vendor's farewell arrives
        assert server.connections == connections
    old = serve(HELLO[0], close=False)
    address = await old.start()
    async with http(Transport(None, 5, 0.0)) as session:
        for _ in range(2):
            await session.post(address, content=b"body")
            await asyncio.sleep(0.001)
    assert old.connections == 2, "kept for no time"


async def test_an_answer_that_is_left_ends_its_connection(serve: Callable[..., Raw]) -> None:
    server = serve(OK + b"content-length: 100\r\n\r\nhello", close=False)
    address = await server.start()
    transport = Transport(None, 5, 30)
    async with http(transport) as session:
        async with session.stream("POST", address, content=b"body") as answer:
            assert await anext(answer.aiter_raw()) == b"hello"
        assert not transport._all
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await session.post(address, content=b"body")
        assert not transport._all


async def test_a_slow_reader_holds_the_vendor_back(serve: Callable[..., Raw]) -> None:
    size = 8 << 20
    server = serve(OK + f"content-length: {size}\r\n\r\n".encode() + b"x" * size)
    address = await server.start()
    transport = Transport(None, 5, 30)
    async with http(transport) as session, session.stream("POST", address, content=b"body") as answer:
        await asyncio.sleep(0.1)
        (connection,) = transport._all
        assert len(connection._buffer) < 3 << 20
        assert sum([len(piece) async for piece in answer.aiter_raw()]) == size


async def test_nobody_there_and_nobody_answering() -> None:
    async with http(Transport(None, 5, 30)) as session:
        with pytest.raises(httpx2.ConnectError):
            await session.post("http://127.0.0.1:1/", content=b"")
    with pytest.raises(httpx2.ConnectTimeout):
        async with http(Transport(None, 0.0, 30)) as session:
            await session.post("http://127.0.0.1:1/", content=b"")


async def test_streams_use_their_connection_again(openai_server: Callable[[Script], OpenAIServer]) -> None:
    server = openai_server(lambda number, text: Reply("a b"))
    provider = client("openai", server.base_url)
    for _ in range(3):
        await collect(provider.stream("m", PROMPT, within(10)))
        await provider.complete("m", PROMPT, within(10))
        assert len(provider._client._client._transport._all) == 1
    await provider.close()


def certificate(folder: Path) -> Path:
    """A certificate of 127.0.0.1 that only those trust who are told to."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "vendor")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "vendor.pem"
    plain = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(plain + made.public_bytes(serialization.Encoding.PEM))
    return path


async def test_certificates_are_checked(serve: Callable[..., Raw], tmp_path: Path) -> None:
    pem = certificate(tmp_path)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(pem)
    server = serve(HELLO[0], close=False)
    address = await server.start(ours)
    async with http(Transport(httpx2.create_ssl_context(), 5, 30)) as session:
        with pytest.raises(httpx2.ConnectError):
            await session.post(address, content=b"secret")
    assert not server.received, "nothing was said to a stranger"
    async with http(Transport(ssl.create_default_context(cafile=str(pem)), 5, 30)) as session:
        for _ in range(2):
            assert (await session.post(address, content=b"body")).content == b"hello"
        assert len(server.received) == 2 and server.connections <= 2
        wrong = address.replace("127.0.0.1", "localhost")
        with pytest.raises(httpx2.ConnectError):
            await session.post(wrong, content=b"secret")


async def test_a_proxy_of_the_environment_is_used(openai_server: Callable[[Script], OpenAIServer], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = openai_server(lambda number, text: "by the proxy")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy.base_url.removesuffix("/v1"))
    provider = client("openai", "http://vendor.invalid/v1")
    assert (await provider.complete("m", PROMPT, within(10))).text == "by the proxy"
    await provider.close()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    direct = client("openai", openai_server(lambda number, text: "directly").base_url)
    assert (await direct.complete("m", PROMPT, within(10))).text == "directly"
    await direct.close()
