"""Every task has a skill that local models answer; routes are explained without running; many requests share a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from grpc_status import rpc_status

from tests.server_process import ServerProcess
from understudy.v1 import inference_service_pb2 as pb
from understudy.v1.inference_service_pb2_grpc import InferenceServiceStub

PAIR = {"text": "who ?", "textPair": "Ada lived in London"}


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[InferenceServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield InferenceServiceStub(channel)


def request(**fields: Any) -> pb.RunRequest:
    return ParseDict(fields, pb.RunRequest())


def run(stub: InferenceServiceStub, **fields: Any) -> pb.RunResponse:
    return stub.Run(request(**fields), timeout=30)


def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)
    assert status is not None
    return caught.value.code(), status.message


def test_local_models_answer_what_they_are_made_for(stub: InferenceServiceStub) -> None:
    text = {"text": "where is my card ?"}
    (vector,) = run(stub, skill="feature-extraction", inputs=[text]).results
    (label,) = run(stub, skill="text-classification", inputs=[text]).results
    (entities,) = run(stub, skill="token-classification", inputs=[{"text": "Ada lived in London"}]).results
    (span,) = run(stub, skill="question-answering", inputs=[{"pair": PAIR}]).results
    (close,) = run(stub, skill="sentence-similarity", inputs=[{"pair": {"text": "my card", "textPair": "my card"}}]).results
    (far,) = run(stub, skill="sentence-similarity", inputs=[{"pair": {"text": "my card", "textPair": "a transfer of money"}}]).results
    (relevance,) = run(stub, skill="text-ranking", inputs=[{"pair": PAIR}]).results
    assert len(vector.embedding) > 8 and label.labels[0].name == label.output_text and not entities.HasField("error")
    assert span.answers[0].text == span.output_text and span.output_text in PAIR["textPair"]
    assert close.score == pytest.approx(1.0, abs=1e-3) and far.score < close.score and relevance.HasField("score")
    for result in (vector, label, entities, span, close, relevance):
        assert result.decision.local and result.decision.candidate.startswith("local:") and result.interaction_id
        assert [hop.outcome for hop in result.decision.hops] == ["delivered"] and result.cost.micro_usd == 0
        assert result.decision.rollout_stage == "full" and result.decision.propensity == 1


def test_labels_of_the_request_are_chosen_from(stub: InferenceServiceStub) -> None:
    (result,) = run(stub, skill="zero-shot-classification", inputs=[{"text": "where is my card ?"}], labels=["card", "loan"]).results
    assert {label.name for label in result.labels} == {"card", "loan"}


def test_inputs_that_a_task_cannot_take_fail_alone(stub: InferenceServiceStub) -> None:
    results = run(stub, skill="question-answering", inputs=[{"pair": PAIR}, {"text": "no pair"}, {}]).results
    assert not results[0].HasField("error")
    assert "inputs[1].pair" in str(results[1].error.details) and "question and context" in results[1].error.message
    assert "inputs[2]" in results[2].error.message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"skill": "translation", "instruction": "translate", "inputs": [{"text": "x"}]}, "instruction"),
        ({"inputs": [{"text": "x"}]}, "skill"),
        ({"skill": "text-classification", "labels": ["one"], "inputs": [{"text": "x"}]}, "labels"),
        ({"skill": "text-classification", "labels": ["a", "A"], "inputs": [{"text": "x"}]}, "tell apart"),
        ({"skill": "text-classification", "maxLatency": "0s", "inputs": [{"text": "x"}]}, "max_latency"),
        ({"skill": "text-classification", "preference": 3, "maxCost": {"microUsd": 0}, "inputs": [{"text": "x"}]}, "max_cost"),
    ],
)
def test_contradictions_name_the_field(stub: InferenceServiceStub, fields: dict[str, Any], says: str) -> None:
    code, message = refused(lambda: run(stub, **fields))
    assert code == grpc.StatusCode.INVALID_ARGUMENT and says in message


def test_unknown_skills_and_tasks_without_a_model_say_so(stub: InferenceServiceStub) -> None:
    code, message = refused(lambda: run(stub, skill="text-clasification", inputs=[{"text": "x"}]))
    assert code == grpc.StatusCode.NOT_FOUND and "'text-classification'" in message
    code, message = refused(lambda: run(stub, skill="fill-mask", preference=3, inputs=[{"text": "x"}]))
    assert code == grpc.StatusCode.FAILED_PRECONDITION and "teacher" in message


def test_a_route_is_explained_without_running(stub: InferenceServiceStub) -> None:
    asked = request(skill="text-classification", inputs=[{"text": "x"}, {}])
    good, empty = stub.ExplainRoute(pb.ExplainRouteRequest(request=asked), timeout=30).routes
    (candidate,) = good.candidates
    assert candidate.local and candidate.reason and not candidate.skipped and candidate.worst_cost.micro_usd == 0
    assert good.decision.task == "text-classification" and not good.decision.hops and good.deliver_bar == pytest.approx(0.8)
    assert empty.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    asked = request(skill="fill-mask", preference=3, inputs=[{"text": "x"}])
    (nobody,) = stub.ExplainRoute(pb.ExplainRouteRequest(request=asked), timeout=30).routes
    assert nobody.error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]


def test_many_requests_share_a_stream_and_fail_alone(stub: InferenceServiceStub) -> None:
    good = request(skill="feature-extraction", inputs=[{"text": "my card"}])
    many = [pb.RunManyRequest(id=str(n), request=good) for n in range(200)]
    many[7].request.skill = "nothing-like-it"
    many[8].id = ""
    found = {response.id: response for response in stub.RunMany(iter(many), timeout=60)}
    assert len(found) == 200
    assert found["7"].error.code == grpc.StatusCode.NOT_FOUND.value[0] and found[""].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert all(one.response.results[0].embedding for name, one in found.items() if name not in ("7", ""))
