"""InferenceService.Generate and GenerateText: requests to a text-generation model, its answers back as a stream or whole."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias, TypeVar

from server.api import calls, convert
from server.api.generate_skill import SkillGeneration
from server.api.selection import Selection
from server.api.skill_requests import tool_choice_of
from server.api.wire import Context
from server.core import Call, FinishReason, Format, Message, Task, Timings, Tool, ToolCall
from server.errors import InvalidArgument
from server.runtime.decoder.contract import Sampling, Token
from server.runtime.decoder.generator import Generation, GeneratorModel
from server.runtime.decoder.request import Answer, Confidence, Delta, GenerateRequest, GenerationTimings, Summary
from server.runtime.runtime import Runtime
from understudy.v1 import generation_pb2, inference_pb2
from understudy.v1 import inference_service_pb2 as pb

MOST_CHOICES = 1024
MOST_MESSAGES = 4096
_FINISH = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: generation_pb2.FINISH_REASON_TOOL_CALLS,
}
AnyRequest: TypeAlias = pb.GenerateRequest | pb.GenerateTextRequest
R = TypeVar("R", pb.GenerateResponse, pb.GenerateTextResponse)


class GenerateServicer:
    """Edges only; the work is in `GeneratorModel` and its engine."""

    def __init__(self, runtime: Runtime, selection: Selection, skills: SkillGeneration) -> None:
        self._runtime = runtime
        self._selection = selection
        self._skills = skills

    async def Generate(self, request: pb.GenerateRequest, _context: Context) -> AsyncIterator[pb.GenerateResponse]:
        """What the answers get, as it comes. While the caller reads slowly, what has come meanwhile is merged."""
        call = _call(request)
        if _routed(request):
            async for response in self._skills.stream(request, _tools(request), call):
                yield response
            return
        _refuse_route(request)
        with self._use(request) as model:
            asked = to_request(request)
            if asked.best_of > asked.n:
                message = "sampling.best_of is set in a stream; expected GenerateText, which waits for all answers before it chooses."
                raise InvalidArgument(message, field="sampling.best_of")
            generation = await model.generate(asked, call)
            write = _Writer(model, request)
            try:
                async for deltas in generation.deltas():
                    yield pb.GenerateResponse(deltas=[write.delta(delta) for delta in deltas])
                yield _finish(generation, pb.GenerateResponse())
            finally:
                # Reached too when the caller leaves or the deadline passes: nothing of this call runs on.
                generation.cancel()

    async def GenerateText(self, request: pb.GenerateTextRequest, _context: Context) -> pb.GenerateTextResponse:
        """The answers, whole."""
        call = _call(request)
        if _routed(request):
            return await self._skills.whole(request, _tools(request), call)
        _refuse_route(request)
        with self._use(request) as model:
            generation = await model.generate(to_request(request), call)
            try:
                answers = await generation.collect()
            finally:
                generation.cancel()
            write = _Writer(model, request)
            return _finish(generation, pb.GenerateTextResponse(results=[write.answer(answer) for answer in answers]))

    def _use(self, request: AnyRequest) -> AbstractContextManager[GeneratorModel]:
        name, version = self._selection.pick(request.model, Task.TEXT_GENERATION)
        return self._runtime.use_generator(name, Task.TEXT_GENERATION, version)


def _call(request: AnyRequest) -> Call:
    if not 0 <= request.priority <= 3:
        raise InvalidArgument(f"priority {request.priority} does not exist; expected a value of Priority.", field="priority")
    return calls.current_call(request.priority)


def _routed(request: AnyRequest) -> bool:
    """Whether the router answers: for a skill, and for a provider's model, whose name has a slash as no local one's has."""
    return bool(request.skill) or "/" in request.model.name


def _refuse_route(request: AnyRequest) -> None:
    """One model has no route: what bounds one would be ignored."""
    for field in ("preference", "max_cost", "user"):
        if request.HasField(field) if field == "max_cost" else getattr(request, field):
            raise InvalidArgument(f"{field} is set without a skill; expected a skill too, whose route it bounds.", field=field)


def _tools(request: AnyRequest) -> list[Tool]:
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools)]


def _finish(generation: Generation, response: R) -> R:
    """Puts who answered, usage and timings into the last response, and into the access log."""
    summary = generation.summary()
    response.model.name, response.model.version = summary.model, summary.version
    response.adapter = summary.adapter
    response.usage.CopyFrom(convert.usage(summary.usage))
    response.timings.CopyFrom(timings(summary.timings))
    _note(summary)
    return response


def _note(summary: Summary) -> None:
    scope = calls.current()
    scope.model = f"{summary.model}@{summary.version}"
    scope.items = 1
    scope.tokens = summary.usage.input + summary.usage.output
    took = summary.timings
    scope.timings = Timings(took.tokenize, took.queue, max(0.0, took.total - took.queue - took.tokenize))


def timings(value: GenerationTimings) -> generation_pb2.GenerationTimings:
    """Seconds to durations."""
    message = generation_pb2.GenerationTimings()
    for duration, seconds in (
        (message.tokenize, value.tokenize),
        (message.queue, value.queue),
        (message.time_to_first_token, value.first_token),
        (message.inter_token, value.inter_token),
        (message.total, value.total),
    ):
        duration.FromNanoseconds(int(seconds * 1e9))
    return message


class _Writer:
    """Deltas and answers to messages, for one request."""

    def __init__(self, model: GeneratorModel, request: AnyRequest) -> None:
        self._model = model
        self._logprobs = request.logprobs

    def delta(self, delta: Delta) -> generation_pb2.GenerationDelta:
        """One answer's growth."""
        message = generation_pb2.GenerationDelta(index=delta.index, text=delta.text)
        if delta.tokens:
            message.tokens.extend(map(self._token, delta.tokens))
        if delta.finish is not None:
            message.finish_reason = _FINISH[delta.finish]
            message.tool_calls.extend(map(_tool_call, delta.tool_calls))
            if delta.confidence is not None:
                message.confidence.CopyFrom(_confidence(delta.confidence))
        return message

    def answer(self, answer: Answer) -> generation_pb2.GeneratedText:
        """A whole answer."""
        return generation_pb2.GeneratedText(
            text=answer.text,
            tokens=map(self._token, answer.tokens),
            finish_reason=_FINISH[answer.finish],
            tool_calls=map(_tool_call, answer.tool_calls),
            confidence=_confidence(answer.confidence),
        )

    def _token(self, token: Token) -> generation_pb2.GeneratedToken:
        message = generation_pb2.GeneratedToken(id=token.id, text=token.text)
        if self._logprobs:
            message.logprob = token.logprob
            for one, logprob in token.top:
                message.top.add(id=one, text=self._model.text_of(one), logprob=logprob)
        return message


def _tool_call(call: ToolCall) -> generation_pb2.ToolCall:
    return generation_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)


def _confidence(value: Confidence) -> generation_pb2.Confidence:
    return generation_pb2.Confidence(mean_logprob=value.logprob, mean_entropy=value.entropy, mean_margin=value.margin)


# Requests.


def to_request(request: AnyRequest) -> GenerateRequest:
    """The request as the model takes it. Raises InvalidArgument naming the field; what the model checks is left to it."""
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidArgument("the request has no input; expected prompt, chat or token_ids.", field="prompt")
    sampling = request.sampling
    tools = _tools(request)
    choice = tool_choice_of(request.tool_choice, tools)
    return GenerateRequest(
        prompt=request.prompt if kind == "prompt" else None,
        messages=_messages(request.chat.messages) if kind == "chat" else None,
        token_ids=request.token_ids.ids if kind == "token_ids" else None,
        tools=[] if choice == "none" else tools,
        tool_choice="" if choice == "none" else choice,
        sampling=_sampling(request),
        max_tokens=sampling.max_tokens,
        n=sampling.n or 1,
        best_of=sampling.best_of,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        format=_format(request.response_format) if request.HasField("response_format") else None,
        adapter=request.adapter,
        return_token_ids=request.return_token_ids,
    )


def _sampling(request: AnyRequest) -> Sampling:
    """Values as given, or the defaults; the model's own check refuses those that cannot be."""
    given = request.sampling
    default = Sampling()
    return Sampling(
        temperature=given.temperature if given.HasField("temperature") else default.temperature,
        top_k=given.top_k,
        top_p=given.top_p if given.HasField("top_p") else default.top_p,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty if given.HasField("repetition_penalty") else default.repetition_penalty,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        logit_bias=dict(given.logit_bias),
        seed=given.seed if given.HasField("seed") else None,
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
    )


def _messages(messages: Sequence[inference_pb2.ChatMessage]) -> list[Message]:
    if len(messages) > MOST_MESSAGES:
        message = f"chat.messages has {len(messages)}; expected at most {MOST_MESSAGES}."
        raise InvalidArgument(message, field="chat.messages", limit=MOST_MESSAGES)
    return [
        Message(
            one.role,
            one.content,
            tuple(ToolCall(call.id, call.name, call.arguments) for call in one.tool_calls),
            one.tool_call_id,
            one.name,
        )
        for one in messages
    ]


def _tool(tool: generation_pb2.Tool, field: str) -> Tool:
    try:
        parameters = json.loads(tool.parameters) if tool.parameters else {"type": "object", "properties": {}}
    except (ValueError, RecursionError) as error:
        message = f"{field}.parameters is no JSON: {str(error)[:100]}; expected a JSON Schema as text."
        raise InvalidArgument(message, field=f"{field}.parameters") from error
    if not isinstance(parameters, dict):
        raise InvalidArgument(f"{field}.parameters is no JSON object; expected a JSON Schema.", field=f"{field}.parameters")
    return Tool(tool.name, tool.description, parameters)


def _format(form: generation_pb2.ResponseFormat) -> Format | None:
    """The form that was asked for; `json_object` set to false asks for none."""
    match form.WhichOneof("format"):
        case "json_schema":
            return Format("json_schema", form.json_schema)
        case "json_object":
            return Format("json_object") if form.json_object else None
        case "regex":
            return Format("regex", form.regex)
        case "grammar":
            return Format("grammar", form.grammar)
        case "choice":
            values = tuple(form.choice.values)
            field = "response_format.choice.values"
            if not 1 <= len(values) <= MOST_CHOICES or not all(values):
                message = f"{field} has {len(values)} texts; expected 1 to {MOST_CHOICES}, none of them empty."
                raise InvalidArgument(message, field=field, limit=MOST_CHOICES)
            return Format("choice", choices=values)
    raise InvalidArgument("response_format is empty; expected one of its forms.", field="response_format")
