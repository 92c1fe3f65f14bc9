"""A gateway before a server, for all tests that go in through HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gateway_process import GatewayProcess, build_gateway
from tests.server_process import ServerProcess

StartGateway = Callable[..., GatewayProcess]


@pytest.fixture(scope="session")
def gateway_binary() -> Path:
    """The program, built once."""
    return build_gateway()


@pytest.fixture(scope="session")
def gateway(gateway_binary: Path, server: ServerProcess) -> Iterator[GatewayProcess]:
    """One gateway before the session's server, for all tests that leave both as they were: `gateway.url`, `gateway.server`."""
    running = GatewayProcess(server.address)
    yield running
    running.stop()


@pytest.fixture
def start_gateway(gateway_binary: Path) -> Iterator[StartGateway]:
    """Starts gateways of a test's own: `start_gateway(server_address, *flags, env=None)`. Each must end cleanly."""
    started: list[GatewayProcess] = []

    def start(server: str, *flags: str, **options: dict[str, str]) -> GatewayProcess:
        running = GatewayProcess(server, *flags, **options)
        started.append(running)
        return running

    yield start
    for running in started:
        if running.process.poll() is None:
            running.stop()
