"""Each call's request and the way its response becomes a result: the part that the two clients share, without any I/O.

A `Prepared` is sent as bytes and read from bytes, so that a matrix of vectors is copied once from the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from understudy import convert
from understudy.errors import UnderstudyError
from understudy.results import (
    Answer,
    Classification,
    Embedding,
    Entity,
    Model,
    RankedDocument,
    Results,
    Skill,
    Status,
)
from understudy.v1 import common_pb2 as common
from understudy.v1 import inference_pb2 as items
from understudy.v1 import inference_service_pb2 as pb
from understudy.v1 import model_service_pb2 as models_pb
from understudy.v1 import skill_service_pb2 as skills_pb
from understudy.v1 import stats_service_pb2 as stats_pb

T = TypeVar("T")

_PRIORITIES = {
    "": common.PRIORITY_UNSPECIFIED,
    "critical": common.PRIORITY_CRITICAL,
    "interactive": common.PRIORITY_INTERACTIVE,
    "bulk": common.PRIORITY_BULK,
}
_POOLING = {"": pb.POOLING_UNSPECIFIED, "mean": pb.POOLING_MEAN, "cls": pb.POOLING_CLS, "last": pb.POOLING_LAST}
_INPUT_TYPES = {
    "": pb.EMBED_INPUT_TYPE_UNSPECIFIED,
    "query": pb.EMBED_INPUT_TYPE_QUERY,
    "passage": pb.EMBED_INPUT_TYPE_PASSAGE,
}
_AGGREGATIONS = {
    "none": pb.AGGREGATION_STRATEGY_NONE,
    "simple": pb.AGGREGATION_STRATEGY_SIMPLE,
    "first": pb.AGGREGATION_STRATEGY_FIRST,
    "average": pb.AGGREGATION_STRATEGY_AVERAGE,
    "max": pb.AGGREGATION_STRATEGY_MAX,
}


@dataclass(frozen=True, slots=True)
class Prepared(Generic[T]):
    """A call that is ready to be sent: `method` is the path, `read` makes the result of the response's bytes.

    `paid`: providers may have been paid where none of them could answer, so that this is not sent again.
    """

    method: str
    request: bytes
    read: Callable[[bytes], T]
    timeout_s: float | None = None
    request_id: str = ""
    paid: bool = False

    def final(self, error: UnderstudyError) -> bool:
        """Whether an error is not to be tried away."""
        return self.paid and error.reason == "PROVIDER_UNAVAILABLE"


def _prepare(service: str, method: str, request: Message, read: Callable[[bytes], T], call: Mapping[str, Any]) -> Prepared[T]:
    return Prepared(
        f"/understudy.v1.{service}/{method}",
        request.SerializeToString(),
        read,
        call.get("timeout_s"),
        call.get("request_id", ""),
    )


def _reader(message: type[Message], convert_it: Callable[[Any], T]) -> Callable[[bytes], T]:
    return lambda data: convert_it(message.FromString(data))


def _call(options: dict[str, Any]) -> dict[str, Any]:
    """Takes what belongs to the call out of the keyword arguments."""
    return {key: options.pop(key) for key in ("timeout_s", "request_id") if key in options}


def _common(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """The call's part, the request's part that all tasks share, and whether errors are returned."""
    call = _call(options)
    selector = common.ModelSelector(name=options.pop("model", ""), version=options.pop("version", ""))
    priority = _choice("priority", options.pop("priority", ""), _PRIORITIES)
    return call, {"model": selector, "priority": priority}, options.pop("return_errors", False)


def _encoder(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """As `_common`, with the adapter that encoders may be asked for."""
    call, shared, return_errors = _common(options)
    return call, {**shared, "adapter": options.pop("adapter", "")}, return_errors


def _choice(name: str, value: str, known: Mapping[str, T]) -> T:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(repr(k) for k in known if k)}")
    return known[value]


def _no_more(options: Mapping[str, Any]) -> None:
    if options:
        raise TypeError(f"unexpected keyword argument {next(iter(options))!r}")


def _texts(value: Iterable[str]) -> list[str]:
    """A list; a lone str is a caller's slip that would be sent letter by letter."""
    if isinstance(value, str):
        raise TypeError("expected a sequence of texts, got one str; put it into a list")
    return list(value)


def embed(texts: Sequence[str], options: dict[str, Any]) -> Prepared[Results[Embedding]]:
    """InferenceService.Embed."""
    call, shared, return_errors = _encoder(options)
    request = pb.EmbedRequest(
        texts=_texts(texts),
        truncate=options.pop("truncate", False),
        normalize=options.pop("normalize", None),
        dimensions=options.pop("dimensions", 0),
        pooling=_choice("pooling", options.pop("pooling", ""), _POOLING),
        input_type=_choice("input_type", options.pop("input_type", ""), _INPUT_TYPES),
        **shared,
    )
    _no_more(options)
    return _prepare("InferenceService", "Embed", request, convert.checked(convert.embeddings, return_errors), call)


def classify(inputs: Sequence[str | tuple[str, str]], options: dict[str, Any]) -> Prepared[Results[Classification]]:
    """InferenceService.Classify; an input is a text, or a text and its pair."""
    call, shared, return_errors = _encoder(options)
    request = pb.ClassifyRequest(
        inputs=[
            items.ClassifyInput(text=one) if isinstance(one, str) else items.ClassifyInput(text=one[0], text_pair=one[1])
            for one in ([] if isinstance(inputs, str) and _texts(inputs) else inputs)
        ],
        top_k=options.pop("top_k", 0),
        truncate=options.pop("truncate", False),
        candidate_labels=_texts(options.pop("candidate_labels", ())),
        multi_label=options.pop("multi_label", False),
        hypothesis_template=options.pop("hypothesis_template", ""),
        **shared,
    )
    _no_more(options)
    return _prepare("InferenceService", "Classify", request, convert.checked(convert.classifications, return_errors), call)


def rerank(query: str, documents: Sequence[str], options: dict[str, Any]) -> Prepared[Results[RankedDocument]]:
    """InferenceService.Rerank."""
    call, shared, return_errors = _encoder(options)
    request = pb.RerankRequest(
        query=query,
        documents=_texts(documents),
        top_n=options.pop("top_n", 0),
        return_documents=options.pop("return_documents", False),
        truncate=options.pop("truncate", False),
        **shared,
    )
    _no_more(options)
    return _prepare("InferenceService", "Rerank", request, convert.checked(convert.ranking, return_errors), call)


def extract_entities(texts: Sequence[str], options: dict[str, Any]) -> Prepared[Results[tuple[Entity, ...]]]:
    """InferenceService.ExtractEntities."""
    call, shared, return_errors = _encoder(options)
    request = pb.ExtractEntitiesRequest(
        texts=_texts(texts),
        aggregation_strategy=_choice("aggregation", options.pop("aggregation", "simple"), _AGGREGATIONS),
        truncate=options.pop("truncate", False),
        **shared,
    )
    _no_more(options)
    return _prepare("InferenceService", "ExtractEntities", request, convert.checked(convert.entities, return_errors), call)


def answer_questions(pairs: Sequence[tuple[str, str]], options: dict[str, Any]) -> Prepared[Results[tuple[Answer, ...]]]:
    """InferenceService.AnswerQuestion; each pair is a question and its context."""
    call, shared, return_errors = _encoder(options)
    request = pb.AnswerQuestionRequest(
        inputs=[items.QuestionInput(question=question, context=context) for question, context in pairs],
        top_k=options.pop("top_k", 0),
        max_answer_tokens=options.pop("max_answer_tokens", 0),
        doc_stride=options.pop("doc_stride", 0),
        allow_no_answer=options.pop("allow_no_answer", False),
        **shared,
    )
    _no_more(options)
    return _prepare("InferenceService", "AnswerQuestion", request, convert.checked(convert.answers, return_errors), call)


def status(options: dict[str, Any]) -> Prepared[Status]:
    """StatsService.GetStatus."""
    call = _call(options)
    _no_more(options)
    return _prepare("StatsService", "GetStatus", stats_pb.GetStatusRequest(), convert.status, call)


def get_model(name: str, version: str, options: dict[str, Any]) -> Prepared[Model]:
    """ModelService.GetModel."""
    call = _call(options)
    _no_more(options)
    request = models_pb.GetModelRequest(name=f"models/{name}/versions/{version or 'current'}")
    read = _reader(models_pb.GetModelResponse, lambda response: convert.model(response.model))
    return _prepare("ModelService", "GetModel", request, read, call)


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a list; `next_token` is empty on the last."""

    items: list[T]
    next_token: str


def list_models(task: str, loaded_only: bool, token: str, options: dict[str, Any]) -> Prepared[Page[Model]]:
    """One page of ModelService.ListModels."""
    options = dict(options)
    call = _call(options)
    _no_more(options)
    request = models_pb.ListModelsRequest(page_size=1000, page_token=token, task=task, loaded_only=loaded_only)
    read = _reader(models_pb.ListModelsResponse, lambda found: Page([convert.model(one) for one in found.models], found.next_page_token))
    return _prepare("ModelService", "ListModels", request, read, call)


def load_model(name: str, version: str, replace: bool, options: dict[str, Any]) -> Prepared[Model]:
    """ModelService.LoadModel."""
    call = _call(options)
    _no_more(options)
    request = models_pb.LoadModelRequest(name=_resource(name, version), replace=replace)
    read = _reader(models_pb.LoadModelResponse, lambda response: convert.model(response.model))
    return _prepare("ModelService", "LoadModel", request, read, call)


def unload_model(name: str, version: str, grace_s: float | None, options: dict[str, Any]) -> Prepared[list[Model]]:
    """ModelService.UnloadModel."""
    call = _call(options)
    _no_more(options)
    request = models_pb.UnloadModelRequest(name=_resource(name, version))
    if grace_s is not None:
        request.grace.FromNanoseconds(round(grace_s * 1e9))
    read = _reader(models_pb.UnloadModelResponse, lambda response: [convert.model(one) for one in response.models])
    return _prepare("ModelService", "UnloadModel", request, read, call)


def delete_model(name: str, version: str, options: dict[str, Any]) -> Prepared[None]:
    """ModelService.DeleteModel."""
    call = _call(options)
    _no_more(options)
    request = models_pb.DeleteModelRequest(name=f"models/{name}/versions/{version}")
    return _prepare("ModelService", "DeleteModel", request, lambda data: None, call)


def get_skill(name: str, options: dict[str, Any]) -> Prepared[Skill]:
    """SkillService.GetSkill."""
    call = _call(options)
    _no_more(options)
    request = skills_pb.GetSkillRequest(name=f"skills/{name}")
    read = _reader(skills_pb.GetSkillResponse, lambda response: convert.skill(response.skill))
    return _prepare("SkillService", "GetSkill", request, read, call)


def list_skills(token: str, options: dict[str, Any]) -> Prepared[Page[Skill]]:
    """One page of SkillService.ListSkills."""
    options = dict(options)
    call = _call(options)
    _no_more(options)
    read = _reader(skills_pb.ListSkillsResponse, lambda found: Page([convert.skill(one) for one in found.skills], found.next_page_token))
    return _prepare("SkillService", "ListSkills", skills_pb.ListSkillsRequest(page_size=1000, page_token=token), read, call)


def _resource(name: str, version: str) -> str:
    return f"models/{name}/versions/{version}" if version else f"models/{name}"
