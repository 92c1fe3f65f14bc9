"""Skills by their route: Run, RunMany and ExplainRoute, without any I/O, for both clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from understudy import convert
from understudy.calls import _PRIORITIES, Prepared, _call, _choice, _no_more, _prepare, _texts
from understudy.errors import UnderstudyError, from_status
from understudy.options import RunOptions
from understudy.results import PlannedCandidate, Results, Route, RunAnswer
from understudy.v1 import inference_pb2 as items
from understudy.v1 import inference_service_pb2 as pb

RUN_MANY = "/understudy.v1.InferenceService/RunMany"
PREFERENCES = {
    "": items.ROUTE_PREFERENCE_UNSPECIFIED,
    "local_first": items.ROUTE_PREFERENCE_LOCAL_FIRST,
    "local_only": items.ROUTE_PREFERENCE_LOCAL_ONLY,
    "provider_only": items.ROUTE_PREFERENCE_PROVIDER_ONLY,
    "cheapest": items.ROUTE_PREFERENCE_CHEAPEST,
    "best": items.ROUTE_PREFERENCE_BEST,
    "fastest": items.ROUTE_PREFERENCE_FASTEST,
    "free_first": items.ROUTE_PREFERENCE_FREE_FIRST,
}


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One request of a `run_many`. `id` is the caller's own, 1 to 128 bytes, and comes back with the answers.

    `options` are those of `run`, without what belongs to a call (timeout_s, request_id).
    """

    id: str
    inputs: Sequence[convert.RunInput] = ()
    skill: str = ""
    options: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True, slots=True)
class RunReply:
    """What became of one request of a `run_many`: its answers, or why it has none."""

    id: str
    found: Results[RunAnswer] | UnderstudyError

    @property
    def answers(self) -> Results[RunAnswer]:
        """One entry an input; taking one that failed raises its error. Raises the request's error where it failed as a whole."""
        if isinstance(self.found, UnderstudyError):
            raise self.found
        return self.found


def run(skill: str, inputs: Sequence[convert.RunInput], options: dict[str, Any]) -> Prepared[Results[RunAnswer]]:
    """InferenceService.Run. Not sent again where providers were asked and may have been paid."""
    call = _call(options)
    return_errors = options.pop("return_errors", False)
    request = run_request(skill, inputs, options)
    prepared = _prepare("InferenceService", "Run", request, convert.checked(convert.run_answers, return_errors), call)
    return replace(prepared, paid=True)


def explain(skill: str, inputs: Sequence[convert.RunInput], options: dict[str, Any]) -> Prepared[Results[Route]]:
    """InferenceService.ExplainRoute."""
    call = _call(options)
    return_errors = options.pop("return_errors", False)
    request = pb.ExplainRouteRequest(request=run_request(skill, inputs, options))
    return _prepare("InferenceService", "ExplainRoute", request, convert.checked(_routes, return_errors), call)


def one_of_many(request: RunRequest) -> bytes:
    """A message of RunMany."""
    options: dict[str, Any] = dict(request.options)
    options.pop("return_errors", None)  # errors stay in the results: the stream goes on
    return pb.RunManyRequest(id=request.id, request=run_request(request.skill, request.inputs, options)).SerializeToString()


def reply(data: bytes) -> RunReply:
    """A message of RunMany's response."""
    response = pb.RunManyResponse.FromString(data)
    return RunReply(response.id, from_status(response.error) if response.HasField("error") else convert.run_results(response.response))


def run_request(skill: str, inputs: Sequence[convert.RunInput], options: dict[str, Any]) -> pb.RunRequest:
    """What the three calls ask for. Raises TypeError or ValueError for slips of the caller's."""
    if isinstance(inputs, str):
        _texts(inputs)
    request = pb.RunRequest(
        skill=skill,
        inputs=[convert.run_input(one) for one in inputs],
        instruction=options.pop("instruction", ""),
        labels=_texts(options.pop("labels", ())),
        parameters=options.pop("parameters", {}),
        model=options.pop("model", ""),
        priority=_choice("priority", options.pop("priority", ""), _PRIORITIES),
    )
    set_limits(request, options)
    if "max_latency_s" in options:
        request.max_latency.FromNanoseconds(round(options.pop("max_latency_s") * 1e9))
    _no_more(options)
    return request


def set_limits(request: Any, options: dict[str, Any]) -> None:
    """Who may answer, at what cost, for whom: fields that requests of skills share. Takes them out of the keyword arguments."""
    request.preference = _choice("preference", options.pop("preference", ""), PREFERENCES)
    request.user = options.pop("user", "")
    if "max_cost_usd" in options:
        request.max_cost.micro_usd = round(options.pop("max_cost_usd") * 1e6)


def _routes(data: bytes) -> Results[Route]:
    response = pb.ExplainRouteResponse.FromString(data)

    def read(it: Any) -> Route:
        return Route(convert.decision(it.decision), tuple(map(_candidate, it.candidates)), it.deliver_bar, it.second_try_bar)

    return Results([convert._item(one, read) for one in response.routes])


def _candidate(message: items.PlannedCandidate) -> PlannedCandidate:
    return PlannedCandidate(
        message.candidate,
        message.local,
        message.reason,
        message.skipped,
        message.worst_cost.micro_usd / 1e6 if message.HasField("worst_cost") else None,
        convert._seconds(message.expected_latency) if message.HasField("expected_latency") else None,
    )
