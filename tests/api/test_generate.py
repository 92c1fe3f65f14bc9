"""Generate and GenerateText through the real server: a small model whose greedy answers are known."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.runtime.repository import Repository
from tests import generation_models as scripted
from tests.conftest import StartServer
from tests.server_process import ServerProcess
from understudy import errors
from understudy.aio import AsyncClient
from understudy.client import Client
from understudy.retry import RetryPolicy

TOLD = "".join(scripted.STORY[1:])
TALK = [{"role": "user", "content": "Where is my card?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": CITY}}
GREEDY: dict[str, Any] = {"temperature": 0.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, small_models: Path) -> Path:
    """The scripted model and one encoder."""
    root = tmp_path_factory.mktemp("generation")
    repository = Repository(root / "models")
    scripted.publish(repository, root)
    shutil.copytree(small_models / "embedder", repository.root / "embedder")
    return repository.root


@pytest.fixture(scope="module")
def generating(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    config = "[server]\ngrace_s = 5\n[generation]\nkv_cache_bytes = 33554432\nmax_sequences = 8\nmax_waiting = 24"
    running = ServerProcess(tmp_path_factory.mktemp("server"), config, models=models)
    running.wait_ready()
    yield running
    running.stop(allow_errors=True)


@pytest.fixture(scope="module")
def client(generating: ServerProcess) -> Iterator[Client]:
    with Client(generating.address, retry=RetryPolicy(attempts=1)) as one:
        yield one


def test_a_stream_is_the_whole_text(client: Client) -> None:
    stream = client.generate("tell", max_tokens=8, return_token_ids=True, **GREEDY)
    deltas = list(stream)
    whole = client.generate_text("tell", max_tokens=8, return_token_ids=True, **GREEDY)
    assert "".join(delta.text for delta in deltas) == whole.text == TOLD
    tokens = [token for delta in deltas for token in delta.tokens]
    assert tokens == list(whole.answers[0].tokens)
    assert "".join(token.text for token in tokens) == TOLD
    assert [delta.finish_reason for delta in deltas][-1] == whole.answers[0].finish_reason == "length"
    assert stream.summary.usage.output_tokens == whole.summary.usage.output_tokens == 8
    assert whole.summary.usage.input_tokens == 2  # "<s>" and "tell"
    took = whole.summary.timings
    assert (whole.summary.model, whole.summary.version, whole.summary.adapter) == (scripted.NAME, "1", "")
    assert 0 < took.time_to_first_token <= took.total
    assert took.inter_token > 0
    confidence = whole.answers[0].confidence
    assert confidence.mean_logprob < 0 < confidence.mean_entropy
    assert confidence.mean_margin > 0


def test_conversations_go_through_the_template(client: Client) -> None:
    answer = client.generate_text(messages=TALK, **GREEDY)
    assert answer.text == scripted.ANSWER + scripted.CALL
    assert answer.answers[0].finish_reason == "stop"
    assert answer.summary.usage.output_tokens == len(scripted.SCRIPT) - 1  # the stop token is no part of the answer


def test_tool_calls_leave_the_text(client: Client) -> None:
    whole = client.generate_text(messages=TALK, tools=[TOOL], **GREEDY).answers[0]
    deltas = list(client.generate(messages=TALK, tools=[TOOL], **GREEDY))
    for text, calls, finish in (
        (whole.text, whole.tool_calls, whole.finish_reason),
        ("".join(delta.text for delta in deltas), deltas[-1].tool_calls, deltas[-1].finish_reason),
    ):
        assert (text, finish) == (scripted.ANSWER, "tool_calls")
        assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", {"city": "Oslo"})]
    kept = client.generate_text(messages=TALK, tools=[TOOL], tool_choice="none", **GREEDY).answers[0]
    assert (kept.tool_calls, kept.finish_reason) == ((), "stop")
    call = whole.tool_calls[0]
    again = [*TALK, {"role": "assistant", "content": whole.text, "tool_calls": [call]}]
    again.append({"role": "tool", "content": '{"celsius": 3}', "tool_call_id": call.id, "name": "weather"})
    assert client.generate_text(messages=again, tools=[TOOL], **GREEDY).text == scripted.ANSWER


def test_several_answers(client: Client) -> None:
    wild: dict[str, Any] = {"temperature": 2.0, "max_tokens": 12, "seed": 3}
    whole = client.generate_text("tell", n=3, **wild)
    assert len({answer.text for answer in whole.answers}) == 3
    parts = ["", "", ""]
    for delta in client.generate("tell", n=3, **wild):
        parts[delta.index] += delta.text
    assert parts == [answer.text for answer in whole.answers]
    best = client.generate_text("tell", n=1, best_of=4, **wild)
    four = client.generate_text("tell", n=4, **wild)
    chosen = max(four.answers, key=lambda answer: answer.confidence.mean_logprob)
    assert best.text == chosen.text
    assert best.summary.usage.output_tokens == four.summary.usage.output_tokens


def test_seeds(client: Client) -> None:
    wild: dict[str, Any] = {"temperature": 2.0, "max_tokens": 16}
    one = client.generate_text("tell", seed=5, **wild).text
    assert client.generate_text("tell", seed=5, **wild).text == one
    assert client.generate_text("tell", seed=6, **wild).text != one


def test_log_probabilities(client: Client) -> None:
    tokens = client.generate_text("tell", max_tokens=4, logprobs=True, top_logprobs=5, **GREEDY).answers[0].tokens
    assert len(tokens) == 4
    for token in tokens:
        assert token.logprob is not None
        assert [one.logprob for one in token.top] == sorted((one.logprob for one in token.top), reverse=True)
        assert (token.top[0].id, token.top[0].text) == (token.id, token.text)
        assert math.isclose(token.top[0].logprob, token.logprob, abs_tol=1e-5)
        assert sum(math.exp(one.logprob) for one in token.top) <= 1 + 1e-5
    assert client.generate_text("tell", max_tokens=1, return_token_ids=True, **GREEDY).answers[0].tokens[0].logprob is None


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ([" about"], " me a story"),
        (["tory ab"], " me a s"),
        (["nowhere", "eta"], " me a story about Gr"),
        ([" me a story about Greta."], ""),
    ],
)
def test_stop_strings(client: Client, stop: list[str], text: str) -> None:
    whole = client.generate_text("tell", max_tokens=20, stop=stop, **GREEDY)
    assert (whole.text, whole.answers[0].finish_reason) == (text, "stop")
    assert "".join(delta.text for delta in client.generate("tell", max_tokens=20, stop=stop, **GREEDY)) == text


def test_stop_tokens(client: Client) -> None:
    tokenizer = scripted.make_tokenizer()
    about = tokenizer.token_to_id(" about")
    assert client.generate_text("tell", stop_token_ids=[about], **GREEDY).text == " me a story"
    ids = tokenizer.encode("tell").ids
    assert client.generate_text(token_ids=ids, max_tokens=8, **GREEDY).text == TOLD
    long = client.generate_text(messages=TALK, max_tokens=12, ignore_eos=True, **GREEDY)
    assert (long.answers[0].finish_reason, long.summary.usage.output_tokens) == ("length", 12)


def test_the_context_ends_an_answer(client: Client) -> None:
    whole = client.generate_text("tell", max_tokens=10 * scripted.CONTEXT, **GREEDY)
    assert whole.answers[0].finish_reason == "length"
    assert whole.summary.usage.input_tokens + whole.summary.usage.output_tokens == scripted.CONTEXT


def test_forms(client: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    wild: dict[str, Any] = {"temperature": 2.0, "max_tokens": 300}
    for seed in range(5):
        found = json.loads(client.generate_text("tell", json_schema=schema, seed=seed, **wild).text)
        assert found["city"] in ("Oslo", "Rome")
        assert 1 <= found["days"] <= 9
    text = "".join(delta.text for delta in client.generate("tell", json_schema=schema, **wild))
    assert set(json.loads(text)) == {"city", "days"}
    assert client.generate_text("tell", choice=["yes", "no"], **wild).text in ("yes", "no")
    number = client.generate_text("tell", regex="[0-9]{3}-[0-9]{2}", **wild).text
    assert number[3] == "-"
    assert (number[:3] + number[4:]).isdigit()
    assert client.generate_text("tell", grammar='start: "a" "b"+ "."', **wild).text.startswith("ab")


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -1.0}, "INVALID_ARGUMENT", "sampling.temperature"),
    ({"top_p": 0.0}, "INVALID_ARGUMENT", "sampling.top_p"),
    ({"min_p": 1.5}, "INVALID_ARGUMENT", "sampling.min_p"),
    ({"repetition_penalty": 0.0}, "INVALID_ARGUMENT", "sampling.repetition_penalty"),
    ({"presence_penalty": float("nan")}, "INVALID_ARGUMENT", "sampling.presence_penalty"),
    ({"logit_bias": {99999: 1.0}}, "INVALID_ARGUMENT", "sampling.logit_bias[99999]"),
    ({"n": 17}, "INVALID_ARGUMENT", "sampling.n"),
    ({"n": 2, "best_of": 1}, "INVALID_ARGUMENT", "sampling.best_of"),
    ({"max_tokens": -1}, "INVALID_ARGUMENT", "sampling.max_tokens"),
    ({"stop": [""]}, "INVALID_ARGUMENT", "sampling.stop[0]"),
    ({"stop": ["x"] * 17}, "INVALID_ARGUMENT", "sampling.stop"),
    ({"stop_token_ids": [-1]}, "INVALID_ARGUMENT", "sampling.stop_token_ids[0]"),
    ({"top_logprobs": 2}, "INVALID_ARGUMENT", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "INVALID_ARGUMENT", "top_logprobs"),
    ({"json_schema": '{"type": 3}'}, "INVALID_ARGUMENT", "response_format.json_schema"),
    ({"json_schema": "{"}, "INVALID_ARGUMENT", "response_format.json_schema"),
    ({"regex": "("}, "INVALID_ARGUMENT", "response_format.regex"),
    ({"choice": []}, "INVALID_ARGUMENT", "response_format.choice.values"),
    ({"grammar": "start: nowhere"}, "INVALID_ARGUMENT", "response_format.grammar"),
    ({"tools": [TOOL]}, "INVALID_ARGUMENT", "tools"),
    ({"adapter": "poet"}, "ADAPTER_NOT_FOUND", ""),
    ({"version": "1"}, "INVALID_ARGUMENT", "model.name"),
    ({"model": "scriptd"}, "MODEL_NOT_FOUND", ""),
    ({"model": "embedder"}, "TASK_NOT_SUPPORTED", ""),
]


@pytest.mark.parametrize(("options", "reason", "field"), BAD, ids=[f"{i}-{next(iter(one[0]))}" for i, one in enumerate(BAD)])
def test_bad_values_name_their_field(client: Client, options: dict[str, Any], reason: str, field: str) -> None:
    options = {"max_tokens": 4, **options}
    with pytest.raises(errors.UnderstudyError) as whole:
        client.generate_text("tell", **options)
    with pytest.raises(errors.UnderstudyError) as stream:
        list(client.generate("tell", **options))
    for caught in (whole.value, stream.value):
        assert (caught.reason, caught.field if field else "") == (reason, field)
        assert caught.request_id


def test_bad_inputs(client: Client) -> None:
    for ask, field in (
        ({"messages": []}, "chat.messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "chat.messages[0].role"),
        ({"token_ids": []}, "token_ids.ids"),
        ({"token_ids": [3, 99999]}, "token_ids.ids[1]"),
        ({"messages": TALK, "tools": [{"name": "f", "parameters": "{"}]}, "tools[0].parameters"),
        ({"messages": TALK, "tools": [TOOL], "json_object": True}, "response_format"),
    ):
        with pytest.raises(errors.InvalidArgument) as caught:
            client.generate_text(**ask)  # type: ignore[arg-type]
        assert caught.value.field == field
    with pytest.raises(errors.InvalidArgument) as long:
        client.generate_text("tell " * 2 * scripted.CONTEXT)
    assert long.value.reason == "INPUT_TOO_LONG"
    assert int(long.value.metadata["tokens"]) > int(long.value.metadata["limit"]) == scripted.CONTEXT
    with pytest.raises(errors.FailedPrecondition):
        client.embed(["a"], model=scripted.NAME)
    with pytest.raises(errors.InvalidArgument) as streamed:
        list(client.generate("tell", n=1, best_of=2))
    assert streamed.value.field == "sampling.best_of"


def test_a_deadline_in_the_middle_of_a_stream(client: Client) -> None:
    got = []
    with pytest.raises(errors.DeadlineExceeded) as caught:
        for _ in range(20):
            for delta in client.generate("tell", timeout_s=0.3, ignore_eos=True, **GREEDY):
                got.append(delta.text)
            got.clear()
    assert got
    assert caught.value.code == "DEADLINE_EXCEEDED"


async def test_leaving_the_loop_frees_the_place(generating: ServerProcess) -> None:
    async with AsyncClient(generating.address, retry=RetryPolicy(attempts=1)) as client:

        async def leave() -> None:
            async for delta in client.generate("tell", ignore_eos=True, **GREEDY):
                if delta.text:
                    break

        # Eight run at once: places that were not freed would make the later ones wait for 2,000 tokens of each before them.
        for _ in range(6):
            await asyncio.gather(*(leave() for _ in range(8)))
        whole = await asyncio.wait_for(client.generate_text("tell", max_tokens=8, **GREEDY), 10)
        assert whole.text == TOLD


async def test_many_at_once_get_the_same_as_alone(generating: ServerProcess) -> None:
    async with AsyncClient(generating.address) as client:

        async def stream(prompt: str) -> str:
            return await client.generate(prompt, max_tokens=40, seed=1).text()

        prompts = [f"tell me{' a' * i}" for i in range(6)]
        alone = [await stream(prompt) for prompt in prompts]
        assert await asyncio.gather(*(stream(prompt) for prompt in prompts * 3)) == alone * 3


async def test_a_full_queue_says_when(generating: ServerProcess) -> None:
    async with AsyncClient(generating.address, retry=RetryPolicy(attempts=1)) as client:
        calls = [client.generate_text("tell", ignore_eos=True, max_tokens=300, n=4, seed=i) for i in range(30)]
        done = await asyncio.gather(*calls, return_exceptions=True)
        refused = [one for one in done if isinstance(one, Exception)]
        assert refused
        for one in refused:
            assert isinstance(one, errors.ResourceExhausted)
            assert one.reason == "OVERLOADED"
            assert one.retry_after_s
        assert len(refused) < len(done)


def test_models_and_status_show_it(client: Client) -> None:
    (one,) = client.models.list(task="text-generation")
    assert (one.name, one.max_tokens, one.architecture) == (scripted.NAME, scripted.CONTEXT, "llama")
    assert scripted.NAME in {loaded.model.name for loaded in client.status().models}


def test_unloading_waits_for_answers(start_server: StartServer, models: Path) -> None:
    running = start_server("[generation]\nkv_cache_bytes = 33554432", models=models)
    with Client(running.address, retry=RetryPolicy(attempts=1)) as client:
        stream = iter(client.generate("tell", max_tokens=400, ignore_eos=True, **GREEDY))
        text = next(stream).text
        client.models.unload(scripted.NAME)
        text += "".join(delta.text for delta in stream)
        assert text.startswith(TOLD)
        with pytest.raises(errors.FailedPrecondition):
            client.generate_text("tell")
        client.models.load(scripted.NAME)
        assert client.generate_text("tell", max_tokens=8, **GREEDY).text == TOLD
    running.stop()
