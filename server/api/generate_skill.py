"""Generate and GenerateText where a skill or a provider's model is named: the router's answer in place of one local model's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.message import Message as ProtoMessage

from server.api import calls, convert
from server.api.skill_requests import (
    MAX_TEXT_BYTES,
    check_user,
    decision_of,
    limits_of,
    messages_of,
    only_providers,
    provider_model,
    tool_choice_of,
)
from server.core import Call, FinishReason, Outcome, Tool, Work
from server.errors import InvalidArgument, RequestTooLarge
from server.routing.briefing import Ask
from server.routing.candidates import Manner
from server.routing.router import Router
from understudy.v1 import common_pb2, generation_pb2
from understudy.v1 import inference_service_pb2 as pb

_TASK = "text-generation"
_PENALTIES = ("presence_penalty", "frequency_penalty")
_SAMPLING = ("max_tokens", "temperature", "top_p", "stop", "seed", *_PENALTIES)
# Of a provider's model that is named, where the request says nothing: a bound for the bill, which OpenAI's API leaves open.
_MAX_TOKENS = 4096
_MOST_STOPS, _MAX_STOP = 16, 256
_PENALTY, _MOST_TOP = 2, 20  # OpenAI's bounds, which are every vendor's
_FINISH = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: generation_pb2.FINISH_REASON_TOOL_CALLS,
}


class SkillGeneration:
    """Edges only. What only one local model could do (token ids, several answers) is refused by its field."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def stream(self, request: pb.GenerateRequest, tools: list[Tool], call: Call) -> AsyncIterator[pb.GenerateResponse]:
        """Words as they may be seen, then the end with the whole story."""
        ask = self._ask(request, tools, call)
        outcomes = self._router.stream(ask, call)
        try:
            async for piece in outcomes:
                if isinstance(piece, str):
                    yield pb.GenerateResponse(deltas=[generation_pb2.GenerationDelta(text=piece)])
                    continue
                tokens = _tokens(piece, request)
                end = generation_pb2.GenerationDelta(finish_reason=_finish(piece), tool_calls=_tools(piece), tokens=tokens)
                response = pb.GenerateResponse(deltas=[end])
                _tell(response, piece)
                yield response
        finally:
            await outcomes.aclose()

    async def whole(self, request: pb.GenerateTextRequest, tools: list[Tool], call: Call) -> pb.GenerateTextResponse:
        """The answer at once."""
        results = await self._router.run(self._ask(request, tools, call), call)
        calls.current().note(results)
        (outcome,) = results.items
        assert isinstance(outcome, Outcome), "the router gives outcomes"
        if outcome.error is not None:
            raise outcome.error
        text = generation_pb2.GeneratedText(
            text=outcome.output_text, finish_reason=_finish(outcome), tool_calls=_tools(outcome), tokens=_tokens(outcome, request)
        )
        response = pb.GenerateTextResponse(results=[text])
        _tell(response, outcome)
        return response

    def _ask(self, request: Any, tools: list[Tool], call: Call) -> Ask:
        skill = self._router.skills.get(request.skill or _TASK)
        if skill.task != _TASK:
            message = f"the skill {skill.name!r} does {skill.task}; Generate takes skills of the task {_TASK}. Call Run."
            raise InvalidArgument(message, field="skill")
        _refuse_set(request, ("adapter", "return_token_ids"), "")
        _refuse_set(request.sampling, [f.name for f in request.sampling.DESCRIPTOR.fields if f.name not in _SAMPLING], "sampling.")
        if request.model.name and request.skill:
            raise InvalidArgument("model and skill are both set; expected one: a skill finds its model.", field="model")
        call.user = check_user(request.user)
        sampling, limits, model = request.sampling, limits_of(request), request.model.name
        if model:
            model, limits = provider_model(model, "model.name"), only_providers(limits)
        if sampling.max_tokens < 0:
            raise InvalidArgument(
                f"sampling.max_tokens is {sampling.max_tokens}; expected 0 or more.", field="sampling.max_tokens", limit=0
            )
        temperature = sampling.temperature if sampling.HasField("temperature") else 1.0 if model else None
        if temperature is not None and not 0 <= temperature <= 2:
            raise InvalidArgument(f"sampling.temperature is {temperature:g}; expected 0 to 2.", field="sampling.temperature")
        return Ask(
            skill.name,
            [self._work(request)],
            limits=limits,
            tools=tuple(tools),
            max_tokens=sampling.max_tokens or (_MAX_TOKENS if model else 0),
            temperature=temperature,
            json_schema=_schema(request),
            manner=_manner(request, tools),
            model=model,
        )

    def _work(self, request: Any) -> Work:
        kind = request.WhichOneof("input")
        if kind == "chat":
            return Work(messages=messages_of(request.chat.messages, "chat.messages"))
        if kind != "prompt":
            what = "token_ids are one model's own" if kind else "the request has no input"
            raise InvalidArgument(f"{what}; expected prompt or chat with a skill.", field=kind or "prompt")
        size = len(request.prompt.encode())
        if size > MAX_TEXT_BYTES:
            raise RequestTooLarge(
                f"prompt has {size} bytes; expected at most {MAX_TEXT_BYTES}. Cut it.", field="prompt", limit=MAX_TEXT_BYTES
            )
        if not request.prompt.strip():
            raise InvalidArgument("prompt is blank; expected some words.", field="prompt")
        return Work(request.prompt)


def _schema(request: Any) -> str:
    if not request.HasField("response_format"):
        return ""
    kind = request.response_format.WhichOneof("format")
    if kind == "json_object":
        return ""
    if kind != "json_schema":
        message = f"response_format.{kind or 'format'} is not what every provider can do; expected json_schema or json_object with a skill."
        raise InvalidArgument(message, field="response_format")
    return str(request.response_format.json_schema)


def _manner(request: Any, tools: list[Tool]) -> Manner:
    sampling = request.sampling
    top_p = sampling.top_p if sampling.HasField("top_p") else None
    if top_p is not None and not 0 < top_p <= 1:
        raise InvalidArgument(f"sampling.top_p is {top_p:g}; expected more than 0 and at most 1.", field="sampling.top_p")
    for name in _PENALTIES:
        value, field = getattr(sampling, name), f"sampling.{name}"
        if not -_PENALTY <= value <= _PENALTY:
            raise InvalidArgument(f"{field} is {value:g}; expected -{_PENALTY} to {_PENALTY} for a route.", field=field, limit=_PENALTY)
    if not 0 <= request.top_logprobs <= _MOST_TOP or (request.top_logprobs and not request.logprobs):
        message = f"top_logprobs is {request.top_logprobs}; expected 0 to {_MOST_TOP}, and logprobs set beside it."
        raise InvalidArgument(message, field="top_logprobs", limit=_MOST_TOP)
    if len(sampling.stop) > _MOST_STOPS or not all(0 < len(text) <= _MAX_STOP for text in sampling.stop):
        message = f"sampling.stop holds what cannot be; expected at most {_MOST_STOPS} texts of 1 to {_MAX_STOP} characters."
        raise InvalidArgument(message, field="sampling.stop", limit=_MOST_STOPS)
    return Manner(
        top_p=top_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
        stop=tuple(sampling.stop),
        seed=sampling.seed if sampling.HasField("seed") else None,
        json_object=request.response_format.json_object,
        tool_choice=tool_choice_of(request.tool_choice, tools),
    )


def _refuse_set(message: ProtoMessage, fields: Any, prefix: str) -> None:
    for descriptor, _ in message.ListFields():
        if descriptor.name in fields:
            name = prefix + descriptor.name
            text = f"{name} is set for a route, not all of whose candidates can do it; expected it unset, or a model of this server."
            raise InvalidArgument(text, field=name)


def _finish(outcome: Outcome) -> Any:
    return _FINISH.get(outcome.reply.finish or FinishReason.STOP)


def _tools(outcome: Outcome) -> list[generation_pb2.ToolCall]:
    return [generation_pb2.ToolCall(id=one.id, name=one.name, arguments=one.arguments) for one in outcome.reply.tool_calls]


def _tokens(outcome: Outcome, request: Any) -> list[generation_pb2.GeneratedToken]:
    """As many as were asked for: a skill may have had the teacher tell more."""
    found = []
    for one in outcome.reply.tokens if request.logprobs else ():
        token = generation_pb2.GeneratedToken(text=one.text, logprob=one.logprob)
        for text, logprob in one.top[: request.top_logprobs]:
            token.top.add(text=text, logprob=logprob)
        found.append(token)
    return found


def _tell(response: Any, outcome: Outcome) -> None:
    """The story, into the last response."""
    decision = outcome.decision
    response.decision.CopyFrom(decision_of(decision))
    response.cost.CopyFrom(common_pb2.Cost(micro_usd=outcome.cost_micro_usd))
    if outcome.quality is not None:
        response.quality = outcome.quality
    response.interaction_id = outcome.interaction_id
    response.usage.CopyFrom(convert.usage(outcome.usage))
    response.model.name = decision.candidate
    scope = calls.current()
    scope.model = decision.candidate
    scope.items = 1
    scope.tokens = outcome.usage.input + outcome.usage.output
