"""Whatever a provider does wrong, a caller of the real server gets the next candidate's answer, or one clear error within its deadline."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from grpc_status import rpc_status

from tests.conftest import StartServer
from tests.providers.loopback import AnthropicServer, OpenAIServer, Reply
from tests.server_process import ServerProcess
from understudy.v1 import inference_service_pb2 as pb
from understudy.v1.inference_service_pb2_grpc import InferenceServiceStub

KEYS = {"FIRST_KEY": "sk-first-of-the-loopback", "SECOND_KEY": "sk-second-of-the-loopback"}
DEADLINE_S = 8.0
SPARE = "the second provider says so"

# What the first provider does, by a word of the request.
BEFORE_A_TOKEN = {
    "refuses": lambda: Reply(401),
    "busy": lambda: Reply(429, headers={"retry-after": "120"}),
    "broken": lambda: Reply(500),
    "overloaded": lambda: Reply(529),
    "silent": lambda: Reply("late", hold=True),
    "hangs-up": lambda: Reply(drop=True),
    "garbage": lambda: Reply(body="no JSON", raw=b"\xff\xfe no events at all\n\n"),
    "empty": lambda: Reply(""),
    "stalls-before-tokens": lambda: Reply("a b c", stall_after=0),
}
AFTER_A_TOKEN = {
    "stalls-between-tokens": lambda: Reply("one two three four", stall_after=2),
    "cuts": lambda: Reply("one two three four", cut_after=2),
    "fails-inside": lambda: Reply("one two three four", error_after=2, error_type="overloaded_error"),
}


def first_script(_number: int, text: str) -> Reply | str:
    fault = {**BEFORE_A_TOKEN, **AFTER_A_TOKEN}.get(text.split()[0])
    return fault() if fault else "the first provider is well"


@pytest.fixture(scope="module")
def first() -> Iterator[OpenAIServer]:
    running = OpenAIServer(first_script)
    yield running
    running.release.set()
    running.close()


@pytest.fixture(scope="module")
def second() -> Iterator[AnthropicServer]:
    running = AnthropicServer(lambda _number, text: Reply(500) if "nobody" in text else SPARE)
    yield running
    running.close()


def config(first: OpenAIServer, second: AnthropicServer, folder: Path, *, circuit_failures: int = 1000) -> str:
    return f"""
[lake]
path = {json.dumps(str(folder / "lake"))}
[registry]
url = {json.dumps(f"sqlite:///{folder / 'registry.db'}")}
[providers.first]
kind = "compatible"
base_url = "{first.base_url}"
api_key_env = "FIRST_KEY"
max_retries = 0
first_token_timeout_s = 1.0
between_tokens_timeout_s = 1.0
circuit_failures = {circuit_failures}
circuit_rest_s = 0.5
prices.big = {{ input_per_million_usd = 1.0, output_per_million_usd = 2.0 }}
[providers.second]
kind = "anthropic"
base_url = "{second.base_url}"
api_key_env = "SECOND_KEY"
max_retries = 0
prices.spare = {{ input_per_million_usd = 3.0, output_per_million_usd = 15.0 }}
[skills.chat]
task = "text-generation"
teacher = "first/big"
fallbacks = ["second/spare"]
"""


@pytest.fixture(scope="module")
def served(
    first: OpenAIServer, second: AnthropicServer, small_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("faults")
    running = ServerProcess(folder, config(first, second, folder), models=small_models, env=KEYS)
    running.wait_ready()
    with grpc.insecure_channel(running.address) as channel:  # the first calls of a new server import both vendors' libraries
        assert run(InferenceServiceStub(channel), "broken please", timeout_s=60.0).output_text == SPARE
    yield running
    running.stop(allow_errors=True)


@pytest.fixture
def stub(served: ServerProcess) -> Iterator[InferenceServiceStub]:
    with grpc.insecure_channel(served.address) as channel:
        yield InferenceServiceStub(channel)


def run(stub: InferenceServiceStub, text: str, timeout_s: float = DEADLINE_S) -> Any:
    request = ParseDict({"skill": "chat", "inputs": [{"text": text}]}, pb.RunRequest())
    (result,) = stub.Run(request, timeout=timeout_s).results
    return result


def generate(stub: InferenceServiceStub, text: str) -> Iterator[Any]:
    return stub.Generate(ParseDict({"skill": "chat", "prompt": text}, pb.GenerateRequest()), timeout=DEADLINE_S)


@pytest.mark.parametrize("fault", BEFORE_A_TOKEN)
def test_a_call_gets_the_next_candidates_answer(stub: InferenceServiceStub, first: OpenAIServer, fault: str) -> None:
    asked, began = len(first.requests), time.monotonic()
    result = run(stub, f"{fault} please")
    assert time.monotonic() - began < DEADLINE_S
    if fault == "stalls-before-tokens":  # of a whole answer, nothing but time is seen of it
        assert result.output_text in (SPARE, "a b c")
        return
    assert result.output_text == SPARE, result
    assert [(hop.candidate, hop.outcome) for hop in result.decision.hops] == [("first/big", "failed"), ("second/spare", "delivered")]
    assert len(first.requests) == asked + 1, "nobody is asked twice"
    assert not any(key in str(result) for key in KEYS.values())


@pytest.mark.parametrize("fault", BEFORE_A_TOKEN)
def test_a_stream_goes_to_the_next_candidate_before_its_first_token(stub: InferenceServiceStub, fault: str) -> None:
    responses = list(generate(stub, f"{fault} please"))
    assert "".join(delta.text for response in responses for delta in response.deltas) == SPARE
    decision = responses[-1].decision
    assert [(hop.candidate, hop.outcome) for hop in decision.hops] == [("first/big", "failed"), ("second/spare", "delivered")]
    assert responses[-1].interaction_id and responses[-1].cost.micro_usd > 0


@pytest.mark.parametrize("fault", AFTER_A_TOKEN)
def test_after_the_first_token_nobody_takes_over(stub: InferenceServiceStub, second: AnthropicServer, fault: str) -> None:
    asked, seen = len(second.requests), []
    with pytest.raises(grpc.RpcError) as caught:
        for response in generate(stub, f"{fault} please"):
            seen += [delta.text for delta in response.deltas]
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "".join(seen).split() == ["one", "two"], "what was seen stays, once"
    assert len(second.requests) == asked
    status = rpc_status.from_call(caught.value)
    assert status is not None and "first/big" in status.message


def test_when_nobody_can_answer_the_error_names_each_ones_reason(stub: InferenceServiceStub) -> None:
    result = run(stub, "broken and nobody else either")
    error = result.error
    assert error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert "first/big" in error.message and "second/spare" in error.message
    with pytest.raises(grpc.RpcError) as caught:
        list(generate(stub, "broken and nobody else either"))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "first/big" in str(caught.value.details()) and "second/spare" in str(caught.value.details())


def test_a_deadline_is_shared_across_hops(stub: InferenceServiceStub) -> None:
    """The first hop gets half of the time, the second answers in what is left."""
    request = ParseDict({"skill": "chat", "inputs": [{"text": "silent please"}]}, pb.RunRequest())
    began = time.monotonic()
    (result,) = stub.Run(request, timeout=2.0).results
    assert result.output_text == SPARE and time.monotonic() - began < 2.0


def test_the_circuit_opens_and_closes_again(
    start_server: StartServer, first: OpenAIServer, second: AnthropicServer, tmp_path: Path
) -> None:
    running = start_server(config(first, second, tmp_path, circuit_failures=3), env=KEYS)
    with grpc.insecure_channel(running.address) as channel:
        stub = InferenceServiceStub(channel)
        for _ in range(3):
            # The first calls of a new server import both vendors' libraries.
            assert run(stub, "broken please", timeout_s=60.0).output_text == SPARE
        asked = len(first.requests)
        assert [hop.outcome for hop in run(stub, "well").decision.hops] == ["skipped", "delivered"]
        assert len(first.requests) == asked, "an open circuit is not asked"
        ended = time.monotonic() + DEADLINE_S
        while (result := run(stub, "well")).output_text == SPARE:
            assert time.monotonic() < ended, "the circuit never closed"
        assert [hop.candidate for hop in result.decision.hops] == ["first/big"]


def test_a_caller_that_leaves_a_stream_leaves_nothing_running(stub: InferenceServiceStub, first: OpenAIServer) -> None:
    stream = generate(stub, "stalls-between-tokens please")
    assert next(iter(stream)).deltas[0].text
    stream.cancel()  # type: ignore[attr-defined]
    # The server goes on to answer others, many at a time: no place is held by those that left.
    done: list[str] = []
    threads = [threading.Thread(target=lambda: done.append(run(stub, "well").output_text)) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == ["the first provider is well"] * 32


def test_no_key_is_anywhere(served: ServerProcess, stub: InferenceServiceStub, first: OpenAIServer) -> None:
    """Logs, the lake, and the arguments of processes; the vendors did get them."""
    for text in ("well", "refuses please", "broken please"):
        assert run(stub, text, timeout_s=60.0).output_text
    assert any(KEYS["FIRST_KEY"] in one for one in first.authorizations)
    everything = "".join(served.lines)
    folder = Path(f"/proc/{served.process.pid}/cwd").resolve()
    for path in folder.rglob("*"):
        if path.is_file():
            everything += path.read_bytes().decode("utf-8", "replace")
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            everything += process.read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
    assert "broken" in everything, "the lake is among what was searched"
    for key in KEYS.values():
        assert key not in everything
