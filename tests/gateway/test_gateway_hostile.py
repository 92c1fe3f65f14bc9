"""What strangers send is refused, and the gateway goes on answering."""

from __future__ import annotations

import httpx

from bench.hostile_http import cases, hostile
from tests.gateway.conftest import StartGateway
from tests.server_process import ServerProcess


def test_a_thousand_hostile_requests_are_refused(start_gateway: StartGateway, server: ServerProcess) -> None:
    gateway = start_gateway(server.address, "--header-timeout=1s", "--body-timeout=1s")
    outcomes = hostile(gateway.address)
    assert sum(outcomes.values()) == len(list(cases(7))) >= 1000
    assert gateway.process.poll() is None
    assert httpx.get(f"{gateway.url}/v1/status").status_code == 200
    assert httpx.get(f"{gateway.url}/readyz").status_code == 200
    seen = [line["status"] for line in gateway.events("request")]
    assert not [status for status in seen if status >= 500]
