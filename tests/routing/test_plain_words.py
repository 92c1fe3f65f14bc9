"""What is to be done may be said in plain words, to the real server with the real starter model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from grpc_status import rpc_status

from tests.providers.loopback import OpenAIServer
from tests.server_process import ServerProcess
from understudy.v1 import inference_service_pb2 as pb
from understudy.v1.inference_service_pb2_grpc import InferenceServiceStub

ROOT = Path(__file__).resolve().parents[2]
STARTER = ROOT / "models"


@pytest.fixture(scope="module")
def teacher() -> Iterator[OpenAIServer]:
    running = OpenAIServer(lambda _number, text: f"done: {text}")
    yield running
    running.close()


@pytest.fixture(scope="module")
def stub(teacher: OpenAIServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceServiceStub]:
    assert (STARTER / "all-minilm-l6-v2").is_dir(), "run the suite by `make test`, which pulls the starter model"
    folder = tmp_path_factory.mktemp("words")
    config = f"""
[models]
load = ["all-minilm-l6-v2"]
[lake]
path = {json.dumps(str(folder / "lake"))}
[providers.loop]
kind = "compatible"
base_url = "{teacher.base_url}"
prices.big = {{ input_per_million_usd = 1.0, output_per_million_usd = 2.0 }}
[routing]
default_teacher = "loop/big"
"""
    running = ServerProcess(folder, config, models=STARTER)
    running.wait_ready()
    with grpc.insecure_channel(running.address) as channel:
        yield InferenceServiceStub(channel)
    running.stop(allow_errors=True)


def run(stub: InferenceServiceStub, **fields: Any) -> Any:
    (result,) = stub.Run(ParseDict(fields, pb.RunRequest()), timeout=60).results
    return result


def test_a_translation_is_asked_for_in_words(stub: InferenceServiceStub, teacher: OpenAIServer) -> None:
    result = run(stub, instruction="translate this into French please", inputs=[{"text": "where is my card"}])
    decision = result.decision
    assert (decision.skill, decision.task, decision.candidate) == ("translation", "translation", "loop/big")
    assert decision.detection.phrase and decision.detection.parameters["target_language"] == "fr"
    assert result.output_text == "done: where is my card"
    system = teacher.requests[-1]["messages"][0]["content"]
    assert "translate this into French please" in system and "into fr" in system
    assert result.HasField("quality"), "what is written is scored"


def test_words_that_carry_their_text_need_no_input(stub: InferenceServiceStub) -> None:
    result = run(stub, instruction="Summarize the following text in one sentence: The cat sat on the mat. It was a large mat.")
    assert result.decision.task == "summarization" and result.output_text == "done: The cat sat on the mat. It was a large mat."


def test_labels_make_it_a_classification(stub: InferenceServiceStub) -> None:
    text = {"text": "I love it"}
    result = run(stub, instruction="is this review positive or negative?", labels=["positive", "negative"], inputs=[text], preference=2)
    assert {label.name for label in result.labels} == {"positive", "negative"} and result.decision.local


def test_words_of_no_task_are_refused_with_those_that_came_near(stub: InferenceServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        run(stub, instruction="good morning, how are you doing today", inputs=[{"text": "x"}])
    status = rpc_status.from_call(caught.value)
    assert status is not None and caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT and "near ones" in status.message


def test_a_task_of_pictures_is_told_apart(stub: InferenceServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        run(stub, instruction="draw me a picture of a castle at night")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED and "text-to-image" in str(caught.value.details())
