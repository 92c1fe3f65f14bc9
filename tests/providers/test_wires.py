"""What is said to vendors, and what is understood of their answers."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from server.core import FinishReason, Format, Image, Message, TokenLogprob, Tool, ToolCall, Usage
from server.errors import InvalidArgument, ProviderUnavailable, Unimplemented
from server.providers.anthropic import AnthropicWire
from server.providers.base import Part, Prompt
from server.providers.openai import OpenAIWire, is_strict
from server.providers.presets import presets
from server.providers.wire import Events
from tests.providers.loopback import OpenAIServer, Reply, Script, vector_of
from tests.providers.provider_clients import PROMPT, QUESTION, ask, client, read, within

Start = Callable[[Script], Any]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
AS_CITY = Format("json_schema", json.dumps(CITY))
WEATHER = Tool("weather", "Tells the weather.", CITY)
TALK = (
    Message("system", "Be brief."),
    Message("user", "What is this?", images=(Image("image/png", b"\x89PNG"), Image(url="https://example.com/a.jpg"))),
    Message("assistant", "", tool_calls=(ToolCall("call_1", "weather", '{"city": "Oslo"}'), ToolCall("call_2", "weather", "{}"))),
    Message("tool", "Rain.", tool_call_id="call_1"),
    Message("tool", "Sun.", tool_call_id="call_2"),
    Message("developer", "In one word."),
    Message("user", "And now?", name="Ada"),
)


def said(wire: str, model: str = "m", *, stream: bool = False, **more: Any) -> dict[str, Any]:
    preset = presets()[wire]
    speaker = AnthropicWire(preset) if preset.wire == "anthropic" else OpenAIWire(preset)
    return speaker.body(model, Prompt(more.pop("messages", PROMPT.messages), 16, **more), stream=stream)


async def test_an_answer_comes_with_usage_cost_and_source(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: f"echo {text}")
    found = await ask(client(kind, server.base_url))
    assert (found.text, found.usage, found.source_model, found.attempts) == (f"echo {QUESTION}", Usage(100, 10), "real-model-1", 1)
    assert found.cost_micro_usd == 200 and found.finish == FinishReason.STOP and 0 < found.first_token_s < 10
    assert server.requests[0]["max_tokens"] == 16 and server.requests[0]["temperature"] == 0 and "stream" not in server.requests[0]


async def test_a_stream_comes_as_it_is_written_and_ends_with_everything(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply("one two three", thinking="hm", stall_after=2))
    provider = client(kind, server.base_url)
    stream = provider.stream("m", PROMPT, within(10))
    assert [(await anext(stream)).text, (await anext(stream)).text] == ["one ", "two "], "while the rest is still to be written"
    server.release.set()
    last = [part async for part in stream]
    assert last[0] == Part("three") and len(last) == 2
    found = last[1].completion
    assert found is not None and (found.text, found.usage, found.cost_micro_usd) == ("one two three", Usage(100, 10), 200)
    assert found.source_model == "real-model-1" and found.first_token_s > 0 and provider.health().first_token_p50_s is not None
    await provider.close()


async def test_missing_usage_is_estimated(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply("fine and well", usage=None))
    whole = await ask(client(kind, server.base_url))
    streamed = (await read(client(kind, server.base_url)))[-1].completion
    for found in (whole, streamed):
        assert found is not None and found.usage.input > 5 and 3 <= found.usage.output <= 6 and found.cost_micro_usd > 0


async def test_calls_of_tools_are_whole_streamed_or_not(kind: str, vendor: Start) -> None:
    calls = [("call_1", "weather", '{"city": "Oslo"}'), ("call_2", "weather", '{"city": "Rome"}')]
    server = vendor(lambda number, text: Reply("Look:", calls=calls))
    prompt = Prompt(PROMPT.messages, 16, tools=(WEATHER,))
    whole = await ask(client(kind, server.base_url), prompt)
    parts = await read(client(kind, server.base_url), prompt)
    expected = tuple(ToolCall(*call) for call in calls)
    assert whole.tool_calls == expected and whole.finish == FinishReason.TOOL_CALLS and whole.text == "Look:"
    assert parts[-2] == Part(tool_calls=expected)
    assert parts[-1].completion is not None and parts[-1].completion.tool_calls == expected
    silent = vendor(lambda number, text: Reply(calls=calls[:1]))
    assert (await ask(client(kind, silent.base_url), prompt)).tool_calls == expected[:1]
    assert (await read(client(kind, silent.base_url), prompt))[0] == Part(tool_calls=expected[:1])


async def test_max_tokens_are_a_reason(kind: str, vendor: Start) -> None:
    server = vendor(lambda number, text: Reply("so far", finish="length"))
    assert (await ask(client(kind, server.base_url))).finish == FinishReason.LENGTH


async def test_logprobs_come_where_the_vendor_has_them(openai_server: Callable[[Script], OpenAIServer]) -> None:
    server = openai_server(lambda number, text: Reply("a b", logprobs=[-0.1, -0.2]))
    prompt = Prompt(PROMPT.messages, 16, logprobs=True, top_logprobs=2)
    likely = (("t", -0.1), ("t1", -1.1))
    expected = (TokenLogprob("t", -0.1, likely), TokenLogprob("t", -0.2, (("t", -0.2), ("t1", -1.2))))
    assert (await ask(client("openai", server.base_url), prompt)).logprobs == expected
    last = (await read(client("openai", server.base_url), prompt))[-1].completion
    assert last is not None and last.logprobs == expected
    assert (server.requests[0]["logprobs"], server.requests[0]["top_logprobs"]) == (True, 2)
    assert not {"logprobs", "top_logprobs"} & set(said("openai"))


async def test_embeddings(openai_server: Callable[[Script], OpenAIServer]) -> None:
    server = openai_server(lambda number, text: "")
    provider = client("openai", server.base_url)
    found = await provider.embed("m", ["a", "b"], within(10))
    assert found.vectors.dtype == np.float32 and np.allclose(found.vectors, [vector_of("a"), vector_of("b")])
    assert found.usage == Usage(5) and found.cost_micro_usd == 5 and found.source_model == "real-model-1"
    assert (await provider.embed("m", [], within(10))).vectors.shape[0] == 0
    await provider.close()
    packed = base64.b64encode(np.array([1, 2], "<f4").tobytes()).decode()
    mixed = openai_server(
        lambda number, text: Reply(body=json.dumps({"data": [{"embedding": [3, 4], "index": 1}, {"embedding": packed, "index": 0}]}))
    )
    provider = client("openai", mixed.base_url)
    assert np.array_equal((await provider.embed("m", ["a", "b"], None)).vectors, [[1, 2], [3, 4]])
    for broken in (
        '{"data": []}',
        '{"data": [{"embedding": [1]}, {"embedding": [1, 2]}]}',
        '{"data": [{"embedding": []}, {"embedding": []}]}',
    ):
        server = openai_server(lambda number, text, broken=broken: Reply(body=broken))  # type: ignore[misc]
        with pytest.raises(ProviderUnavailable):
            await client("openai", server.base_url).embed("m", ["a", "b"], within(10))
    await provider.close()
    for kind in ("anthropic", "groq", "deepseek"):
        with pytest.raises(Unimplemented):
            await client(kind, server.base_url).embed("m", ["a"], None)


def test_conversations_for_openai() -> None:
    body = said("openai", messages=TALK, tools=(WEATHER,), stop=("x",), seed=7, top_p=0.5, temperature=None, stream=True)
    system, user, assistant, first, second, developer, last = body["messages"]
    assert (system["content"], developer["role"], last["name"]) == ("Be brief.", "developer", "Ada")
    assert user["content"][0] == {"type": "text", "text": "What is this?"}
    assert user["content"][1]["image_url"]["url"] == "data:image/png;base64,iVBORw=="
    assert user["content"][2]["image_url"]["url"] == "https://example.com/a.jpg"
    assert assistant["content"] is None and assistant["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert (first["tool_call_id"], second["content"]) == ("call_1", "Sun.")
    assert body["tools"][0]["function"]["parameters"] == CITY
    assert (body["stop"], body["seed"], body["top_p"], body["stream_options"]) == (["x"], 7, 0.5, {"include_usage": True})
    assert "temperature" not in body
    assert said("groq", messages=TALK)["messages"][5]["role"] == "system" and "name" not in said("groq", messages=TALK)["messages"][6]


def test_conversations_for_anthropic() -> None:
    body = said("anthropic", "claude-haiku-4-5", messages=TALK, tools=(WEATHER,), stop=("x",), seed=7)
    assert body["system"] == "Be brief.\n\nIn one word."
    user, assistant, results = body["messages"]
    assert user["content"][0]["source"] == {"type": "base64", "media_type": "image/png", "data": "iVBORw=="}
    assert user["content"][1]["source"] == {"type": "url", "url": "https://example.com/a.jpg"}
    assert user["content"][2] == {"type": "text", "text": "What is this?"}
    assert assistant["content"][0] == {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}}
    assert [block["type"] for block in results["content"]] == ["tool_result", "tool_result", "text"], "turns of one role are one"
    assert body["tools"] == [{"name": "weather", "description": "Tells the weather.", "input_schema": CITY}]
    assert body["stop_sequences"] == ["x"] and body["temperature"] == 0 and "seed" not in body
    assert said("anthropic", "claude-haiku-4-5")["messages"] == [{"role": "user", "content": QUESTION}]


def test_models_with_fixed_sampling_are_sent_none() -> None:
    for model in ("gpt-5-mini", "o3", "o4-mini"):
        body = said("openai", model, top_p=0.5)
        assert body["max_completion_tokens"] == 16 and not {"max_tokens", "temperature", "top_p"} & set(body)
    assert said("openai", "gpt-4o")["max_tokens"] == 16
    for model in ("claude-opus-5", "claude-opus-4-7", "claude-sonnet-5-5", "claude-fable-5"):
        assert not {"temperature", "top_p"} & set(said("anthropic", model, top_p=0.5))
    for model in ("claude-haiku-4-5-20251001", "claude-sonnet-4-6", "claude-3-5-haiku-latest"):
        body = said("anthropic", model, top_p=0.5)
        assert body["temperature"] == 0 and "top_p" not in body, "the two together are refused"


async def test_tokens_that_are_none_are_a_failure_of_the_vendor(openai_server: Callable[[Script], OpenAIServer]) -> None:
    body = {"model": "m", "choices": [{"message": {"content": "a"}, "finish_reason": "stop", "logprobs": None}]}
    for token, good in (
        ({"token": "\ud83d", "logprob": -1}, True),
        ({"token": 3, "logprob": -1}, False),
        ({"token": "a"}, False),
        ({"token": "a", "logprob": float("nan")}, False),
        ("a", False),
    ):
        said = {**body, "choices": [{**body["choices"][0], "logprobs": {"content": [token]}}]}  # type: ignore[dict-item]
        server = openai_server(lambda number, text, said=said: Reply(body=json.dumps(said)))  # type: ignore[misc]
        asked = ask(client("openai", server.base_url), Prompt(PROMPT.messages, 16, logprobs=True))
        if good:
            assert [one.text for one in (await asked).logprobs] == ["?"]
        else:
            with pytest.raises(ProviderUnavailable):
                await asked


def test_penalties_and_logprobs_are_said_or_refused() -> None:
    """An answer without what was asked for is not what was asked for."""
    assert "presence_penalty" not in said("openai", "gpt-4o")
    body = said("openai", "gpt-4o", presence_penalty=0.5, stream=True)
    assert body["presence_penalty"] == 0.5 and "frequency_penalty" not in body
    assert said("vllm", frequency_penalty=-1.5)["frequency_penalty"] == -1.5
    for kind, model in (("openai", "o3"), ("groq", "m"), ("gemini", "m"), ("anthropic", "claude-haiku-4-5")):
        for name, value in (("presence_penalty", -1.0), ("frequency_penalty", 0.1), ("logprobs", True)):
            with pytest.raises(InvalidArgument, match=f"{model} has no {name}") as refused:
                said(kind, model, **{name: value})
            assert refused.value.metadata["field"] == name


def test_schemas() -> None:
    form = said("openai", format=AS_CITY)["response_format"]
    assert form == {"type": "json_schema", "json_schema": {"name": "answer", "schema": CITY, "strict": True}}
    for kind in ("groq", "deepseek", "together"):
        body = said(kind, format=AS_CITY)
        assert body["response_format"] == {"type": "json_object"} and '"city"' in body["messages"][0]["content"]
    assert said("openai", format=Format("json_object"))["response_format"] == {"type": "json_object"}
    body = said("anthropic", "claude-haiku-4-5", format=AS_CITY)
    assert body["tools"][0]["input_schema"] == CITY and body["tool_choice"] == {"type": "tool", "name": "answer"}
    body = said("anthropic", "claude-opus-5", format=AS_CITY)
    assert body["output_config"]["format"] == {"type": "json_schema", "schema": CITY} and "tools" not in body
    assert '"city"' in said("anthropic", "claude-haiku-4-5", format=AS_CITY, tools=(WEATHER,))["system"]
    assert "JSON" in said("anthropic", "claude-haiku-4-5", format=Format("json_object"))["system"]
    assert is_strict(CITY) and not is_strict({"type": "object", "properties": {"a": {}}})
    assert not is_strict({"type": "array", "items": {"type": "object"}}) and is_strict({"anyOf": [CITY, {"type": "null"}]})


async def test_an_answer_by_our_own_tool_is_text(kind: str, vendor: Start) -> None:
    text = '{"city": "Oslo"}'
    server = vendor(lambda number, asked: Reply(text) if kind == "openai" else Reply(calls=[("t", "answer", text)]))
    prompt = Prompt(PROMPT.messages, 16, format=AS_CITY)
    found = await ask(client(kind, server.base_url), prompt)
    assert (found.text, found.tool_calls, found.finish) == (text, (), FinishReason.STOP)
    parts = await read(client(kind, server.base_url), prompt)
    assert "".join(part.text for part in parts) == text and not any(part.tool_calls for part in parts)
    assert parts[-1].completion is not None and parts[-1].completion.text == text


@pytest.mark.parametrize("wire", ["openai", "anthropic"])
@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(PROMPT.messages, 16, format=Format("regex", "a+")),
        Prompt(PROMPT.messages, 16, format=Format("json_schema", "{")),
        Prompt(PROMPT.messages, 16, format=Format("json_schema", "[]")),
        Prompt((Message("user", "x", images=(Image(url="http://x/a.png"),)),), 16),
        Prompt((Message("user", "x", images=(Image("image/tiff", b"x"),)),), 16),
        Prompt((Message("user", "x", images=(Image("image/png"),)),), 16),
    ],
    ids=["regex", "broken", "list", "http", "tiff", "empty"],
)
async def test_what_no_vendor_can_do_is_refused_before_anything_is_sent(wire: str, prompt: Prompt) -> None:
    provider = client(wire, "http://127.0.0.1:9/v1")
    with pytest.raises(InvalidArgument):
        await provider.complete("m", prompt, within(10))
    with pytest.raises(InvalidArgument):
        await anext(provider.stream("m", prompt, within(10)))
    assert provider.health().in_flight == 0 and provider.health().recent == 0
    await provider.close()


def test_events_come_out_of_any_pieces() -> None:
    stream = ': hello\r\n\r\nevent: a\r\ndata: {"x":\r\ndata: 1}\r\n\r\nid: 7\n\ndata:é\n\ndata: [DONE]\n\ndata: never ended'.encode()
    expected = [("a", '{"x":\n1}'), ("", "é"), ("", "[DONE]")]
    for size in (1, 2, 3, 7, len(stream)):
        events = Events()
        found = [event for start in range(0, len(stream), size) for event in events.feed(stream[start : start + size])]
        assert found == expected, size
    with pytest.raises(ValueError, match="does not end"):
        Events().feed(b"x" * (9 << 20))


def test_nothing_heavy_is_imported_before_the_first_request() -> None:
    code = (
        "import sys; from server.providers.make import make_providers; from server.settings import ProviderConfig\n"
        "make_providers({k: ProviderConfig(kind=k, base_url='http://127.0.0.1:1') for k in ('openai', 'anthropic', 'groq')}, environ={})\n"
        "print(sorted({'openai', 'anthropic', 'httpx', 'httpx2'} & {m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
