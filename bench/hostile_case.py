"""What a bad request is: its bytes, and the codes and reasons that are right for it; and requests that are right, to be spoiled."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from understudy.oip import open_inference_pb2 as oip
from understudy.v1 import (
    feedback_service_pb2,
    inference_service_pb2,
    model_service_pb2,
    skill_service_pb2,
    stats_service_pb2,
)

Allowed = Mapping[str, frozenset[str]]  # code -> reasons; the empty reason is gRPC's own answer

ARGUMENT = frozenset({"INVALID_ARGUMENT", "INPUT_TOO_LONG", "INVALID_TENSOR", "REQUEST_TOO_LARGE"})
MALFORMED: Allowed = {"INVALID_ARGUMENT": frozenset({"INVALID_ARGUMENT"})}
BAD: Allowed = {"INVALID_ARGUMENT": ARGUMENT}
ABSENT: Allowed = {
    "NOT_FOUND": frozenset({"MODEL_NOT_FOUND", "VERSION_NOT_FOUND", "SKILL_NOT_FOUND", "INTERACTION_NOT_FOUND", "NOT_FOUND"}),
}
NAME: Allowed = {**BAD, **ABSENT}
# What bytes that are almost a request may get: it may still be one, and even a good one.
SANE: Allowed = {
    **NAME,
    "OK": frozenset({""}),
    "FAILED_PRECONDITION": frozenset({"MODEL_NOT_LOADED", "TASK_NOT_SUPPORTED", "FAILED_PRECONDITION"}),
    "UNIMPLEMENTED": frozenset({"UNIMPLEMENTED"}),
    "DEADLINE_EXCEEDED": frozenset({"DEADLINE_EXCEEDED"}),  # a flipped timeout
}
FINE: Allowed = {"OK": frozenset({""})}
LEFT_OUT: Allowed = {"UNIMPLEMENTED": frozenset({"UNIMPLEMENTED"})}

HOSTILE_NAMES = (
    "../embedder",
    "../../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "a/b",
    "a\\b",
    "a\0b",
    "\0",
    "A",
    " ",
    "-x",
    "a" * 129,
    "a" * 100_000,
    "\U0001f642",
    "a\nb",
    "${HOME}",
    "$(id)",
    "%2e%2e%2f",
    "models/x",
    "adapters",
    "con:",
    "\u202eabc",
)
MUTATING = {"LoadModel", "UnloadModel", "DeleteModel", "RepositoryModelLoad", "RepositoryModelUnload", "CreateFeedback"}
LEFT_OUT_METHODS = {"TraceSetting", "LogSettings"}


@dataclass(frozen=True, slots=True)
class Case:
    """One call. `item_reasons`: with status OK every result must be an error of one of these; empty: results are not looked at."""

    kind: str
    method: str
    data: bytes
    allowed: Allowed
    item_reasons: frozenset[str] = frozenset()
    stream: bool = False
    metadata: tuple[tuple[str, str], ...] = ()
    gzip: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """What the server has: `embedder` answers Embed; `raw` are metadata of models by name."""

    embedder: str
    max_tokens: int
    raw: Mapping[str, oip.ModelMetadataResponse] = field(default_factory=dict)


def methods() -> list[MethodDescriptor]:
    """Every method of every service."""
    files = (inference_service_pb2, model_service_pb2, skill_service_pb2, feedback_service_pb2, stats_service_pb2, oip)
    return [method for file in files for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods]


@cache
def by_name() -> dict[str, MethodDescriptor]:
    return {method.name: method for method in methods()}


def path(name: str) -> str:
    """The path of a method, by its name."""
    method = by_name()[name]
    return f"/{method.containing_service.full_name}/{name}"


def right_request(name: str, rng: random.Random, target: Target) -> Message:
    """A request of the method that would be answered, but for its model where that must not change."""
    embed = {"model": {"name": target.embedder}}
    nobody = f"nobody-{rng.randrange(10**6)}"
    makers: dict[str, Callable[[], Message]] = {
        "Run": lambda: inference_service_pb2.RunRequest(skill=nobody, inputs=[{"text": "hello"}], user="u1"),
        "Embed": lambda: inference_service_pb2.EmbedRequest(texts=["where is my card?", "naïve ∂"], truncate=True, **embed),
        "Classify": lambda: inference_service_pb2.ClassifyRequest(inputs=[{"text": "a"}], candidate_labels=["x", "y"], **embed),
        "Rerank": lambda: inference_service_pb2.RerankRequest(query="q", documents=["a", "b"], top_n=1, **embed),
        "ExtractEntities": lambda: inference_service_pb2.ExtractEntitiesRequest(texts=["Ada"], **embed),
        "AnswerQuestion": lambda: inference_service_pb2.AnswerQuestionRequest(inputs=[{"question": "q?", "context": "c"}], **embed),
        "GetModel": lambda: model_service_pb2.GetModelRequest(name=f"models/{target.embedder}/versions/1"),
        "ListModels": lambda: model_service_pb2.ListModelsRequest(page_size=3, task="feature-extraction"),
        "LoadModel": lambda: model_service_pb2.LoadModelRequest(name=f"models/{nobody}"),
        "UnloadModel": lambda: model_service_pb2.UnloadModelRequest(name=f"models/{nobody}/versions/1", grace={"seconds": 1}),
        "DeleteModel": lambda: model_service_pb2.DeleteModelRequest(name=f"models/{nobody}/versions/1"),
        "GetSkill": lambda: skill_service_pb2.GetSkillRequest(name=f"skills/{nobody}"),
        "ListSkills": lambda: skill_service_pb2.ListSkillsRequest(page_size=3),
        "CreateFeedback": lambda: feedback_service_pb2.CreateFeedbackRequest(feedback={"interaction_id": nobody, "rating": 3}),
        "ModelReady": lambda: oip.ModelReadyRequest(name=target.embedder),
        "ModelMetadata": lambda: oip.ModelMetadataRequest(name=target.embedder),
        "ModelConfig": lambda: oip.ModelConfigRequest(name=target.embedder),
        "ModelStatistics": lambda: oip.ModelStatisticsRequest(name=target.embedder),
        "ModelInfer": lambda: text_request(target, [b"where is my card?"]),
        "ModelStreamInfer": lambda: text_request(target, [b"where is my card?"]),
        "RepositoryIndex": lambda: oip.RepositoryIndexRequest(ready=True),
        "RepositoryModelLoad": lambda: oip.RepositoryModelLoadRequest(model_name=nobody),
        "RepositoryModelUnload": lambda: oip.RepositoryModelUnloadRequest(model_name=nobody),
    }
    if name in makers:
        return makers[name]()
    return GetMessageClass(by_name()[name].input_type)()


def text_request(target: Target, texts: list[bytes]) -> oip.ModelInferRequest:
    """ModelInfer of texts, in raw contents."""
    request = oip.ModelInferRequest(model_name=target.embedder, id="h")
    request.inputs.add(name="text", datatype="BYTES", shape=[len(texts)])
    request.raw_input_contents.append(b"".join(struct.pack("<I", len(text)) + text for text in texts))
    return request


def make(kind: str, name: str, data: Message | bytes, allowed: Allowed, **more: Any) -> Case:
    raw = data if isinstance(data, bytes) else data.SerializeToString()
    return Case(kind, path(name), raw, allowed, stream=name == "ModelStreamInfer", **more)


def any_method(rng: random.Random, *, mutating: bool = True) -> str:
    return rng.choice([name for name in sorted(by_name()) if mutating or name not in MUTATING])


def spoiled(name: str) -> Allowed:
    """What spoiled bytes of a method's request may get; methods that are left out refuse them all the same, parsed or not."""
    return {**SANE, **LEFT_OUT} if name else SANE
