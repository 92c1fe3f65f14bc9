"""Both formats against vendors that fail in every way that vendors fail: the right error, in time, nothing paid twice."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Callable
from typing import Any

import pytest

from server.errors import DeadlineExceeded, Overloaded, ProviderUnavailable, UnderstudyError
from tests.providers.loopback import Reply, Script, nobody_there
from tests.providers.provider_clients import KEY, PROMPT, QUESTION, ask, client, collect, read, within

Start = Callable[[Script], Any]


async def both(kind: str, base_url: str, **more: Any) -> list[UnderstudyError]:
    """The errors of an answer in one piece and of a stream."""
    errors = []
    for call in (ask, read):
        with pytest.raises(UnderstudyError) as caught:
            await call(client(kind, base_url, **more))
        errors.append(caught.value)
    return errors


@pytest.mark.parametrize("status", [429, 500, 502, 503, 529])
async def test_what_was_not_charged_is_asked_again(kind: str, vendor: Start, status: int) -> None:
    server = vendor(lambda number, text: Reply(status) if number % 3 < 2 else "fine")
    found = await ask(client(kind, server.base_url))
    assert found.text == "fine" and found.attempts == 3 and len(server.requests) == 3
    parts = await read(client(kind, server.base_url))
    assert parts[-1].completion is not None and parts[-1].completion.attempts == 3 and len(server.requests) == 6


@pytest.mark.parametrize("status", [307, 400, 401, 402, 403, 404, 413, 422])
async def test_what_cannot_help_is_not_asked_again(kind: str, vendor: Start, status: int) -> None:
    server = vendor(lambda number, text: Reply(status, headers={"location": "http://127.0.0.1:9/"}))
    for error in await both(kind, server.base_url):
        assert isinstance(error, ProviderUnavailable) and error.metadata["status"] == str(status) and error.spent_micro_usd == 0
        assert KEY not in error.message and QUESTION not in error.message, "the vendor's words may repeat both"
    assert len(server.requests) == 2


async def test_retries_end(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply(503))
    for error in await both(kind, server.base_url):
        assert "503" in error.message
    assert len(server.requests) == 6


async def test_retry_after_is_obeyed_and_passed_on(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply(429, headers={"retry-after-ms": "400"}) if number == 0 else "fine")
    started = time.monotonic()
    assert (await ask(client(kind, server.base_url))).text == "fine"
    assert time.monotonic() - started >= 0.4
    for value in ("120", email.utils.formatdate(time.time() + 121, usegmt=True)):
        long = vendor(lambda number, text, value=value: Reply(429, headers={"retry-after": value}))  # type: ignore[misc]
        started = time.monotonic()
        with pytest.raises(ProviderUnavailable) as caught:
            await ask(client(kind, long.base_url))
        assert caught.value.retry_after_s == pytest.approx(120, abs=2)
        assert time.monotonic() - started < 5, "longer than anyone waits: the next candidate is due"
        assert len(long.requests) == 1


async def test_a_stall_ends_at_the_deadline_and_says_what_it_may_have_cost(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply("late", hold=True))
    for call in (ask, read):
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            await call(client(kind, server.base_url), deadline_s=0.5)
        assert caught.value.metadata["stage"] == "provider"
        assert 0.4 < time.monotonic() - started < 2
        assert caught.value.spent_micro_usd > 160, "16 tokens of output at 10 USD a million, and the input"
    assert len(server.requests) == 2


async def test_nothing_is_sent_after_the_deadline(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: "fine")
    assert (await ask(client(kind, server.base_url))).text == "fine"
    for call in (ask, read):
        with pytest.raises(DeadlineExceeded) as caught:
            await call(client(kind, server.base_url), deadline_s=-1)
        assert caught.value.spent_micro_usd == 0
    assert len(server.requests) == 1


async def test_timeouts_are_not_asked_again_because_they_may_be_charged(kind: str, vendor: Start) -> None:
    silent = vendor(lambda number, text: Reply("late", hold=True))
    with pytest.raises(ProviderUnavailable, match=r"timeout_s = 0\.3") as caught:
        await ask(client(kind, silent.base_url, timeout_s=0.3))
    assert caught.value.spent_micro_usd > 160
    before = vendor(lambda number, text: Reply("a b c", stall_after=0))
    for server in (silent, before):
        with pytest.raises(ProviderUnavailable, match=r"first_token_timeout_s = 0\.3") as caught:
            await read(client(kind, server.base_url, first_token_timeout_s=0.3))
        assert 0 < caught.value.spent_micro_usd < 160, "the input, and no output"
    assert len(silent.requests) == 2 and len(before.requests) == 1
    between = vendor(lambda number, text: Reply("a b c", stall_after=2))
    for name, setting in (("between_tokens_timeout_s", 0.3), ("timeout_s", 0.3)):
        seen = []
        with pytest.raises(ProviderUnavailable, match=rf"{name} = 0\.3") as caught:
            async for part in client(kind, between.base_url, **{name: setting}).stream("m", PROMPT, within(10)):
                seen.append(part.text)
        assert seen == ["a ", "b "], "what came was delivered"
        assert caught.value.spent_micro_usd >= 100 / 10 + 10
    assert len(between.requests) == 2


async def test_the_deadline_holds_between_tokens(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply("a b c", stall_after=1))
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        await read(client(kind, server.base_url), deadline_s=0.5)
    assert time.monotonic() - started < 2 and caught.value.spent_micro_usd > 0


@pytest.mark.parametrize("cut", [0, 1, 2])
async def test_a_cut_stream_is_a_failure_with_its_cost(kind: str, vendor: Start, cut: int) -> None:
    server = vendor(lambda number, text: Reply("a b c", cut_after=cut))
    seen = []
    with pytest.raises(ProviderUnavailable) as caught:
        async for part in client(kind, server.base_url).stream("m", PROMPT, within(10)):
            seen.append(part.text)
    assert seen == ["a ", "b "][:cut]
    assert caught.value.spent_micro_usd > 0
    assert len(server.requests) == 1, "it was sent, and may be charged"


async def test_a_stream_that_stops_without_a_word_why_is_cut(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply("a b c", finish=None))
    with pytest.raises(ProviderUnavailable, match="cut its answer off"):
        await read(client(kind, server.base_url))


async def test_zero_tokens_are_a_failure(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply(""))
    for error in await both(kind, server.base_url):
        assert isinstance(error, ProviderUnavailable) and "nothing at all" in error.message
        assert error.spent_micro_usd == 200, "the vendor counted 100 and 10"
    thinking = vendor(lambda number, text: Reply("", thinking="hm", finish="length"))
    for error in await both(kind, thinking.base_url):
        assert "max_tokens" in error.message
    assert len(server.requests) == len(thinking.requests) == 2


async def test_an_answer_that_the_vendor_stopped_is_not_delivered(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply("so", finish="content_filter"))
    for error in await both(kind, server.base_url):
        assert isinstance(error, ProviderUnavailable) and "stopped its answer" in error.message and error.spent_micro_usd > 0


async def test_an_error_inside_a_stream_is_repeated_before_the_first_token_and_never_after(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply("a b c", error_after=0, error_type="overloaded_error") if number == 0 else "fine")
    parts = await read(client(kind, server.base_url))
    assert "".join(part.text for part in parts) == "fine" and len(server.requests) == 2
    later = vendor(lambda number, text: Reply("a b c", error_after=1, error_type="overloaded_error"))
    seen = []
    with pytest.raises(ProviderUnavailable) as caught:
        async for part in client(kind, later.base_url).stream("m", PROMPT, within(10)):
            seen.append(part.text)
    assert seen == ["a "] and len(later.requests) == 1 and caught.value.spent_micro_usd > 0
    assert caught.value.metadata["vendor_type"] == "overloaded_error"


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body="this is not JSON"),
        Reply(body="<html>hello</html>", headers={"content-type": "text/html"}),
        Reply(body="{}"),
        Reply(body="[1, 2"),
        Reply(body="[]"),
        Reply(body='"text"'),
        Reply(body='{"choices": []}'),
        Reply(body='{"choices": [{"message": {}}]}'),
        Reply(body='{"choices": [{"message": {"content": 7}}]}'),
        Reply(body='{"content": 3}'),
        Reply(body='{"content": [{"type": "text"}]}'),
        Reply(body='{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": -1}}'),
        Reply(raw=b"\xff\xfe\x00garbage"),
        Reply(raw=b"data: \xff\xfe\n\n"),
        Reply(raw=b"data: {\n\n"),
        Reply(raw=b"data: 7\n\n"),
        Reply(raw=b'data: {"choices": [7]}\n\n'),
        Reply(raw=b'event: content_block_delta\ndata: {"type": "content_block_delta", "index": 3, "delta": 4}\n\n'),
        Reply(raw=b'data: {"choices": [{"delta": {"content": 7}}]}\n\n'),
        Reply(drop=True),
    ],
    ids=lambda reply: (reply.body or (reply.raw or b"dropped").decode(errors="replace"))[:24],
)
async def test_garbage_is_a_failed_provider(kind: str, vendor: Start, reply: Reply) -> None:
    server = vendor(lambda number, text: reply)
    for error in await both(kind, server.base_url):
        assert type(error) is ProviderUnavailable
    assert len(server.requests) == 2


async def test_nobody_listening_is_unavailable_and_costs_nothing(kind: str) -> None:
    for error in await both(kind, nobody_there(), max_retries=1):
        assert isinstance(error, ProviderUnavailable) and "cannot be reached" in error.message and error.spent_micro_usd == 0


async def test_the_circuit_opens_and_closes_again(kind: str, vendor: Start) -> None:
    healthy = False
    server = vendor(lambda number, text: "fine" if healthy else Reply(500))
    provider = client(kind, server.base_url, max_retries=0, circuit_failures=3, circuit_rest_s=0.3)
    for _ in range(3):
        with pytest.raises(ProviderUnavailable, match="500"):
            await provider.complete("m", PROMPT, None)
    assert provider.open_circuit() and provider.health().circuit == "open"
    for _ in range(4):
        with pytest.raises(ProviderUnavailable, match="again and again") as caught:
            await provider.complete("m", PROMPT, None)
        assert caught.value.retry_after_s
    assert len(server.requests) == 3, "it is left alone"
    while provider.health().circuit == "open":
        await asyncio.sleep(0.02)
    with pytest.raises(ProviderUnavailable, match="500"):
        await collect(provider.stream("m", PROMPT, within(10)))
    assert len(server.requests) == 4 and provider.health().circuit == "open", "the probe failed"
    healthy = True
    while provider.health().circuit == "open":
        await asyncio.sleep(0.02)
    assert (await provider.complete("m", PROMPT, None)).text == "fine"
    assert not provider.open_circuit() and provider.health().circuit == "closed"
    await provider.close()


async def test_streams_that_are_always_cut_open_the_circuit(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply("a b c", cut_after=2))
    provider = client(kind, server.base_url, circuit_failures=3)
    for _ in range(3):
        with pytest.raises(ProviderUnavailable):
            await collect(provider.stream("m", PROMPT, within(10)))
    assert provider.open_circuit() and provider.health().failures == 3
    await provider.close()


async def test_a_stalling_vendor_opens_the_circuit_even_where_only_deadlines_pass(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply("late", hold=True))
    provider = client(kind, server.base_url, circuit_failures=2)
    short = [provider.complete("m", PROMPT, within(0.2)) for _ in range(3)]
    assert all(isinstance(e, DeadlineExceeded) for e in await asyncio.gather(*short, return_exceptions=True))
    assert not provider.open_circuit(), "a caller in a hurry says nothing of the vendor"
    long = [provider.complete("m", PROMPT, within(1.1)) for _ in range(3)]
    assert all(isinstance(e, DeadlineExceeded) for e in await asyncio.gather(*long, return_exceptions=True))
    assert provider.open_circuit()
    await provider.close()


async def test_leaving_a_stream_frees_its_place_and_ends_the_work(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply("a b c d", stall_after=2) if number == 0 else "fine")
    provider = client(kind, server.base_url, max_concurrent=1)
    stream = provider.stream("m", PROMPT, within(10))
    assert (await anext(stream)).text == "a "
    assert provider.health().in_flight == 1
    await stream.aclose()
    assert provider.health().in_flight == 0
    assert provider.aborted_cost_micro_usd("m", PROMPT, "a ") > 0
    assert (await provider.complete("m", PROMPT, within(10))).text == "fine"
    await provider.close()


async def test_a_caller_that_leaves_frees_its_place(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply("late", hold=True) if number == 0 else "fine")
    provider = client(kind, server.base_url, max_concurrent=1)
    task = asyncio.ensure_future(provider.complete("m", PROMPT, None))
    await server.arrived(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await provider.complete("m", PROMPT, within(10))).text == "fine"
    assert provider.health().in_flight == 0
    await provider.close()


async def test_concurrency_is_bounded_and_the_queue_too(kind: str, vendor: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = vendor(lambda number, text: Reply("fine", hold=True))
    monkeypatch.setattr("server.providers.remote._WAITING_PER_SLOT", 2)
    provider = client(kind, server.base_url, max_concurrent=2)
    tasks = [asyncio.ensure_future(provider.complete("m", PROMPT, None)) for _ in range(6)]
    await server.arrived(2)
    with pytest.raises(Overloaded) as caught:
        await provider.complete("m", PROMPT, None)
    assert caught.value.retry_after_s
    assert (provider.health().in_flight, provider.health().waiting, len(server.requests)) == (2, 4, 2)
    server.release.set()
    assert [found.text for found in await asyncio.gather(*tasks)] == ["fine"] * 6
    await provider.close()
