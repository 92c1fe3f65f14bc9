"""The OpenAI client against a real HTTP server that fails in every way that servers fail."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from server.core import Usage
from server.errors import DeadlineExceeded, Overloaded, ProviderUnavailable
from server.providers.base import Prompt
from server.providers.breaker import Breaker
from server.providers.openai import OpenAIProvider
from server.providers.prices import Price
from server.settings import PriceConfig, ProviderConfig
from tests.providers.loopback import Loopback, Reply, completion

Start = Callable[[Callable[[int, str], "Reply | str"]], Loopback]
QUESTION = "Where is my card?"
PROMPT = Prompt.of("Answer.", QUESTION, 16)
KEY = "sk-test-key"


def provider(base_url: str, **more: Any) -> OpenAIProvider:
    settings: dict[str, Any] = {"timeout_s": 5.0, "max_retries": 2, "prices": {"m": PriceConfig(input_per_million_usd=0.15)}}
    config = ProviderConfig(base_url=base_url, api_key_env="LOOPBACK_KEY", **{**settings, **more})
    return OpenAIProvider("loop", config, environ={"LOOPBACK_KEY": KEY})


async def ask(client: OpenAIProvider, deadline_s: float | None = 10.0) -> Any:
    deadline = None if deadline_s is None else time.monotonic() + deadline_s
    try:
        return await client.complete("m", PROMPT, deadline)
    finally:
        await client.close()


async def test_an_answer_comes_with_usage_cost_and_source(loopback: Start) -> None:
    server = loopback(lambda number, text: f"echo {text}")
    found = await ask(provider(server.base_url))
    assert (found.text, found.usage, found.source_model, found.attempts) == (f"echo {QUESTION}", Usage(100, 10), "real-model-1", 1)
    assert found.cost_micro_usd == 15, "100 tokens at 0.15 USD a million; output has no price here"
    assert server.requests[0]["messages"][0]["content"] == "Answer."
    assert server.requests[0]["max_tokens"] == 16
    assert server.authorizations == [f"Bearer {KEY}"]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
async def test_what_was_not_charged_is_asked_again(loopback: Start, status: int) -> None:
    server = loopback(lambda number, text: Reply(status) if number < 2 else "fine")
    found = await ask(provider(server.base_url))
    assert found.text == "fine" and found.attempts == 3 and len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_what_cannot_help_is_not_asked_again(loopback: Start, status: int) -> None:
    server = loopback(lambda number, text: Reply(status))
    with pytest.raises(ProviderUnavailable) as caught:
        await ask(provider(server.base_url))
    assert len(server.requests) == 1
    assert str(status) in caught.value.message
    assert KEY not in caught.value.message and QUESTION not in caught.value.message, "the vendor's words may repeat both"


async def test_retries_end(loopback: Start) -> None:
    server = loopback(lambda number, text: Reply(503))
    with pytest.raises(ProviderUnavailable, match="503"):
        await ask(provider(server.base_url))
    assert len(server.requests) == 3


async def test_retry_after_is_obeyed_and_passed_on(loopback: Start) -> None:
    server = loopback(lambda number, text: Reply(429, headers={"retry-after-ms": "400"}) if number == 0 else "fine")
    started = time.monotonic()
    assert (await ask(provider(server.base_url))).text == "fine"
    assert time.monotonic() - started >= 0.4
    long = loopback(lambda number, text: Reply(429, headers={"retry-after": "120"}))
    started = time.monotonic()
    with pytest.raises(ProviderUnavailable) as caught:
        await ask(provider(long.base_url))
    assert caught.value.retry_after_s == 120 and time.monotonic() - started < 5, "longer than anyone waits: the next candidate is due"
    assert len(long.requests) == 1


async def test_a_stall_ends_at_the_deadline_and_is_not_paid_twice(loopback: Start) -> None:
    server = loopback(lambda number, text: Reply(hold=True))
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        await ask(provider(server.base_url), deadline_s=1.5)
    assert caught.value.metadata["stage"] == "provider"
    assert time.monotonic() - started < 3
    server = loopback(lambda number, text: Reply(hold=True))
    with pytest.raises(ProviderUnavailable, match="timeout_s"):
        await ask(provider(server.base_url, timeout_s=0.5))
    assert len(server.requests) == 1, "it was sent; it may have been charged"


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body="this is not JSON"),
        Reply(body="<html>hello</html>", headers={"content-type": "text/html"}),
        Reply(body="{}"),
        Reply(body='{"choices": []}'),
        Reply(body='{"choices": [{"message": {}}]}'),
        Reply(body=completion(None)),
        Reply(body="[1, 2"),
        Reply(drop=True),
    ],
    ids=["text", "html", "empty", "no-choices", "no-message", "no-text", "half", "dropped"],
)
async def test_garbage_is_a_failed_provider(loopback: Start, reply: Reply) -> None:
    server = loopback(lambda number, text: reply)
    with pytest.raises(ProviderUnavailable):
        await ask(provider(server.base_url))
    assert len(server.requests) == 1


async def test_missing_usage_is_estimated(loopback: Start) -> None:
    server = loopback(lambda number, text: Reply(body=completion("fine", usage=False)))
    found = await ask(provider(server.base_url))
    assert found.usage.input > 0 and found.usage.output > 0 and found.cost_micro_usd > 0


async def test_nobody_listening_is_unavailable() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ProviderUnavailable, match="cannot be reached"):
        await ask(provider(base_url))


async def test_a_provider_that_keeps_failing_is_left_alone(loopback: Start) -> None:
    server = loopback(lambda number, text: Reply(500))
    client = provider(server.base_url, max_retries=0)
    for _ in range(5):
        with pytest.raises(ProviderUnavailable):
            await client.complete("m", PROMPT, None)
    assert client.open_circuit()
    with pytest.raises(ProviderUnavailable, match="again and again") as caught:
        await client.complete("m", PROMPT, None)
    assert caught.value.retry_after_s
    assert len(server.requests) == 5
    await client.close()


def test_the_breaker_lets_one_probe_through() -> None:
    now = [100.0]
    breaker = Breaker(threshold=2, rest_s=5, clock=lambda: now[0])
    breaker.failed()
    assert breaker.admits()
    breaker.failed()
    assert not breaker.admits()
    now[0] += 5
    assert breaker.admits() and not breaker.admits(), "one probe, the others wait"
    breaker.succeeded()
    assert breaker.admits() and breaker.admits()


async def test_concurrency_is_bounded_and_the_queue_too(loopback: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = loopback(lambda number, text: Reply(hold=True))
    client = provider(server.base_url, max_concurrent=2, timeout_s=20.0)
    monkeypatch.setattr("server.providers.remote._WAITING_PER_SLOT", 3)
    tasks = [asyncio.ensure_future(client.complete("m", PROMPT, time.monotonic() + 20)) for _ in range(6)]
    while len(server.requests) < 2:
        await asyncio.sleep(0.01)
    with pytest.raises(Overloaded) as caught:
        await client.complete("m", PROMPT, None)
    assert caught.value.retry_after_s
    assert len(server.requests) == 2
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    server.release.set()
    await client.close()


async def test_the_key_is_nowhere_but_in_the_request(loopback: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = loopback(lambda number, text: Reply(401))
    client = provider(server.base_url)
    with pytest.raises(ProviderUnavailable) as caught:
        await ask(client)
    assert KEY not in repr(client) + repr(vars(client)["_config"]) + str(caught.value) + repr(caught.value.metadata)
    assert KEY not in caplog.text
    chain = caught.value
    assert chain.__cause__ is None and chain.__suppress_context__, "the library's exception, which holds the request, is not shown"


def test_costs_are_whole_and_never_below_the_bill() -> None:
    assert Price(0.15, 0.6).cost_micro_usd(Usage(1000, 100)) == 210
    assert Price(0.15, 0.6).cost_micro_usd(Usage(1, 0)) == 1
    assert Price(3.0, 15.0).cost_micro_usd(Usage(0, 0)) == 0
    assert Price(0.1, 0.0).cost_micro_usd(Usage(30, 0)) == 3, "0.1 * 30 is a hair above 3 in floating point"


def test_the_worst_cost_bounds_any_tokenizer() -> None:
    client = provider("http://127.0.0.1:1/v1", prices={"m": PriceConfig(input_per_million_usd=1.0, output_per_million_usd=10.0)})
    worst = client.worst_cost_micro_usd("m", Prompt.of("é" * 10, "x" * 10, 16))
    assert worst is not None and worst >= 30 + 160
    assert client.worst_cost_micro_usd("unknown", PROMPT) is None
