"""understudy.v1.EnsembleService: several members asked for one answer."""

from __future__ import annotations

from dataclasses import replace

from server.api import calls, convert
from server.api.skill_requests import ask_of, check_user, limits_of, to_result, work_of
from server.api.wire import Context
from server.core import Results
from server.errors import InvalidArgument, UnderstudyError
from server.routing.ensemble import Ensemble, EnsembleAsk, Ensembles, comparable
from server.routing.ensemble_calls import Shot
from server.routing.ensemble_members import MAX_CALLS, MemberAsk
from server.routing.ensemble_strategies import Strategy
from understudy.v1 import common_pb2, ensemble_pb2
from understudy.v1 import ensemble_service_pb2 as pb

MAX_TOKENS = 1 << 20
_STRATEGIES = {
    ensemble_pb2.ENSEMBLE_STRATEGY_UNSPECIFIED: Strategy.CONSENSUS,
    ensemble_pb2.ENSEMBLE_STRATEGY_BEST_OF_N: Strategy.BEST_OF_N,
    ensemble_pb2.ENSEMBLE_STRATEGY_WEIGHTED: Strategy.WEIGHTED,
    ensemble_pb2.ENSEMBLE_STRATEGY_CONSENSUS: Strategy.CONSENSUS,
    ensemble_pb2.ENSEMBLE_STRATEGY_SPECIALIST: Strategy.SPECIALIST,
}
_SHOWN = {strategy: value for value, strategy in _STRATEGIES.items() if value}


class EnsembleServicer:
    """Edges only."""

    def __init__(self, ensembles: Ensembles) -> None:
        self._ensembles = ensembles

    async def RunEnsemble(self, request: pb.RunEnsembleRequest, _context: Context) -> pb.RunEnsembleResponse:
        """Runs a skill on one input by several members. Raises why nobody could answer."""
        call = calls.current_call(request.priority)
        call.user = check_user(request.user)
        try:
            found = await self._ensembles.run(ensemble_of(request), call)
        except UnderstudyError as error:
            raise _of_one_input(error) from None
        if found.outcome.error is not None:
            raise _of_one_input(found.outcome.error)
        scope = calls.current()
        scope.note(Results([found.outcome], found.timings, found.outcome.usage, model=found.outcome.decision.candidate))
        return to_response(found)


def ensemble_of(request: pb.RunEnsembleRequest) -> EnsembleAsk:
    """The request as the ensemble takes it. Raises InvalidArgument, RequestTooLarge naming the field."""
    if request.strategy not in _STRATEGIES:
        message = f"strategy {request.strategy} does not exist; expected a value of EnsembleStrategy, 0 to {max(_STRATEGIES)}."
        raise InvalidArgument(message, field="strategy")
    if request.HasField("threshold") and not 0 <= request.threshold <= 1:
        raise InvalidArgument(f"threshold is {request.threshold:g}; expected 0 to 1.", field="threshold")
    if request.HasField("temperature") and not 0 <= request.temperature <= 2:
        raise InvalidArgument(f"temperature is {request.temperature:g}; expected 0 to 2.", field="temperature")
    for name, limit in (("wave_size", MAX_CALLS), ("max_tokens", MAX_TOKENS)):
        if not 0 <= getattr(request, name) <= limit:
            raise InvalidArgument(f"{name} is {getattr(request, name)}; expected 0 to {limit}.", field=name)
    work = work_of(request.input, 0)
    if isinstance(work, UnderstudyError):
        raise _of_one_input(work)
    limits = limits_of(request)
    ask = replace(
        ask_of(request, [work]),
        limits=replace(limits, max_latency_s=None),
        max_tokens=request.max_tokens,
        temperature=request.temperature if request.HasField("temperature") else None,
    )
    members = [
        MemberAsk(one.model, one.samples or 1, one.accuracy if one.HasField("accuracy") else None, one.observations)
        for one in request.members
    ]
    return EnsembleAsk(
        ask,
        members,
        _STRATEGIES[request.strategy],
        request.wave_size,
        request.quorum,
        request.threshold if request.HasField("threshold") else None,
        request.members_only,
        limits.max_latency_s,
    )


def to_response(found: Ensemble) -> pb.RunEnsembleResponse:
    """The answer with what became of each call."""
    response = pb.RunEnsembleResponse(
        result=to_result(found.outcome, 0),
        confidence=found.confidence,
        strategy=_SHOWN[found.strategy],
        answers=[_answer(shot) for shot in found.shots],
        waves=found.waves,
        stop_reason=found.stopped,
        fell_back=found.fell_back,
        timings=convert.timings(found.timings),
    )
    for hop in response.result.decision.hops:
        hop.reason = hop.reason.replace("inputs[0]", "input")
    return response


def _answer(shot: Shot) -> ensemble_pb2.EnsembleAnswer:
    message = ensemble_pb2.EnsembleAnswer(
        model=shot.name,
        sample=shot.slot.sample,
        wave=shot.wave,
        outcome=shot.outcome,
        reason=shot.reason,
        agreement=shot.share,
        weight=shot.slot.weight,
        cost=common_pb2.Cost(micro_usd=shot.cost_micro_usd),
        usage=convert.usage(shot.usage),
    )
    if shot.answer is not None:
        message.output_text = shot.answer.reply.text or comparable(shot)
        if shot.answer.quality is not None:
            message.quality = shot.answer.quality
    message.elapsed.FromNanoseconds(int(shot.elapsed_s * 1e9))
    return message


def _of_one_input(error: Exception) -> Exception:
    """The same error with the only input's name."""
    if not isinstance(error, UnderstudyError) or "inputs[0]" not in error.message + error.metadata.get("field", ""):
        return error
    metadata = {key: value.replace("inputs[0]", "input") for key, value in error.metadata.items()}
    return type(error)(error.message.replace("inputs[0]", "input"), retry_after_s=error.retry_after_s, **metadata)
