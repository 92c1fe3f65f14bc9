"""Errors in OpenAI's shape, with the statuses that its SDKs act on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.core import Role
from server.registry.api_keys import ApiKeys, KeySettings
from server.registry.registry import Registry
from server.settings import RegistryConfig
from tests.conftest import StartServer
from tests.gateway_process import GatewayProcess

TALK: list[Any] = [{"role": "user", "content": "hello"}]
CHAT = "/chat/completions"


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, whose form is checked on the way."""
    assert response.headers["content-type"] == "application/json", response.text
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"] and error["type"]
    return error


# A body, and the field that is to blame.
BAD: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"temperature": 9}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 99}, "n"),
    (CHAT, {"n": 2147483647, "stream": True}, "n"),
    (CHAT, {"n": 1.5}, "n"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_completion_tokens": -3}, "max_completion_tokens"),
    (CHAT, {"max_tokens": 1e12}, "max_tokens"),
    (CHAT, {"stop": 3}, "stop"),
    (CHAT, {"stop": ["x"] * 17}, "stop"),
    (CHAT, {"seed": "one"}, "seed"),
    (CHAT, {"stream": "yes"}, "stream"),
    (CHAT, {"logit_bias": {"card": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"1": 101}}, "logit_bias[1]"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content[0]"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    (CHAT, {"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    (CHAT, {"tool_choice": "perhaps"}, "tool_choice"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}}, "response_format.json_schema"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"metadata": "m"}, "metadata"),
    (CHAT, {"user": 3}, "user"),
    (CHAT, {"model": ""}, "model"),
    (CHAT, {"model": 7}, "model"),
    (CHAT, {"model": "sorter", "n": 2}, "n"),
    ("/completions", {"model": "writer", "prompt": ["x"] * 65, "n": 2}, "n"),
    (CHAT, {"model": "writer", "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"model": "writer", "top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"model": "vendor/o3-mini", "logprobs": True}, "logprobs"),
    (CHAT, {"model": "writer", "presence_penalty": 2.5}, "presence_penalty"),
    (CHAT, {"model": "vendor/o3-mini", "frequency_penalty": 1}, "frequency_penalty"),
    (CHAT, {"model": "writer", "user": "u" * 257}, "user"),
    (CHAT, {"model": "sorter", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ("/completions", {"prompt": None}, "prompt"),
    ("/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
    ("/completions", {"prompt": [1, 2], "echo": True}, "echo"),
    ("/completions", {"prompt": [[99999999]]}, "prompt[0]"),
    ("/completions", {"prompt": "x", "best_of": 4, "stream": True}, "best_of"),
    ("/embeddings", {"model": "embedder", "input": [1, 2]}, "input"),
    ("/embeddings", {"model": "embedder", "input": []}, "input"),
    ("/embeddings", {"model": "embedder", "input": "x " * 999}, "input[0]"),
    ("/embeddings", {"model": "embedder", "input": "x", "dimensions": 7}, "dimensions"),
    ("/embeddings", {"model": "embedder", "input": "x", "encoding_format": "int8"}, "encoding_format"),
    ("/rerank", {"model": "ranker", "query": "q", "documents": [3]}, "documents[0]"),
    ("/rerank", {"model": "ranker", "query": "q", "documents": []}, "documents"),
    ("/rerank", {"model": "ranker", "documents": ["x"]}, "query"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD, ids=[f"{i}-{one[2]}" for i, one in enumerate(BAD)])
def test_what_is_wrong_is_named(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    whole = {"model": "scripted", "messages": TALK, "prompt": "x", **body}
    response = http.post(path, json=whole)
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error


def test_what_is_new_is_left_alone(http: httpx.Client) -> None:
    body = {
        "model": "scripted",
        "messages": TALK,
        "max_tokens": 1,
        "store": True,
        "reasoning_effort": "low",
        "metadata": {"a": "b"},
        "zzz": [],
    }
    assert http.post(CHAT, json=body).status_code == 200


def test_bodies_that_are_none(http: httpx.Client) -> None:
    kind = {"content-type": "application/json"}
    for body in (b"", b"{", b"[]", b'"x"', b"nul", b"\xff\xfe", b'{"model": "scripted", "messages": [', b"{} {}"):
        response = http.post(CHAT, content=body, headers=kind)
        assert (response.status_code, error_of(response)["type"]) == (400, "invalid_request_error"), body
    assert error_of(http.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}))
    assert http.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    wrong = http.get(CHAT)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert error_of(wrong)["code"] == "method_not_supported"


@pytest.mark.parametrize("model", ["nope", "local:nope", "nobody/m", "scripted:poet", "scripted@99", "embedder/"])
def test_unknown_models(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=model, messages=TALK)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_model_of_another_task(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="embedder", messages=TALK)
    assert caught.value.code == "task_not_supported"


def test_a_prompt_that_is_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="scripted", prompt="where " * 3000)
    assert caught.value.code == "context_length_exceeded"


def test_a_provider_that_fails(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="writer", messages=[{"role": "user", "content": "refuse"}])
    assert (caught.value.status_code, caught.value.code) == (503, "provider_unavailable")


def test_an_error_inside_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="writer", messages=[{"role": "user", "content": "break"}], stream=True)
    said = ""
    with pytest.raises(openai.APIError, match="failed with HTTP status 500"):
        for chunk in stream:
            said += chunk.choices[0].delta.content or ""
    assert said == "one two "


def test_a_stream_that_cannot_begin_has_a_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=TALK, stream=True)


async def test_a_full_server_says_when_to_come_again(start_server: StartServer, gateway_binary: Any) -> None:
    config = "[generation]\nkv_cache_bytes = 33554432\nmax_sequences = 1\nmax_waiting = 1"
    gateway = GatewayProcess(start_server(config).address)
    try:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
            asked: dict[str, Any] = {"model": "scripted", "prompt": "tell", "max_tokens": 300, "temperature": 0}
            done = await asyncio.gather(*(client.completions.create(**asked) for _ in range(12)), return_exceptions=True)
        refused = [one for one in done if isinstance(one, BaseException)]
        assert refused and len(refused) < len(done)
        for one in refused:
            assert isinstance(one, openai.RateLimitError) and one.code == "rate_limit_exceeded"
            assert int(one.response.headers["retry-after"]) >= 1 and int(one.response.headers["retry-after-ms"]) > 0
    finally:
        gateway.stop()


def test_keys_and_roles(tmp_path: Path, start_server: StartServer, gateway_binary: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    keys = ApiKeys(Registry(RegistryConfig(url=url)))
    viewer = keys.create(KeySettings(Role.VIEWER), "test")[1]
    user = keys.create(KeySettings(Role.USER), "test")[1]
    limited = keys.create(KeySettings(Role.USER, skills=("scribe",)), "test")[1]
    slow = keys.create(KeySettings(Role.USER, requests_per_minute=1), "test")[1]
    skill = '[skills.scribe]\ntask = "text-generation"\nstudent_model = "scripted"\ndeliver_bar = 0.0'
    config = f'[auth]\nkeys = "required"\n[registry]\nurl = "{url}"\n{skill}'
    gateway = GatewayProcess(start_server(config).address)

    def chat(key: str, model: str, **more: Any) -> Any:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
            return client.chat.completions.create(model=model, messages=TALK, temperature=0, max_tokens=2, **more)

    try:
        for more in ({}, {"stream": True}):
            with pytest.raises(openai.AuthenticationError) as unknown:
                chat("und_nobody_0", "local:scripted", **more)
            assert unknown.value.code == "invalid_api_key"
            with pytest.raises(openai.PermissionDeniedError) as refused:
                chat(viewer, "scribe", **more)
            assert refused.value.code == "permission_denied"
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=viewer) as client:
            assert "scribe" in {one.id for one in client.models.list()}
        assert chat(user, "scripted").choices[0].message.content
        assert chat(limited, "scribe").choices[0].message.content
        for model in ("scripted", "openai/gpt-4o"):
            with pytest.raises(openai.PermissionDeniedError, match="limited to skills"):
                chat(limited, model)
        assert httpx.post(f"{gateway.url}/v1/embeddings", json={"model": "embedder", "input": "x"}).status_code == 401
        with pytest.raises(openai.RateLimitError) as often:
            for _ in range(3):
                chat(slow, "local:scripted")
        assert often.value.code == "rate_limit_exceeded" and int(often.value.response.headers["retry-after"]) >= 1
    finally:
        gateway.stop()


def test_the_deadline_of_a_caller(http: httpx.Client) -> None:
    body = {"model": "scripted", "prompt": "tell", "max_tokens": 1900, "temperature": 0}
    response = http.post("/completions", json=body, headers={"x-timeout-ms": "30"})
    assert (response.status_code, error_of(response)["type"]) == (504, "timeout_error"), response.text
    assert json.loads(response.text)["error"]["code"] == "deadline_exceeded"
