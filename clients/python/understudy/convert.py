"""Messages to results, and the few inputs that are more than their fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np

from understudy.errors import ItemErrors, UnderstudyError, from_status
from understudy.results import (
    Answer,
    Classification,
    Decision,
    Detection,
    Embedding,
    Entity,
    FloatArray,
    Hop,
    Label,
    LoadedModel,
    Model,
    RankedDocument,
    Results,
    RunAnswer,
    Skill,
    SkillCounts,
    Status,
    Timings,
    ToolCall,
    Usage,
)
from understudy.v1 import generation_pb2 as pieces
from understudy.v1 import inference_pb2 as items
from understudy.v1 import inference_service_pb2 as pb
from understudy.v1 import model_pb2
from understudy.v1 import stats_service_pb2 as stats_pb

T = TypeVar("T")
RunInput = str | tuple[str, str] | Sequence[Mapping[str, Any]]

# Tags (field << 3 | 2, length-delimited) of EmbedResponse.results and EmbedResult.embedding.
_RESULTS = pb.EmbedResponse.RESULTS_FIELD_NUMBER << 3 | 2
_EMBEDDING = items.EmbedResult.EMBEDDING_FIELD_NUMBER << 3 | 2


def checked(read: Callable[[bytes], Results[T]], return_errors: bool) -> Callable[[bytes], Results[T]]:
    """As `read`, and raises ItemErrors for results with errors unless they are asked for."""

    def read_and_check(data: bytes) -> Results[T]:
        results = read(data)
        if not return_errors and (errors := results.errors):
            raise ItemErrors(errors, results)
        return results

    return read_and_check


def matrix(results: Results[Embedding]) -> FloatArray:
    """All vectors as float32 [n, D]; raises the first error there is."""
    return np.stack([one.vector for one in results]) if len(results) else np.empty((0, 0), np.float32)


def embeddings(data: bytes) -> Results[Embedding]:
    """EmbedResponse. Vectors are views of `data`: a packed float field is its array's little-endian bytes."""
    view = memoryview(data)
    found: list[Embedding | UnderstudyError] = []
    rest: list[memoryview] = []
    at = 0
    while at < len(data):
        start = at
        tag, at = _varint(data, at)
        size, at = _varint(data, at)  # every field of EmbedResponse is length-delimited
        at += size
        if tag == _RESULTS:
            found.append(_embedding(view[at - size : at]))
        else:
            rest.append(view[start:at])
    return _results(found, pb.EmbedResponse.FromString(b"".join(rest)))


def _embedding(data: memoryview) -> Embedding | UnderstudyError:
    if len(data) and data[0] == _EMBEDDING:
        size, at = _varint(data, 1)
        if at + size <= len(data):
            vector = np.frombuffer(data[at : at + size], "<f4")
            if at + size == len(data):
                return Embedding(vector)
            tail = items.EmbedResult.FromString(data[at + size :].tobytes())
            if not tail.embedding and not tail.HasField("error"):
                return Embedding(vector, tail.truncated)
    one = items.EmbedResult.FromString(data.tobytes())
    return from_status(one.error) if one.HasField("error") else Embedding(np.array(one.embedding, np.float32), one.truncated)


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def classifications(data: bytes) -> Results[Classification]:
    """ClassifyResponse."""
    response = pb.ClassifyResponse.FromString(data)
    return _results([_item(one, lambda it: Classification(_labels(it.labels), it.truncated)) for one in response.results], response)


def ranking(data: bytes) -> Results[RankedDocument]:
    """RerankResponse."""
    response = pb.RerankResponse.FromString(data)
    return _results(
        [_item(one, lambda it: RankedDocument(it.index, it.score, it.document, it.truncated)) for one in response.results], response
    )


def entities(data: bytes) -> Results[tuple[Entity, ...]]:
    """ExtractEntitiesResponse."""
    response = pb.ExtractEntitiesResponse.FromString(data)

    return _results([_item(one, lambda it: _entities(it.entities)) for one in response.results], response)


def answers(data: bytes) -> Results[tuple[Answer, ...]]:
    """AnswerQuestionResponse."""
    response = pb.AnswerQuestionResponse.FromString(data)

    return _results([_item(one, lambda it: _answers(it.answers)) for one in response.results], response)


def run_answers(data: bytes) -> Results[RunAnswer]:
    """RunResponse."""
    return run_results(pb.RunResponse.FromString(data))


def run_results(response: pb.RunResponse) -> Results[RunAnswer]:
    """The same, parsed already."""
    found = [_item(one, run_answer) for one in response.results]
    return Results(found, usage=_usage(response.usage), timings=_timings(response.timings))


def run_answer(message: Any) -> RunAnswer:
    """RunResult."""
    return RunAnswer(
        text=message.output_text,
        labels=_labels(message.labels),
        decision=decision(message.decision),
        quality=_optional(message, "quality"),
        cost_usd=message.cost.micro_usd / 1e6,
        usage=_usage(message.usage),
        interaction_id=message.interaction_id,
        entities=_entities(message.entities),
        answers=_answers(message.answers),
        embedding=np.array(message.embedding, np.float32) if message.embedding else None,
        score=_optional(message, "score"),
        tool_calls=tuple(ToolCall(one.id, one.name, one.arguments) for one in message.tool_calls),
        findings=tuple(message.findings),
    )


def decision(message: items.Decision) -> Decision:
    """How an answer came about, or would."""
    found = message.detection
    return Decision(
        skill=message.skill,
        candidate=message.candidate,
        local=message.local,
        hops=tuple(map(_hop, message.hops)),
        rollout_stage=message.rollout_stage,
        task=message.task,
        preference=message.preference,
        difficulty=_optional(message, "difficulty"),
        detection=Detection(found.task, found.score, found.phrase, dict(found.parameters), tuple(found.candidates))
        if message.HasField("detection")
        else None,
        propensity=message.propensity,
    )


def _hop(hop: items.Hop) -> Hop:
    quality = _optional(hop, "quality")
    return Hop(hop.candidate, hop.outcome, hop.reason, quality, hop.cost.micro_usd / 1e6, _seconds(hop.elapsed), hop.tries)


def run_input(value: RunInput) -> items.RunInput:
    """A text, a pair of texts, or messages as {"role", "content"}."""
    if isinstance(value, str):
        return items.RunInput(text=value)
    if isinstance(value, tuple):
        text, text_pair = value
        return items.RunInput(pair=items.TextPair(text=text, text_pair=text_pair))
    return items.RunInput(chat=items.Chat(messages=[chat_message(one) for one in value]))


def chat_message(message: Mapping[str, Any]) -> items.ChatMessage:
    """A message of a conversation, as OpenAI writes them."""
    return items.ChatMessage(
        role=message["role"],
        content=message.get("content") or "",
        tool_calls=[_tool_call(one) for one in message.get("tool_calls") or ()],
        tool_call_id=message.get("tool_call_id", ""),
        name=message.get("name", ""),
    )


def _tool_call(call: Mapping[str, Any] | ToolCall) -> pieces.ToolCall:
    if isinstance(call, ToolCall):
        return pieces.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
    inner = call.get("function", call)
    arguments = inner.get("arguments", "")
    return pieces.ToolCall(
        id=call.get("id", ""), name=inner["name"], arguments=arguments if isinstance(arguments, str) else json.dumps(arguments)
    )


def model(message: model_pb2.Model) -> Model:
    """A model version."""
    return Model(
        name=message.model_id,
        version=message.version,
        task=message.task,
        state=model_pb2.ModelState.Name(message.state).removeprefix("MODEL_STATE_").lower(),
        state_message=message.state_message,
        current=message.current,
        architecture=message.architecture,
        dtype=message.dtype,
        max_tokens=message.max_tokens,
        hidden_size=message.hidden_size,
        labels=tuple(message.labels),
        size_bytes=message.size_bytes,
        license=message.license,
        source=message.source,
        load_time=_time(message, "load_time"),
    )


def skill(message: Any) -> Skill:
    """A skill."""
    student = message.student
    return Skill(
        name=message.name.removeprefix("skills/"),
        task=message.task,
        instruction=message.instruction,
        labels=tuple(message.labels),
        teacher=message.teacher,
        base=message.base,
        deliver_bar=message.deliver_bar,
        student_adapter=student.adapter,
        student_version=student.version,
        student_accuracy=student.accuracy,
    )


def status(data: bytes) -> Status:
    """GetStatusResponse."""
    response = stats_pb.GetStatusResponse.FromString(data)
    return Status(
        server_version=response.server_version,
        start_time=_time(response, "start_time"),
        uptime_s=_seconds(response.uptime),
        draining=response.draining,
        kernel_isa=response.kernel_isa,
        onnxruntime_version=response.onnxruntime_version,
        resident_bytes=response.resident_bytes,
        models=tuple(LoadedModel(model(m.model), m.queued_sequences, m.answered_sequences, m.batches) for m in response.models),
        skills=tuple(SkillCounts(s.skill, s.requests, s.local, s.failed, s.cost_micro_usd / 1e6) for s in response.skills),
    )


def _item(one: Any, read: Callable[[Any], T]) -> T | UnderstudyError:
    return from_status(one.error) if one.HasField("error") else read(one)


def _results(found: Sequence[T | UnderstudyError], response: Any) -> Results[T]:
    return Results(found, response.model.name, response.model.version, _usage(response.usage), _timings(response.timings))


def _labels(labels: Any) -> tuple[Label, ...]:
    return tuple(Label(label.name, label.score) for label in labels)


def _entities(entities: Any) -> tuple[Entity, ...]:
    return tuple(Entity(e.label, e.score, e.text, e.start, e.end) for e in entities)


def _answers(answers: Any) -> tuple[Answer, ...]:
    return tuple(Answer(a.text, a.score, a.start, a.end) for a in answers)


def _usage(usage: Any) -> Usage:
    return Usage(usage.input_tokens, usage.output_tokens, usage.cached_input_tokens)


def _timings(timings: Any) -> Timings:
    return Timings(_seconds(timings.queue), _seconds(timings.tokenize), _seconds(timings.run), _seconds(timings.post))


def _seconds(duration: Any) -> float:
    return float(duration.seconds + duration.nanos / 1e9)


def _optional(message: Any, name: str) -> float | None:
    return getattr(message, name) if message.HasField(name) else None


def _time(message: Any, name: str) -> datetime | None:
    return getattr(message, name).ToDatetime(tzinfo=UTC) if message.HasField(name) else None
