"""Requests of Generate, GenerateText, Translate and Summarize, and the way their responses become results. No I/O, as in `calls`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from understudy import convert
from understudy.calls import _PRIORITIES, Prepared, _call, _choice, _common, _no_more, _prepare, _reader, _texts
from understudy.results import (
    Confidence,
    GeneratedText,
    GeneratedTexts,
    GeneratedToken,
    GenerationDelta,
    GenerationSummary,
    GenerationTimings,
    Results,
    TextResult,
    TokenAlternative,
    ToolCall,
)
from understudy.routing import set_limits
from understudy.v1 import common_pb2 as common
from understudy.v1 import generation_pb2 as pieces
from understudy.v1 import inference_service_pb2 as pb

Messages = Sequence[Mapping[str, Any]]
R = TypeVar("R", pb.GenerateRequest, pb.GenerateTextRequest)
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "n",
    "best_of", "max_tokens", "stop", "stop_token_ids", "ignore_eos",
)  # fmt: skip
_FORMS = ("json_schema", "json_object", "regex", "choice", "grammar")
_SHOWN = ("return_token_ids", "logprobs", "top_logprobs")


def generate(
    prompt: str | None, messages: Messages | None, token_ids: Sequence[int] | None, options: dict[str, Any]
) -> Prepared[pb.GenerateResponse]:
    """InferenceService.Generate; `read` gives one message of the stream."""
    call = _call(options)
    request = _fill(pb.GenerateRequest(), (prompt, messages, token_ids), options)
    prepared = _prepare("InferenceService", "Generate", request, pb.GenerateResponse.FromString, call)
    return replace(prepared, paid=bool(request.skill))


def generate_text(
    prompt: str | None, messages: Messages | None, token_ids: Sequence[int] | None, options: dict[str, Any]
) -> Prepared[GeneratedTexts]:
    """InferenceService.GenerateText."""
    call = _call(options)
    request = _fill(pb.GenerateTextRequest(), (prompt, messages, token_ids), options)
    prepared = _prepare("InferenceService", "GenerateText", request, _reader(pb.GenerateTextResponse, _whole), call)
    return replace(prepared, paid=bool(request.skill))


def translate(texts: Sequence[str], options: dict[str, Any]) -> Prepared[Results[TextResult]]:
    """InferenceService.Translate."""
    call, shared, return_errors = _common(options)
    request = pb.TranslateRequest(
        texts=_texts(texts),
        source_language=options.pop("source_language", ""),
        target_language=options.pop("target_language", ""),
        search=_search(options),
        truncate=options.pop("truncate", False),
        **shared,
    )
    _no_more(options)
    read = convert.checked(lambda data: _text_results(pb.TranslateResponse.FromString(data)), return_errors)
    return _prepare("InferenceService", "Translate", request, read, call)


def summarize(texts: Sequence[str], options: dict[str, Any]) -> Prepared[Results[TextResult]]:
    """InferenceService.Summarize."""
    call, shared, return_errors = _common(options)
    request = pb.SummarizeRequest(texts=_texts(texts), search=_search(options), truncate=options.pop("truncate", False), **shared)
    _no_more(options)
    read = convert.checked(lambda data: _text_results(pb.SummarizeResponse.FromString(data)), return_errors)
    return _prepare("InferenceService", "Summarize", request, read, call)


def _fill(request: R, inputs: tuple[str | None, Messages | None, Sequence[int] | None], options: dict[str, Any]) -> R:
    prompt, messages, token_ids = inputs
    if sum(one is not None for one in inputs) != 1:
        raise TypeError("expected one of prompt, messages and token_ids")
    if prompt is not None:
        request.prompt = prompt
    elif messages is not None:
        request.chat.SetInParent()
        request.chat.messages.extend(map(convert.chat_message, messages))
    else:
        request.token_ids.ids.extend(token_ids or ())
    _set_route(request, options)
    request.model.CopyFrom(common.ModelSelector(name=options.pop("model", ""), version=options.pop("version", "")))
    request.adapter = options.pop("adapter", "")
    request.priority = _choice("priority", options.pop("priority", ""), _PRIORITIES)
    request.tools.extend(_tool(one) for one in options.pop("tools", ()))
    request.tool_choice = options.pop("tool_choice", "")
    sampling = {name: options.pop(name) for name in _SAMPLING if options.get(name) is not None}
    if "stop" in sampling:
        sampling["stop"] = _texts(sampling["stop"])
    request.sampling.CopyFrom(pieces.Sampling(**sampling))
    forms = {name: options.pop(name) for name in _FORMS if options.get(name) is not None}
    if len(forms) > 1:
        raise TypeError(f"expected one of {', '.join(_FORMS)}; got {', '.join(forms)}")
    for name, value in forms.items():
        request.response_format.CopyFrom(_form(name, value))
    for name in _SHOWN:
        if options.get(name) is not None:
            setattr(request, name, options.pop(name))
    _no_more({name: value for name, value in options.items() if value is not None})
    return request


def _set_route(request: Any, options: dict[str, Any]) -> None:
    """The skill that is to answer by its route, and what that route may be."""
    request.skill = options.pop("skill", "")
    limits = [name for name in ("preference", "max_cost_usd", "user") if options.get(name)]
    if limits and not request.skill:
        raise TypeError(f"{limits[0]} goes with a skill; a model is who answers, at no cost")
    set_limits(request, options)


def _form(name: str, value: Any) -> pieces.ResponseFormat:
    if name == "json_schema" and not isinstance(value, str):
        value = json.dumps(value)
    if name == "choice":
        value = pieces.Choice(values=_texts(value))
    return pieces.ResponseFormat(**{name: value})


def _tool(tool: Mapping[str, Any]) -> pieces.Tool:
    inner = tool.get("function", tool)
    parameters = inner.get("parameters") or ""
    return pieces.Tool(
        name=inner["name"],
        description=inner.get("description", ""),
        parameters=parameters if isinstance(parameters, str) else json.dumps(parameters),
    )


def _search(options: dict[str, Any]) -> pieces.TextSearch:
    names = ("num_beams", "max_tokens", "length_penalty", "no_repeat_ngram_size")
    return pieces.TextSearch(**{name: options.pop(name) for name in names if name in options})


# Responses.


def delta(message: pieces.GenerationDelta) -> GenerationDelta:
    """One answer's growth."""
    return GenerationDelta(
        message.index,
        message.text,
        tuple(map(_token, message.tokens)),
        _finish(message.finish_reason),
        tuple(ToolCall(one.id, one.name, one.arguments) for one in message.tool_calls),
        _confidence(message.confidence) if message.HasField("confidence") else None,
    )


def summary(response: pb.GenerateResponse | pb.GenerateTextResponse) -> GenerationSummary:
    """The end of a stream, or of a whole answer."""
    took = response.timings
    return GenerationSummary(
        response.model.name,
        response.model.version,
        response.adapter,
        convert._usage(response.usage),
        GenerationTimings(
            tokenize=convert._seconds(took.tokenize),
            queue=convert._seconds(took.queue),
            inter_token=convert._seconds(took.inter_token),
            time_to_first_token=convert._seconds(took.time_to_first_token),
            total=convert._seconds(took.total),
        ),
        convert.decision(response.decision) if response.HasField("decision") else None,
        response.cost.micro_usd / 1e6,
        convert._optional(response, "quality"),
        response.interaction_id,
    )


def _whole(response: Any) -> GeneratedTexts:
    answers = tuple(
        GeneratedText(
            one.text,
            _finish(one.finish_reason),
            _confidence(one.confidence),
            tuple(map(_token, one.tokens)),
            tuple(ToolCall(call.id, call.name, call.arguments) for call in one.tool_calls),
        )
        for one in response.results
    )
    return GeneratedTexts(answers, summary(response))


def _text_results(response: Any) -> Results[TextResult]:
    found = [convert._item(one, lambda it: TextResult(it.text, it.score, it.truncated)) for one in response.results]
    return convert._results(found, response)


def _token(message: pieces.GeneratedToken) -> GeneratedToken:
    top = tuple(TokenAlternative(one.id, one.text, one.logprob) for one in message.top)
    return GeneratedToken(message.id, message.text, message.logprob if message.HasField("logprob") else None, top)


def _finish(reason: int) -> str:
    return pieces.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower() if reason else ""


def _confidence(message: pieces.Confidence) -> Confidence:
    return Confidence(message.mean_logprob, message.mean_entropy, message.mean_margin)
