"""The nouns that travel between packages. Imports nothing of ours.

Times are seconds of `time.monotonic()` unless a name ends in `_ns` or `_ms`. Arrays are NumPy, C-contiguous.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
T = TypeVar("T")


class Task(StrEnum):
    """Kinds of work, named as Hugging Face pipeline tags."""

    FEATURE_EXTRACTION = "feature-extraction"
    TEXT_CLASSIFICATION = "text-classification"
    ZERO_SHOT_CLASSIFICATION = "zero-shot-classification"
    TEXT_RANKING = "text-ranking"
    TOKEN_CLASSIFICATION = "token-classification"
    QUESTION_ANSWERING = "question-answering"
    TEXT_GENERATION = "text-generation"
    TRANSLATION = "translation"
    SUMMARIZATION = "summarization"
    TENSOR = "tensor"  # a raw ONNX model: served through the Open Inference Protocol alone


class Priority(IntEnum):
    """Lower runs first. INTERACTIVE is the default; BULK yields to it at every batch."""

    CRITICAL = 0
    INTERACTIVE = 1
    BULK = 2


class Role(IntEnum):
    """What a caller may do, by the numbers of understudy.v1.Role. Each may do what those before it may."""

    VIEWER = 1
    USER = 2
    OPERATOR = 3
    ADMIN = 4


@dataclass(slots=True, frozen=True)
class Caller:
    """Who calls: `name` is a key's resource name, or "anonymous" where no keys are asked for. `skills`: those it may ask; empty: all."""

    name: str = "anonymous"
    role: Role = Role.ADMIN
    skills: frozenset[str] = frozenset()


@dataclass(slots=True)
class Call:
    """What a request carries from the edge down: identity, deadline, priority, and whether its caller left.

    `deadline` is monotonic seconds, or None. `cancelled` is set by the edge, on the event loop, when the caller leaves; every stage
    may look at it, from any thread; it never goes back to False. `tenant`: id of the caller's key, "" where there is none.
    """

    request_id: str
    deadline: float | None = None
    priority: Priority = Priority.INTERACTIVE
    cancelled: bool = False
    tenant: str = ""
    user: str = ""
    stage: str = ""  # what is being done for it: tokenize, queue, run, post, provider; set by whoever does it

    def remaining(self, now: float | None = None) -> float | None:
        """Seconds until the deadline (negative when past), or None without one."""
        return None if self.deadline is None else self.deadline - (time.monotonic() if now is None else now)


@dataclass(slots=True)
class Timings:
    """Seconds that one request spent in each stage; for a batch of items, the slowest item's."""

    tokenize: float = 0.0
    queue: float = 0.0
    run: float = 0.0
    post: float = 0.0

    def merge(self, other: Timings) -> None:
        """Keeps the larger of each stage."""
        self.tokenize = max(self.tokenize, other.tokenize)
        self.queue = max(self.queue, other.queue)
        self.run = max(self.run, other.run)
        self.post = max(self.post, other.post)


@dataclass(slots=True, frozen=True)
class Usage:
    """Tokens a request used. `output` stays 0 for encoders; `cached` of the input tokens were found in the prefix cache."""

    input: int = 0
    output: int = 0
    cached: int = 0


class FinishReason(StrEnum):
    """Why an answer ended, by OpenAI's names. STOP: a stop token, a stop string, or a grammar that is complete."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Image:
    """A picture in a message: `data` with its `media_type` (image/png, image/jpeg, image/webp, image/gif), or an https `url`."""

    media_type: str = ""
    data: bytes = b""
    url: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation. `role`: system, developer, user, assistant or tool. Local models read no images."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask to be called; `parameters` is a JSON Schema."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Format:
    """What the answer must look like. `source`: the schema as JSON text, the expression, the grammar; `choices` for kind "choice"."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    source: str = ""
    choices: tuple[str, ...] = ()


@dataclass(slots=True, frozen=True)
class Label:
    """A class and its score in [0, 1]."""

    name: str
    score: float


@dataclass(slots=True, frozen=True)
class Entity:
    """A span of the input. `start` and `end` are offsets in Unicode code points, end exclusive."""

    label: str
    score: float
    text: str
    start: int
    end: int


@dataclass(slots=True, frozen=True)
class Span:
    """An extractive answer; `start`/`end` as in Entity, in the context. An empty text means "no answer"."""

    text: str
    score: float
    start: int
    end: int


@dataclass(slots=True)
class Results(Generic[T]):
    """One entry an item, in the caller's order: a value, or the error of that item alone.

    `truncated[i]` is True where truncation was asked for and happened.
    """

    items: list[T | Exception]
    timings: Timings = field(default_factory=Timings)
    usage: Usage = field(default_factory=Usage)
    truncated: Sequence[bool] = ()
    model: str = ""
    version: str = ""


class Preference(StrEnum):
    """Who may answer a skill's request, and in which order; see understudy.v1.RoutePreference."""

    LOCAL_FIRST = "local_first"
    LOCAL_ONLY = "local_only"
    PROVIDER_ONLY = "provider_only"
    CHEAPEST = "cheapest"
    BEST = "best"
    FASTEST = "fastest"
    FREE_FIRST = "free_first"


@dataclass(slots=True, frozen=True)
class Limits:
    """What a caller allows: cost of one item in 1e-6 US dollars, expected latency of a candidate in seconds; None: no limit."""

    preference: Preference | None = None  # None: the skill's own
    max_cost_micro_usd: int | None = None
    max_latency_s: float | None = None


@dataclass(slots=True, frozen=True)
class Work:
    """One input of a skill: a text, a pair of texts, or a conversation."""

    text: str = ""
    text_pair: str | None = None
    messages: tuple[Message, ...] = ()

    @property
    def kind(self) -> str:
        """One of "text", "pair", "chat"."""
        return "chat" if self.messages else "text" if self.text_pair is None else "pair"

    @property
    def plain(self) -> str:
        """Its words in one string: what is asked, for features and for the lake; of a conversation the last user's message."""
        if self.messages:
            return next((one.content for one in reversed(self.messages) if one.role == "user"), self.messages[-1].content)
        return self.text if self.text_pair is None else f"{self.text}\n{self.text_pair}"


@dataclass(slots=True, frozen=True)
class Hop:
    """A candidate that was asked or passed over; cost in 1e-6 US dollars.

    `outcome`: delivered, below_bar, failed, skipped, shadow; in ensembles also member (an answer beside the delivered one) and cut_off.
    """

    candidate: str
    outcome: str
    reason: str
    quality: float | None = None
    cost_micro_usd: int = 0
    elapsed_s: float = 0.0
    tries: int = 1


@dataclass(slots=True, frozen=True)
class Detected:
    """What a request in plain words was taken for; `task` is empty where none was near enough, `candidates` came near, best first.

    `instruction` is the part of the words that decided, `content` what they are about ("" where they do not hold it).
    """

    task: str
    score: float = 0.0
    phrase: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    instruction: str = ""
    content: str = ""


@dataclass(slots=True)
class Decision:
    """How an answer came about. `candidate` is empty where none answered; `propensity`: probability of the assignment that was drawn."""

    skill: str
    rollout_stage: str
    candidate: str = ""
    local: bool = False
    hops: list[Hop] = field(default_factory=list)
    task: str = ""
    preference: Preference = Preference.LOCAL_FIRST
    difficulty: float | None = None
    detected: Detected | None = None
    propensity: float = 1.0


@dataclass(slots=True, frozen=True)
class TokenLogprob:
    """A token of a written answer, with the natural logarithm of its probability, and the likeliest at its place, best first."""

    text: str
    logprob: float
    top: Sequence[tuple[str, float]] = ()


@dataclass(slots=True, frozen=True)
class Reply:
    """What an answer says, whatever the task: `text` always, the others where the task has them. `tokens`: where they were asked for."""

    text: str = ""
    labels: Sequence[Label] = ()
    entities: Sequence[Entity] = ()
    spans: Sequence[Span] = ()
    embedding: FloatArray | None = None
    score: float | None = None
    tool_calls: Sequence[ToolCall] = ()
    finish: FinishReason | None = None
    tokens: Sequence[TokenLogprob] = ()


@dataclass(slots=True)
class Outcome:
    """What became of one input of a skill: an answer or `error`, and its story in either case.

    `quality` is a calibrated probability in [0, 1], None where it is not known; cost in 1e-6 US dollars, all hops together.
    `findings`: what was found wanting in the answer that was delivered.
    """

    interaction_id: str
    decision: Decision
    reply: Reply = field(default_factory=Reply)
    quality: float | None = None
    cost_micro_usd: int = 0
    usage: Usage = field(default_factory=Usage)
    findings: tuple[str, ...] = ()
    error: Exception | None = None

    @property
    def output_text(self) -> str:
        """The answer in one string: for classification the best label."""
        return self.reply.text

    @property
    def labels(self) -> Sequence[Label]:
        """Classes, best first, for classification."""
        return self.reply.labels
