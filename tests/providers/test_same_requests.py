"""What is sent is what the vendor's library would send: address, headers and body, but for what it says of its own retries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2

from tests.providers.loopback import Script
from tests.providers.provider_clients import PROMPT, client, collect, within

OWN = {"x-stainless-retry-count", "x-stainless-read-timeout", "x-stainless-timeout", "idempotency-key", "content-length"}


async def test_the_library_sends_the_same(kind: str, vendor: Callable[[Script], Any]) -> None:
    server = vendor(lambda number, text: "Hello there")
    provider = client(kind, server.base_url)
    await provider.complete("m", PROMPT, within(5))
    await collect(provider.stream("m", PROMPT, within(5)))
    for body in list(server.requests):
        response = await provider._client.post(provider._wire.path, cast_to=httpx2.Response, body=body)
        assert response.status_code == 200
    ours, theirs = server.headers[:2], server.headers[2:]
    for mine, wanted in zip(ours, theirs, strict=True):
        assert {name: value for name, value in mine.items() if name not in OWN} == {
            name: value for name, value in wanted.items() if name not in OWN
        }
    assert server.requests[:2] == server.requests[2:]
