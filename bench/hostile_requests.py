"""Bad requests to every service, from a seed: each with the codes and reasons that are right for it.

Nothing here may change the server's state, whatever is flipped: requests that load, unload or delete carry names that no model has.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from bench.hostile_case import (
    ABSENT,
    BAD,
    FINE,
    HOSTILE_NAMES,
    LEFT_OUT,
    LEFT_OUT_METHODS,
    MALFORMED,
    MUTATING,
    NAME,
    SANE,
    Allowed,
    Case,
    Target,
    any_method,
    by_name,
    make,
    right_request,
    spoiled,
    text_request,
)
from bench.hostile_tensors import bad_parameter, bad_stream, bad_tensor, odd_ids
from understudy.oip import open_inference_pb2 as oip
from understudy.v1 import feedback_service_pb2, inference_service_pb2, model_service_pb2, skill_service_pb2


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
        (2, too_costly),
    ]
    makers = [maker for weight, maker in kinds for _ in range(weight)]
    made = 0
    for huge in (_huge_text, _huge_message, _bomb):
        if count >= 100:
            made += 1
            yield huge(rng, target)
    for index in range(count - made):
        yield makers[index % len(makers)](rng, target)


# Bytes.


def garbage(rng: random.Random, _target: Target) -> Case:
    name = any_method(rng)
    return make("garbage", name, rng.randbytes(rng.choice([1, 2, 3, 8, 64, 1000, 30_000])), spoiled(name))


def truncated(rng: random.Random, target: Target) -> Case:
    name = any_method(rng, mutating=False)
    data = right_request(name, rng, target).SerializeToString()
    return make("truncated", name, data[: rng.randrange(len(data))] if data else b"\x0a", spoiled(name))


def flipped(rng: random.Random, target: Target) -> Case:
    name = any_method(rng, mutating=False)
    data = bytearray(right_request(name, rng, target).SerializeToString() or b"\x0a\x00")
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return make("flipped", name, bytes(data), spoiled(name))


def invalid_utf8(rng: random.Random, _target: Target) -> Case:
    """A text field of the request, or of a message one level down, that is not UTF-8."""
    spots = [
        (name, f, inner)
        for name, method in sorted(by_name().items())
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
    return make("invalid_utf8", name, data, allowed)


def empty(rng: random.Random, _target: Target) -> Case:
    fine = {
        "ListModels",
        "ListSkills",
        "GetStatus",
        "GetStats",
        "GetBudget",
        "GetTimeline",
        "ListInteractions",
        "ServerLive",
        "ServerReady",
        "ServerMetadata",
        "RepositoryIndex",
        "ModelStatistics",
    }
    name = any_method(rng)
    if name in LEFT_OUT_METHODS or "SharedMemory" in name:
        return make("empty", name, b"", LEFT_OUT)
    allowed: Allowed = FINE if name in fine else NAME
    if name in ("ModelStreamInfer", "RunMany"):  # streams go on: what is wrong with a message is in its answer
        allowed = {**NAME, **FINE}
    return make("empty", name, b"", allowed)


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
    return make("unknown_fields", name, right_request(name, rng, target).SerializeToString() + extra, FINE)


def another_message(rng: random.Random, target: Target) -> Case:
    name, other = any_method(rng, mutating=False), any_method(rng, mutating=False)
    return make("another_message", name, right_request(other, rng, target), spoiled(name))


def deep(rng: random.Random, target: Target) -> Case:
    """Unknown groups, one in the other."""
    name = rng.choice(["Embed", "ModelInfer", "ModelMetadata"])
    depth = rng.choice([101, 1000, 50_000])
    tail = b"\x7b" * depth + b"\x7c" * rng.choice([0, depth])
    return make("deep", name, right_request(name, rng, target).SerializeToString() + tail, {**MALFORMED, **FINE})


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
        return make("hostile_name", name, request, NAME)
    name, request = _named("", rng.choice(HOSTILE_NAMES), rng)
    return make("hostile_name", name, request, NAME)


def unknown_name(rng: random.Random, target: Target) -> Case:
    if rng.random() < 0.3:
        name, request = _named(rng.choice(["Embed", "ModelMetadata", "ModelInfer"]), target.embedder, rng, str(rng.randint(1000, 10**8)))
        return make("unknown_name", name, request, {"NOT_FOUND": frozenset({"VERSION_NOT_FOUND"})})
    name, request = _named("", f"nobody-{rng.randrange(10**6)}", rng)
    return make("unknown_name", name, request, ABSENT)


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
    return make("negative", name, request, NAME if name in MUTATING else BAD)


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
    return make("beyond_limit", name, request, allowed)


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
    return make("bad_enum", name, request, allowed)


def bad_item(rng: random.Random, target: Target) -> Case:
    """The call is right and its items are not: each has an error of its own."""
    model = {"name": target.embedder}
    long = rng.choice(["card ", "é ", "漢", "a-"]) * (target.max_tokens * 3)
    texts = rng.choice([[""], ["", ""], [long], [long, ""]])
    reasons = frozenset({"INVALID_ARGUMENT", "INPUT_TOO_LONG"})
    if rng.random() < 0.3:
        request: Message = inference_service_pb2.RerankRequest(model=model, query="q", documents=texts)
        return make("bad_item", "Rerank", request, {**FINE, **BAD}, item_reasons=reasons)
    request = inference_service_pb2.EmbedRequest(model=model, texts=texts)
    return make("bad_item", "Embed", request, FINE, item_reasons=reasons)


def too_many(rng: random.Random, target: Target) -> Case:
    texts = ["a"] * rng.randint(2049, 4000)
    too_large: Allowed = {"INVALID_ARGUMENT": frozenset({"REQUEST_TOO_LARGE"})}
    if rng.random() < 0.5:
        return make("too_many", "ModelInfer", text_request(target, [b"a"] * len(texts)), too_large)
    return make("too_many", "Embed", inference_service_pb2.EmbedRequest(model={"name": target.embedder}, texts=texts), too_large)


def too_costly(rng: random.Random, target: Target) -> Case:
    """Small on the wire, and large in what it would make the server do: refused at once."""
    model = {"name": target.embedder}
    name, request = rng.choice(
        [
            ("AnswerQuestion", inference_service_pb2.AnswerQuestionRequest(inputs=[{"question": "q", "context": "c"}], top_k=2**31 - 1)),
            (
                "AnswerQuestion",
                inference_service_pb2.AnswerQuestionRequest(inputs=[{"question": "q", "context": "c"}], max_answer_tokens=2**31 - 1),
            ),
            (
                "Classify",
                inference_service_pb2.ClassifyRequest(
                    model=model, inputs=[{"text": "a"}] * 2048, candidate_labels=[f"label {i}" for i in range(256)]
                ),
            ),
        ]
    )
    return make("too_costly", name, request, BAD)


def _huge_text(_rng: random.Random, target: Target) -> Case:
    request = inference_service_pb2.EmbedRequest(model={"name": target.embedder}, texts=["a " * 4_000_000])
    return make("huge", "Embed", request, FINE, item_reasons=frozenset({"INPUT_TOO_LONG"}))


def _huge_message(_rng: random.Random, target: Target) -> Case:
    """Larger than the server takes: gRPC itself refuses it, and knows no reasons."""
    return make("huge", "Embed", b"\x12" + b"\x80\x80\x80\x28" + bytes(80 << 20), {"RESOURCE_EXHAUSTED": frozenset({""})})


def _bomb(_rng: random.Random, target: Target) -> Case:
    """Small while compressed."""
    return make("huge", "Embed", b"\x12" + b"\x80\x80\x80\x28" + bytes(80 << 20), {"RESOURCE_EXHAUSTED": frozenset({""})}, gzip=True)


def left_out(rng: random.Random, _target: Target) -> Case:
    name = rng.choice([name for name in sorted(by_name()) if name in LEFT_OUT_METHODS or "SharedMemory" in name])
    request = GetMessageClass(by_name()[name].input_type)()
    if "name" in by_name()[name].input_type.fields_by_name:
        request.name = rng.choice(HOSTILE_NAMES)  # type: ignore[attr-defined]
    return make("left_out", name, request, LEFT_OUT)


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
    return make("bad_metadata", "Embed", right_request("Embed", rng, target), FINE, metadata=(entry,))
