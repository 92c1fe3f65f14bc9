"""What a caller asks of a text-generation model. Fields and the `field` of errors are named as in understudy.v1.GenerateRequest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from server.core import FinishReason, Format, Message, Tool, ToolCall, Usage
from server.runtime.decoder.contract import Sampling, Token


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One of `prompt`, `messages` and `token_ids`, and how to go on with it; see the proto for the meaning of each."""

    prompt: str | None = None
    messages: Sequence[Message] | None = None
    token_ids: Sequence[int] | None = None
    tools: Sequence[Tool] = ()
    tool_choice: str = ""  # "required", or the name of the tool that must be called; "": the model decides
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 0
    n: int = 1
    best_of: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    format: Format | None = None
    adapter: str = ""
    return_token_ids: bool = False


@dataclass(frozen=True, slots=True)
class Confidence:
    """Means over an answer's tokens, of the raw logits; entropy in nats, margin as in contract.Token."""

    logprob: float
    entropy: float
    margin: float


@dataclass(slots=True)
class Delta:
    """What one answer has got since the delta before; the last one has `finish` and `confidence`. `count`: tokens, kept or not."""

    index: int
    text: str
    tokens: list[Token]
    count: int = 0
    finish: FinishReason | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    confidence: Confidence | None = None


@dataclass(slots=True)
class Answer:
    """A whole answer."""

    text: str
    tokens: list[Token]
    finish: FinishReason
    tool_calls: list[ToolCall]
    confidence: Confidence
    count: int


@dataclass(slots=True)
class GenerationTimings:
    """Seconds; `inter_token` is the mean between two tokens of an answer, `total` and `first_token` count from the request's arrival."""

    tokenize: float = 0.0
    queue: float = 0.0
    first_token: float = 0.0
    inter_token: float = 0.0
    total: float = 0.0


@dataclass(slots=True)
class Summary:
    """What is known of a request once all its answers have ended. `adapter`: name@version, "" without one."""

    model: str
    version: str
    adapter: str
    usage: Usage
    timings: GenerationTimings
