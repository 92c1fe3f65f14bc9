"""Every RPC of understudy.v1 against the running server, and what bad requests get."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.conftest import StartServer
from tests.server_process import ServerProcess
from understudy.v1 import (
    feedback_pb2,
    feedback_service_pb2,
    feedback_service_pb2_grpc,
    model_pb2,
    skill_service_pb2,
    skill_service_pb2_grpc,
    stats_service_pb2,
    stats_service_pb2_grpc,
)
from understudy.v1 import inference_pb2 as items
from understudy.v1 import inference_service_pb2 as pb
from understudy.v1 import inference_service_pb2_grpc as stubs
from understudy.v1 import model_service_pb2 as models
from understudy.v1 import model_service_pb2_grpc as model_stubs


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture
def inference(channel: grpc.Channel) -> Any:
    return stubs.InferenceServiceStub(channel)


@pytest.fixture
def repository(channel: grpc.Channel) -> Any:
    return model_stubs.ModelServiceStub(channel)


def reason_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """(code, reason, metadata) of a rich error."""
    trailing = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert trailing["x-request-id"]
    return error.code(), info.reason, dict(info.metadata)


def refused(call: Any, request: Any) -> tuple[str, str, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    code, reason, metadata = reason_of(caught.value)
    return code.name, reason, metadata


def test_embed_gives_unit_vectors_and_an_error_for_the_bad_item_alone(inference: Any) -> None:
    response = inference.Embed(pb.EmbedRequest(texts=["the card is lost", "money", ""]))
    vectors = [np.array(one.embedding, np.float32) for one in response.results]
    assert [len(one) for one in vectors] == [32, 32, 0]
    assert np.allclose([np.linalg.norm(one) for one in vectors[:2]], 1, atol=1e-5)
    assert response.results[2].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert (response.model.name, response.model.version) == ("embedder", "1")
    assert response.usage.input_tokens == 6 + 3
    assert response.timings.run.nanos > 0


def test_a_text_has_the_same_vector_alone_and_in_a_batch(inference: Any) -> None:
    texts = ["the card is lost", "money", "who found it in london ? " * 8]
    together = inference.Embed(pb.EmbedRequest(texts=texts))
    for text, one in zip(texts, together.results, strict=True):
        alone = inference.Embed(pb.EmbedRequest(texts=[text])).results[0]
        assert np.allclose(alone.embedding, one.embedding, atol=1e-6)


def test_embed_truncates_when_asked_and_never_otherwise(inference: Any) -> None:
    long = "money " * 500
    refusal = inference.Embed(pb.EmbedRequest(texts=[long])).results[0]
    assert refusal.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0] and not refusal.embedding
    cut = inference.Embed(pb.EmbedRequest(texts=[long, "money"], truncate=True))
    assert [one.truncated for one in cut.results] == [True, False]


def test_embed_without_normalisation_differs(inference: Any) -> None:
    raw = inference.Embed(pb.EmbedRequest(texts=["money"], normalize=False, pooling=pb.POOLING_CLS))
    assert abs(np.linalg.norm(raw.results[0].embedding) - 1) > 1e-3


def test_classify_by_the_model_s_labels(inference: Any) -> None:
    request = pb.ClassifyRequest(inputs=[items.ClassifyInput(text="card"), items.ClassifyInput(text="a", text_pair="b")], top_k=2)
    response = inference.Classify(request)
    for one in response.results:
        assert len(one.labels) == 2 and one.labels[0].score >= one.labels[1].score
    assert response.model.name == "classifier"


def test_classify_by_the_caller_s_labels(inference: Any) -> None:
    response = inference.Classify(pb.ClassifyRequest(inputs=[items.ClassifyInput(text="card lost")], candidate_labels=["card", "money"]))
    assert {label.name for label in response.results[0].labels} == {"card", "money"}
    assert sum(label.score for label in response.results[0].labels) == pytest.approx(1, abs=1e-4)


def test_rerank_orders_documents(inference: Any) -> None:
    documents = ["money transfer", "the card is lost", "", "password"]
    response = inference.Rerank(pb.RerankRequest(query="where is my card ?", documents=documents, return_documents=True))
    good, bad = response.results[:3], response.results[3]
    assert [one.score for one in good] == sorted((one.score for one in good), reverse=True)
    assert [one.document for one in good] == [documents[one.index] for one in good]
    assert bad.index == 2 and bad.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


def test_entities_point_into_the_text(inference: Any) -> None:
    text = "ada lived in london . who found it ?"
    response = inference.ExtractEntities(pb.ExtractEntitiesRequest(texts=[text]))
    for entity in response.results[0].entities:
        assert text[entity.start : entity.end].replace(" ", "") == entity.text.replace(" ", "")


def test_answers_point_into_the_context(inference: Any) -> None:
    context = "ada lived in london . " * 20
    asked = items.QuestionInput(question="where ?", context=context)
    response = inference.AnswerQuestion(pb.AnswerQuestionRequest(inputs=[asked], top_k=3))
    answers = response.results[0].answers
    assert 1 <= len(answers) <= 3
    assert all(context[one.start : one.end] == one.text for one in answers)


@pytest.mark.parametrize(
    ("method", "request_message", "expected"),
    [
        ("Embed", pb.EmbedRequest(), ("INVALID_ARGUMENT", "INVALID_ARGUMENT", "texts")),
        ("Embed", pb.EmbedRequest(texts=["a"] * 2049), ("INVALID_ARGUMENT", "REQUEST_TOO_LARGE", "texts")),
        ("Embed", pb.EmbedRequest(texts=["a"], dimensions=-1), ("INVALID_ARGUMENT", "INVALID_ARGUMENT", "dimensions")),
        ("Embed", pb.EmbedRequest(texts=["a"], dimensions=31), ("INVALID_ARGUMENT", "INVALID_ARGUMENT", "dimensions")),
        ("Embed", pb.EmbedRequest(texts=["a"], pooling=99), ("INVALID_ARGUMENT", "INVALID_ARGUMENT", "pooling")),
        ("Embed", pb.EmbedRequest(texts=["a"], input_type=9), ("INVALID_ARGUMENT", "INVALID_ARGUMENT", "input_type")),
        ("Embed", pb.EmbedRequest(texts=["a"], priority=9), ("INVALID_ARGUMENT", "INVALID_ARGUMENT", "priority")),
        ("Embed", pb.EmbedRequest(texts=["a"], model={"version": "1"}), ("INVALID_ARGUMENT", "INVALID_ARGUMENT", "model.name")),
        ("Embed", pb.EmbedRequest(texts=["a"], model={"name": "../x"}), ("INVALID_ARGUMENT", "INVALID_ARGUMENT", "model")),
        ("Embed", pb.EmbedRequest(texts=["a"], model={"name": "embeder"}), ("NOT_FOUND", "MODEL_NOT_FOUND", None)),
        ("Embed", pb.EmbedRequest(texts=["a"], model={"name": "embedder", "version": "9"}), ("NOT_FOUND", "VERSION_NOT_FOUND", None)),
        ("Embed", pb.EmbedRequest(texts=["a"], model={"name": "reader"}), ("FAILED_PRECONDITION", "TASK_NOT_SUPPORTED", None)),
        ("Classify", pb.ClassifyRequest(inputs=[{"text": "a"}], top_k=-1), ("INVALID_ARGUMENT", "INVALID_ARGUMENT", "top_k")),
        (
            "Classify",
            pb.ClassifyRequest(inputs=[{"text": "a"}], candidate_labels=["x"] * 257),
            ("INVALID_ARGUMENT", "REQUEST_TOO_LARGE", "candidate_labels"),
        ),
        (
            "Classify",
            pb.ClassifyRequest(inputs=[{"text": "a", "text_pair": "b"}], candidate_labels=["x"]),
            ("INVALID_ARGUMENT", "INVALID_ARGUMENT", "inputs[0].text_pair"),
        ),
        ("Rerank", pb.RerankRequest(query="", documents=["a"]), ("INVALID_ARGUMENT", "INVALID_ARGUMENT", "query")),
        (
            "ExtractEntities",
            pb.ExtractEntitiesRequest(texts=["a"], aggregation_strategy=77),
            ("INVALID_ARGUMENT", "INVALID_ARGUMENT", "aggregation_strategy"),
        ),
        ("AnswerQuestion", pb.AnswerQuestionRequest(), ("INVALID_ARGUMENT", "INVALID_ARGUMENT", "inputs")),
        ("Run", pb.RunRequest(skill="nothing", inputs=[{"text": "a"}]), ("NOT_FOUND", "SKILL_NOT_FOUND", None)),
    ],
)  # fmt: skip
def test_bad_requests_get_their_code_reason_and_field(inference: Any, method: str, request_message: Any, expected: tuple[Any, ...]) -> None:
    code, reason, metadata = refused(getattr(inference, method), request_message)
    assert (code, reason) == expected[:2]
    if expected[2] is not None:
        assert metadata["field"] == expected[2]


def test_bytes_that_are_no_message_are_invalid_and_not_internal(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/understudy.v1.InferenceService/Embed")
    assert refused(call, b"\x12\x02\xff\xfe")[:2] == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")
    health = channel.unary_unary("/grpc.health.v1.Health/Check")
    assert refused(health, b"\xff")[:2] == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")


def test_models_are_listed_by_pages(repository: Any) -> None:
    whole = [one.name for one in repository.ListModels(models.ListModelsRequest()).models]
    assert "models/embedder/versions/1" in whole and whole == sorted(whole)
    seen: list[str] = []
    token = ""
    while True:
        page = repository.ListModels(models.ListModelsRequest(page_size=2, page_token=token))
        seen += [one.name for one in page.models]
        token = page.next_page_token
        if not token:
            break
    assert seen == whole
    tensor = repository.ListModels(models.ListModelsRequest(task="tensor", loaded_only=True)).models
    assert tensor and all(one.task == "tensor" and one.state == model_pb2.MODEL_STATE_READY for one in tensor)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (models.ListModelsRequest(page_size=-1), "page_size"),
        (models.ListModelsRequest(page_token="%%%"), "page_token"),
        (models.ListModelsRequest(task="translating"), "task"),
    ],
)
def test_bad_pages_are_refused(repository: Any, message: Any, field: str) -> None:
    assert refused(repository.ListModels, message)[2]["field"] == field


def test_a_model_is_shown_by_name_and_as_current(repository: Any) -> None:
    one = repository.GetModel(models.GetModelRequest(name="models/classifier/versions/1")).model
    assert (one.task, list(one.labels), one.current) == ("text-classification", ["card", "transfer", "password"], True)
    assert repository.GetModel(models.GetModelRequest(name="models/classifier/versions/current")).model == one
    for name in ("classifier", "models/classifier", "models/../x/versions/1", ""):
        assert refused(repository.GetModel, models.GetModelRequest(name=name))[0] == "INVALID_ARGUMENT"


def test_status_shows_models_and_build(channel: grpc.Channel, inference: Any) -> None:
    inference.Embed(pb.EmbedRequest(texts=["money"]))
    status = stats_service_pb2_grpc.StatsServiceStub(channel).GetStatus(stats_service_pb2.GetStatusRequest())
    embedder = next(one for one in status.models if one.model.model_id == "embedder")
    assert embedder.answered_sequences >= 1 and embedder.batches >= 1
    assert status.kernel_isa and status.onnxruntime_version and status.resident_bytes > 10 << 20 and not status.draining


def test_without_configured_skills_each_task_has_one_and_unknown_ids_get_no_feedback(channel: grpc.Channel) -> None:
    skills = skill_service_pb2_grpc.SkillServiceStub(channel)
    assert all(skill.built_in for skill in skills.ListSkills(skill_service_pb2.ListSkillsRequest()).skills)
    feedback = feedback_service_pb2_grpc.FeedbackServiceStub(channel)
    message = feedback_service_pb2.CreateFeedbackRequest(feedback=feedback_pb2.Feedback(interaction_id="x", rating=5))
    assert refused(feedback.CreateFeedback, message)[:2] == ("NOT_FOUND", "INTERACTION_NOT_FOUND")


def test_reflection_lists_every_service(channel: grpc.Channel) -> None:
    found = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert found == {
        *(f"understudy.v1.{name}Service" for name in ("Admin", "Inference", "Model", "Skill", "Feedback", "Stats", "Ensemble", "Training")),
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_load_unload_and_delete_while_serving(start_server: StartServer, small_models: Path, tmp_path: Path) -> None:
    copy = tmp_path / "models"
    shutil.copytree(small_models, copy)
    running = start_server('[models]\nload = ["adder@1"]', models=copy)
    with grpc.insecure_channel(running.address) as channel:
        stub = model_stubs.ModelServiceStub(channel)
        inference = stubs.InferenceServiceStub(channel)
        assert refused(inference.Embed, pb.EmbedRequest(texts=["a"]))[:2] == ("FAILED_PRECONDITION", "MODEL_NOT_LOADED")
        assert stub.LoadModel(models.LoadModelRequest(name="models/embedder")).model.state == model_pb2.MODEL_STATE_READY
        assert inference.Embed(pb.EmbedRequest(texts=["a"])).results[0].embedding
        assert refused(stub.DeleteModel, models.DeleteModelRequest(name="models/embedder/versions/1"))[1] == "MODEL_IN_USE"
        gone = stub.UnloadModel(models.UnloadModelRequest(name="models/embedder", grace={"seconds": 1})).models
        assert [one.state for one in gone] == [model_pb2.MODEL_STATE_UNLOADED]
        assert refused(stub.UnloadModel, models.UnloadModelRequest(name="models/embedder"))[1] == "MODEL_NOT_LOADED"
        bad_grace = models.UnloadModelRequest(name="models/adder", grace={"seconds": -1})
        assert refused(stub.UnloadModel, bad_grace)[2]["field"] == "grace"
        stub.DeleteModel(models.DeleteModelRequest(name="models/embedder/versions/1"))
        assert refused(stub.LoadModel, models.LoadModelRequest(name="models/embedder"))[1] == "MODEL_NOT_FOUND"
        swapped = stub.LoadModel(models.LoadModelRequest(name="models/adder/versions/2", replace=True)).model
        assert swapped.current and swapped.version == "2"
        model = copy / "ranker" / "1" / "model.onnx"
        model.write_bytes(model.read_bytes()[:-1])
        assert refused(stub.LoadModel, models.LoadModelRequest(name="models/ranker"))[1] == "MODEL_REJECTED"
    running.stop(allow_errors=True)
