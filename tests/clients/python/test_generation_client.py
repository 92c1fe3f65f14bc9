"""The clients' streams: iterators that end the work when they are left, and errors of the usual classes in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.runtime.repository import Repository
from tests import generation_models as scripted
from tests.server_process import ServerProcess
from understudy import errors, generation
from understudy.aio import AsyncClient
from understudy.client import Client
from understudy.retry import RetryPolicy
from understudy.v1 import inference_service_pb2 as pb

TOLD = "".join(scripted.STORY[1:])
TALK = [{"role": "user", "content": "Where is my card?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("streams")
    repository = Repository(root / "models")
    scripted.publish(repository, root)
    running = ServerProcess(root / "server", "[generation]\nkv_cache_bytes = 33554432", models=Path(repository.root))
    running.wait_ready()
    yield running
    running.stop(allow_errors=True)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as one:
        yield one


def cancelled(server: ServerProcess, request_id: str) -> None:
    """Waits until the server has written down that this call's caller left."""
    server.wait_event("call", request_id=request_id, code="CANCELLED")


def test_leaving_the_loop_ends_the_call(client: Client, server: ServerProcess) -> None:
    stream = client.generate("tell", ignore_eos=True, request_id="left-1")
    for delta in stream:
        if delta.text:
            break
    cancelled(server, "left-1")
    with pytest.raises(RuntimeError, match="summary"):
        _ = stream.summary
    with pytest.raises(RuntimeError, match="once"):
        next(iter(stream))
    with client.generate("tell", ignore_eos=True, request_id="left-2") as open_stream:
        next(iter(open_stream))
    cancelled(server, "left-2")
    reader = iter(client.generate("tell", ignore_eos=True, request_id="left-3"))
    next(reader)
    del reader
    cancelled(server, "left-3")


async def test_leaving_an_asynchronous_loop_ends_the_call(server: ServerProcess) -> None:
    async with AsyncClient(server.address) as client:
        async for delta in client.generate("tell", ignore_eos=True, request_id="left-4"):
            if delta.text:
                break
        await asyncio.to_thread(cancelled, server, "left-4")

        async def read() -> None:
            async for _ in client.generate("tell", ignore_eos=True, request_id="left-5"):
                started.set()

        started = asyncio.Event()
        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(cancelled, server, "left-5")


async def test_aio_gives_what_sync_gives(client: Client, server: ServerProcess) -> None:
    async with AsyncClient(server.address) as other:
        whole = await other.generate_text("tell", max_tokens=8, temperature=0.0)
        assert whole.text == TOLD == client.generate_text("tell", max_tokens=8, temperature=0.0).text
        assert await other.generate("tell", max_tokens=8, temperature=0.0).text() == TOLD
        assert client.generate("tell", max_tokens=8, temperature=0.0).text() == TOLD
        stream = other.generate(messages=TALK, temperature=0.0)
        text = "".join([delta.text async for delta in stream])
        assert text == scripted.ANSWER + scripted.CALL
        assert stream.summary.model == scripted.NAME
        for call in (other.translate(["a"]), other.summarize(["a"])):
            with pytest.raises(errors.FailedPrecondition, match="no loaded model does"):
                await call


def test_no_model_translates(client: Client) -> None:
    with pytest.raises(errors.FailedPrecondition):
        client.translate(["a"], source_language="en", target_language="de", num_beams=2)
    with pytest.raises(errors.InvalidArgument) as beams:
        client.summarize(["a"], num_beams=99)
    assert beams.value.field == "search.num_beams"
    with pytest.raises(errors.FailedPrecondition) as other:
        client.translate(["a"], model=scripted.NAME)
    assert other.value.reason == "TASK_NOT_SUPPORTED"


def test_slips_of_the_caller_are_caught_before_anything_is_sent(client: Client) -> None:
    for slip in (
        lambda: client.generate(),
        lambda: client.generate("a", messages=TALK),
        lambda: client.generate("a", regex="a", json_object=True),
        lambda: client.generate("a", stop="end"),
        lambda: client.generate("a", temprature=1.0),  # type: ignore[call-arg]
        lambda: client.generate_text("a", choice="yes"),
    ):
        with pytest.raises(TypeError):
            slip()


def test_every_option_reaches_its_field() -> None:
    sampling = {
        "temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 2.0, "presence_penalty": 1.0,
        "frequency_penalty": -1.0, "logit_bias": {5: 2.0}, "seed": 7, "n": 2, "best_of": 3, "max_tokens": 9, "stop": ["x"],
        "stop_token_ids": [4], "ignore_eos": True,
    }  # fmt: skip
    shown = {"return_token_ids": True, "logprobs": True, "top_logprobs": 2}
    prepared = generation.generate_text("p", None, None, {**sampling, **shown, "adapter": "a@1", "priority": "bulk", "choice": ["y", "n"]})
    request = pb.GenerateTextRequest.FromString(prepared.request)
    assert {field.name for field, _ in request.sampling.ListFields()} | {"temperature"} == set(sampling)
    assert request.sampling.HasField("temperature")
    assert all(getattr(request, name) == value for name, value in shown.items())
    assert (request.adapter, request.priority, list(request.response_format.choice.values)) == ("a@1", 3, ["y", "n"])


def test_a_server_that_is_not_there_is_tried_again_and_then_told() -> None:
    with Client("127.0.0.1:1", retry=RetryPolicy(attempts=2, initial_s=0.01)) as client, pytest.raises(errors.Unavailable):
        list(client.generate("a"))
