"""What calls return. Offsets are Unicode code points, end exclusive; times are seconds; money is US dollars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

from understudy.errors import UnderstudyError

FloatArray = npt.NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds in each stage; of a batch, the slowest item's."""

    queue: float = 0.0
    tokenize: float = 0.0
    run: float = 0.0
    post: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written; `cached_input_tokens` of those read were known from an earlier request."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Results(Sequence[T], Generic[T]):
    """One entry an item, in the order of the request. Taking an entry that failed raises its error; `errors` has those by index.

    `model` and `version` say who answered; `usage` and `timings` are the whole call's.
    """

    items: Sequence[T | UnderstudyError]
    model: str = ""
    version: str = ""
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)

    @property
    def errors(self) -> Mapping[int, UnderstudyError]:
        """Errors by index; empty when all went well."""
        return {i: item for i, item in enumerate(self.items) if isinstance(item, UnderstudyError)}

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[T]:
        return (self._value(item) for item in self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self._value(item) for item in self.items[index]]
        return self._value(self.items[index])

    @staticmethod
    def _value(item: T | UnderstudyError) -> T:
        if isinstance(item, UnderstudyError):
            raise item
        return item


@dataclass(frozen=True, slots=True)
class Label:
    """A class and its score in [0, 1]."""

    name: str
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """A text's vector, float32 [D]. `truncated`: the text was cut, as asked."""

    vector: FloatArray
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Classification:
    """Classes, best first."""

    labels: tuple[Label, ...]
    truncated: bool = False

    @property
    def best(self) -> Label:
        """The class with the highest score."""
        return self.labels[0]


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """A document's place: `index` in the request; `score` in [0, 1] for cross-encoders, a cosine for embedding models."""

    index: int
    score: float
    document: str = ""
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Entity:
    """A named thing: text[start:end]."""

    label: str
    score: float
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A span of the context; an empty text means that it holds no answer."""

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model asks for; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Hop:
    """A candidate that was asked, what came of it ("delivered", "below_bar", "failed", "skipped", "shadow"), and why."""

    candidate: str
    outcome: str
    reason: str
    quality: float | None
    cost_usd: float
    elapsed_s: float = 0.0
    tries: int = 1


@dataclass(frozen=True, slots=True)
class Detection:
    """What a request in plain words was taken for; `phrase` was the nearest, `candidates` are tasks that came near, best first."""

    task: str
    score: float
    phrase: str
    parameters: Mapping[str, str]
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """How an answer came about. `difficulty`: the probability that the local answer would not do; None where nothing was learned.

    `propensity`: of the assignment that the input got; 1 where nothing was drawn.
    """

    skill: str
    candidate: str
    local: bool
    hops: tuple[Hop, ...]
    rollout_stage: str
    task: str = ""
    preference: str = ""
    difficulty: float | None = None
    detection: Detection | None = None
    propensity: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class RunAnswer:
    """A skill's answer with its story. `interaction_id` names it in feedback; `quality` is the probability that it is acceptable.

    `text` always says it; beside it `labels`, `entities`, `answers`, `embedding` (float32 [D]), `score` and `tool_calls`, where the task
    has them. `findings`: what is wanting in it.
    """

    text: str
    labels: tuple[Label, ...]
    decision: Decision
    quality: float | None
    cost_usd: float
    usage: Usage
    interaction_id: str
    entities: tuple[Entity, ...] = ()
    answers: tuple[Answer, ...] = ()
    embedding: FloatArray | None = None
    score: float | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    findings: tuple[str, ...] = ()

    @property
    def skill(self) -> str:
        """The skill that was run."""
        return self.decision.skill

    @property
    def candidate(self) -> str:
        """Who answered: "local:<model or adapter>@<version>" or "<provider>/<model>"."""
        return self.decision.candidate

    @property
    def local(self) -> bool:
        """Whether the server's own models answered."""
        return self.decision.local

    @property
    def hops(self) -> tuple[Hop, ...]:
        """Everybody who was asked or passed over, in order."""
        return self.decision.hops

    @property
    def rollout_stage(self) -> str:
        """The stage of the skill's rollout."""
        return self.decision.rollout_stage


@dataclass(frozen=True, slots=True)
class PlannedCandidate:
    """Somebody who could answer. `reason`: of its place; `skipped`: why it would be passed over, or "".

    `worst_cost_usd` is None where no price is known, `expected_latency_s` before its first answer.
    """

    candidate: str
    local: bool
    reason: str
    skipped: str
    worst_cost_usd: float | None
    expected_latency_s: float | None


@dataclass(frozen=True, slots=True)
class Route:
    """How an input would be routed: candidates in the order of asking, and the qualities at which local answers are taken or asked anew."""

    decision: Decision
    candidates: tuple[PlannedCandidate, ...]
    deliver_bar: float
    second_try_bar: float


@dataclass(frozen=True, slots=True)
class Model:
    """A version of a model in the server's repository. `state`: "unloaded", "loading", "ready", "unloading", "failed"."""

    name: str
    version: str
    task: str
    state: str
    state_message: str
    current: bool
    architecture: str
    dtype: str
    max_tokens: int
    hidden_size: int
    labels: tuple[str, ...]
    size_bytes: int
    license: str
    source: str
    load_time: datetime | None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A version of an adapter of `model`. `state`: "unloaded", "ready", "failed"; `kind`: "lora", "prefix", "prompt".

    `rank` of a LoRA, `positions` that a prefix takes of the context. `resident`: in memory now; if not, the next request brings it in.
    """

    model: str
    name: str
    version: str
    state: str
    state_message: str
    kind: str
    rank: int
    positions: int
    current: bool
    resident: bool
    active_requests: int
    base: str
    license: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Skill:
    """A named job. `student_*` are empty while nothing local answers for it."""

    name: str
    task: str
    instruction: str
    labels: tuple[str, ...]
    teacher: str
    base: str
    deliver_bar: float
    student_adapter: str
    student_version: str
    student_accuracy: float


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory and its queue."""

    model: Model
    queued_sequences: int
    answered_sequences: int
    batches: int


@dataclass(frozen=True, slots=True)
class SkillCounts:
    """What became of a skill's items since the server started."""

    skill: str
    requests: int
    local: int
    failed: int
    cost_usd: float


@dataclass(frozen=True, slots=True)
class Status:
    """How the server is doing."""

    server_version: str
    start_time: datetime | None
    uptime_s: float
    draining: bool
    kernel_isa: str
    onnxruntime_version: str
    resident_bytes: int
    models: tuple[LoadedModel, ...]
    skills: tuple[SkillCounts, ...]


@dataclass(frozen=True, slots=True)
class TokenAlternative:
    """A token that could have stood at a place, and its log-probability."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """A token of an answer. `logprob` is None, and `top` empty, unless they were asked for."""

    id: int
    text: str
    logprob: float | None = None
    top: tuple[TokenAlternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Confidence:
    """How sure the model was: means over an answer's tokens. Entropy in nats; the margin is to the second likeliest token."""

    mean_logprob: float
    mean_entropy: float
    mean_margin: float


@dataclass(frozen=True, slots=True)
class GenerationTimings:
    """Seconds. `inter_token` is the mean between two tokens; the last two count from the request's arrival at the server."""

    tokenize: float = 0.0
    queue: float = 0.0
    inter_token: float = 0.0
    time_to_first_token: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class GenerationDelta:
    """What one answer has got since the last delta. `finish_reason`: "stop", "length" or "tool_calls" in its last one, else ""."""

    index: int
    text: str
    tokens: tuple[GeneratedToken, ...] = ()
    finish_reason: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    confidence: Confidence | None = None


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """A whole answer; `finish_reason` as in GenerationDelta."""

    text: str
    finish_reason: str
    confidence: Confidence
    tokens: tuple[GeneratedToken, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationSummary:
    """Who answered, what it used, and how long it took. `adapter` is "name@version", or "" without one.

    With a skill: how the answer came about, what it cost, how good it is where that is known, and its name for feedback.
    """

    model: str
    version: str
    adapter: str
    usage: Usage
    timings: GenerationTimings
    decision: Decision | None = None
    cost_usd: float = 0.0
    quality: float | None = None
    interaction_id: str = ""


@dataclass(frozen=True, slots=True)
class GeneratedTexts:
    """The answers to one request, and its summary."""

    answers: tuple[GeneratedText, ...]
    summary: GenerationSummary

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.answers[0].text


@dataclass(frozen=True, slots=True)
class TextResult:
    """A translation or a summary. `truncated`: the source was cut, as asked."""

    text: str
    score: float
    truncated: bool = False
