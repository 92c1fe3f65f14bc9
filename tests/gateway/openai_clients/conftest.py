"""A server with small models, skills and a vendor on loopback, behind a gateway: what OpenAI's clients are pointed at."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import pytest_asyncio

from tests.gateway_process import GatewayProcess
from tests.providers.loopback import OpenAIServer, Reply
from tests.server_process import ServerProcess

CONFIG = """
[server]
grace_s = 5
[generation]
kv_cache_bytes = 33554432
max_sequences = 16
max_waiting = 64
[providers.vendor]
kind = "openai"
base_url = "{url}"
api_key_env = "VENDOR_KEY"
prices = {{ "m-1" = {{ input_per_million_usd = 1.0, output_per_million_usd = 10.0 }} }}
[skills.writer]
task = "text-generation"
teacher = "vendor/m-1"
[skills.thinker]
task = "text-generation"
teacher_logprobs = 3
teacher = "vendor/o3-mini"
fallbacks = ["vendor/m-1"]
[skills.scribe]
task = "text-generation"
student_model = "scripted"
[skills.intent]
task = "text-classification"
labels = ["card", "password"]
teacher = "vendor/m-1"
[skills.sorter]
task = "text-classification"
labels = ["card", "transfer", "password"]
student_model = "embedder"
[skills.vectors]
task = "feature-extraction"
student_model = "embedder"
[skills.relevance]
task = "text-ranking"
student_model = "ranker"
"""


@dataclass(slots=True)
class Site:
    """What a test talks to; `vendor.requests` is what the vendor was asked."""

    gateway: GatewayProcess
    server: ServerProcess
    vendor: OpenAIServer

    @property
    def base_url(self) -> str:
        """For any client of OpenAI's API."""
        return f"{self.gateway.url}/v1"


def _script(_number: int, text: str) -> Reply | str:
    if "weather" in text:
        return Reply(calls=[("call_1", "weather", '{"city": "Oslo"}'), ("call_2", "weather", '{"city": "Rome"}')])
    if "break" in text:
        return Reply("one two three four", error_after=2)
    if "refuse" in text:
        return Reply(401)
    if "likely" in text:
        return Reply("t t", logprobs=[-0.125, -0.25])
    if "JSON" in text:
        return '{"city": "Oslo", "days": 3}'
    return "card" if "card" in text else f"echo {text}"


@pytest.fixture(scope="session")
def site(gateway_binary: Path, small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One for all tests here; they leave it as it was."""
    vendor = OpenAIServer(_script)
    server = ServerProcess(
        tmp_path_factory.mktemp("openai"), CONFIG.format(url=vendor.base_url), models=small_models, env={"VENDOR_KEY": "none"}
    )
    try:
        gateway = GatewayProcess(server.wait_ready())
        yield Site(gateway, server, vendor)
        gateway.stop()
    finally:
        server.stop(allow_errors=True)
        vendor.close()


@pytest.fixture
def client(site: Site) -> Iterator[openai.OpenAI]:
    """OpenAI's own, as its documentation shows it, without repeats: an error is to be seen."""
    with openai.OpenAI(base_url=site.base_url, api_key="none", max_retries=0) as one:
        yield one


@pytest_asyncio.fixture
async def aclient(site: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=site.base_url, api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture
def http(site: Site) -> Iterator[httpx.Client]:
    """What no SDK would send."""
    with httpx.Client(base_url=site.base_url, timeout=30) as one:
        yield one
