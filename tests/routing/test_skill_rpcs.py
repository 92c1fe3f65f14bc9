"""Run, SkillService and FeedbackService of the real server, with a teacher on loopback over real HTTP."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from server.lake import table
from server.lake.schema import FEEDBACK, INTERACTIONS
from server.settings import SKILL_TASKS
from tests.conftest import StartServer
from tests.providers.loopback import OpenAIServer, Reply
from tests.server_process import ServerProcess
from understudy.v1 import common_pb2, feedback_pb2, feedback_service_pb2, inference_pb2, inference_service_pb2, skill_service_pb2
from understudy.v1.feedback_service_pb2_grpc import FeedbackServiceStub
from understudy.v1.inference_service_pb2_grpc import InferenceServiceStub
from understudy.v1.skill_service_pb2_grpc import SkillServiceStub

SECRET = "sk-secret-of-the-loopback"


@pytest.fixture
def teacher() -> Iterator[OpenAIServer]:
    def script(number: int, text: str) -> Reply | str:
        return Reply(500) if "broken" in text else "not one of them" if "odd" in text else "card"

    running = OpenAIServer(script)
    yield running
    running.close()


@pytest.fixture
def served(start_server: StartServer, teacher: OpenAIServer, tmp_path: Path) -> ServerProcess:
    return start_server(
        f"""
[lake]
path = {json.dumps(str(tmp_path / "lake"))}
flush_s = 0.5
[registry]
url = {json.dumps(f"sqlite:///{tmp_path / 'registry.db'}")}
[providers.loop]
base_url = "{teacher.base_url}"
api_key_env = "LOOP_KEY"
max_retries = 0
[providers.loop.prices.big]
input_per_million_usd = 1.0
output_per_million_usd = 2.0
[skills.intent]
labels = ["card", "transfer"]
teacher = "loop/big"
base = "embedder"
""",
        env={"LOOP_KEY": SECRET},
    )


@pytest.fixture
def channel(served: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.address) as opened:
        yield opened


def run(channel: grpc.Channel, *texts: str, **more: Any) -> Any:
    inputs = [inference_pb2.RunInput(text=text) for text in texts]
    return InferenceServiceStub(channel).Run(inference_service_pb2.RunRequest(skill="intent", inputs=inputs, **more), timeout=30)


def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)
    assert status is not None
    return caught.value.code(), status.details[0].value.decode("utf-8", "replace")


def test_runs_are_answered_item_by_item_and_kept(
    served: ServerProcess, channel: grpc.Channel, teacher: OpenAIServer, tmp_path: Path
) -> None:
    response = run(channel, "where is it", "odd one", "  ", "broken", user="ada lovelace")
    good, odd, blank, broken = response.results
    assert good.output_text == "card" and good.cost.micro_usd == 120 and good.usage.input_tokens == 100
    assert good.decision.candidate == "loop/big" and not good.decision.local and good.decision.rollout_stage == "held"
    assert [hop.outcome for hop in good.decision.hops] == ["delivered"] and not good.HasField("quality")
    assert odd.error.code == grpc.StatusCode.UNAVAILABLE.value[0] and odd.cost.micro_usd == 120
    assert blank.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0] and "inputs[2].text" in blank.error.message
    assert broken.error.code == grpc.StatusCode.UNAVAILABLE.value[0] and "500" in broken.error.message
    assert response.cost.micro_usd == 240

    served.signal(signal.SIGKILL)
    served.process.wait()
    rows = []
    while not rows:  # a killed server has lost nothing that it answered; whoever converts next finds it
        table.convert(tmp_path / "lake", INTERACTIONS)
        rows = table.read(tmp_path / "lake", INTERACTIONS).to_pylist()
    kept = {row["input"]: row for row in rows}
    assert set(kept) == {"where is it", "odd one", "broken"}
    assert kept["where is it"]["teacher_label"] == "card" and kept["where is it"]["interaction_id"] == good.interaction_id
    everything = "".join(served.lines) + json.dumps(rows, default=str)
    assert SECRET not in everything and "ada lovelace" not in everything
    assert "where is it" not in "".join(served.lines), "logs hold no text"
    assert teacher.authorizations[0] == f"Bearer {SECRET}"


def test_bad_runs_are_refused_by_field(channel: grpc.Channel) -> None:
    stub = InferenceServiceStub(channel)
    request = inference_service_pb2.RunRequest
    text = inference_pb2.RunInput(text="x")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for bad in (
        request(inputs=[text]),
        request(skill="intent"),
        request(skill="intent", inputs=[text], preference=9),
        request(skill="intent", inputs=[text], max_cost=common_pb2.Cost(micro_usd=-1)),
        request(skill="intent", inputs=[text], user="u" * 300),
        request(skill="intent", inputs=[text] * 2049),
    ):
        assert refused(lambda bad=bad: stub.Run(bad, timeout=10))[0] == invalid
    code, _ = refused(lambda: stub.Run(request(skill="intnt", inputs=[text]), timeout=10))
    assert code == grpc.StatusCode.NOT_FOUND
    code, _ = refused(lambda: run(channel, "x", preference=inference_pb2.ROUTE_PREFERENCE_LOCAL_ONLY))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    chat = inference_pb2.RunInput(chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="a")]))
    (result,) = stub.Run(request(skill="intent", inputs=[chat]), timeout=10).results
    assert result.error.code == invalid.value[0]
    (result,) = run(channel, "x", max_cost=common_pb2.Cost(micro_usd=0)).results
    assert result.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0] and result.decision.hops[0].outcome == "skipped"


def test_skills_are_shown(channel: grpc.Channel) -> None:
    stub = SkillServiceStub(channel)
    skills = stub.ListSkills(skill_service_pb2.ListSkillsRequest(), timeout=10).skills
    (listed,) = [skill for skill in skills if not skill.built_in]
    assert {skill.name.removeprefix("skills/") for skill in skills if skill.built_in} == set(SKILL_TASKS)
    got = stub.GetSkill(skill_service_pb2.GetSkillRequest(name="skills/intent"), timeout=10).skill
    assert listed == got and got.teacher == "loop/big" and list(got.labels) == ["card", "transfer"] and not got.HasField("student")
    for name, code in (("skills/none", grpc.StatusCode.NOT_FOUND), ("intent", grpc.StatusCode.INVALID_ARGUMENT)):
        assert refused(lambda name=name: stub.GetSkill(skill_service_pb2.GetSkillRequest(name=name), timeout=10))[0] == code


def test_feedback_is_kept_once_and_only_on_our_interactions(served: ServerProcess, channel: grpc.Channel, tmp_path: Path) -> None:
    stub = FeedbackServiceStub(channel)
    (result,) = run(channel, "where is it").results
    known = result.interaction_id

    def create(request_id: str = "", **fields: Any) -> Any:
        feedback = feedback_pb2.Feedback(**fields)
        return stub.CreateFeedback(
            feedback_service_pb2.CreateFeedbackRequest(feedback=feedback, request_id=request_id), timeout=10
        ).feedback

    first = create("same", interaction_id=known, rating=4, thumb=feedback_pb2.THUMB_UP)
    again = create("same", interaction_id=known, rating=1)
    assert again == first and first.rating == 4 and first.create_time.seconds > 0
    assert create(interaction_id=known, correction="transfer").feedback_id != create(interaction_id=known, comment="hm").feedback_id
    assert refused(lambda: create(interaction_id="a" * 32, rating=1))[0] == grpc.StatusCode.NOT_FOUND
    for bad in ({"rating": 6}, {"rating": 0}, {}, {"comment": " "}, {"comment": "x" * 20_000}, {"thumb": 7}):
        assert refused(lambda bad=bad: create(interaction_id=known, **bad))[0] == grpc.StatusCode.INVALID_ARGUMENT
    served.stop()
    rows = table.read(tmp_path / "lake", FEEDBACK).to_pylist()
    assert sorted((row["rating"], row["correction"], row["comment"]) for row in rows if row["rating"]) == [(4, None, None)]
    assert len(rows) == 3 and {row["interaction_id"] for row in rows} == {known}
