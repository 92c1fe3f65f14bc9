from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from tests.providers.loopback import AnthropicServer, Loopback, OpenAIServer, Script
from tests.providers.provider_clients import MADE


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first repeat comes after some ten milliseconds."""
    monkeypatch.setattr("server.providers.failures._FIRST_DELAY_S", 0.02)


@pytest_asyncio.fixture(autouse=True)
async def providers_close() -> AsyncIterator[None]:
    yield
    while MADE:
        await MADE.pop().close()


@pytest.fixture
def started() -> Iterator[list[Loopback]]:
    """Servers that are closed when the test ends."""
    servers: list[Loopback] = []
    yield servers
    for one in servers:
        one.close()


@pytest.fixture
def openai_server(started: list[Loopback]) -> Callable[[Script], OpenAIServer]:
    """Starts servers of OpenAI's format: `openai_server(script)`."""

    def start(script: Script) -> OpenAIServer:
        server = OpenAIServer(script)
        started.append(server)
        return server

    return start


@pytest.fixture(params=["openai", "anthropic"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def vendor(kind: str, started: list[Loopback]) -> Callable[[Script], Any]:
    """Starts servers of both formats in turn: `vendor(script)`."""

    def start(script: Script) -> Loopback:
        server = OpenAIServer(script) if kind == "openai" else AnthropicServer(script)
        started.append(server)
        return server

    return start
