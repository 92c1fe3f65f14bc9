"""Providers of both formats as tests make them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from server.providers.base import Part, Prompt
from server.providers.make import make_providers
from server.providers.remote import RemoteProvider
from server.settings import PriceConfig, ProviderConfig

KEY = "sk-test-key"
QUESTION = "Where is my card?"
PROMPT = Prompt.of("Answer.", QUESTION, 16)
PRICE = PriceConfig(input_per_million_usd=1.0, output_per_million_usd=10.0)

MADE: list[RemoteProvider] = []  # closed by conftest.py when a test ends


def client(kind: str, base_url: str, **more: Any) -> RemoteProvider:
    settings: dict[str, Any] = {"timeout_s": 10.0, "max_retries": 2, "prices": {"m": PRICE}, "api_key_env": "LOOPBACK_KEY"}
    config = ProviderConfig(kind=kind, base_url=base_url, **{**settings, **more})  # type: ignore[arg-type]
    provider = make_providers({"loop": config}, environ={"LOOPBACK_KEY": KEY})["loop"]
    assert isinstance(provider, RemoteProvider)
    MADE.append(provider)
    return provider


def within(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds


async def ask(provider: RemoteProvider, prompt: Prompt = PROMPT, deadline_s: float | None = 10.0) -> Any:
    """One answer from a provider that is closed afterwards."""
    try:
        return await provider.complete("m", prompt, within(deadline_s))
    finally:
        await provider.close()


async def collect(stream: AsyncGenerator[Part, None]) -> list[Part]:
    return [part async for part in stream]


async def read(provider: RemoteProvider, prompt: Prompt = PROMPT, deadline_s: float | None = 10.0) -> list[Part]:
    """One stream, whole, from a provider that is closed afterwards."""
    try:
        return await collect(provider.stream("m", prompt, within(deadline_s)))
    finally:
        await provider.close()
