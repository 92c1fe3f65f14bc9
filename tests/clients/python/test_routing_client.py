"""Skills through the two clients and the command: run, run_many, explain_route, streams, and what they tell of a route."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.providers.loopback import OpenAIServer, Reply
from tests.server_process import ServerProcess
from understudy import convert, errors
from understudy.aio import AsyncClient
from understudy.client import Client, RunReply, RunRequest
from understudy.v1 import inference_pb2 as items
from understudy.v1 import inference_service_pb2 as pb

ROOT = Path(__file__).resolve().parents[3]


def script(number: int, text: str) -> Reply | str:
    return Reply(500) if "broken" in text else "Your card is on its way" if "write" in text else "card"


@pytest.fixture(scope="module")
def server(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("routing-client")
    teacher = OpenAIServer(script)
    config = f"""
[models]
load = ["embedder"]
[lake]
path = {json.dumps(str(folder / "lake"))}
[registry]
url = {json.dumps(f"sqlite:///{folder / 'registry.db'}")}
[providers.loop]
kind = "compatible"
base_url = "{teacher.base_url}"
max_retries = 0
circuit_failures = 1000
prices.big = {{ input_per_million_usd = 1.0, output_per_million_usd = 2.0 }}
[skills.intent]
labels = ["card", "transfer"]
teacher = "loop/big"
[skills.open]
teacher = "loop/big"
task = "zero-shot-classification"
labels = ["card", "loan"]
[skills.reply]
task = "text-generation"
teacher = "loop/big"
"""
    running = ServerProcess(folder, config, models=small_models)
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()
        teacher.close()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as made:
        yield made


def test_an_answer_tells_its_route(client: Client) -> None:
    found = client.run("intent", ["Where is my card?"], preference="best", user="u1", max_latency_s=30, max_cost_usd=1)
    answer = found[0]
    assert (answer.text, answer.skill, answer.candidate, answer.local) == ("card", "intent", "loop/big", False)
    assert (answer.decision.task, answer.decision.preference, answer.decision.propensity) == ("text-classification", "best", 1.0)
    (hop,) = answer.hops
    assert (hop.outcome, hop.tries) == ("delivered", 1)
    assert 0 < hop.elapsed_s < 30
    assert hop.cost_usd == answer.cost_usd > 0
    assert answer.embedding is None and answer.score is None and answer.decision.detection is None


def test_limits_reach_the_route(client: Client) -> None:
    with pytest.raises(errors.ItemErrors) as dear:
        client.run("intent", ["Where is my card?"], max_cost_usd=0)
    assert "max_cost" in str(dear.value.errors[0])
    with pytest.raises(errors.InvalidArgument, match="labels are given"):
        client.run("intent", ["a"], labels=["x", "y"])
    with pytest.raises(ValueError, match="'cheapest'"):
        client.run("intent", ["a"], preference="dearest")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="put it into a list"):
        client.run("intent", ["a"], labels="card")


def test_a_providers_model_is_named(client: Client) -> None:
    (answer,) = client.run("intent", ["Where is my card?"], model="loop/other")
    assert (answer.candidate, answer.text) == ("loop/other", "card")
    with pytest.raises(errors.UnderstudyError, match="nowhere"):
        client.run("intent", ["Where is my card?"], model="nowhere/other")


def test_plain_words_with_labels(client: Client) -> None:
    with pytest.raises(errors.UnderstudyError) as unlabelled:  # no teacher of the built-in skill, no local classifier
        client.run(
            instruction="which of the two is it?", inputs=["Where is my card?"], labels=["card", "transfer"], preference="provider_only"
        )
    assert unlabelled.value.code == "FAILED_PRECONDITION"
    (local,) = client.run(instruction="which of the two is it?", inputs=["Where is my card?"], labels=["card", "transfer"])
    assert local.local and {label.name for label in local.labels} == {"card", "transfer"}
    assert local.decision.detection is not None and local.decision.detection.task == "text-classification"


def test_routes_are_explained_without_asking(client: Client) -> None:
    route, refused = client.explain_route("intent", ["Where is my card?", " "], return_errors=True).items
    assert not isinstance(route, errors.UnderstudyError)
    assert isinstance(refused, errors.InvalidArgument)
    (one,) = route.candidates
    assert (one.candidate, one.local, one.skipped) == ("loop/big", False, "")
    assert one.worst_cost_usd and route.deliver_bar == pytest.approx(0.8)
    assert route.decision.candidate == "" and route.decision.hops == ()


def many(count: int) -> Iterator[RunRequest]:
    for n in range(count):
        yield RunRequest(f"r{n}", ["Where is my card?"], "none" if n == 3 else "intent", {"preference": "best"})


def check(replies: list[RunReply], count: int) -> None:
    assert sorted(one.id for one in replies) == sorted(f"r{n}" for n in range(count))
    for one in replies:
        if one.id == "r3":
            with pytest.raises(errors.NotFound):
                _ = one.answers
        else:
            assert one.answers[0].text == "card"


def test_run_many(client: Client) -> None:
    check(list(client.run_many(many(100))), 100)
    assert list(client.run_many([])) == []
    for one in client.run_many(many(10**9)):  # leaving ends the call
        assert one.id
        break
    with pytest.raises(errors.DeadlineExceeded):
        list(client.run_many(many(10**9), timeout_s=0.3))


def slip(make: Callable[[], Iterator[RunRequest]]) -> Iterator[RunRequest]:
    yield from make()
    raise LookupError("the caller's own")


def test_run_many_raises_what_the_requests_raise(client: Client) -> None:
    with pytest.raises(LookupError, match="own"):
        list(client.run_many(slip(lambda: many(2))))
    with pytest.raises(TypeError, match="'modle'"):
        list(client.run_many([RunRequest("a", ["x"], "intent", {"modle": "x"})]))  # type: ignore[typeddict-unknown-key]


async def later(count: int) -> AsyncIterator[RunRequest]:
    for one in many(count):
        await asyncio.sleep(0)
        yield one


async def test_aio(server: ServerProcess) -> None:
    async with AsyncClient(server.address) as client:
        check([one async for one in client.run_many(later(100))], 100)
        check([one async for one in client.run_many(many(20))], 20)
        assert [one async for one in client.run_many([])] == []
        with pytest.raises(LookupError, match="own"):
            async for _ in client.run_many(slip(lambda: many(2))):
                pass
        with pytest.raises(errors.DeadlineExceeded):
            async for _ in client.run_many(later(10**9), timeout_s=0.3):
                pass
        endless = client.run_many(later(10**9))
        assert (await anext(endless)).id
        await endless.aclose()  # type: ignore[attr-defined]
        assert (await client.run("intent", ["Where is my card?"]))[0].text == "card"
        assert (await client.explain_route("intent", ["a"]))[0].candidates[0].candidate == "loop/big"


def test_run_many_in_a_task_that_is_cancelled(server: ServerProcess) -> None:
    async def endless() -> None:
        async with AsyncClient(server.address) as client:
            async for _ in client.run_many(later(10**9)):
                pass

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(endless(), 0.3)

    asyncio.run(main())


def test_a_skill_streams(client: Client) -> None:
    stream = client.generate("write to the customer", skill="reply", preference="best", max_cost_usd=1, user="u1", max_tokens=32)
    assert "".join(delta.text for delta in stream) == "Your card is on its way"
    summary = stream.summary
    assert summary.model == "loop/big" and summary.decision is not None and summary.decision.skill == "reply"
    assert summary.cost_usd > 0 and summary.interaction_id
    client.feedback(summary.interaction_id, thumb="up")
    whole = client.generate_text(messages=[{"role": "user", "content": "write to them"}], skill="reply")
    assert whole.text == "Your card is on its way" and whole.summary.decision is not None
    with pytest.raises(TypeError, match="goes with a skill"):
        client.generate("a", preference="best")


def test_what_providers_failed_at_is_not_sent_again(client: Client) -> None:
    with pytest.raises(errors.Unavailable) as failed:
        client.generate_text("broken, write", skill="reply")
    assert failed.value.reason == "PROVIDER_UNAVAILABLE"
    counted = [one for one in client.status().skills if one.skill == "reply"]
    before = counted[0].failed
    with pytest.raises(errors.Unavailable):
        client.generate("broken, write", skill="reply").text()
    assert next(one for one in client.status().skills if one.skill == "reply").failed == before + 1


def command(server: ServerProcess, *arguments: str) -> Any:
    line = [sys.executable, "-m", "server.cli", "run", *arguments, "--address", server.address, "-v"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_command_asks_a_skill(server: ServerProcess) -> None:
    done = command(server, "intent", "Where is my card?", "--skill")
    assert done.stdout == "card\n", done.stderr
    assert "loop/big: delivered" in done.stderr and "$0.0" in done.stderr
    done = command(server, "reply", "write to them", "--skill")
    assert done.stdout == "Your card is on its way\n", done.stderr
    assert command(server, "inten", "x", "--skill").returncode == 1
    assert "--local" in command(server, "intent", "x", "--skill", "--local").stderr


def test_everything_that_a_result_can_carry() -> None:
    result = items.RunResult(
        output_text="x",
        entities=[items.Entity(label="PER", score=0.5, text="Ada", start=0, end=3)],
        answers=[items.Answer(text="Ada", score=0.5, start=0, end=3)],
        embedding=[1.0, 2.0],
        score=0.25,
        tool_calls=[{"id": "1", "name": "look", "arguments": "{}"}],
        findings=["cut off"],
        decision=items.Decision(
            difficulty=0.5,
            detection=items.TaskDetection(
                task="translation", score=0.5, phrase="p", parameters={"target_language": "fr"}, candidates=["a"]
            ),
        ),
    )
    (answer,) = convert.run_answers(pb.RunResponse(results=[result]).SerializeToString())
    assert (answer.entities[0].text, answer.answers[0].end, answer.score, answer.findings) == ("Ada", 3, 0.25, ("cut off",))
    np.testing.assert_array_equal(answer.embedding, np.array([1, 2], np.float32))
    assert answer.tool_calls[0].name == "look" and answer.decision.difficulty == 0.5
    assert answer.decision.detection is not None and answer.decision.detection.parameters == {"target_language": "fr"}
