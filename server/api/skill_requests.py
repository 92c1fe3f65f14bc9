"""Run's messages: requests to what the router takes, outcomes and routes back."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from server.api import convert
from server.api.status import to_status
from server.core import Detected, Hop, Limits, Message, Outcome, Preference, Tool, ToolCall, Work
from server.errors import InvalidArgument, RequestTooLarge, UnderstudyError
from server.routing.briefing import Ask
from server.routing.router import Planned
from understudy.v1 import common_pb2, generation_pb2, inference_pb2
from understudy.v1 import inference_service_pb2 as pb

MAX_TEXT_BYTES = 256 * 1024
MAX_USER_BYTES = 256
MAX_MODEL_BYTES = 256
MAX_MESSAGES = 4096
MAX_PARAMETERS = 32
MAX_LATENCY_S = 3600.0
PREFERENCES = {
    inference_pb2.ROUTE_PREFERENCE_UNSPECIFIED: None,
    inference_pb2.ROUTE_PREFERENCE_LOCAL_FIRST: Preference.LOCAL_FIRST,
    inference_pb2.ROUTE_PREFERENCE_LOCAL_ONLY: Preference.LOCAL_ONLY,
    inference_pb2.ROUTE_PREFERENCE_PROVIDER_ONLY: Preference.PROVIDER_ONLY,
    inference_pb2.ROUTE_PREFERENCE_CHEAPEST: Preference.CHEAPEST,
    inference_pb2.ROUTE_PREFERENCE_BEST: Preference.BEST,
    inference_pb2.ROUTE_PREFERENCE_FASTEST: Preference.FASTEST,
    inference_pb2.ROUTE_PREFERENCE_FREE_FIRST: Preference.FREE_FIRST,
}
_ROLES = ("system", "developer", "user", "assistant", "tool")
# The base speaks of its own list of texts; the caller knows `inputs`.
_TEXTS = re.compile(r"texts\[\d+\]|documents\[\d+\]")


def limits_of(request: Any) -> Limits:
    """Preference, cost and latency of a request that has those fields. Raises InvalidArgument naming the field."""
    if request.preference not in PREFERENCES:
        message = f"preference {request.preference} does not exist; expected a value of RoutePreference, 0 to {max(PREFERENCES)}."
        raise InvalidArgument(message, field="preference")
    preference = PREFERENCES[request.preference]
    max_cost = request.max_cost.micro_usd if request.HasField("max_cost") else None
    if max_cost is not None and max_cost < 0:
        raise InvalidArgument(f"max_cost.micro_usd is {max_cost}; expected 0 or more.", field="max_cost.micro_usd")
    if max_cost == 0 and preference is Preference.PROVIDER_ONLY:
        message = "max_cost is 0 and only providers may answer; expected a higher cost, or another preference."
        raise InvalidArgument(message, field="max_cost.micro_usd")
    latency = None
    if "max_latency" in request.DESCRIPTOR.fields_by_name and request.HasField("max_latency"):
        latency = request.max_latency.ToTimedelta().total_seconds()
        if not 0 < latency <= MAX_LATENCY_S:
            message = f"max_latency is {latency:g} s; expected more than 0 and at most {MAX_LATENCY_S:g} s."
            raise InvalidArgument(message, field="max_latency")
    return Limits(preference, max_cost, latency)


def check_user(user: str) -> str:
    """The user as given. Raises InvalidArgument."""
    if len(user.encode()) > MAX_USER_BYTES:
        message = f"user has over {MAX_USER_BYTES} bytes; expected an opaque id. Send a hash."
        raise InvalidArgument(message, field="user", limit=MAX_USER_BYTES)
    return user


def ask_of(request: Any, works: Sequence[Work]) -> Ask:
    """A request with RunRequest's fields as the router takes it, with the inputs that can be worked on.

    Raises InvalidArgument naming the field.
    """
    if len(request.parameters) > MAX_PARAMETERS or any(len(k) + len(v) > 1024 for k, v in request.parameters.items()):
        message = f"parameters holds too much; expected at most {MAX_PARAMETERS} of 1024 characters each."
        raise InvalidArgument(message, field="parameters", limit=MAX_PARAMETERS)
    limits = limits_of(request)
    ask = Ask(request.skill, works, request.instruction, tuple(request.labels), dict(request.parameters), limits)
    model = getattr(request, "model", "")  # an ensemble's members name theirs
    return replace(ask, model=provider_model(model, "model"), limits=only_providers(limits)) if model else ask


def provider_model(name: str, field: str) -> str:
    """A provider's model, as it is named. Raises InvalidArgument naming the field."""
    provider, _, model = name.partition("/")
    if not provider or not model or len(name.encode()) > MAX_MODEL_BYTES:
        raise InvalidArgument(f'{field} is {name[:128]!r}; expected "<provider>/<model>".', field=field)
    return name


def only_providers(limits: Limits) -> Limits:
    """The same limits, where a provider's model was named. Raises InvalidArgument where they contradict that."""
    if limits.preference not in (None, Preference.PROVIDER_ONLY):
        message = f"preference is {limits.preference} and a provider's model is named, which alone is asked. Leave one out."
        raise InvalidArgument(message, field="preference")
    return replace(limits, preference=Preference.PROVIDER_ONLY)


def tool_choice_of(choice: str, tools: Sequence[Tool]) -> str:
    """Which tools must be called: "" (the model decides), "none", "required", or a tool's name. Raises InvalidArgument."""
    if choice in ("", "auto"):
        return ""
    if choice == "none" or (choice == "required" and tools) or any(tool.name == choice for tool in tools):
        return choice
    known = ", ".join(repr(tool.name) for tool in tools[:10]) or "none"
    message = f"tool_choice is {choice[:64]!r}; expected auto, none, required, or a tool of the request, which has {known}."
    raise InvalidArgument(message, field="tool_choice")


def work_of(item: inference_pb2.RunInput, index: int) -> Work | UnderstudyError:
    """An input, or why it is none."""
    kind = item.WhichOneof("input")
    field = f"inputs[{index}]"
    if kind is None:
        return InvalidArgument(f"{field} is empty; expected text, chat or pair.", field=field)
    if kind == "chat":
        try:
            return Work(messages=messages_of(item.chat.messages, f"{field}.chat.messages"))
        except UnderstudyError as error:
            return error
    texts = [(f"{field}.text", item.text)]
    if kind == "pair":
        texts = [(f"{field}.pair.text", item.pair.text), (f"{field}.pair.text_pair", item.pair.text_pair)]
    for name, text in texts:
        if not text.strip():
            return InvalidArgument(f"{name} is blank; expected some words.", field=name)
        size = len(text.encode())
        if size > MAX_TEXT_BYTES:
            return RequestTooLarge(f"{name} has {size} bytes; expected at most {MAX_TEXT_BYTES}. Cut it.", field=name, limit=MAX_TEXT_BYTES)
    return Work(item.text) if kind == "text" else Work(item.pair.text, item.pair.text_pair)


def messages_of(messages: Sequence[inference_pb2.ChatMessage], field: str) -> tuple[Message, ...]:
    """A conversation. Raises InvalidArgument, RequestTooLarge naming the message."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidArgument(f"{field} has {len(messages)}; expected 1 to {MAX_MESSAGES}.", field=field, limit=MAX_MESSAGES)
    found = []
    for index, one in enumerate(messages):
        if one.role not in _ROLES:
            message = f"{field}[{index}].role is {one.role[:32]!r}; expected one of {', '.join(_ROLES)}."
            raise InvalidArgument(message, field=f"{field}[{index}].role")
        calls = tuple(ToolCall(call.id, call.name, call.arguments) for call in one.tool_calls)
        found.append(Message(one.role, one.content, calls, one.tool_call_id, one.name))
    size = sum(len(message.content.encode()) for message in found)
    if size > MAX_TEXT_BYTES:
        raise RequestTooLarge(
            f"{field} has {size} bytes; expected at most {MAX_TEXT_BYTES}. Shorten it.", field=field, limit=MAX_TEXT_BYTES
        )
    return tuple(found)


def to_result(outcome: Outcome | Exception, index: int) -> inference_pb2.RunResult:
    """One outcome as a message."""
    if isinstance(outcome, Exception):
        return inference_pb2.RunResult(error=to_status(outcome))
    reply = outcome.reply
    result = inference_pb2.RunResult(
        output_text=reply.text,
        labels=[convert.label(label) for label in reply.labels],
        entities=[convert.entity(entity) for entity in reply.entities],
        answers=[convert.answer(span) for span in reply.spans],
        score=reply.score,
        tool_calls=[generation_pb2.ToolCall(id=one.id, name=one.name, arguments=one.arguments) for one in reply.tool_calls],
        decision=decision_of(outcome.decision, index),
        quality=outcome.quality,
        cost=common_pb2.Cost(micro_usd=outcome.cost_micro_usd),
        usage=convert.usage(outcome.usage),
        interaction_id=outcome.interaction_id,
        findings=outcome.findings,
    )
    if reply.embedding is not None:
        result.embedding.extend(reply.embedding.tolist())
    if outcome.error is not None:
        result.error.CopyFrom(to_status(_renamed(outcome.error, index)))
    return result


def to_route(planned: Planned, index: int) -> pb.ExplainedRoute:
    """How an item would be routed."""
    route = pb.ExplainedRoute(decision=decision_of(planned.decision, index))
    if planned.brief is not None:
        route.deliver_bar, route.second_try_bar = planned.brief.skill.deliver_bar, planned.brief.skill.second_try_bar
    if planned.error is not None:
        route.error.CopyFrom(to_status(_renamed(planned.error, index)))
    for place in planned.places:
        candidate = place.candidate
        worst, expected = candidate.worst_cost_micro_usd(planned.work), candidate.expected_s()
        shown = route.candidates.add(
            candidate=candidate.name,
            local=candidate.local,
            reason=place.reason,
            skipped=planned.passed_over.get(candidate.name, "") or candidate.closed(),
        )
        if worst is not None:
            shown.worst_cost.micro_usd = worst
        if expected is not None:
            shown.expected_latency.FromNanoseconds(int(expected * 1e9))
    return route


def decision_of(decision: Any, index: int = 0) -> inference_pb2.Decision:
    """How an answer came about."""
    message = inference_pb2.Decision(
        skill=decision.skill,
        candidate=decision.candidate,
        local=decision.local,
        hops=[_hop(hop, index) for hop in decision.hops],
        rollout_stage=decision.rollout_stage,
        task=decision.task,
        preference=decision.preference.value,
        difficulty=decision.difficulty,
        propensity=decision.propensity,
    )
    if decision.detected is not None:
        message.detection.CopyFrom(_detection(decision.detected))
    return message


def _detection(detected: Detected) -> inference_pb2.TaskDetection:
    return inference_pb2.TaskDetection(
        task=detected.task,
        score=detected.score,
        phrase=detected.phrase,
        parameters={key: value if isinstance(value, str) else json.dumps(value) for key, value in detected.parameters.items()},
        candidates=detected.candidates,
    )


def _hop(hop: Hop, index: int) -> inference_pb2.Hop:
    message = inference_pb2.Hop(
        candidate=hop.candidate,
        outcome=hop.outcome,
        reason=_TEXTS.sub(f"inputs[{index}].text", hop.reason),
        quality=hop.quality,
        cost=common_pb2.Cost(micro_usd=hop.cost_micro_usd),
        tries=hop.tries,
    )
    message.elapsed.FromNanoseconds(int(hop.elapsed_s * 1e9))
    return message


def _renamed(error: Exception, index: int) -> Exception:
    """The same error with the caller's name of the field."""
    if not isinstance(error, UnderstudyError) or not _TEXTS.search(error.message + error.metadata.get("field", "")):
        return error
    name = f"inputs[{index}].text"
    metadata = {key: value for key, value in error.metadata.items() if key != "field"}
    return type(error)(_TEXTS.sub(name, error.message), retry_after_s=error.retry_after_s, field=name, **metadata)
