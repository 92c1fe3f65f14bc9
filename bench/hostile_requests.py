"""Bad requests to every service, from a seed: each with the codes and reasons that are right for it.

Nothing here may change the server's state, whatever is flipped: requests that load, unload or delete carry names that no model has.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
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
    "🙂",
    "a\nb",
    "${HOME}",
    "$(id)",
    "%2e%2e%2f",
    "models/x",
    "adapters",
    "con:",
    "‮abc",
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
def _methods() -> dict[str, MethodDescriptor]:
    return {method.name: method for method in methods()}


def path(name: str) -> str:
    """The path of a method, by its name."""
    method = _methods()[name]
    return f"/{method.containing_service.full_name}/{name}"


def cases(count: int, seed: int, target: Target) -> Iterator[Case]:
    """`count` of them, the same for the same seed and target; every kind has its share."""
    rng = random.Random(seed)
    kinds: list[tuple[int, Callable[[random.Random, Target], Case]]] = [
        (8, garbage),
        (10, truncated),
        (10, flipped),
        (8, invalid_utf8),
        (5, empty),
        (4, unknown_fields),
        (5, another_message),
        (8, hostile_name),
        (6, unknown_name),
        (6, negative),
        (6, beyond_limit),
        (5, bad_enum),
        (5, bad_item),
        (14, bad_tensor),
        (5, odd_ids),
        (5, bad_parameter),
        (5, bad_stream),
        (3, left_out),
        (3, deep),
        (2, bad_metadata),
        (1, too_many),
    ]
    makers = [maker for weight, maker in kinds for _ in range(weight)]
    made = 0
    for huge in (_huge_text, _huge_message, _bomb):
        if count >= 100:
            made += 1
            yield huge(rng, target)
    for index in range(count - made):
        yield makers[index % len(makers)](rng, target)


# Requests that are right, to be spoiled.


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
    return GetMessageClass(_methods()[name].input_type)()


def text_request(target: Target, texts: list[bytes]) -> oip.ModelInferRequest:
    """ModelInfer of texts, in raw contents."""
    request = oip.ModelInferRequest(model_name=target.embedder, id="h")
    request.inputs.add(name="text", datatype="BYTES", shape=[len(texts)])
    request.raw_input_contents.append(b"".join(struct.pack("<I", len(text)) + text for text in texts))
    return request


def _case(kind: str, name: str, data: Message | bytes, allowed: Allowed, **more: Any) -> Case:
    raw = data if isinstance(data, bytes) else data.SerializeToString()
    return Case(kind, path(name), raw, allowed, stream=name == "ModelStreamInfer", **more)


def _any_method(rng: random.Random, *, mutating: bool = True) -> str:
    return rng.choice([name for name in sorted(_methods()) if mutating or name not in MUTATING])


def _spoiled(name: str) -> Allowed:
    """What spoiled bytes of a method's request may get; methods that are left out refuse them all the same, parsed or not."""
    return {**SANE, **LEFT_OUT} if name else SANE


# Bytes.


def garbage(rng: random.Random, _target: Target) -> Case:
    name = _any_method(rng)
    return _case("garbage", name, rng.randbytes(rng.choice([1, 2, 3, 8, 64, 1000, 30_000])), _spoiled(name))


def truncated(rng: random.Random, target: Target) -> Case:
    name = _any_method(rng, mutating=False)
    data = right_request(name, rng, target).SerializeToString()
    return _case("truncated", name, data[: rng.randrange(len(data))] if data else b"\x0a", _spoiled(name))


def flipped(rng: random.Random, target: Target) -> Case:
    name = _any_method(rng, mutating=False)
    data = bytearray(right_request(name, rng, target).SerializeToString() or b"\x0a\x00")
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return _case("flipped", name, bytes(data), _spoiled(name))


def invalid_utf8(rng: random.Random, _target: Target) -> Case:
    """A text field of the request, or of a message one level down, that is not UTF-8."""
    spots = [
        (name, f, inner)
        for name, method in sorted(_methods().items())
        for f in method.input_type.fields
        for inner in ([f] if f.type == FieldDescriptor.TYPE_STRING else f.message_type.fields if f.message_type is not None else [])
        if inner.type == FieldDescriptor.TYPE_STRING
    ]
    name, outer, inner = rng.choice(spots)
    bad = rng.choice([b"\xff", b"\xc3\x28", b"ok\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"a\x80"])
    data = bytes([inner.number << 3 | 2, len(bad)]) + bad
    if outer is not inner:
        data = bytes([outer.number << 3 | 2, len(data)]) + data
    allowed = {**MALFORMED, **LEFT_OUT} if name in LEFT_OUT_METHODS or "SharedMemory" in name else MALFORMED
    return _case("invalid_utf8", name, data, allowed)


def empty(rng: random.Random, _target: Target) -> Case:
    fine = {"ListModels", "ListSkills", "GetStatus", "ServerLive", "ServerReady", "ServerMetadata", "RepositoryIndex", "ModelStatistics"}
    name = _any_method(rng)
    if name in LEFT_OUT_METHODS or "SharedMemory" in name:
        return _case("empty", name, b"", LEFT_OUT)
    allowed: Allowed = FINE if name in fine else NAME
    if name == "ModelStreamInfer":
        allowed = {**NAME, **FINE}
    return _case("empty", name, b"", allowed)


def unknown_fields(rng: random.Random, target: Target) -> Case:
    """Fields of a newer client are skipped: what is known is answered."""
    name = rng.choice(["Embed", "ModelInfer", "ListModels", "GetStatus", "ServerMetadata", "ModelMetadata"])
    extra = b""
    for _ in range(rng.randint(1, 5)):
        number = rng.choice([1000, 5000, 2**28])
        kind = rng.choice([0, 1, 2, 5])
        tag = number << 3 | kind
        while tag >= 0x80:
            extra += bytes([tag & 0x7F | 0x80])
            tag >>= 7
        extra += bytes([tag]) + {0: b"\x96\x01", 1: b"\1" * 8, 2: b"\x03abc", 5: b"\1" * 4}[kind]
    return _case("unknown_fields", name, right_request(name, rng, target).SerializeToString() + extra, FINE)


def another_message(rng: random.Random, target: Target) -> Case:
    name, other = _any_method(rng, mutating=False), _any_method(rng, mutating=False)
    return _case("another_message", name, right_request(other, rng, target), _spoiled(name))


def deep(rng: random.Random, target: Target) -> Case:
    """Unknown groups, one in the other."""
    name = rng.choice(["Embed", "ModelInfer", "ModelMetadata"])
    depth = rng.choice([101, 1000, 50_000])
    tail = b"\x7b" * depth + b"\x7c" * rng.choice([0, depth])
    return _case("deep", name, right_request(name, rng, target).SerializeToString() + tail, {**MALFORMED, **FINE})


# Names.


def _named(name: str, value: str, rng: random.Random, version: str = "") -> tuple[str, Message]:
    prefixed = f"models/{value}" + (f"/versions/{version}" if version else "")
    requests: dict[str, Message] = {
        "Embed": inference_service_pb2.EmbedRequest(model={"name": value, "version": version}, texts=["a"]),
        "Rerank": inference_service_pb2.RerankRequest(model={"name": value, "version": version}, query="a", documents=["b"]),
        "GetModel": model_service_pb2.GetModelRequest(name=f"models/{value}/versions/{version or '1'}"),
        "LoadModel": model_service_pb2.LoadModelRequest(name=prefixed),
        "UnloadModel": model_service_pb2.UnloadModelRequest(name=prefixed),
        "DeleteModel": model_service_pb2.DeleteModelRequest(name=f"models/{value}/versions/{version or '1'}"),
        "ModelMetadata": oip.ModelMetadataRequest(name=value, version=version),
        "ModelConfig": oip.ModelConfigRequest(name=value, version=version),
        "ModelInfer": oip.ModelInferRequest(model_name=value, model_version=version),
        "RepositoryModelLoad": oip.RepositoryModelLoadRequest(model_name=value),
        "RepositoryModelUnload": oip.RepositoryModelUnloadRequest(model_name=value),
        "GetSkill": skill_service_pb2.GetSkillRequest(name=f"skills/{value}"),
        "Run": inference_service_pb2.RunRequest(skill=value, inputs=[{"text": "a"}]),
    }
    chosen = name or rng.choice(sorted(requests))
    return chosen, requests[chosen]


def hostile_name(rng: random.Random, target: Target) -> Case:
    if rng.random() < 0.3:
        version = rng.choice(["../1", "-1", "0", "1.0", "one", "9" * 50, "1\0", "１", " 1"])
        name, request = _named(rng.choice(["Embed", "ModelMetadata", "ModelInfer"]), target.embedder, rng, version)
        return _case("hostile_name", name, request, NAME)
    name, request = _named("", rng.choice(HOSTILE_NAMES), rng)
    return _case("hostile_name", name, request, NAME)


def unknown_name(rng: random.Random, target: Target) -> Case:
    if rng.random() < 0.3:
        name, request = _named(rng.choice(["Embed", "ModelMetadata", "ModelInfer"]), target.embedder, rng, str(rng.randint(1000, 10**8)))
        return _case("unknown_name", name, request, {"NOT_FOUND": frozenset({"VERSION_NOT_FOUND"})})
    name, request = _named("", f"nobody-{rng.randrange(10**6)}", rng)
    return _case("unknown_name", name, request, ABSENT)


# Values.


def negative(rng: random.Random, target: Target) -> Case:
    value = rng.choice([-1, -2, -(2**31)])
    model = {"name": target.embedder}
    name, request = rng.choice(
        [
            ("Embed", inference_service_pb2.EmbedRequest(model=model, texts=["a"], dimensions=value)),
            ("Classify", inference_service_pb2.ClassifyRequest(model=model, inputs=[{"text": "a"}], candidate_labels=["x"], top_k=value)),
            ("Rerank", inference_service_pb2.RerankRequest(model=model, query="a", documents=["b"], top_n=value)),
            ("ListModels", model_service_pb2.ListModelsRequest(page_size=value)),
            ("ListSkills", skill_service_pb2.ListSkillsRequest(page_size=value)),
            ("UnloadModel", model_service_pb2.UnloadModelRequest(name="models/nobody", grace={"seconds": value})),
            ("CreateFeedback", feedback_service_pb2.CreateFeedbackRequest(feedback={"interaction_id": "x", "rating": value})),
        ]
    )
    return _case("negative", name, request, NAME if name in MUTATING else BAD)


def beyond_limit(rng: random.Random, target: Target) -> Case:
    model = {"name": target.embedder}
    many = 10**9
    name, request, allowed = rng.choice(
        [
            ("Embed", inference_service_pb2.EmbedRequest(model=model, texts=["a"], dimensions=many), BAD),
            (
                "Classify",
                inference_service_pb2.ClassifyRequest(model=model, inputs=[{"text": "a"}], candidate_labels=["x"] * 300),
                BAD,
            ),
            (
                "Classify",
                inference_service_pb2.ClassifyRequest(
                    model=model, inputs=[{"text": "a"}], candidate_labels=["x"], hypothesis_template="no place for it"
                ),
                {**BAD, **FINE},
            ),
            ("Run", inference_service_pb2.RunRequest(skill="nobody", inputs=[{"text": "a"}], user="u" * 300), NAME),
            ("ModelInfer", oip.ModelInferRequest(model_name=target.embedder, id="i" * 5000), BAD),
            ("CreateFeedback", feedback_service_pb2.CreateFeedbackRequest(feedback={"interaction_id": "x", "rating": 99}), NAME),
            (
                "CreateFeedback",
                feedback_service_pb2.CreateFeedbackRequest(feedback={"interaction_id": "x", "comment": "c" * 20_000}),
                NAME,
            ),
            ("CreateFeedback", feedback_service_pb2.CreateFeedbackRequest(feedback={"interaction_id": "i" * 10_000, "rating": 1}), NAME),
            ("ListModels", model_service_pb2.ListModelsRequest(page_token=rng.choice(["?", "%%%", "a" * 5000, "AAAA"])), BAD),
            ("ListModels", model_service_pb2.ListModelsRequest(task="no-such-task"), BAD),
            ("UnloadModel", model_service_pb2.UnloadModelRequest(name="models/nobody", grace={"seconds": 10**11}), NAME),
        ]
    )
    return _case("beyond_limit", name, request, allowed)


def bad_enum(rng: random.Random, target: Target) -> Case:
    value = rng.choice([7, 99, 2**31 - 1, -1])
    model = {"name": target.embedder}
    name, request = rng.choice(
        [
            ("Embed", inference_service_pb2.EmbedRequest(model=model, texts=["a"], pooling=value)),
            ("Embed", inference_service_pb2.EmbedRequest(model=model, texts=["a"], input_type=value)),
            ("Embed", inference_service_pb2.EmbedRequest(model=model, texts=["a"], priority=value)),
            ("ExtractEntities", inference_service_pb2.ExtractEntitiesRequest(texts=["a"], aggregation_strategy=value)),
            ("Run", inference_service_pb2.RunRequest(skill="nobody", inputs=[{"text": "a"}], preference=value)),
            ("CreateFeedback", feedback_service_pb2.CreateFeedbackRequest(feedback={"interaction_id": "x", "thumb": value})),
        ]
    )
    allowed = SANE if name == "ExtractEntities" else NAME if name in ("Run", "CreateFeedback") else BAD
    if name == "ExtractEntities":
        allowed = {code: reasons for code, reasons in SANE.items() if code != "OK"}
    return _case("bad_enum", name, request, allowed)


def bad_item(rng: random.Random, target: Target) -> Case:
    """The call is right and its items are not: each has an error of its own."""
    model = {"name": target.embedder}
    long = rng.choice(["card ", "é ", "漢", "a-"]) * (target.max_tokens * 3)
    texts = rng.choice([[""], ["", ""], [long], [long, ""]])
    reasons = frozenset({"INVALID_ARGUMENT", "INPUT_TOO_LONG"})
    if rng.random() < 0.3:
        request: Message = inference_service_pb2.RerankRequest(model=model, query="q", documents=texts)
        return _case("bad_item", "Rerank", request, {**FINE, **BAD}, item_reasons=reasons)
    request = inference_service_pb2.EmbedRequest(model=model, texts=texts)
    return _case("bad_item", "Embed", request, FINE, item_reasons=reasons)


def too_many(rng: random.Random, target: Target) -> Case:
    texts = ["a"] * rng.randint(2049, 4000)
    too_large: Allowed = {"INVALID_ARGUMENT": frozenset({"REQUEST_TOO_LARGE"})}
    if rng.random() < 0.5:
        return _case("too_many", "ModelInfer", text_request(target, [b"a"] * len(texts)), too_large)
    return _case("too_many", "Embed", inference_service_pb2.EmbedRequest(model={"name": target.embedder}, texts=texts), too_large)


def _huge_text(_rng: random.Random, target: Target) -> Case:
    request = inference_service_pb2.EmbedRequest(model={"name": target.embedder}, texts=["a " * 4_000_000])
    return _case("huge", "Embed", request, FINE, item_reasons=frozenset({"INPUT_TOO_LONG"}))


def _huge_message(_rng: random.Random, target: Target) -> Case:
    """Larger than the server takes: gRPC itself refuses it, and knows no reasons."""
    return _case("huge", "Embed", b"\x12" + b"\x80\x80\x80\x28" + bytes(80 << 20), {"RESOURCE_EXHAUSTED": frozenset({""})})


def _bomb(_rng: random.Random, target: Target) -> Case:
    """Small while compressed."""
    return _case("huge", "Embed", b"\x12" + b"\x80\x80\x80\x28" + bytes(80 << 20), {"RESOURCE_EXHAUSTED": frozenset({""})}, gzip=True)


# Tensors.


def bad_tensor(rng: random.Random, target: Target) -> Case:
    name = rng.choice(sorted(target.raw))
    metadata = target.raw[name]
    request = oip.ModelInferRequest(model_name=name)
    graph = [tensor for tensor in metadata.inputs if tensor.name not in ("text", "query", "question", "context")]
    rows = rng.randint(1, 3)
    for tensor in graph:
        shape = [rows if size < 0 else size for size in tensor.shape]
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        request.raw_input_contents.append(_zeros(tensor.datatype, shape))
    spoil = rng.choice(list(_SPOILERS.values()))
    spoil(rng, request)
    return _case("bad_tensor", "ModelInfer", request, BAD)


def _zeros(datatype: str, shape: list[int]) -> bytes:
    count = 1
    for size in shape:
        count *= size
    width = {"BOOL": 1, "BYTES": 4, "BF16": 2, "FP16": 2, "FP32": 4, "FP64": 8}.get(datatype) or int(datatype.lstrip("UINT")) // 8
    return bytes(count * width)


def _first(request: oip.ModelInferRequest) -> Any:
    return request.inputs[0]


def _wrong_type(rng: random.Random, request: oip.ModelInferRequest) -> None:
    others = [t for t in ("FP16", "FP64", "BYTES", "BF16", "FP8", "", "fp32", "UINT8", "BOOL", "x" * 9000) if t != _first(request).datatype]
    _first(request).datatype = rng.choice(others)
    request.raw_input_contents[0] = request.raw_input_contents[0] + b"\7\7\7"


def _wrong_size(rng: random.Random, request: oip.ModelInferRequest) -> None:
    request.raw_input_contents[0] = request.raw_input_contents[0] + rng.randbytes(rng.randint(1, 3))


def _wrong_shape(rng: random.Random, request: oip.ModelInferRequest) -> None:
    del _first(request).shape[:]
    shapes = ([-1], [-(2**63)], [2**62, 4], [2**31, 2**31], [10**9], [1] * 100, [0, 2**63 - 1], [2**32, 2**32], [5, 5, 5, 5, 5])
    _first(request).shape.extend(rng.choice(shapes))


def _missing(_rng: random.Random, request: oip.ModelInferRequest) -> None:
    del request.inputs[0]
    del request.raw_input_contents[0]


def _unknown(rng: random.Random, request: oip.ModelInferRequest) -> None:
    _first(request).name = rng.choice(["nobody", "", "../x", "x" * 70_000, "\0"])


def _twice(_rng: random.Random, request: oip.ModelInferRequest) -> None:
    request.inputs.append(_first(request))
    request.raw_input_contents.append(request.raw_input_contents[0])


def _both(_rng: random.Random, request: oip.ModelInferRequest) -> None:
    _first(request).contents.fp32_contents.append(float("nan"))


def _raw_missing(_rng: random.Random, request: oip.ModelInferRequest) -> None:
    request.raw_input_contents.append(b"")


def _wrong_contents(rng: random.Random, request: oip.ModelInferRequest) -> None:
    del request.raw_input_contents[:]
    rng.choice([_first(request).contents.bytes_contents.append, lambda _: None])(b"x")
    _first(request).contents.uint64_contents.extend([2**64 - 1] * 5)


def _unknown_output(rng: random.Random, request: oip.ModelInferRequest) -> None:
    request.outputs.add(name=rng.choice(["nobody", "", "x" * 10_000]))


def _many_inputs(_rng: random.Random, request: oip.ModelInferRequest) -> None:
    for index in range(300):
        request.inputs.add(name=f"i{index}", datatype="FP32", shape=[1])


_SPOILERS = {
    spoil.__name__: spoil
    for spoil in (
        _wrong_type,
        _wrong_size,
        _wrong_shape,
        _missing,
        _unknown,
        _twice,
        _both,
        _raw_missing,
        _wrong_contents,
        _unknown_output,
        _many_inputs,
    )
}


def odd_ids(rng: random.Random, target: Target) -> Case:
    """Values of the right type and shape that no caller should send: NaN, infinity, ids and tables out of range. Some are legal data."""
    name = rng.choice(sorted(target.raw))
    request = oip.ModelInferRequest(model_name=name)
    rows = rng.randint(1, 4)
    for tensor in target.raw[name].inputs:
        if tensor.name in ("text", "query", "question", "context"):
            continue
        shape = [rows if size < 0 else size for size in tensor.shape]
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        zeros = _zeros(tensor.datatype, shape)
        fill = {
            "FP32": struct.pack("<f", rng.choice([float("nan"), float("inf"), -3e38])),
            "FP64": struct.pack("<d", rng.choice([float("nan"), float("-inf"), 1e308])),
            "FP16": b"\x00\x7e",
            "INT64": struct.pack("<q", rng.choice([-1, 2**63 - 1, -(2**63), 10**6])),
            "INT32": struct.pack("<i", rng.choice([-1, 2**31 - 1, -(2**31), 10**6])),
        }.get(tensor.datatype, b"")
        request.raw_input_contents.append(fill * (len(zeros) // len(fill)) if fill and rng.random() < 0.8 else zeros)
    return _case("odd_ids", "ModelInfer", request, {**BAD, **FINE})


def bad_parameter(rng: random.Random, target: Target) -> Case:
    request = text_request(target, [b"card"])
    key, value = rng.choice(
        [
            ("priority", {"int64_param": 77}),
            ("priority", {"string_param": "high"}),
            ("priority", {"int64_param": -1}),
            ("timeout", {"int64_param": -5}),
            ("timeout", {"double_param": float("nan")}),
            ("truncate", {"string_param": "yes"}),
            ("sequence_id", {"int64_param": 4}),
            ("colour", {"string_param": "red"}),
            ("x" * 10_000, {"bool_param": True}),
            ("", {}),
        ]
    )
    request.parameters[key].CopyFrom(oip.InferParameter(**value))
    return _case("bad_parameter", "ModelInfer", request, BAD)


def bad_stream(rng: random.Random, target: Target) -> Case:
    """A request that fails on a stream has its error in a message of the stream, which then goes on to its end."""
    if rng.random() < 0.3:
        return _case("bad_stream", "ModelStreamInfer", rng.randbytes(40), {**MALFORMED, **FINE})
    return _case("bad_stream", "ModelStreamInfer", bad_tensor(rng, target).data, FINE, item_reasons=ARGUMENT)


def left_out(rng: random.Random, _target: Target) -> Case:
    name = rng.choice([name for name in sorted(_methods()) if name in LEFT_OUT_METHODS or "SharedMemory" in name])
    request = GetMessageClass(_methods()[name].input_type)()
    if "name" in _methods()[name].input_type.fields_by_name:
        request.name = rng.choice(HOSTILE_NAMES)  # type: ignore[attr-defined]
    return _case("left_out", name, request, LEFT_OUT)


def bad_metadata(rng: random.Random, target: Target) -> Case:
    """Odd headers: a request id or a trace that cannot be one is replaced, an authorization that nobody asked for is ignored."""
    entry = rng.choice(
        [
            ("x-request-id", "../../x"),
            ("x-request-id", "a" * 3000),
            ("traceparent", "00-zz-yy-xx"),
            ("authorization", "Bearer " + "A" * 2000),
            ("grpc-encoding-x", "?"),
        ]
    )
    return _case("bad_metadata", "Embed", right_request("Embed", rng, target), FINE, metadata=(entry,))
