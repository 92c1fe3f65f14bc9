"""InferenceService.Run: inputs to the router, outcomes back."""

from __future__ import annotations

import re

from server.api import calls, convert
from server.api.status import to_status
from server.api.wire import Context
from server.core import Hop, Outcome, Preference, Results
from server.errors import InvalidArgument, RequestTooLarge, UnderstudyError
from server.routing.router import Router
from understudy.v1 import common_pb2, inference_pb2
from understudy.v1 import inference_service_pb2 as pb

MAX_TEXT_BYTES = 256 * 1024
MAX_USER_BYTES = 256
_PREFERENCES = {
    inference_pb2.ROUTE_PREFERENCE_UNSPECIFIED: Preference.LOCAL_FIRST,
    inference_pb2.ROUTE_PREFERENCE_LOCAL_FIRST: Preference.LOCAL_FIRST,
    inference_pb2.ROUTE_PREFERENCE_LOCAL_ONLY: Preference.LOCAL_ONLY,
    inference_pb2.ROUTE_PREFERENCE_PROVIDER_ONLY: Preference.PROVIDER_ONLY,
}
# The base speaks of its own list of texts; the caller knows `inputs`.
_TEXTS = re.compile(r"texts\[\d+\]")


class RunServicer:
    """Edges only: the inputs' form here, everything else in the router."""

    def __init__(self, router: Router, max_items: int) -> None:
        self._router = router
        self._max_items = max_items

    async def Run(self, request: pb.RunRequest, _context: Context) -> pb.RunResponse:
        """Runs a skill on each input."""
        if not request.skill:
            known = ", ".join(self._router.skills.names()[:20]) or "none is configured"
            raise InvalidArgument(f"skill is empty; expected the name of one. Known: {known}.", field="skill")
        if not request.inputs:
            raise InvalidArgument("inputs is empty; expected one at least.", field="inputs")
        if len(request.inputs) > self._max_items:
            message = f"inputs holds {len(request.inputs)}; expected at most {self._max_items}. Split the call."
            raise RequestTooLarge(message, field="inputs", limit=self._max_items)
        if request.preference not in _PREFERENCES:
            message = f"preference {request.preference} does not exist; expected a value of RoutePreference, 0 to {max(_PREFERENCES)}."
            raise InvalidArgument(message, field="preference")
        max_cost = request.max_cost.micro_usd if request.HasField("max_cost") else None
        if max_cost is not None and max_cost < 0:
            raise InvalidArgument(f"max_cost.micro_usd is {max_cost}; expected 0 or more.", field="max_cost.micro_usd")
        if len(request.user.encode()) > MAX_USER_BYTES:
            message = f"user has over {MAX_USER_BYTES} bytes; expected an opaque id. Send a hash."
            raise InvalidArgument(message, field="user", limit=MAX_USER_BYTES)
        call = calls.current_call(request.priority)
        call.user = request.user
        texts = [text_of(item, index) for index, item in enumerate(request.inputs)]
        good = [text for text in texts if isinstance(text, str)]
        self._router.skills.get(request.skill)
        results = (
            await self._router.run(request.skill, good, call, _PREFERENCES[request.preference], max_cost) if good else Results[Outcome]([])
        )
        outcomes = iter(results.items)
        merged: list[Outcome | Exception] = [next(outcomes) if isinstance(text, str) else text for text in texts]
        _note(results, merged)
        return pb.RunResponse(
            results=[to_result(outcome, index) for index, outcome in enumerate(merged)],
            usage=convert.usage(results.usage),
            cost=common_pb2.Cost(micro_usd=sum(item.cost_micro_usd for item in merged if isinstance(item, Outcome))),
            timings=convert.timings(results.timings),
        )


def text_of(item: inference_pb2.RunInput, index: int) -> str | UnderstudyError:
    """The text of an input, or why it is none that a classification takes."""
    kind = item.WhichOneof("input")
    if kind != "text":
        what = f"is a {kind}" if kind else "is empty"
        return InvalidArgument(f"inputs[{index}] {what}; this skill classifies texts. Set `text`.", field=f"inputs[{index}]")
    if not item.text.strip():
        return InvalidArgument(f"inputs[{index}].text is blank; expected some words.", field=f"inputs[{index}].text")
    size = len(item.text.encode())
    if size > MAX_TEXT_BYTES:
        message = f"inputs[{index}].text has {size} bytes; expected at most {MAX_TEXT_BYTES}. Cut it."
        return RequestTooLarge(message, field=f"inputs[{index}].text", limit=MAX_TEXT_BYTES)
    return str(item.text)


def to_result(outcome: Outcome | Exception, index: int) -> inference_pb2.RunResult:
    """One outcome as a message."""
    if isinstance(outcome, Exception):
        return inference_pb2.RunResult(error=to_status(outcome))
    decision = outcome.decision
    result = inference_pb2.RunResult(
        output_text=outcome.output_text,
        labels=[convert.label(label) for label in outcome.labels],
        decision=inference_pb2.Decision(
            skill=decision.skill,
            candidate=decision.candidate,
            local=decision.local,
            hops=[_hop(hop, index) for hop in decision.hops],
            rollout_stage=decision.rollout_stage,
        ),
        quality=outcome.quality,
        cost=common_pb2.Cost(micro_usd=outcome.cost_micro_usd),
        usage=convert.usage(outcome.usage),
        interaction_id=outcome.interaction_id,
    )
    if outcome.error is not None:
        result.error.CopyFrom(to_status(_renamed(outcome.error, index)))
    return result


def _hop(hop: Hop, index: int) -> inference_pb2.Hop:
    return inference_pb2.Hop(
        candidate=hop.candidate,
        outcome=hop.outcome,
        reason=_TEXTS.sub(f"inputs[{index}].text", hop.reason),
        quality=hop.quality,
        cost=common_pb2.Cost(micro_usd=hop.cost_micro_usd),
    )


def _renamed(error: Exception, index: int) -> Exception:
    """The same error with the caller's name of the field."""
    if not isinstance(error, UnderstudyError) or not _TEXTS.search(error.message + error.metadata.get("field", "")):
        return error
    name = f"inputs[{index}].text"
    metadata = {key: value for key, value in error.metadata.items() if key != "field"}
    return type(error)(_TEXTS.sub(name, error.message), retry_after_s=error.retry_after_s, field=name, **metadata)


def _note(results: Results[Outcome], merged: list[Outcome | Exception]) -> None:
    """Tells the access log who answered."""
    scope = calls.current()
    scope.note(results)
    scope.items = len(merged)
    scope.failed_items = sum(1 for item in merged if isinstance(item, Exception) or item.error is not None)
