"""Several models asked for one answer, for both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from understudy import calls, convert
from understudy.calls import Prepared
from understudy.options import CallOptions, Priority
from understudy.results import RunAnswer
from understudy.v1 import ensemble_pb2
from understudy.v1 import ensemble_service_pb2 as pb

Strategy = Literal["best_of_n", "weighted", "consensus", "specialist"]
_STRATEGIES = {
    "best_of_n": ensemble_pb2.ENSEMBLE_STRATEGY_BEST_OF_N,
    "weighted": ensemble_pb2.ENSEMBLE_STRATEGY_WEIGHTED,
    "consensus": ensemble_pb2.ENSEMBLE_STRATEGY_CONSENSUS,
    "specialist": ensemble_pb2.ENSEMBLE_STRATEGY_SPECIALIST,
}
_NAMES = {value: name for name, value in _STRATEGIES.items()}


class EnsembleOptions(CallOptions, total=False):
    """`strategy`: "consensus" without it. `wave_size`: calls at once. `quorum`: answers that are enough. `threshold`: lowest confidence.

    `members_only`: an error where the members have no result, instead of the skill's route. `max_cost_usd`: of the whole call.
    `max_latency_s`: after it what has come decides. `temperature`, `max_tokens`: of the members' answers. `labels`, `parameters`:
    as `run` has them in the service. `user`: an opaque id, never a name.
    """

    strategy: Strategy
    wave_size: int
    quorum: int
    threshold: float
    members_only: bool
    max_cost_usd: float
    max_latency_s: float
    temperature: float
    max_tokens: int
    labels: Sequence[str]
    parameters: Mapping[str, str]
    priority: Priority
    user: str


@dataclass(frozen=True, slots=True)
class Member:
    """A model that is asked: "local:<model>" or "<provider>/<model>". `accuracy`: how often it is right, of so many `observations`."""

    model: str
    samples: int = 1
    accuracy: float | None = None
    observations: float = 0.0


@dataclass(frozen=True, slots=True)
class MemberAnswer:
    """What became of one call. `wave` 0: it was not made. `outcome`: chosen, agreed, dissented, answered, failed, skipped, cut_off."""

    model: str
    sample: int
    wave: int
    outcome: str
    reason: str
    text: str
    quality: float | None
    agreement: float
    weight: float
    elapsed_s: float
    cost_usd: float


@dataclass(frozen=True, slots=True)
class EnsembleAnswer:
    """The answer of several. `fell_back`: the members had no result, and the skill's route answered."""

    answer: RunAnswer
    confidence: float | None
    strategy: str
    members: tuple[MemberAnswer, ...]
    waves: int
    stop_reason: str
    fell_back: bool

    @property
    def text(self) -> str:
        """What was answered."""
        return self.answer.text


def run(skill: str, given: convert.RunInput, members: Sequence[str | Member], options: dict[str, Any]) -> Prepared[EnsembleAnswer]:
    """EnsembleService.RunEnsemble."""
    call = calls._call(options)
    listed = [members] if isinstance(members, str) else members
    request = pb.RunEnsembleRequest(
        skill=skill,
        input=convert.run_input(given),
        members=[_member(one) for one in listed],
        strategy=calls._choice("strategy", options.pop("strategy", "consensus"), _STRATEGIES),
        priority=calls._choice("priority", options.pop("priority", ""), calls._PRIORITIES),
    )
    if "max_cost_usd" in options:
        request.max_cost.micro_usd = round(options.pop("max_cost_usd") * 1e6)
    if "max_latency_s" in options:
        request.max_latency.FromNanoseconds(round(options.pop("max_latency_s") * 1e9))
    if "labels" in options:
        request.labels.extend(calls._texts(options.pop("labels")))
    request.parameters.update(options.pop("parameters", {}))
    for name in ("wave_size", "quorum", "threshold", "members_only", "temperature", "max_tokens", "user"):
        if name in options:
            setattr(request, name, options.pop(name))
    calls._no_more(options)
    prepared = calls._prepare("EnsembleService", "RunEnsemble", request, calls._reader(pb.RunEnsembleResponse, _answer), call)
    return replace(prepared, paid=True)


def _member(one: str | Member) -> ensemble_pb2.EnsembleMember:
    member = Member(one) if isinstance(one, str) else one
    return ensemble_pb2.EnsembleMember(
        model=member.model, samples=member.samples, accuracy=member.accuracy, observations=member.observations
    )


def _answer(response: Any) -> EnsembleAnswer:
    return EnsembleAnswer(
        answer=convert.run_answer(response.result),
        confidence=convert._optional(response, "confidence"),
        strategy=_NAMES.get(response.strategy, ""),
        members=tuple(
            MemberAnswer(
                model=one.model,
                sample=one.sample,
                wave=one.wave,
                outcome=one.outcome,
                reason=one.reason,
                text=one.output_text,
                quality=convert._optional(one, "quality"),
                agreement=one.agreement,
                weight=one.weight,
                elapsed_s=convert._seconds(one.elapsed),
                cost_usd=one.cost.micro_usd / 1e6,
            )
            for one in response.answers
        ),
        waves=response.waves,
        stop_reason=response.stop_reason,
        fell_back=response.fell_back,
    )
