"""Chat completions by OpenAI's Python SDK, unchanged: local models, routed skills, a provider's model."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests import generation_models as scripted

TALK: list[Any] = [{"role": "user", "content": "Where is my order?"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"], "additionalProperties": False}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": CITY}}
SAID = scripted.ANSWER + scripted.CALL


class Trip(pydantic.BaseModel):
    city: Literal["Oslo", "Rome"]
    days: int = pydantic.Field(ge=1, le=9)


def stream_of(client: openai.OpenAI, **asked: Any) -> tuple[str, list[Any]]:
    """The text of answer 0, and all chunks."""
    chunks = list(client.chat.completions.create(stream=True, **asked))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices and c.choices[0].index == 0)
    return text, chunks


def test_a_local_model_answers_whole_and_as_a_stream(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="scripted", messages=TALK, temperature=0, user="u-1")
    whole = raw.parse()
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-") and whole.model == "scripted"
    assert whole.choices[0].message.content == SAID and whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None and whole.usage.completion_tokens == len(scripted.SCRIPT) - 1
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert raw.headers["x-understudy-route"] == "local:scripted@1"
    assert (raw.headers["x-understudy-local"], raw.headers["x-understudy-cost-usd"]) == ("true", "0")
    assert raw.headers["x-request-id"]

    text, chunks = stream_of(client, model="scripted", messages=TALK, temperature=0, stream_options={"include_usage": True})
    assert text == SAID
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].finish_reason is None
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(scripted.SCRIPT) - 1
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-2].usage is None
    assert chunks[-2].model_extra["understudy"]["route"] == "local:scripted@1"
    assert len({chunk.id for chunk in chunks}) == 1


def test_names_of_a_local_model(client: openai.OpenAI) -> None:
    for name in ("local:scripted", "scripted@1", "local:scripted@1"):
        answer = client.chat.completions.create(model=name, messages=TALK, temperature=0)
        assert (answer.model, answer.choices[0].message.content) == (name, SAID)


def test_several_seeded_answers(client: openai.OpenAI) -> None:
    wild: dict[str, Any] = {"model": "scripted", "messages": TALK, "temperature": 2.0, "max_completion_tokens": 12, "n": 3, "seed": 3}
    whole = client.chat.completions.create(**wild)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) == 3
    parts, ends = ["", "", ""], []
    for chunk in client.chat.completions.create(stream=True, **wild):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert parts == texts and sorted(ends) == [0, 1, 2]


def test_stop_and_length(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "scripted", "messages": TALK, "temperature": 0}
    assert client.chat.completions.create(stop=["me "], **asked).choices[0].message.content == "Sure, let "
    assert client.chat.completions.create(stop="look", **asked).choices[0].message.content == "Sure, let me "
    cut = client.chat.completions.create(max_tokens=2, **asked).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("Sure, let me ", "length")


def test_penalties_and_bias_reach_the_model(client: openai.OpenAI) -> None:
    look = str(scripted.make_tokenizer().token_to_id("look: "))

    def chat(tokens: int, bias: float = 0, **more: Any) -> str | None:
        made = client.chat.completions.create(
            model="scripted",
            messages=TALK,
            temperature=0,
            max_tokens=tokens,
            logit_bias={look: bias},
            **more,  # type: ignore[dict-item]
        )
        return made.choices[0].message.content

    assert chat(2, bias=100) == "look: look: "
    # Somewhere between no bias and all of it, the second "look: " is worth its penalty, or not.
    assert any(chat(3, bias) != chat(3, bias, presence_penalty=2.0) for bias in range(1, 16))
    assert any(chat(3, bias) != chat(3, bias, frequency_penalty=2.0) for bias in range(1, 16))


def test_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "scripted", "messages": TALK, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.logprobs is not None and whole.logprobs.content is not None
    assert "".join(token.token for token in whole.logprobs.content) == SAID
    for token in whole.logprobs.content:
        assert token.bytes == list(token.token.encode())
        assert math.isclose(token.top_logprobs[0].logprob, token.logprob, abs_tol=1e-4) and len(token.top_logprobs) == 2
    _, chunks = stream_of(client, **asked)
    streamed = [token for c in chunks if c.choices and c.choices[0].logprobs for token in c.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in whole.logprobs.content]


def test_tools_and_their_results(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "scripted", "temperature": 0, "tools": [TOOL]}
    whole = client.chat.completions.create(messages=TALK, **asked).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.tool_calls is not None
    call: Any = whole.message.tool_calls[0]
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "weather", {"city": "Oslo"})
    text, chunks = stream_of(client, messages=TALK, **asked)
    (streamed,) = [one for c in chunks if c.choices for one in c.choices[0].delta.tool_calls or ()]
    assert (text, streamed.function.arguments, streamed.index) == (scripted.ANSWER, call.function.arguments, 0)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": '{"celsius": 3}'}]}
    again = [*TALK, whole.message.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(messages=again, **asked).choices[0].message.content == scripted.ANSWER


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "trip"}}], ids=["required", "named"])
def test_a_model_is_made_to_call_a_tool(client: openai.OpenAI, choice: Any) -> None:
    parameters = {**Trip.model_json_schema(), "additionalProperties": False}
    tools: list[Any] = [{"type": "function", "function": {"name": "trip", "parameters": parameters}}]
    for seed in range(3):
        made = client.chat.completions.create(
            model="scripted", messages=TALK, tools=tools, tool_choice=choice, temperature=2.0, seed=seed, max_tokens=300
        )
        calls: list[Any] = list(made.choices[0].message.tool_calls or ())
        assert len(calls) == 1 and made.choices[0].finish_reason == "tool_calls" and made.choices[0].message.content is None
        Trip.model_validate_json(calls[0].function.arguments)


def test_a_model_is_kept_from_calling_a_tool(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model="scripted", messages=TALK, tools=[TOOL], tool_choice="none", temperature=0).choices[0]
    assert (made.message.content, made.finish_reason) == (SAID, "stop")


def test_structured_output(client: openai.OpenAI) -> None:
    for seed in range(3):
        parsed = client.chat.completions.parse(
            model="scripted", messages=TALK, response_format=Trip, temperature=2.0, seed=seed, max_tokens=300
        )
        trip = parsed.choices[0].message.parsed
        assert trip is not None and 1 <= trip.days <= 9
    with client.chat.completions.stream(model="scripted", messages=TALK, response_format=Trip, temperature=1.0, max_tokens=300) as events:
        for _ in events:
            pass
        assert events.get_final_completion().choices[0].message.parsed is not None
    loose = client.chat.completions.create(
        model="scripted", messages=TALK, response_format={"type": "json_object"}, temperature=0.7, seed=1, max_tokens=400,
        stop=["}"],
    )  # fmt: skip
    assert (loose.choices[0].message.content or "").lstrip().startswith("{")


def test_forms_that_only_this_server_has(client: openai.OpenAI) -> None:
    for spec, allowed in (({"choice": ["yes", "no"]}, ("yes", "no")), ({"regex": "[ab]"}, ("a", "b"))):
        made = client.chat.completions.create(
            model="scripted", messages=TALK, temperature=2.0, max_tokens=20, extra_body={"structured_outputs": spec}
        )
        assert made.choices[0].message.content in allowed


def test_a_skill_is_answered_by_its_teacher(client: openai.OpenAI, site: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="writer", messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hello there"}],
        temperature=0.3, top_p=0.9, stop=["END"], seed=7, max_tokens=99, presence_penalty=0.5, frequency_penalty=-0.25,
    )  # fmt: skip
    assert raw.parse().choices[0].message.content == "echo hello there"
    asked = site.vendor.requests[-1]
    assert (asked["model"], asked["stop"], asked["seed"], asked["max_tokens"]) == ("m-1", ["END"], 7, 99)
    assert (asked["top_p"], asked["temperature"]) == pytest.approx((0.9, 0.3))
    assert (asked["presence_penalty"], asked["frequency_penalty"]) == (0.5, -0.25)
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert raw.headers["x-understudy-route"] == "vendor/m-1" and raw.headers["x-understudy-local"] == "false"
    assert float(raw.headers["x-understudy-cost-usd"]) == pytest.approx(100 * 1e-6 + 10 * 1e-5)
    story: Any = (raw.parse().model_extra or {})["understudy"]
    assert story["interaction_id"] == raw.headers["x-understudy-interaction-id"]
    assert [hop["outcome"] for hop in story["hops"]] == ["delivered"] and story["skill"] == "writer"

    text, chunks = stream_of(client, model="writer", messages=[{"role": "user", "content": "hello there"}])
    assert text == "echo hello there"
    assert chunks[-1].model_extra["understudy"]["cost_usd"] == pytest.approx(0.0002)


@pytest.mark.parametrize("model", ["writer", "vendor/m-1", "scribe"])
def test_logprobs_of_a_route(client: openai.OpenAI, site: Any, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "likely?"}], "temperature": 0}
    asked |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.logprobs is not None and whole.logprobs.content
    for token in whole.logprobs.content:
        assert token.logprob <= 0 and token.bytes == list(token.token.encode())
        assert math.isclose(token.top_logprobs[0].logprob, token.logprob, abs_tol=1e-4) and len(token.top_logprobs) == 2
    if model == "scribe":
        assert "".join(token.token for token in whole.logprobs.content) == whole.message.content
    else:
        assert [(token.token, token.logprob) for token in whole.logprobs.content] == [("t", -0.125), ("t", -0.25)]
        assert (site.vendor.requests[-1]["logprobs"], site.vendor.requests[-1]["top_logprobs"]) == (True, 2)
    text, chunks = stream_of(client, **asked)
    streamed = [token for c in chunks if c.choices and c.choices[0].logprobs for token in c.choices[0].logprobs.content]
    assert text == whole.message.content
    assert [(token.token, round(token.logprob, 3)) for token in streamed] == [
        (token.token, round(token.logprob, 3)) for token in whole.logprobs.content
    ]
    del asked["logprobs"], asked["top_logprobs"]
    assert client.chat.completions.create(**asked).choices[0].logprobs is None


@pytest.mark.parametrize("model", ["writer", "vendor/m-1"])
def test_several_answers_of_a_route_are_so_many_calls(client: openai.OpenAI, site: Any, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hello there"}], "n": 3, "seed": 7}
    before = len(site.vendor.requests)
    raw = client.chat.completions.with_raw_response.create(**asked)
    whole = raw.parse()
    assert [(one.index, one.message.content) for one in whole.choices] == [(at, "echo hello there") for at in range(3)]
    assert sorted(one["seed"] for one in site.vendor.requests[before:]) == [7, 8, 9]
    assert not any("n" in one for one in site.vendor.requests[before:])
    story: Any = (whole.model_extra or {})["understudy"]
    assert story["cost_usd"] == pytest.approx(3 * 0.0002) == float(raw.headers["x-understudy-cost-usd"])
    assert len(set(story["interaction_ids"])) == 3 and story["interaction_id"] in story["interaction_ids"]
    assert whole.usage is not None and whole.usage.completion_tokens == 30
    parts, ends = ["", "", ""], []
    for chunk in client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert parts == ["echo hello there"] * 3 and sorted(ends) == [0, 1, 2]
    texts = client.completions.create(model=model, prompt=["a b", "c d"], n=2, echo=True).choices
    assert [one.text for one in texts] == ["a becho a b", "a becho a b", "c decho c d", "c decho c d"]


def test_a_caller_sees_as_many_of_the_likeliest_as_it_asked_for(client: openai.OpenAI, site: Any) -> None:
    """Though the skill has its teacher tell more, for the lake."""
    asked: dict[str, Any] = {"model": "thinker", "messages": [{"role": "user", "content": "likely?"}], "presence_penalty": 0.5}
    assert client.chat.completions.create(**asked).choices[0].logprobs is None
    assert (site.vendor.requests[-1]["model"], site.vendor.requests[-1]["top_logprobs"]) == ("m-1", 3)
    found = client.chat.completions.create(logprobs=True, top_logprobs=1, **asked).choices[0].logprobs
    assert found is not None and [len(token.top_logprobs) for token in found.content or ()] == [1, 1]


def test_who_cannot_do_what_is_asked_is_passed_over(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "thinker", "messages": TALK}
    for more, route in (({}, "vendor/o3-mini"), ({"logprobs": True}, "vendor/m-1"), ({"presence_penalty": 1.0}, "vendor/m-1")):
        raw = client.chat.completions.with_raw_response.create(**asked, **more)
        assert raw.headers["x-understudy-route"] == route
        story: Any = (raw.parse().model_extra or {})["understudy"]
        assert [hop["outcome"] for hop in story["hops"]] == (["failed", "delivered"] if more else ["delivered"])


def test_a_skill_calls_tools_in_parallel_or_one(client: openai.OpenAI, site: Any) -> None:
    asked: dict[str, Any] = {"model": "writer", "messages": [{"role": "user", "content": "weather, please"}], "tools": [TOOL]}
    whole = client.chat.completions.create(tool_choice="required", **asked).choices[0]
    assert site.vendor.requests[-1]["tool_choice"] == "required"
    assert [json.loads(one.function.arguments)["city"] for one in whole.message.tool_calls or ()] == ["Oslo", "Rome"]  # type: ignore[union-attr]
    _, chunks = stream_of(client, **asked)
    streamed = [one for c in chunks if c.choices for one in c.choices[0].delta.tool_calls or ()]
    assert [(one.index, one.id, one.function.name) for one in streamed] == [(0, "call_1", "weather"), (1, "call_2", "weather")]
    single = client.chat.completions.create(parallel_tool_calls=False, **asked).choices[0]
    assert len(single.message.tool_calls or ()) == 1


def test_a_skill_gives_structured_output(client: openai.OpenAI, site: Any) -> None:
    parsed = client.chat.completions.parse(model="writer", messages=[{"role": "user", "content": "JSON"}], response_format=Trip)
    assert parsed.choices[0].message.parsed == Trip(city="Oslo", days=3)
    assert site.vendor.requests[-1]["response_format"]["type"] == "json_schema"
    client.chat.completions.create(model="writer", messages=[{"role": "user", "content": "JSON"}], response_format={"type": "json_object"})
    assert site.vendor.requests[-1]["response_format"] == {"type": "json_object"}


def test_a_skill_with_a_local_student(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="scribe", messages=TALK, temperature=0)
    assert whole.choices[0].message.content == SAID
    assert (whole.model_extra or {})["understudy"]["local"] is True
    text, _ = stream_of(client, model="scribe", messages=TALK, temperature=0)
    assert text == SAID


def test_a_classifying_skill_answers_with_the_label(client: openai.OpenAI, site: Any) -> None:
    asked: list[Any] = [{"role": "system", "content": "ignored"}, {"role": "user", "content": "my card is lost"}]
    for skill, local in (("intent", False), ("sorter", True)):
        whole = client.chat.completions.create(model=skill, messages=asked)
        label = whole.choices[0].message.content
        assert label in ("card", "transfer", "password")
        story = (whole.model_extra or {})["understudy"]
        assert story["local"] is local and story["labels"][0]["name"] == label
        text, chunks = stream_of(client, model=skill, messages=asked)
        assert text == label and chunks[-1].choices[0].finish_reason == "stop"


def test_a_providers_model_by_its_name(client: openai.OpenAI, site: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(model="vendor/m-2", messages=[{"role": "user", "content": "hi"}])
    assert raw.parse().choices[0].message.content == "echo hi"
    assert site.vendor.requests[-1]["model"] == "m-2" and raw.headers["x-understudy-route"] == "vendor/m-2"
    text, _ = stream_of(client, model="vendor/m-2", messages=[{"role": "user", "content": "hi"}])
    assert text == "echo hi"


def test_what_a_caller_may_say_of_the_route(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Nobody may answer"):
        client.chat.completions.create(model="writer", messages=TALK, extra_body={"understudy": {"preference": "local_only"}})
    with pytest.raises(openai.BadRequestError, match="expected one of local_first"):
        client.chat.completions.create(model="writer", messages=TALK, extra_body={"understudy": {"preference": "nearest"}})
