"""Who can answer: the contract that local models and providers share, and what they give back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from server.core import Call, FloatArray, Reply, Timings, Tool, Usage, Work
from server.errors import UnderstudyError
from server.quality.model import QualityModel
from server.routing.skills import Skill

_NONE = np.zeros(0, np.float32)


@dataclass(slots=True, frozen=True)
class Manner:
    """How a request wants its answer to be written, beyond what its skill says.

    `tool_choice`: "" (the model decides), "none", "required", or the name of the tool that must be called. `json_object`: any JSON object.
    The penalties, in [-2, 2], make what was written already less likely, as OpenAI's API defines them. `logprobs`: the answer's tokens are
    wanted with their log-probabilities, and `top_logprobs` of the likeliest at each place. A candidate that cannot do it is passed over.
    """

    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: bool = False
    top_logprobs: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    json_object: bool = False
    tool_choice: str = ""


@dataclass(slots=True, frozen=True)
class Brief:
    """What is to be done, for every input of a request alike: the skill, and what the request says beyond it.

    `labels`: the classes to choose from; `parameters`: e.g. {"target_language": "fr"}; `instruction`: the caller's words, or the skill's.
    `model`: "provider/model" that is to answer instead of the skill's own, or "".
    """

    skill: Skill
    labels: tuple[str, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    instruction: str = ""
    tools: tuple[Tool, ...] = ()
    manner: Manner = field(default_factory=Manner)
    model: str = ""


@dataclass(slots=True, frozen=True)
class Signals:
    """What is known of an answer's making, for its quality: float32[tokens] each, or empty. `valid`: None where nothing was checked."""

    logprobs: FloatArray = field(default_factory=lambda: _NONE)
    entropies: FloatArray = field(default_factory=lambda: _NONE)
    margins: FloatArray = field(default_factory=lambda: _NONE)
    valid: bool | None = None
    agreement: float | None = None


@dataclass(slots=True, frozen=True)
class Answer:
    """One candidate's answer to one item. `quality` is None where it was not scored; `findings` says what was found wanting.

    `basis`: who gave the quality, where that is not a calibration of the skill's own. `judged_by`: the quality model of the student that
    gave it, where it has its own.
    """

    reply: Reply
    quality: float | None = None
    findings: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)
    cost_micro_usd: int = 0
    source_model: str = ""
    training_allowed: bool = False
    elapsed_s: float = 0.0
    tries: int = 1
    signals: Signals = field(default_factory=Signals)
    basis: str = ""
    judged_by: QualityModel | None = None


@dataclass(slots=True, frozen=True)
class Failure:
    """Why there is no answer, and what it cost all the same. `skipped`: the candidate was not asked."""

    error: UnderstudyError
    skipped: bool = False
    usage: Usage = field(default_factory=Usage)
    cost_micro_usd: int = 0
    elapsed_s: float = 0.0


@dataclass(slots=True, frozen=True)
class Allowance:
    """What one item may take of a candidate: 1e-6 US dollars, monotonic seconds; None: no limit."""

    max_cost_micro_usd: int | None = None
    deadline: float | None = None


@dataclass(slots=True, frozen=True)
class Piece:
    """A part of a streamed answer: new text with what is known of its making so far, or the whole answer at the end."""

    text: str = ""
    signals: Signals | None = None
    answer: Answer | None = None


class Candidate(Protocol):
    """Something that can answer a skill's items. Made for one request; cheap to make.

    `scored`: its answers have a quality that decides, where it is known; a teacher sets the standard and its answers are taken.
    """

    name: str  # as decisions show it: "local:<adapter or model>@<version>" or "<provider>/<model>"
    local: bool  # nothing is paid and nothing leaves the machine
    scored: bool
    aborted_micro_usd: int  # what a stream cost that was closed before its end

    def answers(
        self, works: Sequence[Work], call: Call, timings: Timings, allowed: Allowance
    ) -> AsyncIterator[tuple[int, Answer | Failure]]:
        """Each item's index once, in any order, as soon as it is known; the stages of local work are merged into `timings`.

        Raises only Cancelled and programming errors.
        """
        ...

    async def second_try(self, work: Work, first: Answer, call: Call, allowed: Allowance) -> Answer | Failure | None:
        """Another answer, made with what was found wanting in the first; None where another try would say the same, or would be paid."""
        ...

    def stream(self, work: Work, call: Call, allowed: Allowance) -> AsyncGenerator[Piece, None]:
        """The answer as it is written; the last piece alone has it whole. Raises UnderstudyError; `aclose()` ends the work."""
        ...

    def closed(self) -> str:
        """Why it is not asked at the moment, or ""."""
        ...

    def worst_cost_micro_usd(self, work: Work) -> int | None:
        """What an answer costs at the very most; None where no price is known."""
        ...

    def expected_s(self) -> float | None:
        """Seconds that an answer took of late, or None before the first."""
        ...
